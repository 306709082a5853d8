"""Results that cost little to compute are not kept for the backward pass but computed once more from what is kept anyway.

A LLaMA-like layer's products keep their inputs for the gradients of what is trained beside them: the output of a norm, whose input the norm
keeps, and the gated activation, whose two factors SwiGLU keeps. That is more than a quarter of all that a layer keeps, for about a
hundredth of the time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftcli.kernels import fast

_NAME = "cheap results computed again instead of kept"


class _Recipe:
    """How a tensor comes from others: ``function(*inputs)``, of one storage and one dtype, to the last bit the same each time."""

    # What was made last, for the layers that take it one after the other.
    last: tuple[_Recipe, Tensor] | None = None

    def __init__(self, out: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function, self.inputs = function, tuple(x.detach() for x in inputs)
        self.dtype, self.versions = out.dtype, [x._version for x in inputs]

    def __call__(self) -> Tensor:
        """
        Raises:
            RuntimeError: an input has been changed in place meanwhile, which autograd forbids as well.
        """
        if [x._version for x in self.inputs] != self.versions:
            raise RuntimeError("a tensor that the backward pass computes another from has been changed in place")
        if _Recipe.last is None or _Recipe.last[0] is not self:
            with torch.no_grad():
                _Recipe.last = self, self.function(*self.inputs)
        return _Recipe.last[1]


class _Kept:
    """A view of what a recipe makes, in the place of a tensor that autograd would have kept."""

    def __init__(self, recipe: _Recipe, view: Tensor) -> None:
        self.recipe, self.size, self.stride, self.offset = recipe, view.size(), view.stride(), view.storage_offset()

    def __call__(self) -> Tensor:
        return self.recipe().as_strided(self.size, self.stride, self.offset)


# By storage; one level for each pass that is under way.
_passes: list[dict[int, _Recipe]] = []


def cheap(out: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``out``, noted to be ``function(*inputs)``: contiguous, with a storage of its own, made anew by every call."""
    if _passes and torch.is_grad_enabled():
        recipes, key = _passes[-1], out.untyped_storage()._cdata
        recipes[key] = _Recipe(out, function, inputs)
        weakref.finalize(out, recipes.pop, key, None)
    return out


@contextlib.contextmanager
def sparing() -> Iterator[None]:
    """A forward pass whose cheap results are not kept."""
    if not torch.is_grad_enabled() or not fast.on():
        yield
        return
    _passes.append({})
    _Recipe.last = None
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _passes.pop()


def _pack(tensor: Tensor) -> Any:
    recipe = _passes[-1].get(tensor.untyped_storage()._cdata)
    if recipe is None or recipe.dtype != tensor.dtype or not fast.take(_NAME):
        return tensor
    return _Kept(recipe, tensor)


def _unpack(kept: Any) -> Tensor:
    return kept() if isinstance(kept, _Kept) else kept
