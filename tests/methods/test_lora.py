"""LoRA against stock PEFT, and the choice of what is adapted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch

from peftcli.errors import RecipeError, UsageError
from peftcli.interchange import hf_peft
from peftcli.methods.base import Context
from peftcli.methods.kinds import LayerMethod, adapter_layers, trainable_state
from peftcli.methods.targets import match
from peftcli.recipe.load import parse_recipe

ATTENTION = ["q_proj", "v_proj"]


def reference(kind: str, dtype: torch.dtype, options: dict[str, Any], ours: Any, method: Any) -> Any:
    """Stock PEFT over the same base, with our adapter's weights."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(helpers.tiny_model(kind, dtype), config, autocast_adapter_dtype=False)
    tensors = {hf_peft.file_key(ours, method, name): p.detach().clone() for name, p in trainable_state(ours).items()}
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return model


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {"rank": 4, "alpha": 8, "target_modules": ATTENTION}, {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "all-linear": ("llama", {"rank": 3, "alpha": 7}, {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}),
    "rslora": ("llama", {"rank": 4, "alpha": 8, "use_rslora": True}, {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"}),
    "regex": (
        "llama",
        {"rank": 4, "alpha": 8, "target_modules": r".*\.0\..*_proj"},
        {"r": 4, "lora_alpha": 8, "target_modules": r".*\.0\..*_proj"},
    ),
    "patterns": (
        "llama",
        {"rank": 4, "alpha": 8, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}, "alpha_pattern": {"1.self_attn.v_proj": 3.5}},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}, "alpha_pattern": {"1.self_attn.v_proj": 3.5}},
    ),
    "gpt2 Conv1D": ("gpt2", {"rank": 4, "alpha": 8}, {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "output layer": ("llama", {"rank": 4, "alpha": 8, "target_modules": ["lm_head", "q_proj"]}, {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"]}),
    "tied output layer": ("llama-tied", {"rank": 4, "alpha": 8, "target_modules": ["lm_head"]}, {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]}),
    "modules_to_save": (
        "llama-tied",
        {"rank": 4, "alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "model.norm"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "model.norm"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_stock_peft(case: str) -> None:
    kind, options, theirs = CASES[case]
    model, method = helpers.adapted("lora", kind, torch.float64, **options)
    helpers.stir(model)
    other = reference(kind, torch.float64, theirs, model, method)
    assert sum(p.numel() for p in other.parameters() if p.requires_grad) == sum(p.numel() for p in trainable_state(model).values())
    ids = helpers.some_ids()
    for one in (model, other):
        one.train()
        out = one(input_ids=ids)
        torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert float((helpers.logits(model) - helpers.logits(other)).abs().max()) <= 1e-10
    found = {re.sub(r"\.(default|modules_to_save\.default)\b", "", n): p.grad for n, p in other.named_parameters() if p.requires_grad}
    for name, parameter in trainable_state(model).items():
        key = hf_peft.file_key(model, method, name)
        assert float((parameter.grad - found[key]).abs().max()) <= 1e-10, key  # type: ignore[operator]


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    model, _ = helpers.adapted("lora", dropout=0.5, rank=4)
    helpers.stir(model)
    quiet, _ = helpers.adapted("lora", dropout=0.0, rank=4)
    helpers.stir(quiet)
    ids = helpers.some_ids()
    assert torch.equal(helpers.logits(model), helpers.logits(quiet))
    model.train()
    torch.manual_seed(0)
    first = model(input_ids=ids).logits
    second = model(input_ids=ids).logits
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "targets", "exclude", "expected"),
    [
        ("llama", "all-linear", [], 14),
        ("llama", "all-linear", ["down_proj"], 12),
        ("llama", ["q_proj"], [], 2),
        ("llama", ["0.self_attn.q_proj"], [], 1),
        ("llama", r".*\.1\.mlp\..*_proj", [], 3),
        ("llama", ["lm_head"], [], 1),
        ("gpt2", "all-linear", [], 8),
    ],
)
def test_targets(kind: str, targets: str | list[str], exclude: list[str], expected: int) -> None:
    model = helpers.tiny_model(kind)
    names = match(model, targets, exclude)
    assert len(names) == expected
    assert names == [name for name, _ in model.named_modules() if name in names], "in the model's order"
    if targets == "all-linear":
        assert "lm_head" not in names


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], r"q_porj.*near: q_proj"),
        (["q_proj", "nothing_like_it"], r"nothing_like_it"),
        (r".*\.q_porj", r"no module's whole name matches"),
        ("(", r"no regular expression"),
        ([], r"nothing is left to adapt"),
        (["embed_tokens"], r"adapts linear layers only"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        helpers.adapted("lora", target_modules=targets)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_faults_of_patterns(option: str, tmp_path: Path) -> None:
    text = helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: lora, {option}: {{'q_proj(': 4}}}}")
    with pytest.raises(RecipeError, match=rf"method\.{option}.*'q_proj\(' is no regular expression.*write the end of a module's name"):
        parse_recipe(text, "r.yaml")
    with pytest.raises(UsageError, match=rf"method\.{option}: 'q_porj' fits none of the adapted modules") as caught:
        helpers.adapted("lora", **{option: {"q_porj": 4}})
    assert caught.value.hint == "did you mean 'q_proj'?"
    with pytest.raises(UsageError, match="fits none"):
        helpers.adapted("lora", target_modules=["v_proj"], **{option: {"q_proj": 4}})


def test_modules_to_save_faults() -> None:
    with pytest.raises(UsageError, match="lm_haed"):
        helpers.adapted("lora", modules_to_save=["lm_haed"])
    with pytest.raises(UsageError, match="choose one"):
        helpers.adapted("lora", modules_to_save=["0.mlp"])
    with pytest.raises(UsageError, match="quantized"):
        helpers.adapted("lora", quantization="nf4", target_modules=["q_proj"], modules_to_save=["v_proj"])


def test_a_tied_output_layer_trained_whole_leaves_the_embedding_alone() -> None:
    model, _ = helpers.adapted("lora", "llama-tied", modules_to_save=["lm_head"])
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is not embedding
    assert torch.equal(model.lm_head.weight, embedding)
    assert not embedding.requires_grad
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("whole", [[], ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_new_tokens_train_their_rows_in_what_is_not_trained_whole(kind: str, whole: list[str]) -> None:
    method = helpers.make_method("lora", target_modules=["q_proj"], modules_to_save=whole)
    assert isinstance(method, LayerMethod)
    base = helpers.logits(helpers.tiny_model(kind))
    model = method.apply(helpers.tiny_model(kind), Context(new_token_ids=(261, 262)))
    # The output layer's new rows are a product of their own, which some machines round otherwise.
    assert helpers.same(helpers.logits(model), base)
    rows = {name.rpartition(".")[2] for name, layer in adapter_layers(model).items() if hasattr(layer, "trainable_tokens_delta")}
    assert rows == {"embed_tokens", "lm_head"} - set(whole)
    moving = [name for name in trainable_state(model) if "lora" not in name]
    assert len(moving) == (1 if kind == "llama-tied" and not whole else 2)
