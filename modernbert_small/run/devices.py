"""The device that a process computes on, what it can do, and its memory."""

import os

import torch


def best_device() -> torch.device:
    """The process's CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is done in hardware, so that it is faster than float32 and not merely possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def bf16_autocast(device: torch.device) -> torch.autocast:
    """A context in which matrix products of float32 models run in bf16, where the hardware has it; else none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def peak_memory_bytes() -> int:
    """Peak device memory on CUDA, else the process's peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, where CUDA may still be

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
