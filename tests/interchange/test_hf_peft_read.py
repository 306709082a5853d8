"""We load what stock PEFT writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch

from peftcli.errors import CheckpointError
from peftcli.interchange import hf_peft
from peftcli.merge import merge

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "names that fit nothing": ("llama", {"target_modules": ["q_proj", "c_attn", "query_key_value"]}),
    "expression": ("llama", {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "excluded": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj", "nothing"]}),
    "excluded by an expression": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*q_proj"}),
    "layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "patterns": ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 5}, "alpha_pattern": {"v_proj": 3}}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "modules_to_save by the end of a name": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "modules_to_save, tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings, tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "output layer, tied": ("llama-tied", {"target_modules": ["lm_head"]}),
    "new tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [258, 261]}),
    "new tokens, tied": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [258, 261]}),
    "new tokens by layer": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [258, 261], "lm_head": [258, 261]}}),
    "new tokens of the output layer": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [258, 261]}}),
}  # fmt: skip


def stock(folder: Path, base: Any, **options: Any) -> Any:
    """Write an adapter with stock PEFT; all its weights are random."""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options))
    helpers.stir(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_same_logits(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    theirs = helpers.logits(stock(tmp_path, helpers.tiny_model(kind), **options))
    assert float((theirs - helpers.logits(helpers.tiny_model(kind))).abs().max()) > 1e-3
    ours = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path))
    assert helpers.same(helpers.logits(ours), theirs)
    assert float((helpers.logits(merge(ours)) - theirs).abs().max()) <= 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_read_and_written_again_stock_peft_still_agrees(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    theirs = helpers.logits(stock(tmp_path / "a", helpers.tiny_model(kind), **options))
    adapter = hf_peft.read_adapter(tmp_path / "a")
    model = hf_peft.apply_adapter(helpers.tiny_model(kind), adapter)
    hf_peft.save_adapter(tmp_path / "b", model, adapter.method, base_model="x", revision=None)
    again = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path / "b")
    assert helpers.same(helpers.logits(again), theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("how", ["trainable_token_indices", "modules_to_save"])
def test_a_resized_vocabulary(kind: str, how: str, tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    def base() -> Any:
        model = helpers.tiny_model(kind)
        model.resize_token_embeddings(helpers.VOCABULARY + 3, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[helpers.VOCABULARY :] = 0.1
            model.get_output_embeddings().weight[helpers.VOCABULARY :] = 0.1
        model.config._name_or_path = model.name_or_path = str(tiny_folders[kind])  # PEFT compares the vocabulary's size with it
        return model

    ids = [helpers.VOCABULARY + i for i in range(3)]
    options: dict[str, Any] = {how: ids if how == "trainable_token_indices" else ["embed_tokens", "lm_head"]}
    text = torch.cat([helpers.some_ids(2, 6), torch.tensor([ids, ids[::-1]])], 1)
    theirs = helpers.logits(stock(tmp_path, base(), target_modules=["q_proj"], **options), text)
    ours = hf_peft.apply_adapter(base(), hf_peft.read_adapter(tmp_path))
    assert helpers.same(helpers.logits(ours, text), theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "word"), [({"lora_bias": True}, "lora_bias")])
def test_what_we_do_not_compute_is_refused_by_name(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    stock(tmp_path, helpers.tiny_model("llama"), target_modules=["q_proj"], **options)
    with pytest.raises(CheckpointError, match=word):
        hf_peft.read_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_another_method_is_refused_by_name(tmp_path: Path) -> None:
    peft.get_peft_model(helpers.tiny_model("llama"), peft.OFTConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"OFT.*known: .*LORA"):
        hf_peft.read_adapter(tmp_path)
