"""Attention over rows that are laid end to end without padding: no document sees another, exactly.

Rows of similar length are gathered into small rectangles, attention runs on each, and the results go back to their
places. Under a causal mask a row's padding comes after all its tokens, so no token ever attends to it; and the way back
takes tokens only, so padding gets no gradient. Both directions are pure gathers: deterministic on every device.

The plain reference (:func:`reference_attention`) builds the block-diagonal mask and is what the tests compare with.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.kernels import fast, varlen
from peftcli.kernels.grouping import by_length
from peftcli.kernels.transfer import ahead

NAME = "peftcli_packed"
# Queries in one block of plain products.
_BLOCK = 96
# Rows up to this many tokens take plain products on the CPU: (causal, in both directions). Measured on a core with AVX512-BF16, forward and
# backward, heads 9/3 of width 64: in bfloat16 8 rows of 192 tokens take 23 ms instead of 48, 4 of 384 take 30 instead of 75, 2 of 1024 take
# 94 instead of 182; in float32 4 of 384 take 55 instead of 71, and shorter rows as long as before. Without a mask to save work at, the
# advantage ended at 384 in bfloat16 and at about 100 in float32 (on two cores with AMX).
_SHORT = {torch.bfloat16: (1024, 256), torch.float32: (512, 96), torch.float64: (512, 96)}


@dataclass(frozen=True)
class Rectangle:
    """Documents that are attended to together.

    Attributes:
        rows, longest: its shape.
        gather: [rows * longest] positions in the packed row; padding repeats position 0.
        slots: [tokens] the places in the rectangle that hold tokens, and ``place``: where each lies in the packed row.
        valid: [rows, longest], or ``None`` where there is no padding.
    """

    rows: int
    longest: int
    gather: Tensor
    slots: Tensor
    place: Tensor
    valid: Tensor | None


class Documents:
    """Where each document lies in a packed row of ``total`` tokens, prepared once for all layers of a batch.

    Args:
        lengths: of the documents, in the order in which they lie.
        device: of the index tensors.
        shared: tokens with which every document begins. They lie once, in front of all, are no part of ``lengths``, and every
            document sees them; each document's positions go on behind them.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", shared: int = 0) -> None:
        self.lengths, self.shared = tuple(lengths), shared
        self.total, self.longest = shared + sum(self.lengths), max(self.lengths, default=0)
        self.device = torch.device(device)

    @functools.cached_property
    def starts(self) -> Tensor:
        """[documents + 1] int32: where each document begins, and the end."""
        return ahead(torch.from_numpy(np.cumsum([0, *self.lengths], dtype=np.int32)), self.device)

    @functools.cached_property
    def _laid(self) -> tuple[list[Rectangle], Tensor]:
        starts = list(itertools.accumulate(self.lengths, initial=self.shared))
        groups = by_length(range(len(self.lengths)), [self.lengths])
        rectangles: list[Rectangle] = []
        # In numpy: under fake tensors (memory estimates) the numbers stay known.
        inverse = np.arange(self.total, dtype=np.int64)
        offset = self.shared
        for group in groups:
            longest = self.lengths[group[0]]
            gather = np.zeros((len(group), longest), dtype=np.int64)
            valid = np.zeros((len(group), longest), dtype=np.bool_)
            for row, index in enumerate(group):
                start, length = starts[index], self.lengths[index]
                gather[row, :length] = np.arange(start, start + length)
                valid[row, :length] = True
                inverse[start : start + length] = np.arange(offset, offset + length)
                offset += longest
            flat, slots = gather.reshape(-1), np.flatnonzero(valid)
            parts = [ahead(torch.from_numpy(x), self.device) for x in (flat, slots, flat[slots])]
            padded = None if valid.all() else ahead(torch.from_numpy(valid), self.device)
            rectangles.append(Rectangle(len(group), longest, parts[0], parts[1], parts[2], padded))
        return rectangles, ahead(torch.from_numpy(inverse), self.device)

    @property
    def rectangles(self) -> list[Rectangle]:
        """The documents in rectangles of similar lengths."""
        return self._laid[0]

    @property
    def inverse(self) -> Tensor:
        """[total] where each token lies in the shared beginning and the rectangles, one behind the other."""
        return self._laid[1]


