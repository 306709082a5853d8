"""Attention over rows that are laid end to end without padding: no document sees another, exactly.

Rows of similar length are gathered into small rectangles, attention runs on each, and the results go back to their
places. Under a causal mask a row's padding comes after all its tokens, so no token ever attends to it; and the way back
takes tokens only, so padding gets no gradient. Both directions are pure gathers: deterministic on every device.

The plain reference (:func:`reference_attention`) builds the block-diagonal mask and is what the tests compare with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftcli.errors import UsageError
from peftcli.kernels import fast, streamed, varlen
from peftcli.kernels.documents import Documents, Padded
from peftcli.kernels.dropout import serves
from peftcli.kernels.products import products_attention

NAME = "peftcli_packed"
# Rows up to this many tokens take plain products on the CPU: (causal, in both directions). Measured on a core with AVX512-BF16, forward and
# backward, heads 9/3 of width 64: in bfloat16 8 rows of 192 tokens take 18 ms instead of 42 (fused attention), 2 of 1024 take 82 instead
# of 139, one of 4096 takes 710 instead of 833; in float32 4 of 384 take 45 instead of 62, one of 2048 takes 287 instead of 269, and without
# a causal mask, which spares half of the products, none gains.
_ANY = 1 << 62
_LONGEST = {torch.bfloat16: (_ANY, _ANY), torch.float32: (1024, 0), torch.float64: (1024, 0)}


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
    serving = _serving(q, k, v, dtype, documents, causal, dropout)
    if serving is not None:
        front = None if prefix is None else (prefix[0].to(dtype), prefix[1].to(dtype))
        q, k, v = (x.to(dtype) for x in (q, k, v))
        return serving(q, k, v, documents, scaling=scaling, causal=causal, dropout=dropout, prefix=front).unsqueeze(0)
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


def _serving(
    query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, documents: Documents | Padded, causal: bool, dropout: float
) -> Callable[..., Tensor] | None:
    """What computes attention of [total, heads, width] each in ``dtype`` on a CPU, or ``None`` where PyTorch's fused attention is to."""
    if streamed.serves(query, key, value, dtype, documents) and fast.take("attention in one compiled function"):
        return streamed.streamed_attention
    limit = _LONGEST.get(dtype, (0, 0))[0 if causal else 1] if query.device.type == "cpu" else 0
    draws = dropout == 0.0 or (query.dtype == dtype and serves(query, dropout))
    if documents.longest <= limit and draws and fast.take("attention by plain products"):
        return products_attention
    return None


def _attend(
    parts: Sequence[Tensor], mask: Tensor | None, scaling: float, causal: bool, dropout: float, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """[rows * length, heads, width] from query, key and value [rows, heads, length, width] of rows that see ``prefix`` and themselves."""
    query, key = parts[0], parts[1]
    rows, heads, length, _ = query.shape
    extra = 0
    if prefix is not None:
        parts, mask, extra = _with_prefix(parts, mask, prefix, square=causal)
    out = F.scaled_dot_product_attention(
        parts[0], parts[1], parts[2], attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=heads > key.shape[1]
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


def _common(*parts: Tensor) -> torch.dtype:
    """The dtype that products of ``parts`` are computed in."""
    device = parts[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return functools.reduce(torch.promote_types, (part.dtype for part in parts))


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
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if documents is None:
        padded = None if causal or prefix is not None or _has_terms(kwargs) else _padded(query, key, attention_mask)
        out = None if padded is None else _padded_attention(query, key, value, padded, scale, dropout)
        if out is not None:
            return out, None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        extra = 0
        if prefix is not None:
            square = causal and attention_mask is None and query.shape[2] > 1
            (query, key, value), attention_mask, extra = _with_prefix((query, key, value), attention_mask, prefix, square=square)
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain[0][:, extra:], None
    if _has_terms(kwargs):
        raise PackingUnsupportedError("the model's attention has a term that packed rows do not support")
    window = kwargs.get("sliding_window")
    if window is not None and documents.shared + documents.longest > window:
        raise PackingUnsupportedError(
            f"a row of {documents.shared + documents.longest} tokens is longer than the model's attention window of {window}"
        )
    return packed_attention(query, key, value, documents, scaling=scale, causal=causal, dropout=dropout, prefix=prefix), None


def _has_terms(kwargs: dict[str, Any]) -> bool:
    """Whether the model's attention adds something to its scores."""
    return any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))


def _padded(query: Tensor, key: Tensor, mask: Tensor | None) -> Padded | None:
    """The rows of a padded batch in training, where the mask hides what is behind each row's end and nothing else; found once for all
    layers, which are given the same mask."""
    rows, _, length, _ = query.shape
    if not torch.is_grad_enabled() or query.device.type != "cpu" or key.shape[2] != length:
        return None
    if mask is None:
        return Padded(rows, length, None)
    if mask.dtype != torch.bool or mask.shape[0] != rows or mask.shape[-1] != length:
        return None
    if isinstance(query, FakeTensor):  # a memory estimate: what numbers would tell is taken for granted
        return Padded(rows, length, None)
    found: Padded | None = getattr(mask, "peftcli_rows", None)
    if found is None and not hasattr(mask, "peftcli_rows"):
        seen = mask[:, 0, 0]
        lengths = seen.sum(1)
        ends = torch.arange(length) < lengths.unsqueeze(1)
        plain = bool((lengths > 0).all()) and bool((mask == ends[:, None, None]).all())
        found = Padded(rows, length, lengths) if plain else None
        mask.peftcli_rows = found  # type: ignore[attr-defined]
    return found


def _padded_attention(query: Tensor, key: Tensor, value: Tensor, rows: Padded, scaling: float, dropout: float) -> Tensor | None:
    """[rows, length, heads, width] from [rows, heads, length, width] of each; ``None`` where PyTorch's fused attention is to compute it."""
    dtype = _common(query, key, value)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    serving = _serving(q, k, v, dtype, rows, False, dropout)
    if serving is None:
        return None
    out = serving(q.to(dtype), k.to(dtype), v.to(dtype), rows, scaling=scaling, causal=False, dropout=dropout)
    return out.view(rows.rows, rows.longest, *out.shape[1:])


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
