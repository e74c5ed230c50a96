"""Progress without a terminal: a log line every half minute."""

import logging

from modernbert_small.run import progress
from modernbert_small.run.progress import ProgressBar


def test_lines_when_there_is_no_terminal(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 1000, 20))  # seconds; 20 pass with each look
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with ProgressBar(4000, "reading") as bar:
        for _ in range(4):
            bar.update(1000, "fast")
    assert caplog.messages == ["reading: 2,000 of 4,000 rows, fast", "reading: 4,000 of 4,000 rows, fast"]


def test_short_work_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    with ProgressBar(2, "reading") as bar:
        bar.update(2)
    assert not caplog.messages
