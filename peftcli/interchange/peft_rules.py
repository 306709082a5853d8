"""Where PEFT's reading of ``adapter_config.json`` and of a file's keys differs from the plain one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcli.errors import CheckpointError
from peftcli.methods.base import Method
from peftcli.methods.targets import is_linear

# What PEFT puts between a module's name and `weight` in files that hold base weights, or the same weight once more.
_COPIES = (".modules_to_save", ".original_module")
_BASE = (".token_adapter.base_layer", ".base_layer", "")


def new_tokens(value: Any) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
    """(ids, layer names) of ``trainable_token_indices``: a list is of the embedding, a mapping names the layers."""
    lists = list(value.values()) if isinstance(value, dict) else [value or []]
    ids = lists[0] if lists else []
    if not all(isinstance(one, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in one) for one in lists):
        raise ValueError("trainable_token_indices must be lists of token ids")
    if any(one != ids for one in lists) or len(set(ids)) != len(ids):
        raise ValueError("trainable_token_indices must be the same, each once, for all layers")
    return tuple(ids), tuple(value) if isinstance(value, dict) else None


def check_ranks(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """No rank may be larger than what the file holds: layers of that size are about to be allocated."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    pattern = fields.get("rank_pattern")
    ranks = [fields.get("r"), fields.get("init_r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    too_large = [rank for rank in ranks if isinstance(rank, int) and rank > max(largest, 1)]
    if too_large:
        raise CheckpointError(f"{path} states the rank {too_large[0]}, but no tensor beside it has a side larger than {largest}")
    count = fields.get("num_virtual_tokens")
    if isinstance(count, int) and count > max(largest, 1):
        raise CheckpointError(f"{path} states {count} virtual tokens, but no tensor beside it has a side larger than {largest}")


def as_peft_means(method: Method[Any], fields: Mapping[str, Any], model: nn.Module) -> Method[Any]:
    """``method``, made from the file's ``fields``, with its lists of modules read by PEFT's rules where those are looser
    than ours: names that fit nothing are passed over, ``exclude_modules`` may be an expression, and ``modules_to_save``
    names ends of any length."""
    names = [name for name, _ in model.named_modules() if name]
    options: Any = method.config
    update: dict[str, Any] = {}
    for key in ("target_modules", "exclude_modules"):
        listed = getattr(options, key, None)
        if isinstance(listed, list):
            update[key] = [end for end in listed if any(name == end or name.endswith(f".{end}") for name in names)]
    excluded = fields.get("exclude_modules")
    if isinstance(excluded, str):
        update["exclude_modules"] = [name for name in names if re.fullmatch(excluded, name) and is_linear(model.get_submodule(name))]
    if getattr(options, "modules_to_save", None):
        update["modules_to_save"] = [name for name in names if name.endswith(tuple(options.modules_to_save))]
    return type(method)(options.model_copy(update=update))


def settled_pattern(pattern: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern`` by whole module names. The first key that fits wins, and files are written with
    sorted keys: where several keys fit a module, only whole names keep their meaning."""
    if len(pattern) < 2:
        return dict(pattern)
    settled: dict[str, Any] = {}
    for name in modules:
        value = next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)
        if value is not None:
            settled[name] = value
    return settled


def take_base_weights(model: Any, wanted: Iterable[str], tensors: Mapping[str, Tensor], prefix: str, origin: Path) -> dict[str, Tensor]:
    """Copy the embeddings that PEFT stores beside an adapter (it does so for resized vocabularies) into the base.

    Args:
        wanted: keys of the adapter's own tensors.
        prefix: of all keys.

    Returns:
        ``tensors`` without those, and without second copies of trained ones.

    Raises:
        CheckpointError: an embedding in the file has another shape than the model's.
    """
    wanted = set(wanted)
    left = dict(tensors)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if hasattr(model, "get_input_embeddings") else []
    for name, module in [(name, module) for name, module in model.named_modules() if any(module is end for end in ends)]:
        key = prefix + name
        if f"{key}.weight" in wanted:
            for copy in _COPIES:
                left.pop(f"{key}{copy}.weight", None)
            continue
        delta = f"{key}.token_adapter.trainable_tokens_delta"
        if delta not in wanted and hasattr(module, "trainable_tokens_delta"):
            left.pop(delta, None)  # tied: the embedding has the same rows
        for middle in _BASE:
            stored = left.pop(f"{key}{middle}.weight", None)
            if stored is None:
                continue
            if stored.shape != module.weight.shape:
                raise CheckpointError(
                    f"{origin}: {key}{middle}.weight is {tuple(stored.shape)}, the model's is {tuple(module.weight.shape)}",
                    hint="the vocabulary was resized for this adapter: its tokenizer files must lie beside it.",
                )
            # Not in place, for the same reason as in `hf_peft.load_tensors`.
            module.weight.data = stored.to(module.weight, copy=True)
    return left
