"""How far two labellings agree, from counts that are summed over rows: fast enough to be resampled a thousand times."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from peftcli.tasks.intervals import Floats

Bools = npt.NDArray[np.bool_]


def tallies(found: Bools, true: Bools) -> Floats:
    """[rows, kinds * 3] counts for :func:`peftcli.tasks.intervals.of_sums`: for each kind whether it is right, found and true.

    Args:
        found, true: [rows, kinds].
    """
    return np.stack([found & true, found, true], -1).reshape(len(found), -1).astype(np.float64)


def _kinds(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Right, found and true: [draws, kinds] each."""
    right, found, true = np.moveaxis(sums.reshape(len(sums), -1, 3), -1, 0)
    return right, found, true


def quotient(top: Floats, bottom: Floats) -> Floats:
    """``top / bottom``, zero where that is 0 / 0, as is usual for precision and F1."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def macro_f1(sums: Floats) -> Floats:
    """[draws] the mean of the kinds' F1."""
    right, found, true = _kinds(sums)
    mean: Floats = quotient(2 * right, found + true).mean(-1)
    return mean


def micro_f1(sums: Floats) -> Floats:
    """[draws] F1 of all kinds together."""
    right, found, true = (part.sum(-1) for part in _kinds(sums))
    return quotient(2 * right, found + true)


def last_f1(sums: Floats) -> Floats:
    """[draws] F1 of the last kind: of the positive class, where there are two."""
    right, found, true = (part[:, -1] for part in _kinds(sums))
    return quotient(2 * right, found + true)


def matthews(sums: Floats) -> Floats:
    """[draws] Matthews' correlation of classes (Gorodkin, 2004): each row has one kind. Zero where one side has one class only."""
    right, found, true = _kinds(sums)
    rows = true.sum(-1)
    shared = right.sum(-1) * rows - (found * true).sum(-1)
    spread = (rows**2 - (found**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
    return quotient(shared, np.sqrt(np.maximum(spread, 0.0)))
