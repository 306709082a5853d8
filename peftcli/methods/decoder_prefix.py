"""Prefixes in encoder-decoders of the T5 family: n virtual keys and values in the decoder's self-attention, and nowhere else, as in PEFT.

They stand in front of the cache, so T5's relative positions count them. PEFT 0.21 keeps room for those of cross-attention between the ones
of self-attention, drops what is there, and begins again where its values end: in a decoder of 8 layers, layers 1 and 5 share their prefix
and half of what is trained is never used. Here every layer has its own. Files hold them where PEFT looks; with twice the number of layers
it never begins again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcli.errors import CheckpointError, UsageError
from peftcli.kernels.attention import Prefix
from peftcli.methods.prompts import PromptedLayers
from peftcli.methods.targets import classification_heads


class PromptedDecoder(PromptedLayers):
    """As :class:`PromptedLayers`, for an encoder-decoder.

    Raises:
        UsageError: the decoder's attention is not that of T5, or the model judges texts and writes none.
    """

    def __init__(self, base: nn.Module, values: Tensor | None, encoder: nn.Module | None, layers: int, heads: int) -> None:
        super().__init__(base, values, encoder, layers, heads)
        if classification_heads(base):
            raise UsageError(
                f"{type(base).__name__} judges texts, and takes no prefix: PEFT's files have none for an encoder-decoder that does",
                hint="choose a method that does not depend on the attention, such as lora.",
            )
        found = [module for module in cast(Any, base).get_decoder().modules() if _takes_prefix(module)]
        if len(found) != layers:
            raise UsageError(
                f"the decoder of {type(base).__name__} has an attention that takes no prefix; that of T5 does",
                hint="choose a method that does not depend on the attention, such as prompt_tuning or lora.",
            )
        for module in found:
            # They stay: a checkpointed layer runs again in the backward pass. Without a prefix they do nothing.
            module.register_forward_pre_hook(_put_in_front, with_kwargs=True)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the model's: [rows, length] ids of the sources, and what the decoder reads."""
        prefix = self.prefix()
        out = self.base(input_ids=input_ids, attention_mask=attention_mask, prefix_states=prefix, **kwargs)
        self._see(prefix)
        return out


class _Ahead:
    """A layer's cache with the prefix in front of it, as far as attention asks.

    Args:
        cache: keys and values of the tokens so far; ``None`` where none are kept.
    """

    def __init__(self, prefix: Prefix, cache: Any) -> None:
        self.prefix, self.cache = prefix, getattr(cache, "self_attention_cache", cache)

    def get_seq_length(self, layer: int) -> int:
        before = 0 if self.cache is None else int(self.cache.get_seq_length(layer))
        return self.prefix.keys.shape[2] + before

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, ...]:
        """[rows, heads, n + length, width] keys and values."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, layer)
        ahead = self.prefix.layer(layer, keys)
        return tuple(torch.cat([own.expand(len(x), -1, -1, -1), x], dim=2) for own, x in zip(ahead, (keys, values), strict=True))


def _takes_prefix(module: nn.Module) -> bool:
    """Whether a module is self-attention that takes a cache, a mask, and no positions but those that the cache tells."""
    asks = inspect.signature(module.forward).parameters
    return getattr(module, "is_causal", False) and hasattr(module, "compute_bias") and {"mask", "past_key_values"} <= asks.keys()


def _put_in_front(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    prefix: Prefix | None = kwargs.pop("prefix_states", None)
    if prefix is None:
        return None
    kwargs["past_key_values"] = _Ahead(prefix, kwargs.get("past_key_values"))
    kwargs["mask"] = _seen(kwargs.get("mask"), args[0], prefix.keys.shape[2])
    return args, kwargs


def _seen(mask: Tensor | None, hidden: Tensor, count: int) -> Tensor | None:
    """The mask [rows or 1, 1, queries, keys] (True: seen, or added to the scores) with the prefix in front, which every query sees."""
    if mask is None:
        length = hidden.shape[1]
        if length == 1:  # a token that is being written sees all before it
            return None
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device).tril()
    ahead = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([ahead(*mask.shape[:-1], count), mask], dim=-1)


def for_peft(values: Tensor, layers: int) -> Tensor:
    """[n, 2 layers x width] values as PEFT's files hold them, [n, 4 layers x width]: behind each layer's pair room for another."""
    pairs = values.view(len(values), layers, 2, -1)
    return torch.cat([pairs, torch.zeros_like(pairs)], dim=2).flatten(1)


def used_by_peft(stored: Tensor, layers: int, width: int) -> Tensor:
    """The [n, 2 layers x width] values that PEFT would use of a file's.

    Raises:
        CheckpointError: the file's are of another width.
    """
    if stored.ndim != 2 or stored.shape[1] % (2 * width) or not stored.shape[1]:
        raise CheckpointError(f"the prefix is {tuple(stored.shape)}, which is no number of keys and values {width} wide")
    parts = stored.view(len(stored), -1, width)
    return parts[:, [(4 * layer + side) % parts.shape[1] for layer in range(layers) for side in (0, 1)]].flatten(1)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises:
    CheckpointError: PEFT itself would mix up the caches of self-attention and cross-attention.
    """
    if fields.get("task_type") == "SEQ_2_SEQ_LM" and fields.get("num_transformer_submodules") == 1:
        raise CheckpointError("the adapter has num_transformer_submodules=1, with which PEFT puts no sound prefix into an encoder-decoder")