class Prefix:
    """Keys and values that stand in front of every row, in each layer: every token sees them, they see nothing.

    Args:
        keys, values: [layers, key-value heads, n, width].

    A model takes it as the keyword argument ``prefix_states``, which transformers hands through to each layer's attention;
    ``used`` holds the layers that asked for theirs. Position numbers are the caller's: rows begin at n.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.used: set[int] = set()

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [key-value heads, n, width] of one layer, in the dtype of its keys ``like`` [..., heads, length, width].

        Raises:
            UsageError: the layer's heads have another shape.
        """
        heads, width = like.shape[-3], like.shape[-1]
        if (self.keys.shape[1], self.keys.shape[3]) != (heads, width):
            raise UsageError(
                f"layer {index} of the model has {heads} key-value heads of width {width}, the prefix {self.keys.shape[1]} of "
                f"{self.keys.shape[3]}; prefixes need layers of one shape",
                hint="choose a method that does not depend on the heads, such as lora.",
            )
        self.used.add(index)
        return self.keys[index].to(like.dtype), self.values[index].to(like.dtype)


class _Gather(torch.autograd.Function):
    """[total, ...] -> [documents * longest, ...] by ``gather``; its gradient is taken back by ``inverse``, so that
    positions repeated as padding add nothing and nothing is accumulated in an undefined order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, place: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(place, slots)
        ctx.total = x.shape[0]
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        place, slots = ctx.saved_tensors
        (grad,) = grads
        out = grad.new_zeros(ctx.total, *grad.shape[1:])
        out[place] = grad.index_select(0, slots)
        return out, None, None, None


class _Scatter(torch.autograd.Function):
    """[slots, ...] -> [total, ...] by ``inverse``; slots that hold padding get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.slots = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        (grad,) = grads
        out = grad.new_zeros(ctx.slots, *grad.shape[1:])
        out[inverse] = grad
        return out, None


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    scaling: float,
    causal: bool = True,
    dropout: float = 0.0,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention within each document.

    Args:
        query: [1, heads, total, width]; ``key``, ``value``: [1, key-value heads, total, width] (grouped-query attention
            when there are fewer).
        documents: where the documents lie; ``total`` tokens.
        scaling: of the scores.
        prefix: keys and values [key-value heads, n, width] that every document sees in front of its own.

    Returns:
        [1, total, heads, width].
    """
    outputs: list[Tensor] = []
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    dtype, shared = _common(q, k, v), documents.shared
    alone = prefix is None and not shared and dropout == 0.0
    if alone and varlen.serves(q, v, dtype) and fast.take("variable-length attention"):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        return varlen.attend(q, k, v, documents.starts, documents.longest, scaling=scaling, causal=causal).unsqueeze(0)
    if shared:
        first = [x[:shared].unsqueeze(0).transpose(1, 2) for x in (q, k, v)]
        outputs.append(_attend(first, None, scaling, causal, dropout, prefix))
        # To a document the shared tokens are what a prefix is: keys and values in front of its own.
        ahead_of_all = [x[0] for x in first[1:]]
        both = ahead_of_all if prefix is None else [torch.cat(pair, dim=1) for pair in zip(prefix, ahead_of_all, strict=True)]
        prefix = (both[0], both[1])
    for rectangle in documents.rectangles:
        rows, longest = rectangle.rows, rectangle.longest
        if rectangle.valid is None and rows == 1 and longest == documents.total:
            parts = [x.unsqueeze(0).transpose(1, 2) for x in (q, k, v)]
        else:
            index = (rectangle.gather, rectangle.place, rectangle.slots)
            parts = [
                _Gather.apply(x, *index).view(rows, longest, x.shape[1], x.shape[2]).transpose(1, 2)  # type: ignore[no-untyped-call]
                for x in (q, k, v)
            ]
        mask = None if causal or rectangle.valid is None else rectangle.valid[:, None, None, :]
        outputs.append(_attend(parts, mask, scaling, causal, dropout, prefix))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    scattered: Tensor = _Scatter.apply(joined, documents.inverse)  # type: ignore[no-untyped-call]
    return scattered.unsqueeze(0)


def _attend(
    parts: Sequence[Tensor], mask: Tensor | None, scaling: float, causal: bool, dropout: float, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """[rows * length, heads, width] from query, key and value [rows, heads, length, width] of rows that see ``prefix`` and themselves."""
    query, key = parts[0], parts[1]
    rows, heads, length, _ = query.shape
    limit = _SHORT.get(query.dtype, (0, 0))[0 if causal else 1] if query.device.type == "cpu" and dropout == 0.0 else 0
    short = length <= limit and fast.take("attention of short rows by plain products")
    extra = 0
    if prefix is not None:
        parts, mask, extra = _with_prefix(parts, mask, prefix, square=causal and not short)
    if short:
        out = _short_attention(parts[0], parts[1], parts[2], mask, scaling, causal)
    else:
        grouped = heads > key.shape[1]
        out = F.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
        )[:, :, extra:]
    return out.transpose(1, 2).reshape(rows * length, heads, -1)


def _with_prefix(
    parts: Sequence[Tensor], mask: Tensor | None, prefix: tuple[Tensor, Tensor], *, square: bool
) -> tuple[list[Tensor], Tensor | None, int]:
    """Query, key and value [rows, heads, length, width] with the prefix's keys and values in front, and a mask (True: seen, or added to the
    scores) that shows them.

    Args:
        square: put queries of zeros in front as well, as many as the last of the results says: a causal kernel then lets
            every row's own queries see the whole prefix, without a mask. Their outputs are dropped, so they have no gradient.
    """
    query, key, value = parts
    rows, count = key.shape[0], prefix[0].shape[-2]
    key, value = (torch.cat([own.expand(rows, -1, -1, -1), x], dim=2) for own, x in zip(prefix, (key, value), strict=True))
    if mask is not None:
        seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat([seen(*mask.shape[:-1], count), mask], dim=-1)
    if square:
        query = torch.cat([query.new_zeros(rows, query.shape[1], count, query.shape[3]), query], dim=2)
    return [query, key, value], mask, count if square else 0


class _Products(torch.autograd.Function):
    """Attention by plain products. Queries are [rows, key-value heads, heads for each, length, width], keys and values [rows, key-value
    heads, keys, width]. Causal rows go in blocks of queries, each against the keys up to its end only: what a causal mask would hide is
    mostly not computed. The softmax's weights are kept, and nothing else that is square."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, causal: bool, scaling: float) -> Tensor:
        length, extra = query.shape[3], key.shape[2] - query.shape[3]
        count = max(1, round(length / _BLOCK)) if causal else 1
        edges = [length * i // count for i in range(count + 1)]
        out = query.new_empty(*query.shape[:4], value.shape[3])
        kept = []
        for start, end in itertools.pairwise(edges):
            some, seen = (query[:, :, :, start:end] * scaling).flatten(2, 3), extra + end if causal else key.shape[2]
            scores = some @ key[:, :, :seen].transpose(-1, -2)
            each = scores.view(*query.shape[:3], end - start, seen)
            if causal:
                later = torch.full((end - start, end - start), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
                each[..., extra + start :] += later
            elif hidden is not None:
                each += hidden
            weights = scores.softmax(-1)
            out[:, :, :, start:end] = (weights @ value[:, :, :seen]).view_as(out[:, :, :, start:end])
            kept += [some, weights]
        ctx.save_for_backward(key, value, *kept)
        ctx.edges, ctx.shape, ctx.scaling = edges, query.shape, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        key, value, *kept = ctx.saved_tensors
        for_query, for_key, for_value = grads[0].new_empty(ctx.shape), torch.zeros_like(key), torch.zeros_like(value)
        for index, (start, end) in enumerate(itertools.pairwise(ctx.edges)):
            some, weights = kept[2 * index : 2 * index + 2]
            seen, grad = weights.shape[-1], grads[0][:, :, :, start:end].flatten(2, 3)
            scores = torch._softmax_backward_data(grad @ value[:, :, :seen].transpose(-1, -2), weights, -1, weights.dtype)
            for_query[:, :, :, start:end] = (scores @ key[:, :, :seen]).view_as(for_query[:, :, :, start:end]) * ctx.scaling
            for_key[:, :, :seen] += scores.transpose(-1, -2) @ some
            for_value[:, :, :seen] += weights.transpose(-1, -2) @ grad
        return for_query, for_key, for_value, None, None, None


def _common(*parts: Tensor) -> torch.dtype:
    """The dtype that products of ``parts`` are computed in."""
    device = parts[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return functools.reduce(torch.promote_types, (part.dtype for part in parts))


def _short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> Tensor:
    """[rows, heads, longest, width] by plain products. On the CPU the fused kernel's backward pass costs more than these
    for short rows; query heads that share a key-value head are one taller matrix, so nothing is repeated."""
    if not query.dtype == key.dtype == value.dtype:
        # Under autocast positions turn queries and keys into float32; the fused kernel is given one dtype by autocast itself.
        query, key, value = (x.to(_common(query, key, value)) for x in (query, key, value))
    rows, heads, longest, width = query.shape
    shared = key.shape[1]
    hidden = None
    if mask is not None and not causal:
        hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf")).unsqueeze(2)
    each = query.reshape(rows, shared, heads // shared, longest, width)
    out: Tensor = _Products.apply(each, key.contiguous(), value.contiguous(), hidden, causal, scaling)  # type: ignore[no-untyped-call]
    return out.view(rows, heads, longest, -1)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    scaling: float,
    causal: bool = True,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same by a block-diagonal mask over the whole row; shapes as in :func:`packed_attention`."""
    own = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths))
    owner = torch.cat([own.new_full((documents.shared,), -1), own]).to(query.device)
    mask = (owner[:, None] == owner[None, :]) | (owner[None, :] == -1)
    if causal:
        mask = mask & torch.ones_like(mask).tril()
    if prefix is not None:
        mask = torch.cat([mask.new_ones(mask.shape[0], prefix[0].shape[-2]), mask], dim=1)
        key, value = (torch.cat([more[None], x], dim=2) for more, x in zip(prefix, (key, value), strict=True))
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = (query @ key.transpose(-1, -2)) * scaling
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls as attention. Without ``documents`` (generation, padded batches) it is plain SDPA."""
    documents: Documents | None = kwargs.pop("documents", None)
    states: Prefix | None = kwargs.pop("prefix_states", None)
    prefix = None if states is None else states.layer(_number(module), key)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        extra = 0
        if prefix is not None:
            square = causal and attention_mask is None and query.shape[2] > 1
            (query, key, value), attention_mask, extra = _with_prefix((query, key, value), attention_mask, prefix, square=square)
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain[0][:, extra:], None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise PackingUnsupportedError("the model's attention has a term that packed rows do not support")
    window = kwargs.get("sliding_window")
    if window is not None and documents.shared + documents.longest > window:
        raise PackingUnsupportedError(
            f"a row of {documents.shared + documents.longest} tokens is longer than the model's attention window of {window}"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return packed_attention(query, key, value, documents, scaling=scale, causal=causal, dropout=dropout, prefix=prefix), None


def _number(module: nn.Module) -> int:
    """Which layer of the model an attention module belongs to.

    Raises:
        UsageError: it does not know.
    """
    number = getattr(module, "layer_idx", None)
    if number is None:
        raise UsageError(
            f"the attention of this model ({type(module).__name__}) does not know its layer, so it can take no prefix of its own",
            hint="choose a method that does not depend on the attention, such as prompt_tuning or lora.",
        )
    return int(number)


class PackingUnsupportedError(Exception):
    """This model's attention cannot run over packed rows; the caller falls back to padded ones."""


def register() -> str:
    """Make the packed attention known to transformers and return its name for ``attn_implementation``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
