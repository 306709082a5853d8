"""95 % intervals of figures, and what tells two models apart that were measured on the same rows. Rows are the independent units."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]

_Z = 1.959963984540054
_RESAMPLES = 1000
# Entries of the matrix that says how often each row is in each of some draws.
_CHUNK = 4_000_000


class Metric(NamedTuple):
    """A figure of a model's held-out rows.

    Attributes:
        value: the figure. ``interval``: its 95 % interval, ``None`` where there is none.
        paired: what :func:`compare` needs of it, short enough for a checkpoint; ``None``: it is not compared.
    """

    value: float
    interval: Interval | None
    paired: str | None = None


def wilson(hits: float, total: int) -> Interval:
    """Wilson's interval of a share (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, p = _Z, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio(sums: Tensor, counts: Tensor) -> Interval:
    """Interval of sum(sums) / sum(counts), [rows] each (delta method)."""
    n = len(sums)
    value = float(sums.sum() / counts.sum())
    if n < 2:
        return value, value
    residual = sums - value * counts
    error = math.sqrt(float((residual**2).sum()) * n / (n - 1)) / float(counts.sum())
    return value - _Z * error, value + _Z * error


def share(hits: npt.ArrayLike) -> Metric:
    """The share of rows that are hits, [rows] booleans, with Wilson's interval; compared row by row."""
    right = np.asarray(hits, dtype=np.bool_)
    bits = base64.b64encode(np.packbits(right).tobytes()).decode()
    return Metric(float(right.mean()) if len(right) else 0.0, wilson(int(right.sum()), len(right)), f"hits:{len(right)}:{bits}")


def mean_of_units(sums: Tensor, counts: Tensor) -> Metric:
    """sum(sums) / sum(counts), [rows] each: a loss over all units of the rows, with the interval of :func:`ratio`."""
    parts = torch.stack([sums.double(), counts.double()], -1).numpy()
    return of_sums(parts, lambda drawn: drawn[:, 0] / drawn[:, 1])._replace(interval=ratio(sums, counts))


def of_sums(parts: npt.ArrayLike, figure: Callable[[Floats], Floats]) -> Metric:
    """A figure that depends on the rows only through sums over them, such as a quotient of two; its interval by bootstrap.

    Args:
        parts: [rows, k] numbers to be summed over rows.
        figure: from sums [..., k] to figures [...]; NaN where it is undefined.
    """
    numbers = np.asarray(parts, dtype=np.float64)
    rows = len(numbers)
    many = max(1, _CHUNK // max(1, rows))
    draws = _draws(rows)
    drawn = []
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(figure(numbers.sum(0, keepdims=True))[0])
        while some := list(itertools.islice(draws, many)):
            drawn.append(figure(np.stack([np.bincount(chosen, minlength=rows) for chosen in some]) @ numbers))
    return _metric(value, np.concatenate(drawn), rows)


def of_rows(figure: Callable[[npt.NDArray[np.int64]], float], rows: int) -> Metric:
    """Any figure of rows, its interval by bootstrap.

    Args:
        figure: takes row numbers, with repeats; NaN where it is undefined.
    """
    return _metric(figure(np.arange(rows)), np.asarray([figure(chosen) for chosen in _draws(rows)]), rows)


def _draws(rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers of each resample (Efron, 1979). Always the same for as many rows, so that models can be compared draw by draw."""
    random = np.random.Generator(np.random.PCG64(0))
    return (random.integers(0, rows, rows) for _ in range(_RESAMPLES))


def _metric(value: float, drawn: Floats, rows: int) -> Metric:
    short = drawn.astype("<f4")
    return Metric(value, _quantiles(drawn), f"draws:{rows}:{base64.b64encode(short.tobytes()).decode()}")


def _quantiles(drawn: Floats) -> Interval | None:
    """2.5 and 97.5 %; ``None`` where most draws leave the figure undefined."""
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < _RESAMPLES // 2:
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """One figure of two models on the same rows: the second minus the first.

    Attributes:
        value: the difference. ``interval``: its 95 % interval.
        p_value: two-sided, of no difference.
        test: ``mcnemar`` (exact; McNemar, 1947), or ``bootstrap``: paired, the rows drawn together, so p is at least 0.002.
    """

    value: float
    interval: Interval
    p_value: float
    test: Literal["mcnemar", "bootstrap"]


def compare(first: Metric, second: Metric) -> Difference | None:
    """The paired test of one figure; ``None`` where the two were not measured on as many rows, or in a way that cannot be paired."""
    if first.paired is None or second.paired is None:
        return None
    (kind, rows, one), (other_kind, other_rows, two) = first.paired.split(":"), second.paired.split(":")
    if kind != other_kind or rows != other_rows or int(rows) == 0:
        return None
    if kind == "hits":
        return _mcnemar(_bits(one, int(rows)), _bits(two, int(rows)))
    change = np.frombuffer(base64.b64decode(two), "<f4").astype(np.float64) - np.frombuffer(base64.b64decode(one), "<f4")
    change = change[np.isfinite(change)]
    interval = _quantiles(change)
    if interval is None:
        return None
    # A draw without a difference speaks for neither side.
    below, above = int((change <= 0).sum()), int((change >= 0).sum())
    p = min(1.0, 2 * (1 + min(below, above)) / (len(change) + 1))
    return Difference(second.value - first.value, interval, p, "bootstrap")


def _bits(text: str, rows: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=rows).astype(np.bool_)


def _mcnemar(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Difference:
    """The exact test, and Newcombe's interval of a paired difference (Newcombe, 1998, method 10)."""
    from scipy.stats import binomtest

    n = len(first)
    both, lost, won = int((first & second).sum()), int((first & ~second).sum()), int((second & ~first).sum())
    neither = n - both - lost - won
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    one, two = (both + lost) / n, (both + won) / n
    (low_one, high_one), (low_two, high_two) = wilson(both + lost, n), wilson(both + won, n)
    # The correlation of the two, made smaller where it is positive.
    spread = math.sqrt((both + lost) * (won + neither) * (both + won) * (lost + neither))
    cross = both * neither - lost * won
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / spread if spread else 0.0

    def half(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up * up - 2 * phi * up * down + down * down))

    change = two - one
    return Difference(change, (change - half(two - low_two, high_one - one), change + half(high_two - two, one - low_one)), p, "mcnemar")
