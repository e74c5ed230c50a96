"""Each phase is killed by SIGKILL at random moments, and run again until it has finished.

This is not part of the test suite; `make soak` runs it.
"""

import random

import pytest
from soak_jobs import JOBS, Tally, assert_same, attempt, forget, inputs, undisturbed  # noqa: F401, inputs is a fixture

KILLS = 100  # of each phase


@pytest.mark.parametrize("phase", JOBS)
def test_killed_and_run_again(inputs, phase, capsys):  # noqa: F811
    folder, job, chance, tally = inputs, JOBS[phase], random.Random(phase), Tally()
    whole = folder / f"whole-{phase}"
    seconds = undisturbed(folder, job, whole)
    rounds = 0
    while tally.tried < KILLS:
        forget(folder)
        kills = 0
        for _ in range(chance.randint(1, 8)):
            if not attempt(folder, job, chance.uniform(0, seconds)):
                break
            kills += 1
        with tally.attack(f"round {rounds}", kills):
            attempt(folder, job)
            assert_same(whole, folder / "cut")
        rounds += 1
    tally.report(f"{phase}, kills", capsys, f"; {rounds} runs of {seconds:.1f} s")
