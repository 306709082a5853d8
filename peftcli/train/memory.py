"""Memory of this process: its peak as the operating system or the GPU's allocator counts it, and giving back what is not needed."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch

# Prepared products that oneDNN keeps, each for one number of tokens. It would keep 1,024 in each of two caches, where a step with another
# number of tokens finds nothing: 10 to 25 MB more after every step, spread over the heap so that little around them can be given back.
# Eight steps of 1,500 to 2,100 tokens, 6 layers: 796 MiB above the start as it is by default, 540 with 32, 647 with 128; equally fast.
_PREPARED = 64
# Batches between two times that the heap is given back: every time costs page faults, about a tenth of a batch.
_EVERY = 16


def keep_caches_small() -> None:
    """Bound what oneDNN keeps of past shapes, unless the environment says otherwise. Takes effect before the first product."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PREPARED))


def give_back() -> None:
    """Give the free pages of the C library's heap back to the operating system, where it can (glibc)."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None
    return trim


class Heap:
    """Keeps the heap near what a batch needs. What batches of other sizes have left free lies in pieces that a larger one cannot use."""

    def __init__(self) -> None:
        self._most, self._since = 0, 0

    def before_batch(self, tokens: int) -> None:
        """A forward and backward pass over so many tokens begins."""
        self._since += 1
        if tokens > self._most or self._since >= _EVERY:
            give_back()
            self._most, self._since = max(self._most, tokens), 0


class Peak:
    """In which phase of a run memory was highest.

    Attributes:
        phase: the one that is on. ``highest``: the one with the peak so far.
    """

    def __init__(self, device: torch.device, phase: str) -> None:
        self.device, self.phase, self.highest = device, phase, phase
        self._bytes = 0

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        self.look()
        self.phase = phase

    def look(self) -> tuple[int, str]:
        """(the peak in bytes, the phase that it was in)."""
        now = peak_memory(self.device)[0]
        if now > self._bytes:
            self._bytes, self.highest = now, self.phase
        return self._bytes, self.highest


def peak_memory(device: torch.device) -> tuple[int, str]:
    """(bytes, kind): ``allocated`` on a GPU, since :func:`reset_peak`; ``resident`` on the CPU, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated"
    return _resident_peak(), "resident"


def _resident_peak() -> int:
    """Where Linux tells it, of this program alone: what ``getrusage`` says includes the process that started it."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's on a GPU, or that of torch's allocator on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))


def reset_peak(device: torch.device) -> None:
    """Begin counting anew where that is possible (GPUs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
