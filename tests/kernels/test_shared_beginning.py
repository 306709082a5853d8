"""A beginning that packed rows share is laid once: the same loss, the same gradients, fewer tokens to compute."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.data.batching import Batch, collate, shared_beginning
from peftcli.kernels.attention import packed_attention, reference_attention
from peftcli.kernels.documents import Documents
from peftcli.methods import registry
from peftcli.methods.base import Context
from peftcli.tasks.causal_lm import CausalLM, supports_sharing


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    common = draw(st.lists(st.integers(0, 60), max_size=12))
    own = draw(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=10), min_size=1, max_size=5))
    ids = [np.asarray([*common, *one], dtype=np.int32) for one in own]
    return ids, [np.asarray(draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)))) for row in ids]


def learned(batch: Batch) -> list[tuple[int, int, int]]:
    """(position in its row, token there, next token) of everything that carries loss."""
    ids, place = batch.input_ids[0], batch.position_ids[0]
    return [(int(place[p]), int(ids[p]), int(t)) for p, t in zip(batch.positions, batch.targets, strict=True)]


@settings(max_examples=150, deadline=None)
@given(rows())
def test_the_same_tokens_carry_loss_and_each_row_can_be_put_together_again(drawn: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    ids, supervised = drawn
    apart, shared = (collate(ids, supervised, packed=True, share=share) for share in (False, True))
    assert learned(shared) == learned(apart)
    assert (shared.counts, shared.rows, shared.tokens) == (apart.counts, apart.rows, apart.tokens)
    assert apart.documents is not None
    assert shared.documents is not None
    common, flat = shared.documents.shared, shared.input_ids[0].tolist()
    assert shared.documents.total == len(flat) == apart.tokens - common * (len(ids) - 1)
    start = common
    for row, length in zip(ids, shared.documents.lengths, strict=True):
        assert length >= 1
        assert flat[:common] + flat[start : start + length] == row.tolist()
        assert shared.position_ids[0, start : start + length].tolist() == list(range(common, len(row)))
        start += length


@pytest.mark.parametrize(
    ("common", "first_learned", "expected"),
    [(8, 12, 8), (8, 8, 7), (8, 3, 2), (0, 5, 0)],
)
def test_no_shared_token_predicts_a_learned_one(common: int, first_learned: int, expected: int) -> None:
    ids = [np.asarray([*range(common), 50 + i, *range(20, 30)], dtype=np.int32) for i in range(4)]
    supervised = [np.arange(len(row)) >= first_learned for row in ids]
    assert shared_beginning(ids, supervised) == expected


def test_equal_rows_keep_a_token_each_and_one_row_shares_nothing() -> None:
    row, nothing = np.arange(9, dtype=np.int32), np.zeros(9, dtype=np.bool_)
    assert shared_beginning([row, row], [nothing, nothing]) == 8
    assert shared_beginning([row], [nothing]) == 0


def test_a_beginning_that_spares_little_is_not_shared() -> None:
    ids = [np.asarray([1, *range(2 + i, 90 + i)], dtype=np.int32) for i in range(3)]
    assert shared_beginning(ids, [np.zeros(len(row), dtype=np.bool_) for row in ids]) == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=6),
    shared=st.integers(1, 12),
    prefix=st.booleans(),
    heads=st.sampled_from([(4, 4), (4, 2)]),
    seed=st.integers(0, 50),
)
def test_attention_equals_its_reference(lengths: list[int], shared: int, prefix: bool, heads: tuple[int, int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    total = shared + sum(lengths)
    qkv = [torch.randn(1, n, total, 4, generator=g, dtype=torch.float64).requires_grad_() for n in (heads[0], heads[1], heads[1])]
    ahead = tuple(torch.randn(heads[1], 3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)) if prefix else None
    results = []
    for function in (packed_attention, reference_attention):
        out = function(*qkv, Documents(lengths, shared=shared), scaling=0.4, prefix=ahead)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [*qkv, *(ahead or ())])])
    for mine, theirs in zip(*results, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-10


def batch(share: bool) -> Batch:
    ids = [np.asarray([4, 9, 2, 7, 7, 1, *own], dtype=np.int32) for own in ([5, 6, 8], [11, 12, 13, 14, 3], [5, 2])]
    return collate(ids, [np.arange(len(row)) >= 6 for row in ids], packed=True, share=share)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "full", "ia3", "prefix_tuning", "adapter", "prompt_tuning", "p_tuning"])
def test_loss_and_gradients_of_a_model_stay(kind: str, method: str) -> None:
    cls = registry.get(method)
    options = {"target_modules": "all-linear"} if method == "lora" else {}
    made = cls(cls.Config(name=method, **options))
    model = made.apply(helpers.tiny_model(kind, torch.float64), Context(0))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) * 0.05)
    assert supports_sharing(model, 90)
    module, trained = CausalLM(model), [p for p in model.parameters() if p.requires_grad]
    results: list[list[Tensor]] = []
    for share in (False, True):
        loss = made.loss(module, batch(share)).total
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        results.append([loss, *(g for g in grads if g is not None)])
    for apart, shared in zip(*results, strict=True):
        # LLaMA's norms and positions are in float32 in transformers, whatever the model's dtype; so are weights that are all trained.
        limit = 1e-10 if kind == "gpt2" and method != "full" else 2e-6
        assert float((apart - shared).abs().max()) <= limit * max(1.0, float(apart.abs().max())), float((apart - shared).abs().max())


def test_dropout_forbids_it() -> None:
    cls = registry.get("lora")
    model = cls(cls.Config(name="lora", dropout=0.1)).apply(helpers.tiny_model("llama"), Context(0))
    before = torch.get_rng_state()
    assert not supports_sharing(model, 90)
    assert torch.equal(torch.get_rng_state(), before)
