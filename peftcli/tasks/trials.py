"""Trials of what a model can do, on as few of its layers as show every kind of them: a model of 80 layers answers like one of 2."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import Tensor, nn

# What tells a layer its own number. Where its code depends on that, an attribute or the config says so as well (``layer_types``).
_NUMBER = "layer_idx"


def on_first_layers(model: nn.Module, trial: Callable[[], bool]) -> bool:
    """What ``trial`` says of ``model``. A yes of its first layers, with a layer of every kind among them, is taken for all; after anything
    else, an error too, the whole model is asked.

    Layers are of one kind that consist of modules of the same classes with the same settings: they run the same code on other numbers.
    """
    with _first_layers(model) as fewer:
        if fewer:
            with contextlib.suppress(Exception):  # a model may count on all of its layers: that is no answer
                if trial():
                    return True
    return trial()


@contextlib.contextmanager
def _first_layers(model: nn.Module) -> Iterator[bool]:
    """Leave the layers behind the last new kind out while this lasts; gives whether there are such."""
    name, kinds = _stack(model)
    count = max((kinds.index(kind) + 1 for kind in kinds), default=0)
    if count == len(kinds):
        yield False
        return
    parent, _, child = name.rpartition(".")
    owner, whole = model.get_submodule(parent), model.get_submodule(name)
    assert isinstance(whole, nn.ModuleList)
    owner._modules[child] = whole[:count]
    try:
        yield True
    finally:
        owner._modules[child] = whole


def _stack(model: nn.Module) -> tuple[str, list[Hashable]]:
    """Name of the list of all layers, and the kind of each; no kinds where there is no such list, or more than one."""
    config: Any = getattr(model, "config", None)
    depth = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    outer = [(name, stack) for name, stack in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        return "", []
    # What the config says of each layer by its number (which see a window only, which have no positions) is read by the code around them.
    by_number = [value for value in config.get_text_config().to_dict().values() if isinstance(value, (list, tuple)) and len(value) == depth]
    name, stack = outer[0]
    return name, [(_kind(layer), *(_nature(values[index]) for values in by_number)) for index, layer in enumerate(stack)]


def _kind(layer: nn.Module) -> Hashable:
    """What the code that a layer runs depends on: the classes and the settings of its modules, and what has been hooked into them."""
    return tuple(
        (name, type(module), *((key, _nature(value)) for key, value in vars(module).items() if key != _NUMBER))
        for name, module in layer.named_modules()
    )


def _nature(value: Any) -> Any:
    """A setting as something to hash and compare: what is worked with (tensors, objects) by its type only. A function is itself: a layer's
    own may do anything."""
    if isinstance(value, dict):
        return tuple((key if isinstance(key, str) else None, _nature(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_nature, value))
    if isinstance(value, (bool, int, float, str)):
        return (type(value), value)
    if callable(value) and not isinstance(value, (Tensor, nn.Module, type)):
        return id(value)
    return type(value)
