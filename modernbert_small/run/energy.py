"""What the GPUs draw, as NVIDIA's driver counts it."""

import pynvml
import torch

from modernbert_small.run.processes import local_world_size


def gpu_joules() -> float | None:
    """What the GPUs of this run on this machine, one a process, have drawn since their driver was loaded, in joules.

    Returns:
        Their sum, or None where nothing counts: no CUDA, a slice of a GPU, one older than Volta.

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
