"""Attention within each document of a packed row by plain products, for CPUs: PyTorch's fused attention takes longer there, above all on
the way back.

Each rectangle of documents is gathered straight into the layout that the products want. Query heads that share a key-value head are one
taller matrix, so nothing is repeated. Queries go in blocks, under a causal mask each against the keys up to its end only: what the mask
would hide is mostly not computed. Kept for the way back are the inputs and, for short rows, the softmax's weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftcli.kernels import native
from peftcli.kernels.documents import Cells, Documents, Padded
from peftcli.kernels.dropout import draw, dropped

# Queries in one block.
_BLOCK = 96
# rows.c computes so many numbers at a time.
_LANES = 16
# Rows of more tokens keep no weights, whose number grows with the square of the length, and compute them again.
_KEPT = 1024


class _Softmax:
    """The softmax of scores [rows * heads, queries * group, keys] in place, and its way back, each in one pass.

    Args:
        cells: the rectangle. ``group``: query heads for each key-value head. ``extra``: keys in front of the rows' own.
        causal: a query sees the keys up to its own; otherwise those of its row.
        dropout: share of the weights that drop out, by the places from ``first`` on of ``seed``.
    """

    def __init__(
        self, cells: Cells, group: int, extra: int, causal: bool, scaling: float, dropout: float, seed: Tensor | None, first: int
    ) -> None:
        self.cells, self.group, self.extra, self.causal, self.scaling = cells, group, extra, causal, scaling
        self.dropout, self.seed, self.first = dropout, seed, first

    def blocks(self) -> Iterator[tuple[slice, int, int]]:
        """Each block of queries: where it lies in the rectangle, its first query, and how many keys it is multiplied with."""
        longest = self.cells.longest
        count = max(1, round(longest / _BLOCK)) if self.causal or longest > _KEPT else 1
        for start, end in itertools.pairwise(longest * i // count for i in range(count + 1)):
            yield slice(start * self.group, end * self.group), start, self.extra + (end if self.causal else longest)

    def weights(self, scores: Tensor, first: int) -> Tensor:
        """Scores of the queries from ``first`` on become weights."""
        if not native.usable(scores):
            return self._reference(scores, first)
        lengths = None if self.causal else self.cells.lengths
        sizes = (len(scores), self.cells.heads, scores.shape[1], self.group, scores.shape[2])
        scratch = torch.empty(torch.get_num_threads(), -(-scores.shape[2] // _LANES) * _LANES)
        native.call("softmax", scores, scores, scratch, lengths, *sizes, self.extra, first, int(self.causal), self.scaling)
        return scores

    def drop(self, x: Tensor, first: int) -> Tensor:
        """Weights of the queries from ``first`` on, or their gradient, after dropout."""
        if self.seed is None:
            return x
        # A place of its own for each weight of the rectangle.
        return dropped(x, self.seed, self.dropout, self.first + first * self.group * len(x) * (self.extra + self.cells.longest))

    @property
    def places(self) -> int:
        """How many there are."""
        return self.cells.rows * self.cells.heads * self.cells.longest * self.group * (self.extra + self.cells.longest)

    def back(self, weights: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the weights becomes that of the products of queries and keys."""
        if not native.usable(grad, weights):
            return torch._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(self.scaling)
        native.call("softmax_backward", grad, weights, grad, grad.shape[0] * grad.shape[1], grad.shape[2], self.scaling)
        return grad

    def _reference(self, scores: Tensor, first: int) -> Tensor:
        """The same by PyTorch's operators."""
        keys, scores = torch.arange(scores.shape[2], device=scores.device), scores.mul_(self.scaling)
        if self.causal:
            place = torch.arange(first, first + scores.shape[1] // self.group, device=scores.device).repeat_interleave(self.group)
            scores.masked_fill_(keys > place.unsqueeze(1) + self.extra, float("-inf"))
        elif self.cells.lengths is not None:
            seen = self.cells.lengths.repeat_interleave(self.cells.heads) + self.extra
            scores.masked_fill_(keys >= seen[:, None, None], float("-inf"))
        return scores.softmax(-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        more_keys: Tensor | None,
        more_values: Tensor | None,
        documents: Documents | Padded,
        causal: bool,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        seed = draw() if dropout > 0.0 else None
        fronts = [_front(x, more, documents) for x, more in ((key, more_keys), (value, more_values))]
        out = query.new_empty(*query.shape[:2], value.shape[2])
        kept: list[Tensor] = []
        moving = any(ctx.needs_input_grad)
        for cells, queries, keys, values, softmax in _rectangles(query, key, value, fronts, documents, causal, scaling, dropout, seed):
            to = query.new_empty(*queries.shape[:2], value.shape[2])
            for block, first, seen in softmax.blocks():
                weights = softmax.weights(queries[:, block] @ keys[:, :seen].transpose(1, 2), first)
                to[:, block] = softmax.drop(weights, first) @ values[:, :seen]
                if moving and cells.longest <= _KEPT:
                    kept.append(weights)
            _scatter(to, cells, out)
        ctx.save_for_backward(query, key, value, more_keys, more_values, seed, *kept)
        ctx.documents, ctx.causal, ctx.scaling, ctx.dropout = documents, causal, scaling, dropout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, more_keys, more_values, seed, *rest = ctx.saved_tensors
        documents, kept = ctx.documents, iter(rest)
        fronts = [_front(x, more, documents) for x, more in ((key, more_keys), (value, more_values))]
        # Sums over blocks and rows are made in float32.
        wide = torch.promote_types(key.dtype, torch.float32)
        for_fronts = [torch.zeros_like(front, dtype=wide) for front in fronts]
        for_query, for_key, for_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        how = (ctx.causal, ctx.scaling, ctx.dropout, seed)
        for cells, queries, keys, values, softmax in _rectangles(query, key, value, fronts, documents, *how):
            wanted = _gathered(grads[0], cells, zeros=True)
            sums = [torch.zeros_like(x, dtype=wide) for x in (keys, values)]
            to = torch.empty_like(queries)
            for block, first, seen in softmax.blocks():
                if cells.longest <= _KEPT:
                    weights = next(kept)
                else:
                    weights = softmax.weights(queries[:, block] @ keys[:, :seen].transpose(1, 2), first)
                scores = softmax.back(weights, softmax.drop(wanted[:, block] @ values[:, :seen].transpose(1, 2), first))
                to[:, block] = scores @ keys[:, :seen]
                sums[0][:, :seen] += scores.transpose(1, 2) @ queries[:, block]
                sums[1][:, :seen] += softmax.drop(weights, first).transpose(1, 2) @ wanted[:, block]
            _scatter(to, cells, for_query)
            for total, front, out in zip(sums, for_fronts, (for_key, for_value), strict=True):
                each = total.view(cells.rows, cells.heads, *total.shape[1:])
                front[:, : softmax.extra] += each[:, :, : softmax.extra].sum(0)
                _scatter(each[:, :, softmax.extra :].to(out.dtype), cells, out)
        for_more: list[Tensor | None] = []
        for front, more, out in zip(for_fronts, (more_keys, more_values), (for_key, for_value), strict=True):
            count = front.shape[1] - documents.shared
            out[: documents.shared] += front[:, count:].transpose(0, 1)
            for_more.append(None if more is None else front[:, :count].to(more.dtype))
        return for_query, for_key, for_value, *for_more, None, None, None, None


def _rectangles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fronts: Sequence[Tensor],
    documents: Documents | Padded,
    causal: bool,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> Iterator[tuple[Cells, Tensor, Tensor, Tensor, _Softmax]]:
    """Each rectangle with its queries, the keys and values that its rows see, and its softmax; the same in both directions."""
    group, first = query.shape[1] // key.shape[1], 0
    for cells in documents.cells(key.shape[1]):
        keys, values = _seen(key, cells, fronts[0]), _seen(value, cells, fronts[1])
        softmax = _Softmax(cells, group, keys.shape[1] - cells.longest, causal, scaling, dropout, seed, first)
        first += softmax.places
        yield cells, _gathered(query, cells), keys, values, softmax


def _gathered(x: Tensor, cells: Cells, *, zeros: bool = False) -> Tensor:
    """[total, heads, width] as a rectangle [rows * key-value heads, longest * heads for each, width]. Padding holds whatever token 0 does,
    or with ``zeros`` nothing."""
    width = x.shape[2]
    packed = x.reshape(x.shape[0] * cells.heads, -1)
    if zeros and cells.slots is not None:
        out = packed.new_zeros(len(cells.gather), packed.shape[1]).index_copy_(0, cells.slots, packed.index_select(0, cells.place))
    else:
        out = packed.index_select(0, cells.gather)
    return out.view(cells.rows * cells.heads, -1, width)


def _scatter(x: Tensor, cells: Cells, out: Tensor) -> None:
    """Put a rectangle back into its places in ``out`` [total, heads, width]."""
    packed = out.view(out.shape[0] * cells.heads, -1)
    each = x.reshape(len(cells.gather), packed.shape[1])
    packed.index_copy_(0, cells.place, each if cells.slots is None else each.index_select(0, cells.slots))


def _front(x: Tensor, more: Tensor | None, documents: Documents | Padded) -> Tensor:
    """[key-value heads, n, width]: keys or values that every document sees in front of its own."""
    shared = x[: documents.shared].transpose(0, 1)
    return shared if more is None else torch.cat([more, shared], dim=1)


def _seen(x: Tensor, cells: Cells, front: Tensor) -> Tensor:
    """[rows * key-value heads, n + longest, width]: keys or values that a rectangle's rows see."""
    own = _gathered(x, cells)
    front = front[:, : front.shape[1] - cells.longest] if cells.beginning else front
    if not front.shape[1]:
        return own
    every = front.expand(cells.rows, *front.shape)
    return torch.cat([every, own.view(cells.rows, cells.heads, *own.shape[1:])], dim=2).flatten(0, 1)


def products_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents | Padded,
    *,
    scaling: float,
    causal: bool,
    dropout: float = 0.0,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention within each document.

    Args:
        query: [total, heads, width]; ``key``, ``value``: [total, key-value heads, width], all of one dtype.
        dropout: share of the weights that drop out; where there is any, :func:`dropout.serves` must take the queries.
        prefix: keys and values [key-value heads, n, width] of that dtype that every document sees in front of its own.

    Returns:
        [total, heads, width].
    """
    parts = [x.contiguous() for x in (query, key, value)]
    out: Tensor = _Attention.apply(*parts, *(prefix or (None, None)), documents, causal, scaling, dropout)  # type: ignore[no-untyped-call]
    return out
