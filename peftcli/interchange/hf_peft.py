"""Adapter files of Hugging Face PEFT: write what stock ``peft`` loads, read what it writes.

``adapter_config.json`` is parsed by our own rules (nothing in it is imported or fetched), and tensors are checked by their
header before anything is allocated. What is written is a function of the weights and the recipe alone, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcli.errors import CheckpointError, UsageError
from peftcli.interchange.peft_rules import as_peft_means, check_ranks, new_tokens, settled_pattern, take_base_weights
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import AdapterLayer, Wrapper, adapter_layers, trainable_state, whole_modules
from peftcli.methods.targets import classification_heads

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The version of PEFT whose files these are; stock peft reads it to convert older files.
PEFT_VERSION = "0.21.2"
_PREFIX = "base_model.model."
# What stock PEFT trains and saves of a classifier without being told.
_PEFT_HEADS = ("classifier", "score")
_MAX_CONFIG, _MAX_HEADER = 1 << 20, 32 << 20
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, checked but not yet applied.

    Attributes:
        fields: of ``adapter_config.json``.
        tensors: by the file's own keys.
        method: our method for its type, with the options that the file states.
        new_token_ids: tokens whose rows the adapter holds; ``new_token_layers``: the layers' names, ``None`` for the embedding.
    """

    folder: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    method: Method[Any]
    new_token_ids: tuple[int, ...] = ()
    new_token_layers: tuple[str, ...] | None = None

    @property
    def base_model(self) -> str | None:
        """Name of the base model that it was trained on."""
        value = self.fields.get("base_model_name_or_path")
        return value if isinstance(value, str) and value else None


def file_key(model: nn.Module, method: Method[Any], name: str) -> str:
    """The key in the file for our parameter called ``name``."""
    if method.peft and name in method.peft.whole:
        return method.peft.whole[name]
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    plain = _without_base(model, path)
    if path.endswith(".base") and isinstance(model.get_submodule(path.removesuffix(".base")), AdapterLayer):
        plain += ".base_layer"  # the base's own parameter, such as a trained bias
    keys = method.peft.keys if method.peft else {}
    suffix = keys.get(attribute, attribute) if isinstance(owner, AdapterLayer) else attribute
    # PEFT puts prompts around the whole model, and everything else into it.
    inside = isinstance(model, Wrapper) and name.startswith("base.")
    prefix = "base_model." if inside else method.peft.prefix if method.peft else _PREFIX
    return f"{prefix}{plain}.{suffix}" if plain else f"{prefix}{suffix}"


def _without_base(model: nn.Module, path: str) -> str:
    """The dotted path with our ``base`` levels taken out."""
    parts: list[str] = []
    module = model
    for part in path.split(".") if path else []:
        if not (isinstance(module, (AdapterLayer, Wrapper)) and part == "base"):
            parts.append(part)
        module = module.get_submodule(part)
    return ".".join(parts)


def save_adapter(
    folder: Path,
    model: nn.Module,
    method: Method[Any],
    *,
    base_model: str,
    revision: str | None,
    task_type: str = "CAUSAL_LM",
    fresh: Sequence[str] = (),
) -> list[Path]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32) into ``folder``; returns the two paths.

    Args:
        fresh: modules that the base has no weights for; trained and saved whole, as a classifier's head is.
    """
    if method.peft is None:
        raise CheckpointError(f"{method.config.name} has no file format of PEFT's")
    folder.mkdir(parents=True, exist_ok=True)
    wrapped = isinstance(model, Wrapper)
    new = [*classification_heads(cast(nn.Module, model.base) if wrapped else model), *fresh]
    fields = {
        "peft_type": method.peft.peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "auto_mapping": None,
        "peft_version": PEFT_VERSION,
        **method.peft_config(model),
    }
    if "tokenizer_name_or_path" in fields and fields.get("prompt_tuning_init_text") is not None:
        fields["tokenizer_name_or_path"] = base_model
    if wrapped and not all(name.endswith(_PEFT_HEADS) for name in new):
        fields["modules_to_save"] = sorted(new)
    if "modules_to_save" in fields and not wrapped:
        # Whole names: PEFT takes every module whose name ends with the text, `input_layernorm` for `norm`.
        named = {*whole_modules(model, fields["modules_to_save"] or ()), *(name for name in new if _trained(model, name))}
        fields["modules_to_save"] = sorted(named) or fields["modules_to_save"]
    for key in ("rank_pattern", "alpha_pattern"):
        if fields.get(key) and hasattr(method.config, key):
            # In the order in which the options have them.
            ordered = {name: fields[key][name] for name in getattr(method.config, key)}
            fields[key] = settled_pattern(ordered, adapter_layers(model))
    ours = method.to_file(model, {name: p.detach().to("cpu", torch.float32) for name, p in trainable_state(model).items()})
    tensors = {file_key(model, method, name): tensor.contiguous() for name, tensor in ours.items()}
    weights, config = folder / WEIGHTS, folder / CONFIG
    aside = weights.with_suffix(".partial")
    save_file(dict(sorted(tensors.items())), aside, metadata={"format": "pt"})
    os.replace(aside, weights)
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [config, weights]


def _trained(model: nn.Module, name: str) -> bool:
    """Whether the module called ``name`` is trained whole, and not adapted."""
    module = model.get_submodule(name)
    return not isinstance(module, AdapterLayer) and any(p.requires_grad for p in module.parameters())


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder.

    Raises:
        CheckpointError: a file is missing or damaged, asks for a method or option that is unknown, or holds numbers
            that are not finite.
    """
    path = folder / CONFIG
    fields = read_config(path)
    peft_type = fields.get("peft_type")
    classes = {name: registry.get(name) for name in registry.names()}
    found = next((name for name, cls in classes.items() if cls.peft is not None and cls.peft.peft_type == peft_type), None)
    if found is None:
        known = sorted({cls.peft.peft_type for cls in classes.values() if cls.peft is not None})
        raise CheckpointError(f"{path}: peft_type {peft_type!r} is not known here; known: {', '.join(known)}")
    try:
        # An expression in exclude_modules needs the model; `as_peft_means` looks at it.
        plain = {key: value for key, value in fields.items() if key != "exclude_modules" or not isinstance(value, str)}
        method = classes[found](classes[found].Config.model_validate({"name": found, **classes[found].from_peft(plain)}))
        ids, layers = new_tokens(fields.get("trainable_token_indices"))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is not sound: {error}") from None
    tensors = read_tensors(folder / WEIGHTS, empty=method.peft is not None and method.peft.empty)
    if method.peft is None or method.peft.rank_is_size:
        check_ranks(path, fields, tensors)
    return AdapterFile(folder, fields, tensors, method, ids, layers)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of an adapter's config.

    Raises:
        CheckpointError: it is missing, too large or no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise CheckpointError(f"{path} is larger than {_MAX_CONFIG} bytes; that is no adapter's config")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} holds no adapter: there is no {path.name}", hint="name a run's folder or its adapter/ folder."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return fields


