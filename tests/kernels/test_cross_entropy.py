"""The sliced cross-entropy against the plain expression."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.kernels.cross_entropy import reference_cross_entropy, sum_cross_entropy


def both(
    rows: int, vocabulary: int, dtype: torch.dtype, seed: int, scale: float = 4.0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    found = []
    for function in (sum_cross_entropy, reference_cross_entropy):
        logits = base.clone().requires_grad_()
        total, correct = function(logits, targets)
        (gradient,) = torch.autograd.grad(total * 0.3, logits)
        assert torch.equal(logits.detach(), base), "the logits must not be changed in place"
        found.append((total.detach(), correct, gradient))
    return found


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 200), vocabulary=st.integers(2, 50), seed=st.integers(0, 1000))
def test_float64(rows: int, vocabulary: int, seed: int) -> None:
    ours, reference = both(rows, vocabulary, torch.float64, seed)
    assert ours[0].dtype == torch.float64
    assert abs(float(ours[0] - reference[0])) <= 1e-10 * max(1.0, abs(float(reference[0])))
    assert int(ours[1]) == int(reference[1])
    assert float((ours[2] - reference[2]).abs().max()) <= 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_other_dtypes_sum_in_float32(dtype: torch.dtype, limit: float) -> None:
    ours, reference = both(150, 77, dtype, 5)
    assert ours[0].dtype == torch.float32
    assert ours[2].dtype == dtype
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=1e-6)
    assert int(ours[1]) == int(reference[1])
    assert float((ours[2].float() - reference[2].float()).abs().max()) <= limit


def test_huge_logits_stay_finite() -> None:
    ours, reference = both(10, 20, torch.float32, 5, scale=3e4)
    assert torch.isfinite(ours[0])
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_rows_are_a_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    total, correct = sum_cross_entropy(torch.zeros(0, 5, dtype=dtype) @ weight, torch.zeros(0, dtype=torch.long))
    assert float(total) == 0.0
    assert int(correct) == 0
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    total.backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) == 0.0


def test_a_nan_is_not_hidden() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    total, _ = sum_cross_entropy(logits, torch.zeros(3, dtype=torch.long))
    assert torch.isnan(total)


def test_ties_count_as_correct() -> None:
    _, correct = sum_cross_entropy(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    assert int(correct) == 4
