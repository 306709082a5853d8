"""The low-rank update fused with its frozen layer: equal to the plain reference, and taken only where it is the same computation."""

from __future__ import annotations

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.kernels import fast
from peftcli.kernels.frozen import product_of
from peftcli.kernels.low_rank import low_rank_linear, reference_low_rank_linear

NAME = "low-rank update fused with its frozen layer"


def both(shape: tuple[int, ...], out: int, rank: int, bias: bool, dropout: bool, dtype: torch.dtype, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, weight, narrow, wide = draw(*shape), draw(out, shape[-1]), draw(rank, shape[-1]), draw(out, rank)
    shift, mask, factor = draw(out) if bias else None, (draw(*shape) > 0).double() * 2.0, draw(*shape[:-1], out)
    half = [None if t is None else t.to(dtype) for t in (weight, shift, mask, factor)]
    thin = [t.to(torch.float64 if dtype == torch.float64 else torch.float32) for t in (narrow, wide)]
    found = []
    for function in (low_rank_linear, reference_low_rank_linear):
        own = [t.clone().requires_grad_() for t in (x.to(dtype), *thin)]
        dropped = own[0] * half[2] if dropout else None
        y = function(own[0], dropped, half[0], half[1], own[1], own[2], 0.7)  # type: ignore[arg-type]
        found.append([y.detach(), *torch.autograd.grad((y * half[3]).sum(), own)])
        assert [g.dtype for g in found[-1][1:]] == [t.dtype for t in own]
    return found


@settings(max_examples=60, deadline=None)
@given(
    lead=st.sampled_from([(1, 7), (3, 5), (4,), (2, 3, 2)]),
    rank=st.integers(1, 5),
    bias=st.booleans(),
    dropout=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_float64(lead: tuple[int, ...], rank: int, bias: bool, dropout: bool, seed: int) -> None:
    for ours, reference in zip(*both((*lead, 6), 4, rank, bias, dropout, torch.float64, seed), strict=True):
        assert ours.shape == reference.shape
        assert float((ours - reference).abs().max()) <= 1e-11


@pytest.mark.parametrize("dropout", [True, False])
def test_bfloat16(dropout: bool) -> None:
    ours, reference = both((2, 40, 32), 24, 4, True, dropout, torch.bfloat16, 0)
    exact = both((2, 40, 32), 24, 4, True, dropout, torch.float64, 0)[1]
    for a, b, c in zip(ours, reference, exact, strict=True):
        # As close to the exact values as the plain computation is.
        assert float((a.double() - c).abs().mean()) <= 1.2 * float((b.double() - c).abs().mean()) + 1e-6


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_a_bfloat16_model_takes_it_and_agrees_with_the_plain_path(name: str) -> None:
    split, found = helpers.make_split([6, 11, 9]), []
    for plain in (False, True):
        model, _ = helpers.adapted(name, dtype=torch.bfloat16)
        helpers.stir(model)
        fast.switch(on=not plain)
        try:
            helpers.loss_of(model, split).backward()
            assert (NAME in fast.taken()) is not plain
        finally:
            fast.switch(on=True)
        found.append(helpers.gradients(model))
    for key, gradient in found[0].items():
        close = torch.nn.functional.cosine_similarity(gradient.flatten(), found[1][key].flatten(), dim=0)
        assert float(close) >= 0.99, key


def test_the_input_may_need_no_gradient() -> None:
    narrow, wide = torch.ones(2, 3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    low_rank_linear(torch.ones(5, 3), None, torch.ones(4, 3), None, narrow, wide, 1.0).sum().backward()
    assert narrow.grad is not None
    assert wide.grad is not None


def test_where_it_is_not_taken() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    linear = torch.nn.Linear(3, 4).bfloat16().requires_grad_(False)
    assert product_of(linear, x)
    assert not product_of(linear, x.float())
    assert not product_of(torch.nn.Linear(3, 4).bfloat16(), x), "its weight moves"
    assert not product_of(torch.nn.Sequential(linear), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_of(linear, x)
        assert not product_of(linear, x.float()), "autocast rounds it first"
    handle = linear.register_forward_hook(lambda *_: None)
    assert not product_of(linear, x), "a hook must see what it computes"
    handle.remove()
    assert product_of(linear, x)


def test_under_autocast_it_is_taken_for_what_autocast_rounds() -> None:
    """A classifier's fresh output layer is trained in float32 under autocast, whose norms hand float32 to the next layer."""
    model, _ = helpers.adapted("lora", dtype=torch.bfloat16)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.siblings = None
    helpers.stir(layer)
    x = torch.randn(2, 5, layer.lora_A.shape[1])
    results = []
    for plain in (False, True):
        fast.switch(on=not plain)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                own = x.clone().requires_grad_()
                out = layer(own)
            assert (NAME in fast.taken()) is not plain
        finally:
            fast.switch(on=True)
        assert out.dtype == torch.bfloat16
        results.append([out.float(), *torch.autograd.grad(out.float().square().sum(), [own, layer.lora_A, layer.lora_B])])
        assert results[-1][1].dtype == torch.float32
    for mine, theirs in zip(*results, strict=True):
        assert float((mine - theirs).norm()) <= 0.02 * float(theirs.norm())
