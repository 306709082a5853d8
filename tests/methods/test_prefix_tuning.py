"""Prefix tuning against stock PEFT (rows 25 and 27: heads shared or not, gradient checkpointing), and its attention against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import peft
import prompt_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftcli.errors import UsageError
from peftcli.kernels.attention import packed_attention, reference_attention
from peftcli.kernels.documents import Documents
from peftcli.methods.base import Context

NAME = "prefix_tuning"
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "projection": ({"projection": True, "hidden_size": 24}, {"prefix_projection": True, "encoder_hidden_size": 24}),
}


def case(form: str) -> tuple[dict[str, Any], Any]:
    ours, theirs = FORMS[form]
    return {"num_virtual_tokens": 5, **ours}, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_outputs_and_gradients_equal_stock_peft(kind: str, form: str, dtype: torch.dtype) -> None:
    options, config = case(form)
    cases.check_against_stock(kind, dtype, NAME, options, config, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_files_go_both_ways(kind: str, form: str, tmp_path: Path) -> None:
    options, config = case(form)
    cases.check_files(kind, NAME, options, config, 0, tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_packed_padded_and_alone_are_the_same(kind: str, form: str) -> None:
    cases.check_layouts(kind, NAME, case(form)[0])
    cases.check_no_leak(kind, NAME, case(form)[0])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_batch_generates_what_each_prompt_does(kind: str) -> None:
    cases.check_generation(kind, NAME, case("plain")[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_gradient_checkpointing(kind: str, form: str) -> None:
    cases.check_checkpointing(kind, NAME, case(form)[0])


def test_resume_is_exact_and_has_the_projection(tmp_path: Path) -> None:
    cases.check_resume(NAME, {"projection": True}, tmp_path)


@pytest.mark.parametrize("form", ["", ", projection: true"])
def test_a_whole_run(form: str, tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    cases.check_whole_run(f"{{name: prefix_tuning{form}}}", tmp_path, tiny_folders["llama"], tiny_data)


def test_initial_values_have_the_spread_that_was_asked_for() -> None:
    for spread in (0.0, 0.1, 0.5):
        values = helpers.adapted(NAME, num_virtual_tokens=50, init="random", init_std=spread)[0].result()
        assert abs(float(values.std()) - spread) <= 0.05 * spread


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_training_starts_as_if_tokens_of_the_vocabulary_stood_in_front(kind: str, projection: bool) -> None:
    model, _ = helpers.adapted(NAME, kind, num_virtual_tokens=5, projection=projection)
    base, ids = helpers.tiny_model(kind), helpers.some_ids()
    words = torch.randint(0, helpers.VOCABULARY, (1, 5), generator=Context(seed=11).generator("prompt_embeddings"))
    wanted = helpers.logits(base, torch.cat([words.expand(len(ids), -1), ids], dim=1))[:, 5:]
    assert float((helpers.logits(model, ids) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_a_model_whose_layers_differ_or_take_no_prefix_is_refused() -> None:
    model, _ = helpers.adapted(NAME)
    model.base.config._attn_implementation = "eager"
    with pytest.raises(UsageError, match=r"2 of the 2 layers.*takes no prefix"):
        model(input_ids=helpers.some_ids())
    other, _ = helpers.adapted(NAME)
    other.heads = 1
    with pytest.raises(UsageError, match="key-value heads"):
        other(input_ids=helpers.some_ids())


def _outcome(function: Any, tensors: list[Tensor], documents: Documents, causal: bool) -> list[Tensor]:
    *qkv, keys, values = tensors
    out = function(*qkv, documents, scaling=0.37, causal=causal, prefix=(keys, values))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=7),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    count=st.integers(1, 9),
    causal=st.booleans(),
    seed=st.integers(0, 100),
)
def test_packed_attention_with_a_prefix_equals_the_reference(
    lengths: list[int], heads: tuple[int, int], count: int, causal: bool, seed: int
) -> None:
    _compare(lengths, heads, count, causal, seed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[130, 120, 9], [200]])
def test_the_same_for_rows_long_enough_for_the_fused_kernel(lengths: list[int], causal: bool) -> None:
    _compare(lengths, (4, 2), 7, causal, 0)


def _compare(lengths: list[int], heads: tuple[int, int], count: int, causal: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, sum(lengths), 4) for n in (heads[0], heads[1], heads[1])] + [(heads[1], count, 4)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    documents = Documents(lengths)
    ours, reference = (_outcome(f, tensors, documents, causal) for f in (packed_attention, reference_attention))
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-10


def test_half_precision_and_long_rows_agree_with_a_prefix() -> None:
    model, _ = helpers.adapted(NAME, dtype=torch.bfloat16, num_virtual_tokens=5)
    exact, _ = helpers.adapted(NAME, dtype=torch.float64, num_virtual_tokens=5)
    ids = helpers.some_ids(2, 40)
    wanted = helpers.logits(exact, ids)
    assert float((helpers.logits(model, ids).double() - wanted).abs().max()) <= 0.1 * float(wanted.abs().max())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
