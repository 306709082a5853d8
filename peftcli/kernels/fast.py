"""The one switch of all fast paths, and which of them have been taken.

A fast path computes what its plain reference computes, in less time or memory. Whoever has one asks :func:`on` or :func:`take` before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_state: dict[str, bool] = {"on": True}
_taken: dict[str, None] = {}


def switch(*, on: bool) -> None:
    """Turn all fast paths on or off, for the whole process, and forget which were taken."""
    _state["on"] = on
    _taken.clear()


def on() -> bool:
    """Whether fast paths may be taken."""
    return _state["on"]


def take(name: str) -> bool:
    """Whether the fast path called ``name`` may be taken; if so, it is noted."""
    if _state["on"]:
        _taken[name] = None
    return _state["on"]


def taken() -> list[str]:
    """Names of the fast paths that were taken, in the order in which they came."""
    return list(_taken)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Without fast paths while this lasts."""
    before = _state["on"]
    _state["on"] = False
    try:
        yield
    finally:
        _state["on"] = before
