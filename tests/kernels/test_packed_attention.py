"""Packed attention: equal to its plain reference, outputs and gradients, and no document sees another."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.data.batching import collate
from peftcli.kernels import attention, fast, native, products
from peftcli.kernels.attention import packed_attention, reference_attention
from peftcli.kernels.documents import Documents
from peftcli.tasks.causal_lm import CausalLM, supports_packing


def inputs(lengths: list[int], heads: int, groups: int, seed: int, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, sum(lengths), width) for n in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def path(plain: bool) -> Any:
    """Without the path for short rows on the CPU where ``plain``, as for long ones."""
    return fast.plain() if plain else contextlib.nullcontext()


def outputs_and_gradients(function: Any, qkv: list[Tensor], documents: Documents, causal: bool) -> list[Tensor]:
    out = function(*qkv, documents, scaling=0.37, causal=causal)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), qkv)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=9),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
    plain=st.booleans(),
    block=st.sampled_from([3, 8, 96]),
    kept=st.sampled_from([4, 1024]),
    seed=st.integers(0, 100),
)
def test_equals_the_reference_in_float64(
    lengths: list[int], heads: tuple[int, int], causal: bool, plain: bool, block: int, kept: int, seed: int
) -> None:
    documents, qkv = Documents(lengths), inputs(lengths, *heads, seed)
    with (
        path(plain),
        mock.patch.dict(attention._LONGEST, {torch.float64: (99, 99)}),
        mock.patch.object(products, "_BLOCK", block),
        mock.patch.object(products, "_KEPT", kept),
    ):
        ours = outputs_and_gradients(packed_attention, qkv, documents, causal)
    theirs = outputs_and_gradients(reference_attention, qkv, documents, causal)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-10


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kept", [4, 1024])
def test_compiled_softmax_in_products(causal: bool, shared: int, prefix: int, dtype: torch.dtype, limit: float, kept: int) -> None:
    """Lengths below, at and above whole vectors, beside the reference in float64 over the same numbers."""
    lengths = [1, 16, 17, 33, 40, 15, 31, 64]
    generator = torch.Generator().manual_seed(4)
    total = shared + sum(lengths)
    shapes = [(1, 6, total, 8), (1, 2, total, 8), (1, 2, total, 8), *([(2, prefix, 8)] * 2 if prefix else [])]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    documents, results = Documents(lengths, shared=shared), []
    for function, wide in ((packed_attention, dtype), (reference_attention, torch.float64)):
        given = [x.to(wide).requires_grad_() for x in inputs]
        with mock.patch.dict(attention._LONGEST, {dtype: (99, 99)}), mock.patch.object(products, "_KEPT", kept):
            out = function(*given[:3], documents, scaling=0.37, causal=causal, prefix=tuple(given[3:]) or None)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            results.append([x.double() for x in (out.detach(), *torch.autograd.grad((out * weight).sum(), given))])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).abs().max()) <= limit * max(1.0, float(theirs.abs().max()))


@pytest.mark.machine
@pytest.mark.skipif(native.library(torch.float32) is None, reason="no compiler on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_softmax_keeps_what_is_no_number(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    k[0, 0, 30, 0] = float("nan")
    with mock.patch.dict(attention._LONGEST, {dtype: (99, 99)}):
        out = packed_attention(q, k, v, Documents([40]), scaling=1.0)
    seen = out[0, :, 0].isnan().any(-1)
    assert not seen[:30].any()
    assert seen[30:].all()
    assert not out[0, :, 1].isnan().any()


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_attention_on_each_document_alone(causal: bool) -> None:
    lengths = [3, 1, 7]
    qkv = inputs(lengths, 4, 2, 0)
    packed = reference_attention(*qkv, Documents(lengths), scaling=0.5, causal=causal)
    start = 0
    for length in lengths:
        q, k, v = (x[:, :, start : start + length] for x in qkv)
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.5, enable_gqa=True).transpose(1, 2)
        assert float((packed[:, start : start + length] - alone).abs().max()) <= 1e-12
        start += length


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5, 9], [9, 5, 6, 1], [8, 8], [1, 30, 1], [16], [300, 290, 7]])
def test_editing_one_document_changes_no_other_by_a_single_bit(lengths: list[int], causal: bool, plain: bool) -> None:
    documents, qkv = Documents(lengths), inputs(lengths, 4, 2, 0)
    first = lengths[0]
    edited = [x.detach().clone() for x in qkv]
    for x in edited:
        x[:, :, :first] = -5.0 * x[:, :, :first] + 1.0
    with path(plain):
        before = packed_attention(*qkv, documents, scaling=1.0, causal=causal)
        after = packed_attention(*edited, documents, scaling=1.0, causal=causal)
    assert torch.equal(before[:, first:], after[:, first:])
    assert not torch.equal(before[:, :first], after[:, :first])
    gradient = torch.autograd.grad(before[:, first:].sum(), qkv)
    assert all(float(g[:, :, :first].abs().sum()) == 0.0 for g in gradient), "a document must get no gradient from another"


@pytest.mark.parametrize("kind", ["llama", "llama-mha", "llama-tied", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_whole_model_packed_equals_separate_and_leaks_nothing(kind: str, checkpointing: bool) -> None:
    model = helpers.tiny_model(kind, torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    task = CausalLM(model)
    split = helpers.make_split([6, 11, 5, 9], prompt=0)
    ids, masks = split.input_ids, [np.ones(len(row), dtype=np.bool_) for row in split.input_ids]
    packed = task.logits(collate(ids, masks, packed=True))
    separate = torch.cat([task.logits(collate([row], [mask], packed=False)) for row, mask in zip(ids, masks, strict=True)])
    assert float((packed - separate).abs().max().detach()) <= 1e-10
    edited = task.logits(collate([ids[0][::-1].copy(), *ids[1:]], masks, packed=True))
    assert torch.equal(packed[5:], edited[5:]), "editing document 1 must change the others by exactly 0"
    assert not torch.equal(packed[:5], edited[:5])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_packed_equal_padded(kind: str) -> None:
    split = helpers.make_split([6, 11, 5, 9, 9, 2])
    found = []
    for packed in (True, False):
        model, _ = helpers.adapted("lora", kind, torch.float64, rank=4)
        helpers.stir(model)
        helpers.loss_of(model, split, packed=packed).backward()
        found.append(helpers.gradients(model))
    for name, gradient in found[0].items():
        assert float((gradient - found[1][name]).abs().max()) <= 1e-10, name


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_packing_is_found_to_work_by_trying(kind: str) -> None:
    assert supports_packing(helpers.tiny_model(kind), helpers.VOCABULARY)


def test_a_model_whose_rows_see_each_other_is_found_out() -> None:
    class Leaky(torch.nn.Module):
        """Every token sees the mean of the whole row."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(16, 16)

        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            x = self.embedding(input_ids)
            return type("Output", (), {"logits": x + x.mean(1, keepdim=True)})

    assert not supports_packing(Leaky(), 16)


def test_a_sliding_window_is_packed_only_where_no_row_is_longer() -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register()).double().eval()
    assert supports_packing(model, 64, 8)
    assert not supports_packing(model, 64, 9)
    assert not supports_packing(model, 64)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    plain.load_state_dict(model.state_dict())
    row = np.arange(20, dtype=np.int32)
    padded = CausalLM(model).logits(collate([row, row[:5]], [np.ones(20, dtype=np.bool_), np.ones(5, dtype=np.bool_)], packed=False))
    expected = plain(input_ids=torch.arange(20)[None]).logits[0, :-1]
    assert float((padded[:19] - expected).abs().max().detach()) <= 1e-10, "padded rows keep the window"
