"""The output layer fused with its cross-entropy: equal to the plain reference, and taken only where it is the same computation."""

from __future__ import annotations

from typing import Any
from unittest import mock

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.data.batching import collate
from peftcli.kernels import fast
from peftcli.kernels import linear_cross_entropy as kernel
from peftcli.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_token_losses,
    reference_linear_cross_entropy,
    reference_linear_token_losses,
)
from peftcli.tasks.causal_lm import CausalLM

NAME = "linear cross-entropy without logits"


def both(
    rows: int, vocabulary: int, bias: bool, dtype: torch.dtype, seed: int, scale: float = 1.0, trained: bool = False
) -> list[tuple[Tensor, ...]]:
    """Loss, correct rows, and the gradients of the hidden states and, where they are trained, of weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64).mul_(scale).to(dtype) for n in (rows, vocabulary))
    shift = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    found: list[tuple[Tensor, ...]] = []
    for function in (linear_cross_entropy, reference_linear_cross_entropy):
        own = [x.clone().requires_grad_(index == 0 or trained) for index, x in enumerate((hidden, weight, shift)) if x is not None]
        total, correct = function(own[0], own[1], own[2] if bias else None, targets)
        gradients = torch.autograd.grad(total * 0.3, [x for x in own if x.requires_grad])
        assert torch.equal(own[0].detach(), hidden)
        found.append((total.detach(), correct, *gradients))
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 50),
    bias=st.booleans(),
    trained=st.booleans(),
    small=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_float64(rows: int, vocabulary: int, bias: bool, trained: bool, small: bool, seed: int) -> None:
    logits, wide = (7 * vocabulary, 3 * vocabulary) if small else (kernel._LOGITS, kernel._WIDE)
    with mock.patch.multiple(kernel, _LOGITS=logits, _TRAINED=logits, _WIDE=wide):
        ours, reference = both(rows, vocabulary, bias, torch.float64, seed, trained=trained)
    assert len(ours) == 3 + (trained and 1 + bias)
    assert ours[0].dtype == torch.float64
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=1e-12, abs=1e-11)
    assert int(ours[1]) == int(reference[1])
    for mine, theirs in zip(ours[2:], reference[2:], strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_a_trained_float32_head_under_autocast(bias: bool) -> None:
    """Beside the plain operators under autocast, which round the logits' gradient as well; both beside float64."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(150, 8, generator=g), torch.randn(77, 8, generator=g)
    shift, targets = torch.randn(77, generator=g) if bias else None, torch.randint(0, 77, (150,), generator=g)
    found = []
    for function, wide in ((linear_cross_entropy, False), (reference_linear_cross_entropy, False), (reference_linear_cross_entropy, True)):
        given = [(x.bfloat16().double() if wide else x).clone().requires_grad_() for x in (hidden, weight, shift) if x is not None]
        with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
            total, _ = function(given[0], given[1], given[2] if bias else None, targets)
        found.append([total.detach().double(), *(x.double() for x in torch.autograd.grad(total, given))])
        assert all(x.grad is None for x in given)
    for ours, plain, exact in zip(*found, strict=True):
        assert float((ours - exact).norm()) <= 3.0 * float((plain - exact).norm()) + 1e-3 * float(exact.norm())
        assert float((ours - exact).norm()) <= 0.02 * float(exact.norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_other_dtypes(dtype: torch.dtype, limit: float) -> None:
    ours, reference = both(150, 77, False, dtype, 5)
    assert ours[0].dtype == torch.float32
    assert ours[2].dtype == dtype
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=1e-5)
    assert float((ours[2].float() - reference[2].float()).abs().max()) <= limit


