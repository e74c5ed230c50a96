"""Settings of all tests: one thread, no hub, and neither waits for the disk nor searches for garbage in libraries.

The first ones must be set before torch is imported. With one thread, ten tiny training steps take 0.15 s instead of
seconds.
"""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# They take longest. If they came last, one process would work alone at the end.
_LONGEST = (
    *("test_recipe_from_hub", "test_processes", "test_emulated_cuda", "test_pipeline", "test_training"),
    *("test_teachers", "test_report"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _fast_session():
    """What costs a tiny run of a phase most, and tests nothing.

    Every sync takes milliseconds, and each run makes dozens. test_durable and the soak tests look at what is synced.
    The Trainer collects garbage at its start, which searches through all objects of the imported libraries. A corpus
    of a hundred texts needs no 256 buckets, whose number changes nothing about it; scripts in processes of their own
    have them.
    """
    from modernbert_small.corpus import spill

    spill.BUCKET_BITS = 3
    sync, os.fsync = os.fsync, lambda descriptor: None
    gc.collect()
    gc.freeze()
    yield
    os.fsync = sync
