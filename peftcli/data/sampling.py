"""Which rows are held out and how often a source's rows appear: pure functions of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Key = TypeVar("_Key")
_HOLD_OUT_STREAM = 0
_WEIGHT_STREAM = 1


def weigh(count: int, weight: float, seed: int, source: int) -> list[int]:
    """Row numbers of a source: each as often as the weight's whole part says, and a random share for the rest.

    Args:
        count: rows of the source.
        weight: 1 takes each row once, 0.5 half of them, 2 each twice; at least one row is taken.
        source: the source's number, so that two sources draw differently.
    """
    whole, part = divmod(weight, 1.0)
    places = list(range(count)) * int(whole)
    extra = round(part * count)
    if not places:
        extra = max(extra, 1)
    return places + sorted(_random(seed, _WEIGHT_STREAM, source).permutation(count)[:extra].tolist())


def choose(keys: Sequence[_Key], fraction: float, seed: int) -> set[_Key]:
    """A random fraction of at least two distinct keys: at least one, and at least one is left."""
    count = min(max(round(fraction * len(keys)), 1), len(keys) - 1)
    return {keys[place] for place in _random(seed, _HOLD_OUT_STREAM, 0).permutation(len(keys))[:count]}


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, number])))
