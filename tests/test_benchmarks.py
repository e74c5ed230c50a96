"""The benchmarks' own parts: what they run on, and how they count tokens."""

import shutil
import sys
from types import SimpleNamespace

import torch
from helpers import load_script

from benchmarks.workload import Positions


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
