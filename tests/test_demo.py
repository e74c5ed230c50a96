"""The demo as a process that gets stopped."""

import os
import signal
import threading
import time

import pytest

from modernbert_small import demo
from modernbert_small.run.errors import Terminated, raise_stop

PHASE = """
import signal, sys, time
from pathlib import Path

def save(number, frame):
    time.sleep(0.5)
    Path("saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
Path("started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stopped_demo_lets_its_phase_save(tmp_path, monkeypatch, number, raised):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "RECIPE", tmp_path / "recipe.yaml")
    (tmp_path / "phase.py").write_text(PHASE)

    def stop_when_started():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    earlier = signal.signal(number, raise_stop)
    try:
        threading.Thread(target=stop_when_started, daemon=True).start()
        with pytest.raises(raised):
            demo.run_phase("phase.py")
    finally:
        signal.signal(number, earlier)
    assert (tmp_path / "saved").exists()
