"""Stock PEFT loads what we write: every key, every bit, the same logits. What is written depends on the weights alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file

from peftcli.interchange import hf_peft
from peftcli.methods.base import Context
from peftcli.methods.kinds import trainable_state

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"rank": 4, "alpha": 8}),
    "tied": ("llama-tied", {"rank": 4, "alpha": 8}),
    "gpt2": ("gpt2", {"rank": 4, "alpha": 8}),
    "one layer": ("llama", {"rank": 4, "target_modules": ["0.self_attn.q_proj", "1.self_attn.v_proj"]}),
    "rslora and patterns": ("llama", {"rank": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {"v_proj": 4.5}}),
    "modules_to_save": ("llama", {"rank": 4, "modules_to_save": ["norm", "lm_head"]}),
    "modules_to_save, tied": ("llama-tied", {"rank": 4, "modules_to_save": ["lm_head"]}),
    "embedding whole, tied": ("llama-tied", {"rank": 4, "modules_to_save": ["embed_tokens"]}),
    "output layer": ("llama", {"rank": 4, "target_modules": ["lm_head", "o_proj"]}),
    "output layer, tied": ("llama-tied", {"rank": 4, "target_modules": ["lm_head", "o_proj"]}),
}  # fmt: skip


def stock(folder: Path, base: Any) -> Any:
    """The adapter through ``PeftModel.from_pretrained``; a key that is missing is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    model, method = helpers.write_adapter(tmp_path, kind, options)
    other = stock(tmp_path, helpers.tiny_model(kind))
    assert helpers.same(helpers.logits(other), helpers.logits(model))
    assert float((helpers.logits(model) - helpers.logits(helpers.tiny_model(kind))).abs().max()) > 1e-2
    theirs, ours = peft.get_peft_model_state_dict(other, save_embedding_layers=False), load_file(tmp_path / hf_peft.WEIGHTS)
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        assert torch.equal(theirs[key], tensor), key
    for name, parameter in trainable_state(model).items():
        assert torch.equal(ours[hf_peft.file_key(model, method, name)], parameter)
    assert not any("_orig_mod" in key or ".base." in key or ".module." in key for key in ours)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_we_read(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    model, _ = helpers.write_adapter(tmp_path, kind, options)
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path))
    assert torch.equal(helpers.logits(again), helpers.logits(model))


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("whole", [[], ["embed_tokens", "lm_head"]])
def test_new_tokens_and_a_resized_vocabulary(kind: str, whole: list[str], tmp_path: Path) -> None:
    def base() -> Any:
        model = helpers.tiny_model(kind)
        model.resize_token_embeddings(helpers.VOCABULARY + 3, mean_resizing=False)
        with torch.no_grad():  # what the new rows hold before the adapter is loaded must not matter
            model.get_input_embeddings().weight[helpers.VOCABULARY :] = torch.randn(3, 64)
        return model

    ids = tuple(range(helpers.VOCABULARY, helpers.VOCABULARY + 3))
    method = helpers.make_method("lora", rank=4, modules_to_save=whole)
    model = method.apply(base(), Context(new_token_ids=ids))
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    text = torch.cat([helpers.some_ids(2, 6), torch.tensor([list(ids), list(ids)[::-1]])], 1)
    expected = helpers.logits(model, text)
    assert float((expected - helpers.logits(base(), text)).abs().max()) > 1e-2
    again = hf_peft.apply_adapter(base(), hf_peft.read_adapter(tmp_path))
    assert torch.equal(helpers.logits(again, text)[..., : helpers.VOCABULARY], expected[..., : helpers.VOCABULARY])
    assert torch.equal(helpers.logits(again, text), expected)
    assert helpers.same(helpers.logits(stock(tmp_path, base()), text), expected)


def test_the_config_names_what_it_is(tmp_path: Path) -> None:
    helpers.write_adapter(tmp_path, "llama", {"rank": 4, "alpha": 8, "target_modules": ["v_proj", "q_proj"], "modules_to_save": ["norm"]})
    text = (tmp_path / hf_peft.CONFIG).read_text(encoding="utf-8")
    fields = json.loads(text)
    assert text == json.dumps(fields, indent=2, sort_keys=True) + "\n"
    assert fields["peft_type"] == "LORA"
    assert fields["task_type"] == "CAUSAL_LM"
    assert fields["base_model_name_or_path"] == "some/base"
    assert fields["r"] == 4
    assert fields["lora_alpha"] == 8
    assert isinstance(fields["lora_alpha"], int)
    assert fields["target_modules"] == ["q_proj", "v_proj"]
    assert fields["modules_to_save"] == ["model.norm"], "stock PEFT takes `norm` for every name that ends with it"
    assert sorted(p.name for p in tmp_path.iterdir()) == [hf_peft.CONFIG, hf_peft.WEIGHTS]


def test_bytes_do_not_depend_on_the_process_or_the_order_of_options(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, helpers\n"
        "options = {'rank': 4, 'rank_pattern': {'q_proj': 2, 'v_proj': 3}, 'target_modules': ['q_proj', 'v_proj'], 'modules_to_save': ['norm', 'lm_head']}\n"
        "helpers.write_adapter(pathlib.Path(sys.argv[1]), 'llama', options)\n"
    )
    here = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=True, env=env)
    options = {
        "rank": 4,
        "rank_pattern": {"v_proj": 3, "q_proj": 2},
        "target_modules": ["v_proj", "q_proj"],
        "modules_to_save": ["lm_head", "norm"],
    }
    helpers.write_adapter(tmp_path / "b", "llama", options)
    assert helpers.folder_bytes(tmp_path / "a") == helpers.folder_bytes(tmp_path / "b")
