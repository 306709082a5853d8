"""Compiled RMSNorm, SwiGLU, rotary positions and cross-entropy: the results and gradients of their plain references."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.kernels import linear_cross_entropy as head
from peftcli.kernels import native
from peftcli.kernels.elementwise import (
    reference_rms_norm,
    reference_rotate,
    reference_scale_columns,
    reference_swiglu,
    rms_norm,
    rotate,
    scale_columns,
    swiglu,
)

BF16, FP32 = torch.bfloat16, torch.float32


def compiled(test: Any) -> Any:
    """A test of what a C compiler makes."""
    return pytest.mark.machine(pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")(test))


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype, units: float = 2.0) -> None:
    """Within some roundings of ``dtype`` of the float64 result."""
    assert ours.dtype == dtype
    assert ours.shape == exact.shape
    limit = units * torch.finfo(dtype).eps * exact.abs().clamp_min(1.0)
    assert bool(((ours.double() - exact).abs() <= limit).all()), float(((ours.double() - exact).abs() / limit).max())


def check(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    moving: int,
    dtype: torch.dtype,
    units: float = 10.0,
) -> None:
    """Outputs and the gradients of the first ``moving`` inputs, against the reference in float64 on the same rounded inputs."""
    inputs = [x.to(dtype) for x in inputs]
    mine = [x.clone().requires_grad_(i < moving) for i, x in enumerate(inputs)]
    wide = [x.double().requires_grad_(i < moving) for i, x in enumerate(inputs)]
    out, exact = function(*mine), reference(*wide)
    # Half a unit for each of the sum, the quotients, the root and the products.
    close(out, exact.detach(), dtype, units=4.0)
    seed = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(out, mine[:moving], seed)
    for ours, theirs in zip(found, torch.autograd.grad(exact, wide[:moving], seed.double()), strict=True):
        close(ours, theirs, dtype, units)


def wide_rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@compiled
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(4, 70), dtype=st.sampled_from([BF16, FP32]), seed=st.integers(0, 99))
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(1, rows, width, generator=g) * 3, torch.rand(width, generator=g) + 0.5]
    check(lambda x, w: rms_norm(x, w, 1e-5), wide_rms, inputs, 1, dtype)


@compiled
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_weight_of_a_norm_may_be_trained(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 30, 64, generator=g), torch.rand(64, generator=g) + 0.5]
    check(lambda x, w: rms_norm(x, w, 1e-5), wide_rms, inputs, 2, dtype, units=60.0)  # a sum over 60 rows


@compiled
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_scaled_columns(rows: int, dtype: torch.dtype) -> None:
    """The scale stays in float32, and the sum of its gradient over the rows too."""
    g = torch.Generator().manual_seed(rows)
    x, scale = torch.randn(2, rows, 37, generator=g).to(dtype), torch.rand(37, generator=g) + 0.5
    seed = torch.randn(2, rows, 37, generator=g).to(dtype)
    mine, wide = (
        (x.clone().requires_grad_(), scale.clone().requires_grad_()),
        (x.double().requires_grad_(), scale.double().requires_grad_()),
    )
    out, exact = scale_columns(*mine), reference_scale_columns(*wide)
    close(out, exact.detach(), dtype)
    found, wanted = torch.autograd.grad(out, mine, seed), torch.autograd.grad(exact, wide, seed.double())
    close(found[0], wanted[0], dtype)
    assert found[1].dtype == FP32
    assert float((found[1] - wanted[1]).abs().max()) <= 1e-5 * float(wanted[1].abs().max())


@compiled
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 70), dtype=st.sampled_from([BF16, FP32]), seed=st.integers(0, 99))
def test_swiglu(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    # The gradient is a product of four roundings and of e^x, which is exact to 2 units.
    check(swiglu, reference_swiglu, [torch.randn(rows, width, generator=g) * 4 for _ in range(2)], 2, dtype)


@compiled
@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 4), length=st.integers(1, 9), half=st.integers(1, 20), packed=st.booleans(), dtype=st.sampled_from([BF16, FP32])
)
def test_rotate(heads: int, length: int, half: int, packed: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(heads)
    angle = torch.arange(length)[None, :, None] * torch.rand(half, generator=g).repeat(2)
    x = torch.randn(1, heads, length, 2 * half, generator=g)
    if packed:  # as a projection leaves it
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    check(rotate, reference_rotate, [x, angle.cos(), angle.sin()], 1, dtype)


@compiled
@pytest.mark.parametrize("packed", [True, False])
def test_rotate_with_wide_angles_rounds_once(packed: bool) -> None:
    """Bit for bit what PyTorch makes of bfloat16 and float32, rounded to bfloat16; the gradient's way too."""
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(40)[None, :, None] * torch.rand(16, generator=g).repeat(2)
    x = torch.randn(1, 3, 40, 32, generator=g).to(BF16)
    if packed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    found = []
    for function in (rotate, reference_rotate):
        own = x.clone().requires_grad_()
        out = function(own, angle.cos(), angle.sin())
        assert out.dtype == BF16
        found.append((out, torch.autograd.grad(out, own, torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(BF16))[0]))
    assert torch.equal(found[0][0], found[1][0])
    close(found[0][1], found[1][1].double(), BF16)


