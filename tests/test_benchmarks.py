"""The benchmarks' own parts: what they run on, and how they count tokens."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from helpers import load_script

from benchmarks.strongest import batches_of_similar_length, every_nth
from benchmarks.workload import Positions, Workload


def test_the_device_is_the_one_that_torch_runs_on(monkeypatch):
    speed = load_script("benchmarks/speed.py")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--tokenizer", "folder"])
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    for has_gpu, warm_up_rows in ((False, 16), (True, 2048)):  # a torch without CUDA may be on a machine with a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        args = speed.parse_arguments()
        assert (args.cuda, args.warm_up_rows) == (has_gpu, warm_up_rows)


def test_counting_tokens_waits_for_no_device():
    """A step of either side is timed, and the usual side's mask is on the device."""
    waits = []

    class OnDevice:
        def sum(self):
            return self

        def __int__(self):
            waits.append(1)
            return 5

    model = SimpleNamespace(forward=lambda **inputs: None)
    positions = Positions(model)
    for mask in (OnDevice(), OnDevice(), None):
        model.forward(input_ids=torch.zeros(2, 4), attention_mask=mask)
    assert not waits
    assert (positions.tokens, positions.positions) == (5 + 5 + 8, 24)
    positions.reset()
    assert (positions.tokens, positions.positions) == (0, 0)


def test_the_strongest_way_wastes_little_and_runs_a_fair_share():
    lengths = np.random.default_rng(0).integers(2, 129, 4000).tolist()
    batches = batches_of_similar_length(lengths, 1024)
    assert sorted(row for batch in batches for row in batch) == list(range(4000))
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert max(padded) <= 1024
    assert 1 - sum(lengths) / sum(padded) < 0.04

    for first in (0, 400):
        share = every_nth(batches, Workload(Path(), Path(), first, 400), warm_up=False)
        rows = [row for batch in share for row in batch]
        assert len(set(rows)) == len(rows)
        assert abs(len(rows) - 400) < 40
        tokens = sum(lengths[row] for row in rows)
        assert abs(tokens / sum(lengths) - 0.1) < 0.005


def test_a_line_has_the_ratio_to_each_other_way():
    speed = load_script("benchmarks/speed.py")
    seconds = {"usual": (8, 9, 4), "strongest": (2, 4, 1), "ours": (1, 1, 1)}
    measured = [
        {"what": "mlm", "side": side, "seconds": s, "tokens": 90, "positions": 100, "peak_bytes": 10**9}
        for side, of_side in seconds.items()
        for s in of_side
    ]
    measured += [m | {"what": "corpus", "positions": None} for m in measured if m["side"] != "strongest"]
    lines = [speed.summarise(what, measured) for what in ("mlm", "corpus")]
    assert lines[0].ratios == {"usual": (8, 4, 9), "strongest": (2, 1, 4)}
    text = speed.markdown(lines, {"date": "today"}).splitlines()
    assert text[2].startswith("| mlm | 11 | 45 | 90 | 8.0 | 4.0 - 9.0 | 2.0 | 1.0 - 4.0 | 10% | 10% | 10% | 1.00 |")
    assert text[3].startswith("| corpus | 11 |  | 90 | 8.0 | 4.0 - 9.0 |  |  |  |  |  | 1.00 |")
