"""Peak memory of this process, as the operating system or the GPU's allocator counts it."""

from __future__ import annotations

import resource

import torch


def peak_memory(device: torch.device) -> tuple[int, str]:
    """(bytes, kind): ``allocated`` on a GPU, since :func:`reset_peak`; ``resident`` on the CPU, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's on a GPU, or that of torch's allocator on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))


def reset_peak(device: torch.device) -> None:
    """Begin counting anew where that is possible (GPUs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