@compiled
def test_extreme_values_and_what_is_no_number_come_through() -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("nan")]])
    out = swiglu(gate, torch.ones_like(gate))
    assert bool((out[0, :4].abs() < 1e-8).all())
    assert torch.equal(out[0, 4:6], gate[0, 4:6])
    assert bool(out[0, 6].isnan())
    assert bool(rms_norm(torch.tensor([[1.0, float("nan")]], dtype=BF16), torch.ones(2, dtype=BF16), 1e-5).isnan().all())


@compiled
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), vocabulary=st.integers(2, 90), gradient=st.booleans(), seed=st.integers(0, 99))
def test_cross_entropy_of_logits(rows: int, vocabulary: int, gradient: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(rows, vocabulary, generator=g) * 5, torch.randint(0, vocabulary, (rows,), generator=g)
    plain, fast = logits.clone(), logits.clone()
    losses, correct, shares = head._operators(plain, targets, gradient)
    ours, right, own = head._compiled(fast, targets, gradient)
    # Small losses are the difference of logits of up to 20, of which float32 has seven digits.
    torch.testing.assert_close(ours, losses, rtol=1e-5, atol=4e-6)
    assert torch.equal(right, correct)
    if gradient:
        assert float((fast * own - plain * shares).abs().max()) <= 1e-6


@compiled
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_broken_logit_breaks_the_loss(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(1, 70, dtype=dtype)
        logits[0, 5] = bad
        assert not bool(head._compiled(logits, torch.tensor([3]), True)[0].isfinite())


@compiled
def test_rows_as_eight_bit_numbers() -> None:
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)) * 10
    x[1] = 0
    by = torch.rand(70) + 0.5
    codes, factor = torch.empty(5, 70, dtype=torch.int8), torch.empty(5)
    native.call("quantize", x, x, by, codes, factor, 5, 70)
    assert float((codes * factor[:, None] - x * by).abs().max()) <= 0.5001 * float(factor.max())
    out = torch.empty_like(x)
    native.call("dequantize", x, codes.int(), factor, by, out, 5, 70)
    assert torch.allclose(out, codes * factor[:, None] * by)
    x[2, 3] = float("nan")
    native.call("quantize", x, x, None, codes, factor, 5, 70)
    assert factor.isnan().tolist() == [False, False, True, False, False]


@compiled
def test_the_number_of_threads_changes_nothing() -> None:
    x, weight = torch.randn(64, 96).to(BF16), torch.rand(96).to(BF16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((rms_norm(x, weight, 1e-6), swiglu(x, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


_PROBE = "import torch\nfrom peftcli.kernels import native\nprint(native.usable(torch.zeros(2, dtype=torch.bfloat16)))"


def _probe(**variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@compiled
def test_the_build_is_kept_in_the_cache_folder_and_used_again(tmp_path: Path) -> None:
    assert _probe(XDG_CACHE_HOME=str(tmp_path)) == "True"
    (built,) = (tmp_path / "peftcli" / "kernels").iterdir()
    before = built.stat().st_mtime_ns
    assert _probe(XDG_CACHE_HOME=str(tmp_path)) == "True"
    assert [(path, path.stat().st_mtime_ns) for path in built.parent.iterdir()] == [(built, before)]


@compiled
def test_without_a_place_for_the_cache_a_private_folder_does(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert _probe(XDG_CACHE_HOME=str(tmp_path / "file")) == "True"


def test_without_a_compiler_or_with_one_that_fails_there_is_nothing(tmp_path: Path) -> None:
    assert _probe(XDG_CACHE_HOME=str(tmp_path), CC="no-such-compiler") == "False"
    assert _probe(XDG_CACHE_HOME=str(tmp_path), CC="false") == "False"
    assert not any(tmp_path.rglob("*.so"))


def test_the_references_are_what_transformers_computes() -> None:
    from transformers.models.llama import modeling_llama as llama

    x = torch.randn(1, 5, 64)
    norm = llama.LlamaRMSNorm(64, 1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    assert torch.equal(reference_rms_norm(x, norm.weight, 1e-5), norm(x))
    q = torch.randn(1, 2, 5, 64)
    cosine, sine = torch.randn(2, 1, 5, 64).unbind(0)
    plain = getattr(llama.apply_rotary_pos_emb, "__wrapped__", llama.apply_rotary_pos_emb)
    assert torch.equal(reference_rotate(q, cosine, sine), plain(q, q, cosine, sine)[0])
