"""This machine's speed and memory, for estimates."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modernbert_small.packed.flops import PEAK_RATES, find_gpu
from modernbert_small.run.devices import best_device, compute_dtype
from modernbert_small.run.tables import counted

# Shares of the rate that phases reach. Of a data sheet's rate they are assumed, with compiled layers: a narrow
# student's matrix products keep tensor cores less busy than a wide teacher's. Without compilation, memory traffic
# leaves 0.13, 0.21 and 0.15 at most. Of a measured rate they were measured on a CPU in bf16 (docs/LOG.md).
OF_THE_DATA_SHEET = {"pre_train": 0.25, "create_distil_dataset": 0.4, "distil_train": 0.2}
OF_A_MEASUREMENT = {"pre_train": 0.52, "create_distil_dataset": 0.65, "distil_train": 0.52}
_SIZES = {
    "cpu": 512,
    "cuda": 4096,
}  # of the measured product: large, and on a busy CPU over before others get their turn
_SECONDS = 0.3


@dataclass(frozen=True)
class Machine:
    """What an estimate needs to know of a machine.

    Attributes:
        name: for people.
        flops_per_second: in large matrix products.
        utilisation: the share of it that each phase is expected to reach.
        bf16: whether activations take two bytes and not four.
        memory: bytes on the device; None if it is not known.
        gpus: in each machine; 1 for a CPU. Each has a process.
        machines: of this kind.
    """

    name: str
    flops_per_second: float
    utilisation: Mapping[str, float]
    bf16: bool
    memory: int | None = None
    gpus: int = 1
    machines: int = 1

    @property
    def has_gpu(self) -> bool:
        """Whether models and batches lie in the memory of a GPU, and not in the machine's own."""
        return not self.name.startswith("a CPU")

    @property
    def processes(self) -> int:
        """How many processes all machines run."""
        return self.gpus * self.machines

    @property
    def is_measured(self) -> bool:
        """Whether the rate was measured; else it is the data sheet's."""
        return self.utilisation is OF_A_MEASUREMENT


def named_gpu(name: str) -> Machine:
    """A GPU of PEAK_RATES, by its name there."""
    return Machine(f"one {name}", PEAK_RATES[name], OF_THE_DATA_SHEET, True)


def this_machine() -> Machine:
    """The device that the phases would run on here. If its rate is not known, it is measured in a third of a second."""
    device = best_device()
    bf16 = compute_dtype(device) is torch.bfloat16
    memory: int | None
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
        if known := find_gpu(name):
            return Machine(f"one {known}", PEAK_RATES[known], OF_THE_DATA_SHEET, bf16, memory)
    else:
        name = f"a CPU, {counted(torch.get_num_threads(), 'thread')}, no GPU"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return Machine(name, _measured_rate(device), OF_A_MEASUREMENT, bf16, memory)


def _measured_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of some, in the dtype that the phases compute in."""
    size = _SIZES[device.type]
    matrix = torch.ones((size, size), dtype=compute_dtype(device), device=device)
    best, until = float("inf"), time.monotonic() + _SECONDS
    while time.monotonic() < until:
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
