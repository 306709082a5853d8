"""Attention over documents laid end to end, by torch's variable-length kernel: one launch for all of them, without padding, on CUDA.

The plain reference (:func:`reference_varlen`) has the same arguments and attends to one document after the other.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What the kernel (FlashAttention) takes: compute capability 8.0, heads of at most this width, a multiple of 8.
_CAPABILITY, _WIDEST = (8, 0), 256


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` computes for these arguments.

    Args:
        query: [tokens, heads, width]; ``key``, ``value``: [tokens, key-value heads, width], fewer than ``heads`` with ``enable_gqa``.
        cu_seq_q, cu_seq_k: [documents + 1] int32, where each document begins, and the end.
        max_q, max_k: length of the longest document.
        window_size: (-1, -1): every token of the document is seen; (-1, 0): those up to the query's own.

    Returns:
        [tokens, heads, width].
    """
    assert window_size in ((-1, -1), (-1, 0)), window_size
    assert enable_gqa or query.shape[1] == key.shape[1]
    starts = cu_seq_q.tolist()
    assert starts == cu_seq_k.tolist()
    assert max_q == max_k == max(end - start for start, end in itertools.pairwise(starts))
    assert starts[-1] == query.shape[0]
    repeat, outputs = query.shape[1] // key.shape[1], []
    for start, end in itertools.pairwise(starts):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if window_size == (-1, 0):
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@functools.cache
def kernel() -> tuple[Callable[..., Any], bool] | None:
    """torch's kernel, and whether it shares key-value heads among queries by itself; ``None`` where this torch has none that fits."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return (varlen_attn, "enable_gqa" in known) if {"scale", "window_size"} <= set(known) else None


def serves(query: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes these in ``dtype``: half precision on a GPU that is new enough, heads of one width that it knows."""
    return (
        query.device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= _WIDEST
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= _CAPABILITY
        and kernel() is not None
    )


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, *, scaling: float, causal: bool) -> Tensor:
    """Attention within each document.

    Args:
        query: [tokens, heads, width]; ``key``, ``value``: [tokens, key-value heads, width].
        starts: [documents + 1] int32, where each document begins, and the end; ``longest``: tokens of the longest one.

    Returns:
        [tokens, heads, width].
    """
    found = kernel()
    assert found is not None
    function, shares = found
    repeat = query.shape[1] // key.shape[1]
    more: dict[str, Any] = {}
    if repeat > 1 and shares:
        more["enable_gqa"] = True
    elif repeat > 1:
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    out: Tensor = function(query, key, value, starts, starts, longest, longest, scale=scaling, window_size=window, **more)
    return out
