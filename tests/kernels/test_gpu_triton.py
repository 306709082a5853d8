"""The Triton kernels, on a GPU where there is one and else in Triton's interpreter: the numbers of their plain references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import helpers
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from peftcli.kernels import elementwise, fast, four_bit, native
from peftcli.kernels import linear_cross_entropy as fused
from peftcli.kernels.eight_bit import reference_quantize
from peftcli.quantization import quantize_linear

triton_code: Any = pytest.importorskip("peftcli.kernels.triton_code", reason="Triton is not installed", exc_type=ImportError)
triton_rows: Any = pytest.importorskip("peftcli.kernels.triton_rows", reason="Triton is not installed", exc_type=ImportError)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# `pytest -m gpu` runs them where they matter most; without a GPU they run in the interpreter, unmarked.
pytestmark = [pytest.mark.gpu] if CUDA else []


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def by_triton(name: str, like: Tensor, *arguments: Any) -> None:
    triton_rows.FUNCTIONS[name](*arguments)


def outputs_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    own = [x.clone().requires_grad_() for x in inputs]
    out = function(*own)
    return [out.detach(), *torch.autograd.grad(out, own, draw(*out.shape, seed=9, dtype=out.dtype))]


def layer(kind: str, double: bool, out: int = 48, width: int = 128) -> Any:
    torch.manual_seed(3)
    linear = torch.nn.Linear(width, out).to(torch.bfloat16).requires_grad_(False).to(DEVICE)
    linear.weight.data[0] = 0.0
    return quantize_linear(linear, kind, double=double, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_expand_to_the_bits_of_bitsandbytes(kind: str, double: bool) -> None:
    # More blocks than one scale of the second level covers, and no multiple of what one program does.
    module = layer(kind, double, out=173, width=192)
    state = module.weight.quant_state
    assert state.nested is double
    reference = dequantize_4bit(module.weight.data, state)
    assert torch.equal(four_bit.expand(module.weight.data, state).view(torch.int16), reference.view(torch.int16))


def test_all_layers_share_one_buffer() -> None:
    large, small = layer("nf4", True, out=64), layer("nf4", True, out=16)
    first = four_bit.expand(large.weight.data, large.weight.quant_state)
    second = four_bit.expand(small.weight.data, small.weight.quant_state)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, dequantize_4bit(small.weight.data, small.weight.quant_state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_step_over_expanded_weights_is_that_of_bitsandbytes(kind: str) -> None:
    """Two layers, so that the buffer is written over between forward and backward."""
    found = []
    for ours in (True, False):
        one, two = layer(kind, True, 128, 128), layer(kind, True, 64, 128)

        def forward(x: Tensor, one: Any = one, two: Any = two, ours: bool = ours) -> Tensor:
            if not ours:
                return two(one(x))
            for module in (one, two):
                x = four_bit_linear(module, x)
            return x

        found.append(outputs_and_gradients(forward, draw(2, 9, 128)))
    for a, b in zip(*found, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) <= 5e-3


def four_bit_linear(module: Any, x: Tensor) -> Tensor:
    from peftcli.kernels.frozen import frozen_linear

    product = module.frozen_product(x)
    assert isinstance(product, four_bit.FourBit)
    product.expanded = lambda: four_bit.expand(product.packed, product.state)  # type: ignore[method-assign]
    return frozen_linear(x, product, module.bias)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("width", [16, 3000])
def test_rows_round_to_the_same_eight_bits(weighted: bool, width: int) -> None:
    rows = draw(8, width) * torch.logspace(-20, 20, 8, device=DEVICE).unsqueeze(1).to(torch.bfloat16)
    rows[5] = 0.0
    rows[6, 3], rows[6, 4] = float("nan"), -1.0
    factors = draw(width, seed=1, dtype=torch.float32) if weighted else None
    codes, scales = torch.empty(8, width, dtype=torch.uint8, device=DEVICE), torch.empty(8, device=DEVICE)
    triton_code.quantize_rows(rows, factors, codes, scales)
    reference, wanted = reference_quantize(rows, factors, torch.float8_e4m3fn)
    whole = [0, 1, 2, 3, 4, 5, 7]
    assert torch.equal(codes[whole], reference.view(torch.uint8)[whole])
    assert torch.equal(scales[whole], wanted[whole])
    assert bool(torch.isnan(codes.view(torch.float8_e4m3fn).float()[6, 3])), "what is no number stays none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_layer(dtype: torch.dtype) -> None:
    x, up, weight = draw(9, 80, dtype=dtype), draw(9, 80, seed=1, dtype=dtype), draw(80, seed=2, dtype=dtype)
    turned, cosine, sine = draw(1, 3, 9, 16, dtype=dtype), draw(1, 9, 16, seed=1, dtype=dtype), draw(1, 9, 16, seed=2, dtype=dtype)
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda a, b: elementwise.rms_norm(a, b, 1e-5), lambda a, b: elementwise.reference_rms_norm(a, b, 1e-5), (x, weight)),
        (elementwise.swiglu, elementwise.reference_swiglu, (x, up)),
        (lambda a: elementwise.rotate(a, cosine, sine), lambda a: elementwise.reference_rotate(a, cosine, sine), (turned,)),
    ]
    for ours, reference, inputs in cases:
        with mock.patch.object(native, "call", by_triton):
            found = outputs_and_gradients(ours, *inputs)
        exact = outputs_and_gradients(reference, *(x.double() for x in inputs))
        plain = outputs_and_gradients(reference, *inputs)
        for a, b, c in zip(found, plain, exact, strict=True):
            assert a.dtype == b.dtype
            # As close to the exact values as the plain computation is.
            assert float((a.double() - c).abs().mean()) <= 1.3 * float((b.double() - c).abs().mean()) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradient", [True, False])
def test_cross_entropy_of_rows(dtype: torch.dtype, gradient: bool) -> None:
    targets = torch.tensor([0, 4999, 70, 3, 9], device=DEVICE)
    ours, plain = (draw(5, 5000, dtype=dtype) * 3 for _ in range(2))
    ours[3, 3] = plain[3, 3] = 40.0
    with mock.patch.object(native, "call", by_triton):
        found = fused._compiled(ours, targets, gradient)
    reference = fused._operators(plain, targets, gradient)
    assert torch.allclose(found[0], reference[0], rtol=1e-5, atol=4e-6)
    assert torch.equal(found[1], reference[1])
    assert int(found[1].sum()) == 1
    if gradient:
        assert torch.allclose(found[2], reference[2], rtol=1e-5)
        assert torch.allclose(
            ours.float() * found[2], plain.float() * reference[2], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
        )
    else:
        assert torch.equal(ours, plain)
    ours[2, 11] = float("nan")
    with mock.patch.object(native, "call", by_triton):
        assert fused._compiled(ours, targets, gradient)[0].isnan().tolist() == [False, False, True, False, False]


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_model_on_a_gpu_takes_every_fast_path_and_agrees_with_the_plain_one(quantization: str | None) -> None:
    from peftcli.data.batching import collate
    from peftcli.model.fused import fuse
    from peftcli.tasks.causal_lm import CausalLM

    split, found = helpers.make_split([60, 111, 90]), []
    for plain in (False, True):
        model, _ = helpers.adapted("lora", dtype=torch.bfloat16, quantization=quantization)
        model = model.to("cuda")
        helpers.stir(model)
        fuse(model)
        fast.switch(on=not plain)
        try:
            loss = CausalLM(model)(collate(split.input_ids, split.supervised, packed=True, device="cuda")).total
            loss.backward()
            taken = fast.taken()
        finally:
            fast.switch(on=True)
        if not plain:
            wanted = {"variable-length attention", "low-rank update fused with its frozen layer", "linear cross-entropy without logits"}
            wanted |= {"RMSNorm, SwiGLU and rotary positions in compiled code"}
            wanted |= {"4-bit weights expanded in one launch"} if quantization else set()
            assert wanted <= set(taken)
        found.append((float(loss.detach()), helpers.gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=5e-3)
    for key, gradient in found[0][1].items():
        close = torch.nn.functional.cosine_similarity(gradient.flatten().float(), found[1][1][key].flatten().float(), dim=0)
        assert float(close) >= 0.98, key
