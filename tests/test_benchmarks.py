"""The benchmarks' own parts: what they run on, and how they count tokens."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import load_script

from benchmarks import correctness, gpu
from benchmarks.strongest import batches_of_similar_length, every_nth
from benchmarks.workload import Positions, Workload
from modernbert_small.packed.attention import packed_sdpa_attention
from modernbert_small.run.errors import UserError


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
    text = speed.table(lines).splitlines()
    assert text[2].startswith("| mlm | 11 | 45 | 90 | 8.0 | 4.0 - 9.0 | 2.0 | 1.0 - 4.0 | 10% | 10% | 10% | 1.00 |")
    assert text[3].startswith("| corpus | 11 |  | 90 | 8.0 | 4.0 - 9.0 |  |  |  |  |  | 1.00 |")


def test_a_part_runs_once_and_a_failed_one_again(tmp_path):
    ran = []

    def part(name, error=None, needs=()):
        def run():
            ran.append(name)
            if error and ran.count(name) == 1:
                raise UserError(error)
            return {"value": 1.5}

        return gpu.Part(name, run, needs)

    parts = [part("good"), part("bad", "found 3, expected 2"), part("absent", needs=("no_such_package",))]
    file, where = tmp_path / "x.json", {"gpu": "H100", "torch": "2.13.0", "load": "1"}
    first = gpu.run_parts(parts, file, where)
    assert first == {
        "good": {"value": 1.5},
        "bad": {"failed": "found 3, expected 2"},
        "absent": {"not run": "it needs the package no_such_package"},
    }
    assert gpu.run_parts(parts, file, where | {"load": "2"})["bad"] == {"value": 1.5}
    assert ran == ["good", "bad", "bad"]
    assert "| absent | not run | it needs the package no_such_package |" in gpu.correctness_table(first)
    with pytest.raises(UserError, match="measured with gpu H100"):
        gpu.run_parts(parts, file, where | {"gpu": "L4"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_the_check_of_attention_finds_a_wrong_window_and_no_wrong_kernel(dtype, window):
    lengths = [1, 7, 16]
    expected = correctness.output_and_gradients(correctness.row_by_row, lengths, window, torch.float32)
    found = correctness.output_and_gradients(packed_sdpa_attention, lengths, window, dtype)
    errors = [correctness.relative_error(*pair) for pair in zip(found, expected, strict=True)]
    assert max(errors) < correctness.MOST_ERROR[dtype]
    wrong = correctness.output_and_gradients(packed_sdpa_attention, lengths, 6, dtype)
    errors = [correctness.relative_error(*pair) for pair in zip(wrong, expected, strict=True)]
    assert min(errors) > correctness.MOST_ERROR[dtype]
    with pytest.raises(UserError, match=r"window: found nan, expected at most 0\.02"):
        correctness.at_most(0.02, float("nan"), "window")


def test_utilisation_and_idle_share():
    measured = {"tokens": 4000, "seconds": 2.0, "flops_per_token": 1e9, "peak_bytes": 3 * 10**9}
    results = {
        "matrix product": {"flops_per_second": 8e12},
        "mlm": measured | {"busy_seconds_per_token": 4e-4},
        "labels": measured | {"busy_seconds_per_token": None},
        "mlm, compiled": {"not run": "it needs CUDA"},
    }
    text = gpu.speed_table(results)
    assert "| mlm | 2,000 | 25.0% | 20% | 3.00 | 4,000 |" in text
    assert "| labels | 2,000 | 25.0% | not run | 3.00 | 4,000 |" in text
    assert "| mlm, compiled | not run: it needs CUDA |" in text
