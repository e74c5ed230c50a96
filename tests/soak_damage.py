"""Every file that a phase has written is damaged in turn: cut off, filled with zeros, removed.

Damaged are the files of an unfinished run that was killed, and those of a finished one. The unfinished runs are those
of the phases that go on with earlier work. This is not part of the test suite; `make soak` runs it.
"""

import shutil
import time

import pytest
from soak_jobs import JOBS, Tally, assert_same, forget, inputs, run_as_told, started, undisturbed  # noqa: F401, a fixture
from test_durable import WAYS, spoil

# Files that a phase doesn't look at again: people edit the card, and the others are not read by any phase. In the folder
# of what only training needs, run.json does no more than mark the folder as the phase's own.
NOT_CHECKED = ("report.html", "eval", "runs", "checkpoint-", "corpus.tokens", "distil.tokens", "out.training")
STATES = [*((phase, "finished") for phase in JOBS), *((phase, "unfinished") for phase in ("mlm", "labels", "model"))]


def interrupt(folder, job):
    """Kill a phase when it has saved something twice."""
    process = started(folder, job)
    saved = folder / "cut" / "out.partial"
    while len([*saved.glob("checkpoint-*[0-9]"), *saved.glob("train-*.parquet")]) < 2:
        assert process.is_alive(), "the phase ended before it was killed"
        time.sleep(0.001)
    process.kill()
    process.join()


def state_of(folder):
    """The folders that a phase writes: its output and the caches beside its inputs."""
    return [path for path in (folder / "cut", *sorted(folder.glob("*.tokens"))) if path.exists()]


def restore(folder, state):
    """Put back what was kept of a phase's folders."""
    forget(folder)
    for path in state.iterdir():
        shutil.copytree(path, folder / path.name)


@pytest.mark.parametrize(("phase", "moment"), STATES)
def test_every_file_damaged_in_turn(inputs, phase, moment, capsys):  # noqa: F811
    folder, job, tally = inputs, JOBS[phase], Tally()
    whole, state = (folder / f"{name}-{phase}-{moment}" for name in ("whole", "state"))
    undisturbed(folder, job, whole)
    if moment == "unfinished":
        forget(folder)
        interrupt(folder, job)
    for path in state_of(folder):
        shutil.copytree(path, state / path.name)
    files = [path.relative_to(state) for path in sorted(state.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    files = [path for path in files if path.name != "README.md"]
    if moment == "finished":
        files = [path for path in files if not any(part.startswith(NOT_CHECKED) for part in path.parts)]
    silent = []
    for path in files:
        for how in WAYS:
            restore(folder, state)
            spoil(folder / path, how)
            with tally.attack(f"{path} ({how})"):
                said = run_as_told(folder, job)
                lost_sample = phase == "labels" and (moment == "finished" or path.name in ("sample.npz", "run.json"))
                assert_same(whole, folder / "cut", to_the_byte=not lost_sample)
                if not any(word in said for word in (path.name, "random numbers", "made with", "no run made")):
                    silent.append(f"{path} ({how})")
    notes = f"; {len(files)} files in {len(WAYS)} ways; {len(silent)} times without a word"
    tally.report(f"{phase}, damage, {moment}", capsys, notes)
