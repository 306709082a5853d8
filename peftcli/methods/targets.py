"""Which modules a method adapts: ``all-linear``, a list of names, or a regular expression.

A name that matches nothing is an error that lists near names: an adapter that is silently absent is the worst outcome.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from peftcli.errors import UsageError
from peftcli.quantization import is_quantized

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """Linear layers in any storage: dense, quantized, and GPT-2's transposed ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_quantized(module) or type(module).__name__ == "Conv1D"


def output_layer_name(model: nn.Module) -> str | None:
    """The dotted name of the model's output embedding (`lm_head`), or ``None``."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def classification_heads(model: nn.Module) -> list[str]:
    """Dotted names of what a classifier has beside its body (``score``, ``classifier``); none for other models."""
    inner = getattr(model, "base_model", None)
    if not isinstance(inner, nn.Module) or inner is model or output_layer_name(model) is not None:
        return []
    return [name for name, child in model.named_children() if child is not inner and any(True for _ in child.parameters())]


def output_layers(model: nn.Module) -> list[str]:
    """Dotted names of the layers that turn features into answers: the output embedding, or a classifier's head."""
    head = output_layer_name(model)
    return [head] if head is not None else classification_heads(model)


def match(model: nn.Module, target_modules: str | Sequence[str], exclude_modules: Sequence[str] = ()) -> list[str]:
    """Dotted names of the modules to adapt, in the model's order.

    Args:
        target_modules: ``all-linear`` (every linear layer but the output layer), a list of names (a module matches
            when its dotted name is the name or ends with ``.name``), or a regular expression that matches the whole
            dotted name. The same rules as PEFT's.
        exclude_modules: names taken out again, by the rule for lists.

    Raises:
        UsageError: a name or expression that matches no linear or embedding layer; lists the nearest names.
    """
    candidates = {
        name: module for name, module in model.named_modules() if name and (is_linear(module) or isinstance(module, nn.Embedding))
    }
    if target_modules == ALL_LINEAR:
        heads = output_layers(model)
        chosen = {
            name
            for name, module in candidates.items()
            if is_linear(module) and not any(name == head or name.startswith(f"{head}.") for head in heads)
        }
    elif isinstance(target_modules, str):
        chosen = _match_regex(target_modules, candidates)
    else:
        chosen = _match_names(target_modules, candidates)
    if exclude_modules:
        _match_names(exclude_modules, candidates)
        chosen = {name for name in chosen if not any(_ends(name, end) for end in exclude_modules)}
    if not chosen:
        raise UsageError(f"method.target_modules: nothing is left to adapt; the model has {_leaf_list(candidates)}")
    return [name for name in candidates if name in chosen]


def _match_regex(pattern: str, candidates: Iterable[str]) -> set[str]:
    names = list(candidates)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"method.target_modules: {pattern!r} is no regular expression: {error}") from None
    chosen = {name for name in names if compiled.fullmatch(name)}
    if not chosen:
        raise UsageError(
            f"method.target_modules: no module's whole name matches {pattern!r}; the model has {_leaf_list(names)}",
            hint="write `all-linear`, a list such as [q_proj, v_proj], or an expression such as '.*\\.q_proj'.",
        )
    return chosen


def _match_names(targets: Sequence[str], candidates: Iterable[str]) -> set[str]:
    names = list(candidates)
    chosen: set[str] = set()
    faults: list[str] = []
    for target in targets:
        found = {name for name in names if _ends(name, target)}
        if not found:
            leaves = _leaves(names)
            near = difflib.get_close_matches(target, leaves, n=3, cutoff=0.4)
            faults.append(f"{target!r}" + (f" (near: {', '.join(near)})" if near else ""))
        chosen |= found
    if faults:
        raise UsageError(f"method.target_modules: no module is called {'; nor '.join(faults)}; the model has {_leaf_list(names)}")
    return chosen


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})


def _leaf_list(names: Iterable[str]) -> str:
    return ", ".join(_leaves(names)) or "no linear layers"


def parent_and_leaf(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds ``name``, and the last part of ``name``."""
    head, _, leaf = name.rpartition(".")
    return (model.get_submodule(head) if head else model), leaf


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent, leaf = parent_and_leaf(model, name)
    setattr(parent, leaf, module)


def stacks(model: nn.Module) -> list[list[str]]:
    """Dotted names of the transformer's layers, in order, for each of its stacks (an encoder-decoder has two): the outermost
    lists of modules of one class that hold linear layers."""
    found: list[tuple[str, list[str]]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        if len({type(layer) for layer in module}) == 1 and any(is_linear(inner) for inner in module.modules()):
            found.append((name, [f"{name}.{index}" for index in range(len(module))]))
    return [names for _, names in found]
