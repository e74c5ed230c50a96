"""What the GPUs draw, as NVIDIA's driver counts it."""

import pynvml
import torch


def gpu_joules() -> float | None:
    """What this process's visible GPUs have drawn since their driver was loaded, in joules.

    Returns:
        The sum over the GPUs, or None where nothing counts: no CUDA in use, a slice of a GPU, one older than Volta.

    Source: `nvmlDeviceGetTotalEnergyConsumption`, https://docs.nvidia.com/deploy/nvml-api
    """
    if not torch.cuda.is_initialized():
        return None
    try:
        pynvml.nvmlInit()
        uuids = [torch.cuda.get_device_properties(index).uuid for index in range(torch.cuda.device_count())]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1000
    except pynvml.NVMLError:
        return None
