"""Head only: the output layer over frozen features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaForSequenceClassification

from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.merge import merge
from peftcli.methods.base import Context
from peftcli.methods.kinds import trainable_state
from peftcli.methods.targets import classification_heads
from peftcli.model.heads import start_afresh


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_only_the_output_layer_moves_and_its_gradient_is_the_formula(kind: str) -> None:
    model, _ = helpers.adapted("head_only", kind, torch.float64)
    assert list(trainable_state(model)) == ["lm_head.weight"]
    embedding = model.get_input_embeddings().weight
    assert embedding is not model.lm_head.weight
    assert not embedding.requires_grad
    assert not model.config.tie_word_embeddings
    split = helpers.make_split([7, 12, 5])
    helpers.loss_of(model, split, packed=False).backward()
    # Softmax regression on the last hidden states: the gradient is (p - onehot)' h.
    expected = torch.zeros_like(model.lm_head.weight)
    for ids, mask in zip(split.input_ids, split.supervised, strict=True):
        row = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            hidden = model.base_model(input_ids=row).last_hidden_state[0, :-1]
            p = (hidden @ model.lm_head.weight.t()).softmax(-1)
        p[torch.arange(len(p)), row[0, 1:]] -= 1.0
        expected += (p * torch.from_numpy(mask[1:])[:, None]).t() @ hidden
    assert float((model.lm_head.weight.grad - expected).abs().max()) <= 1e-9


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_tied_layer_is_untied_in_the_file_and_in_the_merged_model(quantization: str | None, tmp_path: Path) -> None:
    model, method = helpers.adapted("head_only", "llama-tied", quantization=quantization)
    helpers.stir(model)
    before = helpers.logits(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    assert list(load_file(tmp_path / hf_peft.WEIGHTS)) == ["base_model.model.lm_head.weight"]
    again = hf_peft.apply_adapter(helpers.tiny_model("llama-tied", quantization=quantization), hf_peft.read_adapter(tmp_path), Context())
    assert torch.equal(helpers.logits(again), before)
    merged = merge(model)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    if quantization is None:
        reloaded = type(merged).from_pretrained(tmp_path / "merged")
        assert float((helpers.logits(reloaded) - before).abs().max()) <= 1e-5


def tiny_bert(cls: Any) -> Any:
    torch.manual_seed(1)
    return cls(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifiers_head_starts_afresh_as_a_function_of_the_seed(family: str) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # transformers fills a missing head from torch's own state
        model: Any = (
            tiny_bert(BertForSequenceClassification) if family == "bert" else LlamaForSequenceClassification(helpers.tiny_config("llama"))
        )
        start_afresh(model, classification_heads(model), seed=5)
        states.append(trainable_state(helpers.make_method("head_only").apply(model, Context())))
    assert set(states[0]) == ({"classifier.weight", "classifier.bias"} if family == "bert" else {"score.weight"})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(bool(p.any()) != name.endswith("bias") for name, p in states[0].items())


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="BertModel has no output layer"):
        helpers.make_method("head_only").apply(tiny_bert(BertModel), Context())