def read_tensors(path: Path, *, empty: bool = False) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose header, dtypes and values are sound.

    Args:
        empty: tensors without elements are sound.

    Raises:
        CheckpointError: with what is wrong.
    """
    if not path.is_file():
        pickled = path.parent / "adapter_model.bin"
        hint = "adapter_model.bin is a pickle, which can run code and is not read; convert it with peft." if pickled.exists() else None
        raise CheckpointError(f"{path} is missing", hint=hint)
    try:
        with open(path, "rb") as handle:
            head = handle.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= size <= min(_MAX_HEADER, path.stat().st_size - 8):
                raise CheckpointError(f"{path} is no safetensors file: its header claims {size} bytes")
            header = json.loads(handle.read(size))
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"{path}: {key} has dtype {entry['dtype']}; allowed: {', '.join(_DTYPES)}")
            if math.prod(entry["shape"]) == 0 and not empty:
                raise CheckpointError(
                    f"{path}: {key} is empty (shape {entry['shape']})", hint="weights of a sharded model were saved without being gathered."
                )
        tensors = load_file(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(f"{path}: {len(bad)} tensors hold NaN or infinity, such as {bad[0]}")
    return tensors


def apply_adapter(model: nn.Module, adapter: AdapterFile, ctx: Context | None = None) -> nn.Module:
    """Apply the adapter's method to ``model`` and load its weights.

    Raises:
        CheckpointError: keys or shapes do not fit the model; lists what is missing and what is not expected.
    """
    ctx = ctx or Context()
    layers = adapter.new_token_layers
    if adapter.new_token_ids and layers is None:
        embedding = cast(Any, model).get_input_embeddings()
        layers = tuple(name for name, module in model.named_modules() if module is embedding)
    ctx = replace(ctx, new_token_ids=adapter.new_token_ids, new_token_layers=layers, from_file=True)
    try:
        method = as_peft_means(adapter.method, adapter.fields, model)
        if "num_virtual_tokens" in adapter.fields:  # those methods have no option for it
            saved = tuple(adapter.fields.get("modules_to_save") or ())
            there = [
                name for name, module in model.named_modules() if saved and name.endswith(saved) and any(True for _ in module.parameters())
            ]
            ctx = replace(ctx, fresh=tuple(dict.fromkeys([*ctx.fresh, *there])))
        applied = method.apply(model, ctx)
    except (UsageError, re.error) as error:
        raise CheckpointError(f"{adapter.folder / CONFIG} does not fit the model: {error}") from None
    load_tensors(applied, method, adapter.tensors, adapter.folder / WEIGHTS)
    return applied


def as_parameters(model: nn.Module, method: Method[Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, by its keys, in the shapes that the trainable parameters have."""
    names = {file_key(model, method, name): name for name in method.file_targets(model)}
    known = method.from_file(model, {names[key]: tensor for key, tensor in tensors.items() if key in names})
    found = {file_key(model, method, name): tensor for name, tensor in known.items()}
    return {key: tensor for key, tensor in tensors.items() if key not in names} | found


def load_tensors(model: nn.Module, method: Method[Any], tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Copy a file's tensors into the trainable parameters of ``model``; every key must be used, every parameter filled."""
    wanted = {file_key(model, method, name): target for name, target in method.file_targets(model).items()}
    tensors = as_parameters(model, method, take_base_weights(model, wanted, tensors, _PREFIX, origin))
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        parts = [f"{len(keys)} {what} such as {keys[0]}" for keys, what in ((missing, "missing"), (unexpected, "not expected")) if keys]
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(parts)}", hint="is it the adapter of another base model?")
    with torch.no_grad():
        for key, parameter in wanted.items():
            if tensors[key].shape != parameter.shape:
                raise CheckpointError(f"{origin}: {key} is {tuple(tensors[key].shape)}, the model needs {tuple(parameter.shape)}")
            # A tensor of its own, never a write in place: what was there may be the base's, which other adapters share.
            parameter.data = tensors[key].to(parameter, copy=True)
