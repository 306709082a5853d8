"""95 % intervals. Rows are the independent units."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Z = 1.959963984540054
_RESAMPLES = 1000


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, p = _Z, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Interval of sum(sums) / sum(counts), [rows] each (delta method)."""
    n = len(sums)
    value = float(sums.sum() / counts.sum())
    if n < 2:
        return value, value
    residual = sums - value * counts
    error = math.sqrt(float((residual**2).sum()) * n / (n - 1)) / float(counts.sum())
    return value - _Z * error, value + _Z * error


def bootstrap(figure: Callable[[npt.NDArray[np.int64]], float], rows: int) -> tuple[float, float] | None:
    """Interval of any figure of rows, by resampling them (Efron, 1979): its 2.5 and 97.5 % quantiles. Always the same draws.

    Args:
        figure: takes row numbers, with repeats; may be NaN where a draw leaves it undefined. ``None`` where most draws do.
    """
    random = np.random.Generator(np.random.PCG64(0))
    drawn = np.asarray([figure(random.integers(0, rows, rows)) for _ in range(_RESAMPLES)])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < _RESAMPLES // 2:
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
