"""Freeze: which part of the base moves, and that the file holds just that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.methods.base import Context
from peftcli.methods.kinds import trainable_state
from peftcli.methods.targets import stacks


def moving(kind: str = "llama", **options: Any) -> set[str]:
    return set(trainable_state(helpers.adapted("freeze", kind, **options)[0]))


def under(kind: str, *beginnings: str) -> set[str]:
    return {name for name, _ in helpers.tiny_model(kind).named_parameters() if name.startswith(beginnings)}


def test_what_moves() -> None:
    assert moving() == under("llama", "model.layers.")
    assert moving(last_layers=1) == under("llama", "model.layers.1.")
    assert moving(first_layers=1) == under("llama", "model.layers.0.")
    assert moving(last_layers=1, first_layers=1) == under("llama", "model.layers.")
    assert moving("gpt2", last_layers=1) == under("gpt2", "transformer.h.1.")
    assert moving(patterns=[r"norm"]) == {name for name in under("llama", "") if "norm" in name}
    assert moving(patterns=[r"^lm_head", r"1\.mlp\."]) == under("llama", "lm_head", "model.layers.1.mlp")
    assert moving(last_layers=1, embeddings=True) == under("llama", "model.layers.1.", "model.embed_tokens.")


def test_tied_embeddings_stay_tied_when_they_move() -> None:
    model, _ = helpers.adapted("freeze", "llama-tied", embeddings=True)
    assert set(trainable_state(model)) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_loss_and_gradients_are_full_fine_tunings() -> None:
    part, _ = helpers.adapted("freeze", dtype=torch.float64, last_layers=1)
    whole, _ = helpers.adapted("full", dtype=torch.float64)
    split = helpers.make_split([7, 12, 5])
    losses = [helpers.loss_of(one, split) for one in (part, whole)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    grads = helpers.gradients(whole)
    found = helpers.gradients(part)
    assert found
    assert all(torch.equal(grad, grads[name]) for name, grad in found.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_layers": 3}, r"last_layers: 3 is more than the 2 layers of model\.layers"),
        ({"first_layers": 9}, r"first_layers: 9 is more than the 2 layers"),
        ({"patterns": ["q_porj"]}, r"no weight's name .*'q_porj'"),
        ({"patterns": ["("]}, r"no regular expression"),
    ],
)
def test_faults(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        moving(**options)
    if options == {"patterns": ["q_porj"]}:
        assert "q_proj" in str(caught.value.hint)


def test_a_model_without_layers_and_quantized_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="no list of layers"):
        helpers.make_method("freeze").apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), Context())
    with pytest.raises(UsageError, match="quantized"):
        helpers.adapted("freeze", quantization="nf4")


@pytest.mark.parametrize("options", [{"last_layers": 1}, {"patterns": ["norm", "k_proj"], "embeddings": True}, {}])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_the_file_holds_what_moved_and_its_choice(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, method = helpers.adapted("freeze", kind, **options)
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    assert set(load_file(tmp_path / hf_peft.WEIGHTS)) == {f"base_model.model.{name}" for name in trainable_state(model)}
    adapter = hf_peft.read_adapter(tmp_path)
    assert adapter.method.config == method.config
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), adapter, Context())
    assert torch.equal(helpers.logits(again), helpers.logits(model))


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_new_tokens_are_trained_by_row_where_the_embedding_is_not(kind: str, embeddings: bool, tmp_path: Path) -> None:
    method = helpers.make_method("freeze", last_layers=1, embeddings=embeddings)
    model = method.apply(helpers.tiny_model(kind), Context(new_token_ids=(261, 262)))
    rows = {name for name in trainable_state(model) if name.endswith("trainable_tokens_delta")}
    tied = kind == "llama-tied"
    expected = (
        set()
        if embeddings and tied
        else {"lm_head"}
        if embeddings
        else {"model.embed_tokens"}
        if tied
        else {"model.embed_tokens", "lm_head"}
    )
    assert rows == {f"{name}.trainable_tokens_delta" for name in expected}
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path), Context())
    ids = torch.tensor([[5, 261, 262, 9]])
    assert torch.equal(helpers.logits(again, ids), helpers.logits(model, ids))


def test_stacks_of_layers_in_each_family() -> None:
    assert stacks(helpers.tiny_model("llama")) == [["model.layers.0", "model.layers.1"]]
    assert stacks(helpers.tiny_model("gpt2")) == [["transformer.h.0", "transformer.h.1"]]
    bert = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24))
    assert stacks(bert) == [["encoder.layer.0", "encoder.layer.1"]]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    assert stacks(t5) == [["encoder.block.0", "encoder.block.1"], ["decoder.block.0", "decoder.block.1"]]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_trained_embeddings_in_a_bfloat16_model(kind: str) -> None:
    """Their float32 features meet norms, which take them in float32 only."""
    model = helpers.make_method("freeze", last_layers=1, embeddings=True).apply(helpers.tiny_model(kind, torch.bfloat16), Context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        helpers.loss_of(model, helpers.make_split([8, 12])).backward()
    assert all(gradient.abs().sum() > 0 for gradient in helpers.gradients(model).values())
    assert len(helpers.gradients(model)) == sum(p.requires_grad for p in model.parameters())
