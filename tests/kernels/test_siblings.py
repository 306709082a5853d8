"""Layers of LoRA with one input, computed together: each gets what it gets alone, and what it cannot get so it computes alone."""

from __future__ import annotations

from collections.abc import Iterator

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peftcli.kernels import fast
from peftcli.kernels.frozen import Dense
from peftcli.kernels.low_rank import reference_low_rank_linear
from peftcli.kernels.siblings import low_rank_siblings
from peftcli.methods import registry
from peftcli.methods.base import Context
from peftcli.methods.lora_layers import LoraLayer
from peftcli.methods.siblings import Siblings

NAME = "low-rank updates of one input together"


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    fast.switch(on=True)
    yield
    fast.switch(on=True)


@settings(max_examples=60, deadline=None)
@given(
    outs=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    ranks=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    bias=st.booleans(),
    moves=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_each_layers_own(outs: list[int], ranks: list[int], bias: bool, moves: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    ranks = ranks[: len(outs)]
    x, weights = draw(2, 5, 7), [draw(n, 7) for n in outs]
    biases = [draw(n) if bias else None for n in outs]
    narrow, wide = [draw(r, 7) for r in ranks], [draw(n, r) for n, r in zip(outs, ranks, strict=True)]
    scalings, factors = [0.5 + i for i in range(len(outs))], [draw(2, 5, n) for n in outs]
    results = []
    for together in (True, False):
        own = [t.clone().requires_grad_() for t in (*narrow, *wide)]
        seen = x.clone().requires_grad_(moves)
        a, b = own[: len(outs)], own[len(outs) :]
        if together:
            found = list(low_rank_siblings(seen, [Dense(w) for w in weights], biases, a, b, scalings))
        else:
            found = [reference_low_rank_linear(seen, None, *parts) for parts in zip(weights, biases, a, b, scalings, strict=True)]
        total = sum(((y * f).sum() for y, f in zip(found, factors, strict=True)), torch.zeros((), dtype=torch.float64))
        results.append([*found, *torch.autograd.grad(total, [*own, seen] if moves else own)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) <= 1e-11


def adapted(targets: object = "all-linear", dropout: float = 0.0) -> nn.Module:
    cls = registry.get("lora")
    options = cls.Config(name="lora", rank=4, target_modules=targets, dropout=dropout)
    model = cls(options).apply(helpers.tiny_model("llama").to(torch.bfloat16), Context(0))
    helpers.stir(model)
    return model


def groups(model: nn.Module) -> set[Siblings]:
    return {m.siblings for m in model.modules() if isinstance(m, LoraLayer) and m.siblings is not None}


def test_a_model_computes_the_same_and_every_group_takes_part() -> None:
    model, ids = adapted(), helpers.some_ids()
    assert sorted(len(group.layers) for group in groups(model)) == [2, 2, 3, 3]
    together = model(input_ids=ids).logits
    assert NAME in fast.taken()
    together.float().square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.siblings = None
    alone = model(input_ids=ids).logits
    alone.float().square().mean().backward()
    assert float((together - alone).float().norm()) <= 0.02 * float(alone.float().norm())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert float((grads[name] - p.grad).norm()) <= 0.05 * float(p.grad.norm()) + 1e-9, name


def test_nothing_is_kept_between_passes() -> None:
    model = adapted()
    model(input_ids=helpers.some_ids())
    assert all(group._input is None and not group._waiting for group in groups(model))


def test_a_layer_called_alone_or_with_another_input_computes_for_itself() -> None:
    model = adapted()
    group = next(g for g in groups(model) if len(g.layers) == 3)
    x, other = torch.randn(2, 1, 3, 64).to(torch.bfloat16).unbind(0)
    first, _, value = group.layers
    expected = value(other)  # nothing waits
    first(x)
    assert torch.equal(value(other), expected)


def test_dropout_and_few_targets() -> None:
    assert not groups(adapted(dropout=0.1))
    assert not groups(adapted(targets=["q_proj", "o_proj", "up_proj"]))
    assert [len(group.layers) for group in groups(adapted(targets=["q_proj", "v_proj"]))] == [2, 2]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_query_key_and_value_of_an_encoder(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).to(torch.bfloat16)
    cls = registry.get("lora")
    model = cls(cls.Config(name="lora", rank=4, target_modules="all-linear")).apply(base, Context(0))
    helpers.stir(model)
    model.eval()
    assert [len(group.layers) for group in groups(model)] == [3, 3]
    ids = torch.arange(3, 27).view(2, 12)
    together = model(input_ids=ids).last_hidden_state
    assert NAME in fast.taken()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.siblings = None
    alone = model(input_ids=ids).last_hidden_state
    assert float((together - alone).detach().float().norm()) <= 0.02 * float(alone.detach().float().norm())
