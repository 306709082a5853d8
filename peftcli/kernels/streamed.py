"""Attention within each document in one compiled function (``attention.c``), for CPUs that multiply bfloat16 numbers (AVX512-BF16): the
scores exist for a few queries and keys at a time, nothing is gathered into rectangles, and no padding is computed.

The plain reference is :func:`peftcli.kernels.products.products_attention`, which computes the same with PyTorch's products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftcli.kernels import native
from peftcli.kernels.documents import Documents, Padded
from peftcli.kernels.dropout import draw

# Documents are shared out into so many parts whose gradients for a shared beginning are summed apart; a fixed number, so that the sums do
# not depend on the threads.
_SLICES = 8
# Widths of a head are multiples of it, and heads that share a key-value head are at most so many.
_WIDTH, _GROUP = 32, 64


def serves(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype, documents: Documents | Padded) -> bool:
    """Whether :func:`streamed_attention` takes these, computed in ``dtype``: [total, heads, width] each. With few documents and heads for
    many threads, products that share one product among all threads are the better choice."""
    if dtype != torch.bfloat16 or query.device.type != "cpu" or not native.has("attention", dtype):
        return False
    heads, groups = query.shape[1], key.shape[1]
    shaped = query.shape[2] == key.shape[2] == value.shape[2] and query.shape[2] % _WIDTH == 0 and heads // groups <= _GROUP
    return shaped and groups * min(len(documents.spans), _SLICES) >= torch.get_num_threads()


class _Streamed(torch.autograd.Function):
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
        # What is padding is given nothing.
        out = torch.zeros_like(query) if isinstance(documents, Padded) else torch.empty_like(query)
        tops, shares = (query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(2))
        inputs = (query, key, value, more_keys, more_values, documents.spans, seed)
        sizes = _sizes(query, key, more_keys, documents, causal)
        native.call("attention", query, *inputs, out, tops, shares, *_scratch(sizes, documents), *sizes, scaling, dropout)
        ctx.save_for_backward(query, key, value, more_keys, more_values, seed, out, tops, shares)
        ctx.documents, ctx.causal, ctx.scaling, ctx.dropout = documents, causal, scaling, dropout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, more_keys, more_values, seed, out, tops, shares = ctx.saved_tensors
        documents: Documents | Padded = ctx.documents
        make = torch.zeros_like if isinstance(documents, Padded) else torch.empty_like
        for_query, for_key, for_value = make(query), make(key), make(value)
        sizes = _sizes(query, key, more_keys, documents, ctx.causal)
        count, _, groups, width, prefix, shared, _ = sizes
        slices = min(count, _SLICES)
        fronts = [query.new_zeros(slices, groups, prefix + shared, width, dtype=torch.float32) for _ in range(2)]
        inputs = (query, key, value, more_keys, more_values, documents.spans, seed)
        given = (out, grads[0].contiguous(), tops, shares, for_query, for_key, for_value, *fronts, *_scratch(sizes, documents), slices)
        native.call("attention_backward", query, *inputs, *given, *sizes, ctx.scaling, ctx.dropout)
        for_more: list[Tensor | None] = []
        for front, own, more in zip(fronts, (for_key, for_value), (more_keys, more_values), strict=True):
            total = front.sum(0)
            own[:shared] = total[:, prefix:].transpose(0, 1)
            for_more.append(None if more is None else total[:, :prefix].to(more.dtype))
        return for_query, for_key, for_value, *for_more, None, None, None, None


def _sizes(
    query: Tensor, key: Tensor, more_keys: Tensor | None, documents: Documents | Padded, causal: bool
) -> tuple[int, int, int, int, int, int, int]:
    """Documents, heads, key-value heads, width, keys in front of all, tokens of the shared beginning, causal."""
    prefix = 0 if more_keys is None else more_keys.shape[1]
    return len(documents.spans), query.shape[1], key.shape[1], query.shape[2], prefix, documents.shared, int(causal)


def _scratch(sizes: tuple[int, ...], documents: Documents | Padded) -> tuple[Tensor, int]:
    """Memory for each thread, and how many bytes each has."""
    _, heads, groups, width, prefix, shared, _ = sizes
    longest = max(documents.longest, shared)
    needed = native.ask("attention_scratch", torch.bfloat16, longest, longest + prefix + shared, width, heads // groups)
    return torch.empty(torch.get_num_threads(), needed, dtype=torch.uint8), needed


def streamed_attention(
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
    """Attention within each document; arguments and result as in :func:`peftcli.kernels.products.products_attention`, all in bfloat16, and
    :func:`serves` must take them. Dropout draws by the query's token and head and the number of the key. Padding gets zeros."""
    parts = [x.contiguous() for x in (query, key, value)]
    front = (None, None) if prefix is None else tuple(x.contiguous() for x in prefix)
    out: Tensor = _Streamed.apply(*parts, *front, documents, causal, scaling, float(dropout))  # type: ignore[no-untyped-call]
    return out
