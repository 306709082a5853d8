"""Every method by name: the only list of methods in the project.

An entry is ``name: "module:Class"``, imported when it is asked for, so listing names costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftcli.errors import UsageError, nearest

if TYPE_CHECKING:
    from peftcli.methods.base import Method

_METHODS: dict[str, str] = {
    "full": "peftcli.methods.full:Full",
    "head_only": "peftcli.methods.head_only:HeadOnly",
    "freeze": "peftcli.methods.freeze:Freeze",
    "bitfit": "peftcli.methods.bitfit:BitFit",
    "adapter": "peftcli.methods.adapter:Adapter",
    "prefix_tuning": "peftcli.methods.prefix_tuning:PrefixTuning",
    "p_tuning": "peftcli.methods.p_tuning:PTuning",
    "prompt_tuning": "peftcli.methods.prompt_tuning:PromptTuning",
    "lora": "peftcli.methods.lora:Lora",
    "qlora": "peftcli.methods.qlora:QLora",
    "ia3": "peftcli.methods.ia3:Ia3",
    "loha": "peftcli.methods.loha:Loha",
    "lokr": "peftcli.methods.lokr:Lokr",
    "adalora": "peftcli.methods.adalora:AdaLora",
    "delta_lora": "peftcli.methods.delta_lora:DeltaLora",
    "vera": "peftcli.methods.vera:Vera",
}


def names() -> list[str]:
    """The names of all methods, in the order of the field's history."""
    return list(_METHODS)


def get(name: str) -> type[Method[Any]]:
    """The method class called ``name``.

    Raises:
        UsageError: there is no such method; names the nearest one.
    """
    try:
        module, _, attribute = _METHODS[name].partition(":")
    except KeyError:
        near = nearest(name, _METHODS)
        raise UsageError(
            f"no method is called {name!r}; allowed: {', '.join(_METHODS)}",
            hint=f"did you mean {near!r}?" if near else "`peftcli methods` describes each.",
        ) from None
    cls: type[Method[Any]] = getattr(importlib.import_module(module), attribute)
    return cls


def register(name: str, target: str) -> None:
    """Add a method from outside the package; ``target`` is ``"module:Class"``."""
    _METHODS[name] = target
