"""The device that a process computes on, what it can do, and its memory."""

import os
import sys

import torch
from torch.utils._triton import has_triton

from modernbert_small.run.errors import UserError


def best_device() -> torch.device:
    """The process's CUDA device if there is one, else the CPU.

    Raises:
        UserError: there are more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"process {index} of this machine finds {count} GPUs, expected one for each process; use torchrun "
            f"--nproc_per_node {count}, or CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", index)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is done in hardware, so that it is faster than float32 and not merely possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can make kernels for a GPU, which takes triton and compute capability 7.0."""
    return device.type == "cuda" and has_triton()


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrix products of float32 models run in under `bf16_autocast`."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def bf16_autocast(device: torch.device) -> torch.autocast:
    """A context in which matrix products of float32 models run in bf16, where the hardware has it; else none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def peak_memory_bytes() -> int:
    """Peak device memory if the process has used a CUDA device, else its peak resident memory."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    import resource  # not on Windows, where CUDA may still be

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
