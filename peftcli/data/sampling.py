"""Which rows are held out and how often a source's rows appear: pure functions of the seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
_HOLD_OUT_STREAM = 0
_WEIGHT_STREAM = 1


def weigh(count: int, weight: float, seed: int, source: int) -> Places:
    """Row numbers of a source: each as often as the weight's whole part says, and a random share for the rest.

    Args:
        count: rows of the source.
        weight: 1 takes each row once, 0.5 half of them, 2 each twice; at least one row is taken.
        source: the source's number, so that two sources draw differently.
    """
    whole, part = divmod(weight, 1.0)
    places = np.tile(np.arange(count), int(whole))
    extra = max(round(part * count), 0 if len(places) else 1)
    return np.concatenate([places, np.sort(_random(seed, _WEIGHT_STREAM, source).permutation(count)[:extra])])


def choose(count: int, fraction: float, seed: int) -> Places:
    """A random fraction of the numbers below ``count``, which is at least 2: at least one, and at least one is left."""
    taken = min(max(round(fraction * count), 1), count - 1)
    return _random(seed, _HOLD_OUT_STREAM, 0).permutation(count)[:taken]


def hold_out(keys: Sequence[Keys], fraction: float, seed: int) -> list[npt.NDArray[np.bool_]] | None:
    """Which rows of each source are held out, as a mask; rows with the same key stay on the same side.

    Returns:
        ``None`` where there are fewer than two different rows.
    """
    distinct, place = _numbered(np.concatenate(keys))
    if distinct < 2:
        return None
    taken = np.zeros(distinct, np.bool_)
    taken[choose(distinct, fraction, seed)] = True
    return np.split(taken[place], np.cumsum([len(part) for part in keys])[:-1])


def repeats(keys: Sequence[Keys]) -> list[npt.NDArray[np.bool_]]:
    """Which rows of each source have the key of an earlier one, in the same source or one before it."""
    whole = np.concatenate(keys)
    again = np.ones(len(whole), np.bool_)
    again[np.unique(whole, return_index=True)[1]] = False
    return np.split(again, np.cumsum([len(part) for part in keys])[:-1])


def _numbered(keys: Keys) -> tuple[int, Places]:
    """How many different keys there are, and for each the number of its first appearance among them."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return len(first), rank[inverse]


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, number])))
