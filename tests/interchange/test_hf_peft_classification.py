"""Classifiers in PEFT's files: what we write gives the same logits in stock ``peft``, and what it writes comes back the same here. Heads by
their usual names and by others; the base is loaded with another head, which must not matter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import classifiers
import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcli.data.splits import LabelledSplit
from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.methods import registry
from peftcli.methods.base import Context

STOCK = [name for name in registry.names() if name != "qlora" and (form := registry.get(name).peft) is not None and form.stock]
# Stock PEFT has these layers for nn.Linear only, not for GPT-2's Conv1D; ours are tested there against the formula.
LINEAR_ONLY = {"loha", "lokr"}
# Other bodies and heads: RoBERTa (a head of two layers, positions after the padding's id), DistilBERT (`pre_classifier`), T5
# (`classification_head`). What takes no prefix or prompt there says so; see below.
OTHERS = {"roberta": set(), "distilbert": {"prefix_tuning", "ia3"}, "t5": {"prefix_tuning", "prompt_tuning", "p_tuning"}}
CASES = [(name, kind) for name in STOCK for kind in classifiers.KINDS if kind != "gpt2" or name not in LINEAR_ONLY] + [
    (name, kind) for kind, without in OTHERS.items() for name in STOCK if name not in without
]


def base(kind: str, seed: int) -> Any:
    """The classifier as transformers alone makes it, with another head."""
    model = classifiers.tiny_classifier(kind, plain=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score" in name or "classifier" in name or "classification_head" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def theirs(model: Any, split: LabelledSplit, kind: str) -> Tensor:
    """Stock PEFT's logits, row by row: with virtual tokens its decoders judge shorter rows of a batch by their padding."""
    model.eval()
    found = []
    for row in range(len(split.origins)):
        batch = classifiers.batch_of(split, [row])
        types = {"token_type_ids": batch.token_type_ids} if kind == "bert" else {}
        with torch.no_grad():
            found.append(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types).logits)
    return torch.cat(found)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_files_go_both_ways_with_the_head(name: str, kind: str, tmp_path: Path) -> None:
    split = classifiers.labelled_split([9, 4, 6, 9])
    model, method = classifiers.adapted(name, kind)
    helpers.stir(model)
    expected = classifiers.judged(model, split)
    hf_peft.save_adapter(tmp_path / "ours", model, method, base_model="some/base", revision=None, task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        other = peft.PeftModel.from_pretrained(base(kind, 1), tmp_path / "ours")
    assert isinstance(other, peft.PeftModelForSequenceClassification)
    assert helpers.same(theirs(other, split, kind), expected)

    other.save_pretrained(tmp_path / "theirs")
    written, stored = (load_file(tmp_path / who / hf_peft.WEIGHTS) for who in ("ours", "theirs"))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], stored[key]) for key in written)
    assert any("classifier" in key or "score" in key or "classification_head" in key for key in written)
    again = hf_peft.apply_adapter(classifiers.tiny_classifier(kind), hf_peft.read_adapter(tmp_path / "theirs"), Context(seed=5))
    assert torch.equal(classifiers.judged(again, split), expected)


@pytest.mark.parametrize("name", STOCK)
def test_a_pooler_that_is_trained_too_goes_both_ways(name: str, tmp_path: Path) -> None:
    """As where the base has none, or `task.train_pooler` asks for it; PEFT has to be told by `modules_to_save`."""
    split = classifiers.labelled_split([9, 4, 6])
    method = helpers.make_method(name)
    model = method.apply(classifiers.tiny_classifier("bert"), Context(seed=11, fresh=("bert.pooler",)))
    helpers.stir(model)
    expected = classifiers.judged(model, split)
    hf_peft.save_adapter(tmp_path, model, method, base_model="b", revision=None, task_type="SEQ_CLS", fresh=("bert.pooler",))
    assert any("pooler" in key for key in load_file(tmp_path / hf_peft.WEIGHTS))
    assert "bert.pooler" in json.loads((tmp_path / hf_peft.CONFIG).read_text())["modules_to_save"]
    other = peft.PeftModel.from_pretrained(base("bert", 1), tmp_path)
    assert helpers.same(theirs(other, split, "bert"), expected)
    again = hf_peft.apply_adapter(classifiers.tiny_classifier("bert"), hf_peft.read_adapter(tmp_path), Context(seed=5))
    assert torch.equal(classifiers.judged(again, split), expected)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, without in OTHERS.items() for name in sorted(without)])
def test_what_a_body_cannot_take_is_refused_with_the_reason(kind: str, name: str) -> None:
    with pytest.raises(UsageError, match=r"no prefix|virtual tokens have none|no known names"):
        classifiers.judged(classifiers.adapted(name, kind)[0])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stock_peft_judges_decoders_by_their_padding_and_we_do_not(kind: str, tmp_path: Path) -> None:
    """The reason for comparing row by row above. When this fails, PEFT or transformers has mended it, and batches can be compared."""
    split = classifiers.labelled_split([12, 4])
    model, method = classifiers.adapted("prompt_tuning", kind)
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="b", revision=None, task_type="SEQ_CLS")
    other = peft.PeftModel.from_pretrained(base(kind, 1), tmp_path)
    batch = classifiers.batch_of(split)
    other.eval()
    with torch.no_grad():
        together = other(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    ours = classifiers.judged(model, split)
    assert helpers.same(together[:1], ours[:1])
    assert not torch.allclose(together[1], ours[1], atol=1e-3)
