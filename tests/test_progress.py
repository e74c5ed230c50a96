"""Progress without a terminal: a log line every half minute."""

import logging
from types import SimpleNamespace

from modernbert_small.packed.progress import Progress
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


def test_training_says_how_long_it_takes_after_its_second_step(caplog, monkeypatch):
    """Of steps of 100 tokens; the first one, which compiles, is not counted. Above a day it is still hours."""
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    training = Progress(tokens_per_step=100)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10_000, global_step=0)

    def step(seconds, is_logged=False):
        now[0], state.global_step = seconds, state.global_step + 1
        training.on_step_end(None, state, SimpleNamespace(should_log=is_logged))

    training.on_train_begin(None, state, None)
    step(100)
    step(110)
    step(150)
    step(200, is_logged=True)
    training.on_log(None, state, None, {"loss": 2.5})
    training.on_log(None, state, None, {"eval_loss": 2.25, "eval_runtime": 15.0})
    training.on_train_end(None, state, None)
    assert caplog.messages == [
        "10,000 steps of some 100 tokens each",
        "step 1/10000",
        "step 2/10000  10 tokens/s  27:46:20 left",
        "step 3/10000  4 tokens/s  69:25:25 left",
        "step 4/10000  loss 2.5  3 tokens/s  92:33:20 left",
        "step 4/10000  eval_loss 2.25 (evaluations: 15% of the training's time)  3 tokens/s  92:33:20 left",
    ]
    assert training.evaluation_share == 0.15  # of the 100 s after the first step
