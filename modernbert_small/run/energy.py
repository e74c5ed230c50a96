"""The energy that NVIDIA GPUs draw, from their driver's counter."""

import pynvml
import torch

from modernbert_small.run.processes import local_world_size


def gpu_joules() -> float | None:
    """The energy in joules that this run's GPUs on this machine have drawn since their driver was loaded.

    Each process has one GPU.

    Returns:
        The sum over the GPUs. None where there is no counter: without CUDA, on a slice of a GPU, before Volta.

    Source: `nvmlDeviceGetTotalEnergyConsumption`, https://docs.nvidia.com/deploy/nvml-api
    """
    if not torch.cuda.is_available():
        return None
    try:
        pynvml.nvmlInit()
        uuids = [torch.cuda.get_device_properties(index).uuid for index in range(local_world_size())]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1000
    except pynvml.NVMLError:
        return None
