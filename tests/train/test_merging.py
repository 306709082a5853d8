"""Merged models as folders: tied bases, quantized bases and which base an adapter is folded into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from peftcli.errors import CheckFailed, ModelError
from peftcli.merge import check, logits_of, merge, parity, probe_rows
from peftcli.methods.base import Context
from peftcli.methods.kinds import adapter_layers
from peftcli.quantization import dense_weight, is_quantized, quantize_linear

CPU = torch.device("cpu")


def rows() -> list[Any]:
    return [row.numpy() for row in helpers.some_ids(6, 30)]


def reload(folder: Path, model: Any) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"new": (261, 262)},
        {"new": (261, 262), "modules_to_save": ["lm_head"]},
    ],
    ids=["linear layers", "output layer", "output layer whole", "new tokens", "new tokens and output layer whole"],
)
def test_merged_saved_and_loaded_again_computes_the_same(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    new = options.pop("new", ())
    model = helpers.make_method("lora", rank=4, **options).apply(helpers.tiny_model(kind), Context(new_token_ids=new))
    helpers.stir(model)
    before = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)
    embedding = model.get_input_embeddings().weight.detach().clone()
    merged = merge(model)
    if not new:
        assert torch.equal(merged.get_input_embeddings().weight, embedding), (
            "a change of the output layer must not reach the tied embedding"
        )
    again = reload(tmp_path, merged)
    found = parity(before, logits_of(helpers.CAUSAL_LM, again, rows(), CPU), exact=True)
    assert found.passed, found
    assert again.config.tie_word_embeddings == (again.get_input_embeddings().weight is again.get_output_embeddings().weight)
    if kind != "llama" and "modules_to_save" not in options and options.get("target_modules") != ["lm_head"]:
        assert again.config.tie_word_embeddings, "tied where it can stay tied"


def test_a_quantized_merge_uses_the_dequantized_base(tmp_path: Path) -> None:
    """Folded into the original dense base instead, the result would be another model."""
    model, _ = helpers.adapted("qlora", quantization="nf4", rank=4)
    helpers.stir(model, scale=0.02)
    before = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)
    adapters = adapter_layers(model)
    wrong = helpers.tiny_model("llama")
    with torch.no_grad():
        for name, layer in adapters.items():
            plain = wrong.get_submodule(name)
            plain.weight.copy_(layer.fold(plain.weight, None)[0])
    right = reload(tmp_path, merge(model))
    good, bad = (parity(before, logits_of(helpers.CAUSAL_LM, other, rows(), CPU), exact=False) for other in (right, wrong))
    assert good.passed
    assert good.kl < 0.05 * bad.kl
    assert good.kl <= 1e-6


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_dense_weights_survive_an_evaluation(kind: str) -> None:
    model = helpers.tiny_model("llama", quantization=kind)
    layers = [module for module in model.modules() if is_quantized(module)]
    assert len(layers) == 14
    before = [dense_weight(layer) for layer in layers]
    helpers.logits(model)
    model.train()
    model(input_ids=helpers.some_ids()).logits.sum()
    helpers.logits(model)
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(dense_weight(layer), weight)
    original = [module.weight for name, module in helpers.tiny_model("llama").named_modules() if name.endswith("_proj")]
    for weight, dense in zip(before, original, strict=True):
        assert 0 < float(((weight - dense).norm() / dense.norm()).detach()) < {"nf4": 0.1, "fp4": 0.13, "int8": 0.01}[kind]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_widths_that_the_cpu_kernels_expand_wrongly_are_refused(kind: str) -> None:
    layer = torch.nn.Linear(96, 64, bias=False)
    with pytest.raises(ModelError, match="multiple of 64; one has 96"):
        quantize_linear(layer, kind, double=True, compute_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_dtype_can_be_chosen(dtype: torch.dtype) -> None:
    model, _ = helpers.adapted("qlora", quantization="nf4", rank=4)
    merged = merge(model, dtype)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert not any(p.requires_grad for p in merged.parameters())


def test_a_model_that_differs_fails_the_check(tmp_path: Path) -> None:
    model, _ = helpers.adapted("lora", rank=4)
    helpers.stir(model)
    before = logits_of(helpers.CAUSAL_LM, model, rows(), CPU)
    merged = merge(model)
    assert parity(before, logits_of(helpers.CAUSAL_LM, merged, rows(), CPU), exact=True).passed
    with torch.no_grad():
        merged.model.layers[0].self_attn.q_proj.weight[0] += 0.5
    other = logits_of(helpers.CAUSAL_LM, merged, rows(), CPU)
    with pytest.raises(CheckFailed, match=r"largest difference .*allowed: max_difference <= 0\.000\d+") as caught:
        check(parity(before, other, exact=True), tmp_path)
    assert caught.value.exit_code == 8
    with pytest.raises(CheckFailed, match=r"KL .*allowed: kl <= 0\.005, top1 >= 0\.99"):
        check(parity(before, before.roll(1, 1), exact=False), tmp_path)


def test_parity_is_a_divergence() -> None:
    p = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    same = parity(p, p + 3.0, exact=False)
    assert same.kl == pytest.approx(0.0, abs=1e-9)
    assert same.top1 == 1.0
    assert same.max_difference == pytest.approx(3.0, rel=1e-6)
    q = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    assert parity(p, q, exact=False).kl == pytest.approx(float(expected), rel=1e-5)


def test_a_nan_never_passes() -> None:
    p = torch.randn(7, 11)
    bad = p.clone()
    bad[3, 3] = float("nan")
    for exact in (True, False):
        assert not parity(p, bad, exact=exact).passed
        assert not parity(bad, bad, exact=exact).passed


def test_probe_rows_are_the_given_ones_or_a_text() -> None:
    tokenizer = helpers.tiny_tokenizer()
    (probe,) = probe_rows(tokenizer)
    assert len(probe) > 50
    assert probe.dtype == np.int32
    assert [row.tolist() for row in probe_rows(tokenizer, [np.asarray([1, 2])])] == [[1, 2]]
