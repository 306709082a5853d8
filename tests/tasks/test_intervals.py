"""Intervals cover what they promise, and paired tests tell chance from a difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from peftcli.tasks.intervals import Metric, compare, mean_of_units, of_rows, of_sums, ratio, share, wilson


def random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize(("total", "p"), [(20, 0.5), (50, 0.1), (200, 0.95)])
def test_wilson_covers(total: int, p: float) -> None:
    inside = sum(binom.pmf(hits, total, p) for hits in range(total + 1) if wilson(hits, total)[0] <= p <= wilson(hits, total)[1])
    assert 0.92 <= inside <= 0.98


def test_a_quotient_of_sums_is_the_same_by_rows_and_by_sums() -> None:
    numbers = random().random((60, 2)) + 0.5
    one = of_sums(numbers, lambda sums: sums[:, 0] / sums[:, 1])
    two = of_rows(lambda rows: float(numbers[rows, 0].sum() / numbers[rows, 1].sum()), 60)
    assert one.value == pytest.approx(two.value, rel=1e-12)
    assert one.interval == pytest.approx(two.interval, rel=1e-12)
    # The bootstrap agrees with the delta method where both hold.
    delta = ratio(torch.from_numpy(numbers[:, 0]), torch.from_numpy(numbers[:, 1]))
    assert one.interval == pytest.approx(delta, abs=0.1 * (delta[1] - delta[0]))


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random().random((60, 2))
    whole = of_sums(numbers, lambda sums: sums[:, 0] / sums[:, 1])
    monkeypatch.setattr("peftcli.tasks.intervals._CHUNK", 600)
    parts = of_sums(numbers, lambda sums: sums[:, 0] / sums[:, 1])
    assert parts.interval == pytest.approx(whole.interval, rel=1e-12)


def test_a_loss_keeps_its_interval_and_can_be_compared() -> None:
    sums, counts = torch.rand(50, dtype=torch.float64) * 9, torch.randint(1, 9, (50,))
    metric = mean_of_units(sums, counts)
    assert metric.value == pytest.approx(float(sums.sum() / counts.sum()))
    assert metric.interval == ratio(sums, counts)
    better = compare(metric, mean_of_units(sums * 0.9, counts))
    assert better is not None and better.value == pytest.approx(-0.1 * metric.value)
    assert better.interval[0] < better.value < better.interval[1] < 0
    assert better.p_value == pytest.approx(2 / 1001)


def test_mcnemar_counts_only_what_changed() -> None:
    first = np.asarray([1] * 40 + [0] * 20 + [1] * 3 + [0] * 12, dtype=bool)
    second = np.asarray([1] * 40 + [0] * 20 + [0] * 3 + [1] * 12, dtype=bool)
    found = compare(share(first), share(second))
    assert found is not None and found.test == "mcnemar"
    assert found.value == pytest.approx(9 / 75)
    assert found.p_value == pytest.approx(binomtest(12, 15).pvalue)
    assert found.interval[0] < found.value < found.interval[1]
    back = compare(share(second), share(first))
    assert back is not None and back.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_all_wrong_to_all_right_is_no_interval_of_one_point() -> None:
    found = compare(share(np.zeros(30, dtype=bool)), share(np.ones(30, dtype=bool)))
    assert found is not None and found.p_value < 1e-8
    assert 0.8 < found.interval[0] < found.interval[1] <= 1.0


def test_the_interval_of_a_paired_difference_covers() -> None:
    """Newcombe's interval over simulated pairs of which some change: close to 95 % of them hold the true difference."""
    draws, n, inside = random(1), 60, 0
    for _ in range(400):
        kind = draws.choice(4, size=n, p=[0.5, 0.2, 0.1, 0.2])  # both, won, lost, neither
        found = compare(share((kind == 0) | (kind == 2)), share((kind == 0) | (kind == 1)))
        assert found is not None
        inside += found.interval[0] <= 0.1 <= found.interval[1]
    assert 0.92 <= inside / 400 <= 0.985


def test_without_a_difference_small_p_values_are_rare() -> None:
    """Both tests call chance a difference in about one case of twenty or less."""
    draws, by_rows, by_hits = random(2), 0, 0
    for _ in range(80):
        one, two = draws.normal(size=(2, 40))
        found = compare(*(of_sums(np.stack([x, np.ones(40)], -1), lambda sums: sums[:, 0] / sums[:, 1]) for x in (one, two)))
        hits = compare(share(one > 0), share(two > 0))
        assert found is not None and hits is not None
        by_rows, by_hits = by_rows + (found.p_value < 0.05), by_hits + (hits.p_value < 0.05)
    assert by_rows <= 10 and by_hits <= 8


def test_what_cannot_be_paired_is_not_compared() -> None:
    hits, numbers = share([True, False, True]), of_rows(lambda rows: float(rows.mean()), 3)
    assert compare(hits, hits) is not None and compare(hits, hits).p_value == 1.0  # type: ignore[union-attr]
    assert compare(numbers, numbers).p_value == 1.0  # type: ignore[union-attr]
    assert compare(hits, share([True, False])) is None
    assert compare(hits, numbers) is None
    assert compare(Metric(1.0, None), hits) is None
    nowhere = of_rows(lambda rows: float("nan"), 3)
    assert nowhere.interval is None and compare(numbers, nowhere) is None


def test_what_a_checkpoint_keeps_stays_small() -> None:
    assert len(share(np.ones(10_000, dtype=bool)).paired or "") < 2_000
    assert len(of_sums(np.ones((10_000, 2)), lambda sums: sums[:, 0] / sums[:, 1]).paired or "") < 6_000
