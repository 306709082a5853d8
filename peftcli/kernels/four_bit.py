"""Products with frozen 4-bit weights: expanded to bfloat16 just before they are needed, forward and again backward, and never kept.

On a GPU one launch expands a weight, its scales quantized once more included, into a buffer that all layers of the device share. The plain
reference, of the same bits, is bitsandbytes' own expansion.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels import fast, native

# For each device: as large as the largest weight expanded on it so far. Work on one stream takes turns, so one layer's weight is used up
# before the next one is written.
_buffers: dict[torch.device, Tensor] = {}


class FourBit:
    """A weight of bitsandbytes as something to multiply by.

    Args:
        packed: codes, two in each byte. ``state``: bitsandbytes' ``QuantState``: what they stand for; bfloat16.
        plain: bitsandbytes' own expansion of the two.
    """

    def __init__(self, packed: Tensor, state: Any, plain: Callable[[Tensor, Any], Tensor]) -> None:
        self.packed, self.state, self.plain = packed, state, plain

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, self.expanded(), bias)

    def back(self, rows: Tensor, onto: Tensor | None = None) -> Tensor:
        return rows @ self.expanded() if onto is None else onto.addmm_(rows, self.expanded())

    def expanded(self) -> Tensor:
        """[out, in] bfloat16; on a GPU only until the next weight is expanded there."""
        if self.packed.device.type == "cuda" and native.triton_runs() and fast.take("4-bit weights expanded in one launch"):
            return expand(self.packed, self.state)
        return self.plain(self.packed, self.state)


def expand(packed: Tensor, state: Any) -> Tensor:
    """The weight in the device's shared buffer, by the Triton kernel."""
    count = state.shape.numel()
    buffer = _buffers.get(packed.device)
    if buffer is None or buffer.numel() < count:
        _buffers[packed.device] = buffer = torch.empty(count, dtype=torch.bfloat16, device=packed.device)
    out, double = buffer[:count], None
    if state.nested:
        double = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    triton_code = importlib.import_module("peftcli.kernels.triton_code")
    triton_code.expand(packed.view(torch.uint8), state.code, state.absmax, double, state.blocksize, out)
    return out.view(state.shape)
