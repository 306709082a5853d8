"""Products with a frozen weight, however it is stored: what goes forward, what comes back, and nothing kept in between.

A module that holds such a weight says by ``frozen_product(x)`` how it multiplies; the low-rank update and every other layer take it from
there, and know no storage by name.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Product(Protocol):
    """A frozen weight [out, in] as something to multiply by."""

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[n, in] -> [n, out] a tensor of its own: ``rows @ weight.T + bias``."""

    def back(self, rows: Tensor, onto: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in] a tensor of its own: ``rows @ weight``; or ``onto`` [n, in] with that added, in place."""


class Dense:
    """The product with a weight that is stored as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def times(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, self.weight, bias)

    def back(self, rows: Tensor, onto: Tensor | None = None) -> Tensor:
        return rows @ self.weight if onto is None else onto.addmm_(rows, self.weight)


def product_of(base: nn.Module, x: Tensor) -> Product | None:
    """How ``base`` multiplies ``x``, where it is a frozen linear layer that computes in the half precision of ``x`` and that nobody looks
    at; else ``None``, and only calling it says what it computes."""
    if base._forward_hooks or base._forward_pre_hooks or x.dtype != working_dtype(x):
        return None
    if any(p.requires_grad for p in base.parameters()):
        return None
    own = getattr(base, "frozen_product", None)
    if own is not None:
        return cast("Product | None", own(x))
    if type(base) is nn.Linear and x.dtype == base.weight.dtype == torch.bfloat16:
        return Dense(base.weight)
    return None


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with ``x`` is computed in here: its own, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.is_floating_point() else x.dtype


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, bias: Tensor | None) -> Tensor:
        ctx.product = product
        return product.times(x.flatten(0, -2), bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        return ctx.product.back(grad.flatten(0, -2)).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None, None, None


def frozen_linear(x: Tensor, product: Product, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` where only ``x`` gets a gradient; [..., in] -> [..., out]."""
    out: Tensor = _FrozenLinear.apply(x, product, bias)  # type: ignore[no-untyped-call]
    return out