def test_in_bfloat16_the_gradient_of_sure_tokens_is_as_exact_as_that_of_others() -> None:
    weight = torch.eye(8)
    hidden = torch.zeros(1, 8)
    hidden[0, 3] = 10.0
    target = torch.tensor([3])
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        own = hidden.to(dtype).requires_grad_()
        total, _ = linear_cross_entropy(own, weight.to(dtype), None, target)
        found.append(torch.autograd.grad(total, own)[0].double())
    assert 0.0 < float(found[1].abs().max()) < 1e-3
    assert torch.allclose(found[0], found[1], rtol=0.02, atol=0.0)


def test_huge_logits_stay_finite_and_a_nan_is_not_hidden() -> None:
    ours, reference = both(10, 20, False, torch.float32, 5, scale=200.0)
    assert float(ours[0]) == pytest.approx(float(reference[0]), rel=1e-6)
    hidden = torch.zeros(3, 4)
    hidden[1, 2] = float("nan")
    assert torch.isnan(linear_cross_entropy(hidden, torch.ones(5, 4), None, torch.zeros(3, dtype=torch.long))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_rows_are_a_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    inner = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    total, correct = linear_cross_entropy(
        torch.zeros(0, 5, dtype=dtype) @ inner, torch.ones(9, 4, dtype=dtype), None, torch.zeros(0, dtype=torch.long)
    )
    assert (float(total.detach()), int(correct)) == (0.0, 0)
    total.backward()
    assert inner.grad is not None
    assert float(inner.grad.abs().sum()) == 0.0


def loss_and_gradients(name: str, kind: str, options: dict[str, Any], packed: bool) -> tuple[float, int, dict[str, Tensor], list[str]]:
    model, method = helpers.adapted(name, kind, torch.float64, **options)
    helpers.stir(model)
    split = helpers.make_split([6, 11, 5, 9])
    fast.switch(on=True)
    loss = method.loss(CausalLM(model), collate(split.input_ids, split.supervised, packed=packed, pad_id=3))
    loss.total.backward()
    return float(loss.total.detach()), int(loss.correct), helpers.gradients(model), fast.taken()


HEADS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "frozen": ("lora", "llama", {"rank": 4}, True),
    "frozen and tied": ("lora", "llama-tied", {"rank": 4}, True),
    "Conv1D model": ("lora", "gpt2", {"rank": 4}, True),
    "another method": ("ia3", "llama", {}, True),
    "prompts": ("prompt_tuning", "llama", {"num_virtual_tokens": 3}, True),
    "prefixes": ("prefix_tuning", "llama", {"num_virtual_tokens": 3}, True),
    "adapted": ("lora", "llama", {"rank": 4, "target_modules": ["lm_head", "q_proj"]}, False),
    "adapted and tied": ("lora", "llama-tied", {"rank": 4, "target_modules": ["lm_head"]}, False),
    "trained whole": ("lora", "llama-tied", {"rank": 4, "modules_to_save": ["lm_head"]}, True),
    "trained alone": ("head_only", "llama", {}, True),
    "trained and tied": ("full", "llama-tied", {}, True),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", HEADS)
def test_the_loss_is_that_of_the_model_whatever_its_head(case: str, packed: bool) -> None:
    """An adapter on the output layer must take part (unsloth#9331)."""
    name, kind, options, fused = HEADS[case]
    ours = loss_and_gradients(name, kind, options, packed)
    with mock.patch.object(CausalLM, "_plain_head", lambda _: None):
        reference = loss_and_gradients(name, kind, options, packed)
    assert (NAME in ours[3]) is fused
    assert ours[0] == pytest.approx(reference[0], rel=1e-12)
    assert ours[1] == reference[1]
    assert set(ours[2]) == set(reference[2])
    for key, gradient in ours[2].items():
        assert float((gradient - reference[2][key]).abs().max()) <= 1e-10, key


def test_logits_that_the_model_still_changes_are_left_to_it() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        final_logit_softcapping=0.5, attn_logit_softcapping=None, sliding_window=64, initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    model.get_output_embeddings().requires_grad_(False)
    split = helpers.make_split([6, 11])
    batch = collate([ids % 64 for ids in split.input_ids], split.supervised, packed=False, pad_id=3)
    task = CausalLM(model)
    fast.switch(on=True)
    expected = torch.nn.functional.cross_entropy(task.logits(batch), batch.targets, reduction="sum")
    for _ in range(2):
        assert float(task(batch).total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert "forward" not in vars(model.get_output_embeddings())
    assert NAME not in fast.taken()


def test_the_switch() -> None:
    split = helpers.make_split([6, 11])
    batch = collate(split.input_ids, split.supervised, packed=True)
    model, _ = helpers.adapted("lora", rank=4)
    with fast.plain(), mock.patch("peftcli.tasks.causal_lm.linear_cross_entropy", side_effect=AssertionError("taken")):
        CausalLM(model)(batch).total.backward()
    fast.switch(on=True)
    CausalLM(model)(batch)
    assert NAME in fast.taken()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), vocabulary=st.integers(2, 50), bias=st.booleans(), small=st.booleans(), seed=st.integers(0, 1000))
