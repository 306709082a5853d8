"""A frozen linear layer and a trained product of two thin matrices beside it, in few passes over wide tensors.

Both products of a direction add onto one tensor in place: no copy of the layer's output is made, and the gradient of the input is
not summed from two. Kept for the backward pass are the input, which the layers beside this one share, and the thin product.

The plain reference is ``F.linear(x, weight, bias) + scaling * (dropped @ narrow.T) @ wide.T``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels.frozen import Dense, Product


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, product: Product, bias: Tensor | None, narrow: Tensor, wide: Tensor, scaling: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        seen = rows if dropped is None else dropped.flatten(0, -2)
        thin, thick = narrow.to(x.dtype), (wide * scaling).to(x.dtype)
        low = seen @ thin.t()
        out = product.times(rows, bias).addmm_(low, thick.t())
        ctx.save_for_backward(seen, low, thin, thick)
        ctx.product = product
        ctx.scaling, ctx.shape, ctx.dtypes, ctx.drops = scaling, x.shape, (narrow.dtype, wide.dtype), dropped is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, low, thin, thick = ctx.saved_tensors
        needs, grad = ctx.needs_input_grad, grads[0].flatten(0, -2)
        for_low = grad @ thick
        for_x = ctx.product.back(grad) if needs[0] else None
        for_dropped = None
        if ctx.drops:
            for_dropped = (for_low @ thin).view(ctx.shape) if needs[1] else None
        elif for_x is not None:
            for_x.addmm_(for_low, thin)
        for_narrow = (for_low.t() @ seen).to(ctx.dtypes[0]) if needs[4] else None
        for_wide = (low.t() @ grad).t().to(ctx.dtypes[1]) * ctx.scaling if needs[5] else None
        return None if for_x is None else for_x.view(ctx.shape), for_dropped, None, None, for_narrow, for_wide, None


def low_rank_linear(
    x: Tensor, dropped: Tensor | None, weight: Tensor | Product, bias: Tensor | None, narrow: Tensor, wide: Tensor, scaling: float
) -> Tensor:
    """``F.linear(x, weight, bias) + scaling * (dropped @ narrow.T) @ wide.T``.

    Args:
        x: [..., in]. ``dropped``: the same after dropout; ``None`` where it is ``x`` itself.
        weight: [out, in], or how it is multiplied by where it is stored otherwise, and ``bias`` [out] in the dtype of ``x``; they get
            no gradient.
        narrow: [rank, in] and ``wide`` [out, rank], often float32; their gradients have their dtype.

    Returns:
        [..., out] in the dtype of ``x``.
    """
    product = Dense(weight) if isinstance(weight, Tensor) else weight
    out: Tensor = _LowRankLinear.apply(x, dropped, product, bias, narrow, wide, scaling)  # type: ignore[no-untyped-call]
    return out


def reference_low_rank_linear(
    x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, narrow: Tensor, wide: Tensor, scaling: float
) -> Tensor:
    """The same in PEFT's order of operations."""
    seen = x if dropped is None else dropped
    return F.linear(x, weight, bias) + F.linear(F.linear(seen, narrow.to(x.dtype)), wide.to(x.dtype)) * scaling
