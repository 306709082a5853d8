"""IA3 against stock PEFT, and the choice of what is scaled."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.merge import merge
from peftcli.methods.base import Context
from peftcli.methods.ia3 import Ia3Layer
from peftcli.methods.kinds import adapter_layers, trainable_state

# kind, our options, PEFT's
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "defaults": ("llama", {}, {}),
    "tied": ("llama-tied", {}, {}),
    "gpt2 Conv1D": ("gpt2", {}, {"fan_in_fan_out": True}),
    "all outputs": ("llama", {"target_modules": "all-linear", "feedforward_modules": []}, {"target_modules": "all-linear", "feedforward_modules": []}),
    "expressions": (
        "llama",
        {"target_modules": r".*\.0\..*_proj", "feedforward_modules": r".*(up|down)_proj"},
        {"target_modules": r".*\.0\..*_proj", "feedforward_modules": r".*(up|down)_proj"},
    ),
    "whole modules": (
        "llama-tied",
        {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip


def stock(kind: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    config = peft.IA3Config(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(helpers.tiny_model(kind, dtype), config, autocast_adapter_dtype=False).to(dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_stock_peft(case: str, dtype: torch.dtype, limit: float) -> None:
    kind, options, theirs = CASES[case]
    model, method = helpers.adapted("ia3", kind, dtype, **options)
    helpers.stir(model, scale=0.3)
    other = stock(kind, dtype, theirs)
    tensors = {hf_peft.file_key(model, method, name): p.detach().clone() for name, p in trainable_state(model).items()}
    assert not peft.set_peft_model_state_dict(other, tensors).unexpected_keys
    ids = helpers.some_ids()
    for one in (model, other):
        one.train()
        out = one(input_ids=ids)
        torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = helpers.logits(other)
    assert float((helpers.logits(helpers.tiny_model(kind, dtype)) - expected).abs().max()) > 1e-2, "the scales must matter"
    assert float((helpers.logits(model) - expected).abs().max()) <= limit * max(1.0, float(expected.abs().max()))
    found = {re.sub(r"\.(default|modules_to_save\.default)\b", "", n): p.grad for n, p in other.named_parameters() if p.requires_grad}
    state = trainable_state(model)
    assert {hf_peft.file_key(model, method, name) for name in state} == set(found)
    for name, parameter in state.items():
        there = found[hf_peft.file_key(model, method, name)]
        assert parameter.grad is not None
        assert there is not None
        assert parameter.shape == there.shape
        assert float((parameter.grad - there).abs().max()) <= limit * max(1.0, float(there.abs().max())), name


@pytest.mark.parametrize("case", CASES)
def test_files_both_ways(case: str, tmp_path: Path) -> None:
    kind, options, theirs = CASES[case]
    model, method = helpers.adapted("ia3", kind, **options)
    helpers.stir(model, scale=0.3)
    hf_peft.save_adapter(tmp_path / "ours", model, method, base_model="some/base", revision=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        warnings.filterwarnings("ignore", message=".*tie")  # and of tied weights that are trained whole
        other = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path / "ours")
    loaded, mine = peft.get_peft_model_state_dict(other), load_file(tmp_path / "ours" / hf_peft.WEIGHTS)
    assert all(torch.equal(loaded[key], mine[key]) for key in mine)
    assert helpers.same(helpers.logits(model), helpers.logits(other))
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path / "ours"), Context())
    assert torch.equal(helpers.logits(again), helpers.logits(model))

    torch.manual_seed(0)
    other = stock(kind, torch.float32, theirs)
    helpers.stir(other, scale=0.3)
    other.save_pretrained(tmp_path / "theirs")
    here = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path / "theirs"), Context())
    assert helpers.same(helpers.logits(here), helpers.logits(other))
    assert not helpers.same(helpers.logits(here), helpers.logits(helpers.tiny_model(kind)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_half_precision_is_pefts_too(kind: str) -> None:
    """PEFT keeps its scales in float32 over a half-precision base, as we do."""
    model, method = helpers.adapted("ia3", kind, torch.bfloat16)
    helpers.stir(model, scale=0.3)
    other = peft.get_peft_model(helpers.tiny_model(kind, torch.bfloat16), peft.IA3Config(task_type="CAUSAL_LM"))
    tensors = {hf_peft.file_key(model, method, name): p.detach().clone() for name, p in trainable_state(model).items()}
    assert not peft.set_peft_model_state_dict(other, tensors).unexpected_keys
    assert torch.equal(helpers.logits(model), helpers.logits(other))


def tiny(family: str) -> Any:
    if family == "bert":
        return BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24))
    if family == "t5":
        return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    return helpers.tiny_model(family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_familys_defaults_are_pefts(family: str) -> None:
    model = helpers.make_method("ia3").apply(tiny(family), Context())
    layers = {name: layer.feedforward for name, layer in adapter_layers(model).items() if isinstance(layer, Ia3Layer)}
    other = peft.get_peft_model(tiny(family), peft.IA3Config())
    theirs = {
        name.removeprefix("base_model.model."): module.is_feedforward
        for name, module in other.named_modules()
        if isinstance(module, peft.tuners.ia3.layer.IA3Layer)
    }
    assert layers == theirs
    assert True in layers.values()
    assert False in layers.values()


def test_scales_rest_at_one_and_do_not_decay() -> None:
    model, method = helpers.adapted("ia3", modules_to_save=["lm_head"])
    groups = method.param_groups(model, 1e-3, 0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    state = trainable_state(model)
    assert len(decay) == len(state)
    for name, parameter in state.items():
        assert decay[id(parameter)] == (0.1 if name == "lm_head.weight" else 0.0)
        if name.endswith("ia3_l"):
            assert bool((parameter == 1.0).all())


def test_bias_is_scaled_with_the_output() -> None:
    """GPT-2 has biases: merging must scale them with the outputs and leave them alone with the inputs."""
    model, _ = helpers.adapted("ia3", "gpt2", torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    helpers.stir(model, scale=0.3)
    before = helpers.logits(model)
    assert float((helpers.logits(merge(model)) - before).abs().max()) <= 1e-9


def test_packed_rows_equal_rows_alone() -> None:
    split = helpers.make_split([7, 12, 5])
    model, _ = helpers.adapted("ia3", dtype=torch.float64)
    helpers.stir(model, scale=0.3)
    packed, alone = helpers.loss_of(model, split), helpers.loss_of(model, split, packed=False)
    assert abs((packed - alone).detach()) <= 1e-9 * float(alone.detach())


def test_faults() -> None:
    with pytest.raises(UsageError, match=r"feedforward_modules: up_proj is not among the targets"):
        helpers.adapted("ia3", target_modules=["v_proj"], feedforward_modules=["up_proj"])
    with pytest.raises(UsageError, match="near: v_proj"):
        helpers.adapted("ia3", target_modules=["v_prj"])
    with pytest.raises(UsageError, match="no known names"):
        helpers.make_method("ia3").apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), Context())
