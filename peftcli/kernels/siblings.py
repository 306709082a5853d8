"""Frozen linear layers that take the same input, each with a trained product of two thin matrices beside it, computed together.

The thin matrices that multiply the input lie in one, so the input is read once for all of them in every product with them, and the
gradients of the input add up in one tensor. The plain reference is each layer alone (``low_rank.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftcli.kernels.frozen import Product


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, products: Sequence[Product], biases: Sequence[Tensor | None], scalings: Sequence[float], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        rows, count = x.flatten(0, -2), len(products)
        narrow, wide = factors[:count], factors[count:]
        thin = torch.cat([each.to(x.dtype) for each in narrow])
        thick = [(each * scaling).to(x.dtype) for each, scaling in zip(wide, scalings, strict=True)]
        low = rows @ thin.t()
        edges = [0, *itertools.accumulate(len(each) for each in narrow)]
        outs = [
            product.times(rows, bias).addmm_(low[:, start:end], each.t()).view(*x.shape[:-1], -1)
            for product, bias, each, (start, end) in zip(products, biases, thick, itertools.pairwise(edges), strict=True)
        ]
        ctx.save_for_backward(rows, low, thin, *thick)
        ctx.products, ctx.scalings, ctx.edges, ctx.shape = products, scalings, edges, x.shape
        ctx.dtypes = [each.dtype for each in factors]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, low, thin, *thick = ctx.saved_tensors
        flat = [grad.flatten(0, -2) for grad in grads]
        for_low = torch.cat([grad @ each for grad, each in zip(flat, thick, strict=True)], dim=1)
        for_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for product, grad in zip(ctx.products, flat, strict=True):
                for_x = product.back(grad, onto=for_x)
            assert for_x is not None
            for_x = for_x.addmm_(for_low, thin).view(ctx.shape)
        count, parts = len(thick), list(itertools.pairwise(ctx.edges))
        for_thin = for_low.t() @ rows
        for_narrow = [for_thin[start:end].to(dtype) for (start, end), dtype in zip(parts, ctx.dtypes, strict=False)]
        for_wide = [
            (low[:, start:end].t() @ grad).t().to(dtype) * scaling
            for (start, end), grad, dtype, scaling in zip(parts, flat, ctx.dtypes[count:], ctx.scalings, strict=True)
        ]
        return for_x, None, None, None, *for_narrow, *for_wide


def low_rank_siblings(
    x: Tensor,
    products: Sequence[Product],
    biases: Sequence[Tensor | None],
    narrow: Sequence[Tensor],
    wide: Sequence[Tensor],
    scalings: Sequence[float],
) -> tuple[Tensor, ...]:
    """``x @ weight.T + bias + scaling * (x @ narrow.T) @ wide.T`` of each layer.

    Args:
        x: [..., in]. ``products``: with the layers' frozen weights [out, in]; ``biases`` [out] or ``None``.
        narrow: [rank, in] and ``wide`` [out, rank] of each layer, often float32; their gradients have their dtype.

    Returns:
        [..., out] of each layer in the dtype of ``x``.
    """
    outs: tuple[Tensor, ...] = _Siblings.apply(x, products, biases, scalings, *narrow, *wide)  # type: ignore[no-untyped-call]
    return outs
