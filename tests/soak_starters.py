"""The same command is started twice, the second time at many moments of the first one's run.

One of the two does the work. The other one is refused in one line, or finds the work finished. The result is what an
undisturbed run writes. This is not part of the test suite; `make soak` runs it.
"""

import time

import pytest
from soak_jobs import JOBS, Tally, assert_same, forget, inputs, started, undisturbed  # noqa: F401, inputs is a fixture

OFFSETS = 20  # of each phase, over the first one's duration


@pytest.mark.parametrize("phase", JOBS)
def test_started_twice(inputs, phase, capsys):  # noqa: F811
    folder, job, tally = inputs, JOBS[phase], Tally()
    whole = folder / f"whole-{phase}"
    seconds = undisturbed(folder, job, whole)
    outcomes = {}
    for step in range(OFFSETS):
        offset = seconds * step / OFFSETS
        forget(folder)
        with tally.attack(f"the second one after {offset:.2f} s"):
            outcome = started_twice(folder, job, offset)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            assert_same(whole, folder / "cut")
    found = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
    tally.report(f"{phase}, two starters", capsys, f"; the other one: {found}")


def started_twice(folder, job, offset):
    """Run a phase twice, the second time some seconds after the first; returns what became of the one that was late."""
    logs = [folder / f"log-{index}.txt" for index in range(2)]
    processes = []
    for index, log in enumerate(logs):
        log.unlink(missing_ok=True)
        time.sleep(offset * index)
        processes.append(started(folder, job, log=log.name))
    for process in processes:
        process.join()
    said = [log.read_text() for log in logs]
    codes = [process.exitcode for process in processes]
    assert sorted(codes) in ([0, 0], [0, 2]), f"{codes}: {said}"
    if 2 not in codes:
        finished = ["nothing to do" in text for text in said]
        assert sorted(finished) == [False, True], said
        return "found it finished"
    late = codes.index(2)
    (error,) = [line for line in said[late].splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said[late]
    if f"process {processes[1 - late].pid} on " in error:
        return "was told who writes"
    assert "was written by another run meanwhile; try again" in error, error
    return "was told to try again"
