"""Dropout on the CPU without a stored mask: whether a number stays is a hash of its place and of a seed that PyTorch's generator draws, one
for each call. PyTorch draws a number for each place, one after the other, and keeps the mask.

The two draw differently, so no number can be compared with PyTorch's. The distribution is the same, and a resumed or recomputed pass draws
what it drew before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.kernels import fast, native

_NAME = "dropout by a hash of place and seed"


def serves(x: Tensor, share: float) -> bool:
    """Whether :func:`dropped` takes ``x``."""
    return 0.0 < share < 1.0 and x.device.type == "cpu" and native.usable(x)


def draw() -> Tensor:
    """[1] int64: a seed of PyTorch's generator."""
    return torch.empty(1, dtype=torch.long).random_()


def dropped(x: Tensor, seed: Tensor, share: float, first: int = 0) -> Tensor:
    """``x`` with that share of its numbers zero and the others divided by ``1 - share``; contiguous, on the CPU, without gradient.

    Args:
        first: place of the first number; the same seed and places always drop the same.
    """
    out = torch.empty_like(x)
    native.call("dropout", x, x, seed, out, x.numel(), first, float(share))
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        seed = draw()
        ctx.save_for_backward(seed)
        ctx.share = share
        return dropped(x, seed, share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (seed,) = ctx.saved_tensors
        return dropped(grads[0].contiguous(), seed, ctx.share), None


def dropout(x: Tensor, share: float, *, training: bool = True) -> Tensor:
    """``F.dropout``, by the hash where the compiled code serves ``x``."""
    if not training or not serves(x, share) or not fast.take(_NAME):
        return F.dropout(x, share, training)
    out: Tensor = _Dropout.apply(x.contiguous(), share)  # type: ignore[no-untyped-call]
    return out


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the base class names it so)
        """``input`` of any shape after dropout."""
        return F.dropout(input, self.p, self.training, inplace=True) if self.inplace else dropout(input, self.p, training=self.training)
