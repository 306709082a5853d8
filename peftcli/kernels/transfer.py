"""Copies to a GPU that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def ahead(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` of the CPU on ``device``. The copy to a GPU takes its place among the work already queued there, and the host goes on;
    from memory that may be paged out it would wait for all of that work."""
    device = torch.device(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
