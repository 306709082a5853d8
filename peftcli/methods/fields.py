"""What layer methods share of PEFT's ``adapter_config.json``: which modules are adapted, and options by name pattern."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from torch import nn

from peftcli.errors import CheckpointError, UsageError, nearest
from peftcli.methods.kinds import AdapterLayer, NewTokens, adapter_layers

V = TypeVar("V")


def from_pattern(pattern: Mapping[str, V], name: str, default: V) -> V:
    """The value for the module called ``name``. PEFT's rule: a key is a regular expression for the end of the dotted name."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def expressions(pattern: dict[str, V]) -> dict[str, V]:
    """Raises:
    ValueError: a key of ``rank_pattern`` or ``alpha_pattern`` is no regular expression.
    """
    for key in pattern:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise ValueError(
                f"{key!r} is no regular expression ({error}); write the end of a module's name, such as q_proj, or an expression for it"
            ) from None
    return pattern


def check_patterns(options: Any, names: Collection[str]) -> None:
    """Raises:
    UsageError: a key of ``rank_pattern`` or ``alpha_pattern`` fits none of the adapted modules called ``names``.
    """
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(options, option):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                near = nearest(key, {name.rpartition(".")[2] for name in names})
                hint = f"did you mean {near!r}?" if near else f"an adapted module is {next(iter(names))}."
                raise UsageError(f"method.{option}: {key!r} fits none of the adapted modules", hint=hint)


def whole_number(value: float) -> int | float:
    """Whole numbers as PEFT writes them: 32, not 32.0."""
    return int(value) if float(value).is_integer() else value


def short_names(model: nn.Module, adapted: list[str]) -> list[str]:
    """The shortest list of name endings that means exactly the adapted modules, sorted (PEFT writes a set, whose order
    changes between runs)."""
    leaves = sorted({name.rpartition(".")[2] for name in adapted})
    names = {name.removesuffix(".base") for name, _ in model.named_modules()}
    meant = {name for name in names if any(name == leaf or name.endswith(f".{leaf}") for leaf in leaves)}
    return leaves if meant == set(adapted) else sorted(adapted)


def adapted_names(model: nn.Module, layer: type[AdapterLayer]) -> list[str]:
    """Dotted names of the modules that a layer of this class stands for, in the model's order."""
    return [name for name, module in adapter_layers(model).items() if isinstance(module, layer)]


def token_fields(model: nn.Module) -> dict[str, Any]:
    """``trainable_token_indices`` by the layer that owns the rows (a tied one shares them); empty without new tokens."""
    owned = {name for name, _ in model.named_parameters()}
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, NewTokens)}
    tokens = {name: [int(i) for i in layer.ids] for name, layer in layers.items() if f"{name}.trainable_tokens_delta" in owned}
    return {"trainable_token_indices": tokens} if tokens else {}


def module_fields(model: nn.Module, layer: type[AdapterLayer], options: Any) -> dict[str, Any]:
    """The fields that say which modules the file is for.

    Args:
        layer: the class of the method's adapter layers.
        options: of the method, for ``modules_to_save``.
    """
    return {
        "target_modules": short_names(model, adapted_names(model, layer)),
        "exclude_modules": None,
        "modules_to_save": options.modules_to_save or None,
        **token_fields(model),
    }


def module_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`module_fields`, PEFT's ``layers_to_transform`` included."""
    targets, layers = fields.get("target_modules"), fields.get("layers_to_transform")
    if isinstance(targets, list) and layers is not None:
        wanted = layers if isinstance(layers, list) else [layers]
        if not all(isinstance(i, int) and i >= 0 for i in wanted):
            raise ValueError(f"layers_to_transform is {layers!r}; allowed: the number of a block, or a list of numbers")
        ends = "|".join(re.escape(name) for name in sorted(targets))
        targets = rf"(.*\.)?({'|'.join(str(int(i)) for i in wanted)})\.(.*\.)?({ends})"
    return {
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "exclude_modules": sorted(fields.get("exclude_modules") or []),
        "modules_to_save": fields.get("modules_to_save") or [],
    }


def refuse(fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises:
    CheckpointError: a field has a value beside those that the method computes.
    """
    asked = [f"{key}={fields[key]!r}" for key, fine in allowed.items() if key in fields and fields[key] not in fine]
    if asked:
        raise CheckpointError(f"the adapter uses {', '.join(asked)}, which this version does not compute")
