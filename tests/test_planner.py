"""The choice of what is saved and what is recomputed, as a pure function, and that no choice changes a gradient."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.methods import registry
from peftcli.model.load import checkpoint_activations
from peftcli.planner import CHOICES, Choice, LayerCost, MemoryPlan, apply, choose, layers, peak, smallest
from peftcli.tasks.base import Layout


@st.composite
def layer_costs(draw: st.DrawFn) -> LayerCost:
    """As layers are: what is recomputed is as large as what would have been saved, and is used in the same way."""
    amount = st.integers(0, 60)
    kept, more, backward, rest = draw(amount), draw(amount), draw(amount), draw(amount)
    return LayerCost(
        float(kept + more), float(kept), float(kept + more), float(backward), float(more + backward + rest), draw(st.integers(1, 9))
    )


COSTS = st.lists(layer_costs(), min_size=1, max_size=5)
BUDGETS = st.integers(0, 700)


def work(costs: list[LayerCost], choices: tuple[Choice, ...]) -> float:
    return sum(cost.work for cost, choice in zip(costs, choices, strict=True) if choice != "saved")


def every_choice(count: int) -> list[tuple[Choice, ...]]:
    return list(itertools.product(("saved", "recomputed"), repeat=count))


@settings(max_examples=150, deadline=None)
@given(COSTS, st.integers(0, 60), BUDGETS, st.booleans())
def test_a_choice_fits_and_has_no_work_to_spare(costs: list[LayerCost], between: int, budget: int, offload: bool) -> None:
    choices = choose(costs, between, budget, offload=offload)
    if choices is None:
        assert peak(costs, smallest(costs, between, offload=offload), between) > budget
        assert all(peak(costs, [choice] * len(costs), between) > budget for choice in CHOICES[:2])
        return
    assert peak(costs, choices, between) <= budget
    assert offload or "offloaded" not in choices, "a CPU has nowhere else to put anything"
    for index, choice in enumerate(choices):
        if choice != "saved":
            fewer = (*choices[:index], "saved", *choices[index + 1 :])
            assert peak(costs, fewer, between) > budget


@settings(max_examples=150, deadline=None)
@given(layer_costs(), st.integers(1, 7), st.integers(0, 60), BUDGETS)
def test_of_equal_layers_as_few_as_possible_are_recomputed(cost: LayerCost, count: int, between: int, budget: int) -> None:
    costs = [cost] * count
    fitting = [choices for choices in every_choice(count) if peak(costs, choices, between) <= budget]
    choices = choose(costs, between, budget, offload=False)
    if not fitting:
        assert choices is None
        return
    assert choices is not None
    assert work(costs, choices) == min(work(costs, other) for other in fitting)
    richer = choose(costs, between, budget + 10, offload=False)
    assert richer is not None and work(costs, richer) <= work(costs, choices)


def test_the_first_layers_are_recomputed_and_offloading_comes_last() -> None:
    costs = [LayerCost(saved=100.0, recomputed=10.0, forward=100.0, backward=5.0, again=95.0, work=1.0)] * 4
    assert choose(costs, 0.0, 405.0, offload=True) == ("saved",) * 4
    assert choose(costs, 0.0, 404.0, offload=True) == ("recomputed", "saved", "saved", "saved")
    assert choose(costs, 0.0, 230.0, offload=True) == ("recomputed", "recomputed", "saved", "saved")
    assert choose(costs, 0.0, 110.0, offload=False) is None
    assert choose(costs, 0.0, 110.0, offload=True) == ("offloaded", "offloaded", "offloaded", "saved")
    assert str(MemoryPlan(("offloaded", "saved"))) == "1 of 2 layers saved, 1 offloaded"
    assert str(MemoryPlan(("recomputed", "saved"))) == "1 of 2 layers saved, 1 recomputed"


def gradients(model: Any, task: Any, batch: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)  # of the dropout
    task.module(model)(batch).total.backward()
    return helpers.gradients(model)


PLANS: list[tuple[Choice, ...]] = [
    ("recomputed", "saved"),
    ("saved", "recomputed"),
    ("offloaded", "recomputed"),
    ("recomputed", "recomputed"),
]


def same_gradients(model: Any, task: Any, batch: Any, repeat: int = 1) -> None:
    plain = gradients(model, task, batch)
    assert any(bool(gradient.any()) for gradient in plain.values())
    for choices in PLANS:
        apply(model, MemoryPlan(choices * repeat), enable=checkpoint_activations)
        assert [bool(layer.gradient_checkpointing) for layer in layers(model).values()] == [c != "saved" for c in choices * repeat]
        found = gradients(model, task, batch)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], plain[name]) for name in plain), choices


@pytest.mark.parametrize("name", [name for name in registry.names() if name != "qlora"])
def test_no_plan_changes_a_gradient_by_a_bit(name: str) -> None:
    try:
        model, _ = helpers.adapted(name)
    except UsageError:  # it trains biases
        model, _ = helpers.adapted(name, "llama-bias")
    helpers.stir(model)
    split = helpers.make_split([7, 12, 5])
    same_gradients(model, helpers.CAUSAL_LM, helpers.CAUSAL_LM.batch(split, [0, 1, 2], Layout(True, 3)))


@pytest.mark.parametrize(("dtype", "quantization"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "nf4")])
def test_dropout_draws_the_same_once_more(dtype: torch.dtype, quantization: str | None) -> None:
    model, _ = helpers.adapted("lora", dtype=dtype, quantization=quantization, rank=4, alpha=8, dropout=0.3)
    helpers.stir(model)
    split = helpers.make_split([7, 12, 5])
    same_gradients(model, helpers.CAUSAL_LM, helpers.CAUSAL_LM.batch(split, [0, 1, 2], Layout(True, 3)))


@pytest.mark.parametrize("name", ["lora", "full", "prefix_tuning", "adapter", "ia3"])
def test_encoder_decoders_have_layers_of_two_kinds(name: str) -> None:
    model, _ = helpers.adapted(name, "flan-t5")
    helpers.stir(model)
    pairs = helpers.make_pairs([(7, 4), (5, 6)])
    same_gradients(model, helpers.SEQ2SEQ, helpers.SEQ2SEQ.batch(pairs, [0, 1], Layout(False, 3)), repeat=2)


def test_a_model_without_such_layers_has_no_plan() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert layers(model) == {}
    apply(model, MemoryPlan(), enable=lambda _: pytest.fail("nothing to enable"))