def test_losses_of_single_tokens_in_float64(rows: int, vocabulary: int, bias: bool, small: bool, seed: int) -> None:
    """Every row's loss has a weight of its own, as in a loss over pairs of answers."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (rows, vocabulary))
    shift = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    shares = torch.randn(rows, generator=generator, dtype=torch.float64)
    found = []
    logits, wide = (7 * vocabulary, 3 * vocabulary) if small else (kernel._LOGITS, kernel._WIDE)
    with mock.patch.multiple(kernel, _LOGITS=logits, _WIDE=wide):
        for function in (linear_token_losses, reference_linear_token_losses):
            own = hidden.clone().requires_grad_()
            losses, right = function(own, weight, shift, targets)
            found.append((losses.detach(), right, torch.autograd.grad((losses * shares).sum(), own)[0]))
    for ours, theirs in zip(*found, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_single_tokens_in_other_dtypes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(dtype).requires_grad_(n == 150) for n in (150, 77))
    targets, shares = torch.randint(0, 77, (150,), generator=generator), torch.randn(150, generator=generator)
    ours, right = linear_token_losses(hidden, weight, None, targets)
    theirs, expected = reference_linear_token_losses(hidden, weight, None, targets)
    assert torch.equal(right, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    mine, plain = (torch.autograd.grad((losses * shares).sum(), hidden)[0].float() for losses in (ours, theirs))
    assert float((mine - plain).norm()) <= (1e-5 if dtype == torch.float32 else 0.02) * float(plain.norm())


def test_losses_of_single_tokens_need_a_frozen_output_layer() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with pytest.raises(ValueError, match="trained output layer"):
        linear_token_losses(hidden, weight, None, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", HEADS)
def test_losses_of_single_tokens_are_those_of_the_model_whatever_its_head(case: str, packed: bool) -> None:
    name, kind, options, _ = HEADS[case]
    split = helpers.make_split([6, 11, 5, 9])
    batch = collate(split.input_ids, split.supervised, packed=packed, pad_id=3)
    found = []
    for on in (True, False):
        model, _ = helpers.adapted(name, kind, torch.float64, **options)
        helpers.stir(model)
        fast.switch(on=on)
        try:
            losses, hits = CausalLM(model).token_losses(batch)
            frozen = not any(x.requires_grad for x in model.get_output_embeddings().parameters()) if on else False
            assert (NAME in fast.taken()) is (on and frozen and not case.startswith("adapted"))
        finally:
            fast.switch(on=True)
        (losses * torch.linspace(-1, 2, len(losses), dtype=torch.float64)).sum().backward()
        found.append((losses.detach(), hits, helpers.gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-11, atol=1e-11)
    assert torch.equal(found[0][1], found[1][1])
    for key, gradient in found[0][2].items():
        assert float((gradient - found[1][2][key]).abs().max()) <= 1e-10, key
