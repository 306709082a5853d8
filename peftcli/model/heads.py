"""Output layers that a task puts on a base: which weights the base lacks, and where they start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peftcli.errors import ModelError
from peftcli.methods.base import Context
from peftcli.methods.targets import classification_heads


def unfilled(model: nn.Module, keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the weights called ``keys``, which the base does not have, mean: (modules that may start anew, other keys).

    A classifier's head may, and so may a pooler below it, which some published encoders leave out.
    """
    heads = classification_heads(model)
    fresh: list[str] = []
    other: list[str] = []
    for key in sorted(keys):
        head = next((name for name in heads if key.startswith(f"{name}.")), None)
        if head is None and heads and ".pooler." in key:
            head = key[: key.index(".pooler.")] + ".pooler"
        if head is None:
            other.append(key)
        elif head not in fresh:
            fresh.append(head)
    return fresh, other


def poolers(model: nn.Module) -> list[str]:
    """Names of the layers between the body and a classifier's head.

    Raises:
        ModelError: there is none.
    """
    found = [name for name, module in model.named_modules() if name.endswith(".pooler") and any(True for _ in module.parameters())]
    if not found:
        raise ModelError(f"task.train_pooler: {type(model).__name__} has no pooler below its head", hint="take the option out.")
    return found


def start_afresh(model: nn.Module, names: Sequence[str], seed: int) -> None:
    """Give the modules called ``names`` initial values that are a function of the seed and their names: weights normal, as
    wide as the model's own (``initializer_range``, else 0.02), norms one, biases zero."""
    ctx = Context(seed)
    deviation = getattr(getattr(model, "config", None), "initializer_range", None) or 0.02
    for module in names:
        for name, parameter in model.get_submodule(module).named_parameters(prefix=module):
            values = torch.zeros(parameter.shape)
            if parameter.ndim > 1:
                values.normal_(std=deviation, generator=ctx.generator(name))
            elif name.endswith(".weight"):  # of a norm
                values.fill_(1.0)
            parameter.data.copy_(values)
