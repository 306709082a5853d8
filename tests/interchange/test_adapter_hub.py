"""Files of the ``adapters`` library against its written-out layout. scripts/check_references.py compares with the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from peftcli.errors import CheckpointError, UsageError
from peftcli.interchange import adapter_hub, hf_peft
from peftcli.methods.base import Context

VARIANTS = ["houlsby", "pfeiffer", "parallel"]
# By family and the library's block: where its adapters are kept.
PLACES = {
    "llama": {"mh": "model.layers.{}.attention_adapters", "output": "model.layers.{}.output_adapters"},
    "gpt2": {"mh": "transformer.h.{}.attention_adapters", "output": "transformer.h.{}.output_adapters"},
    "bert": {"mh": "encoder.layer.{}.attention.output", "output": "encoder.layer.{}.output"},
}
# What the library saves for its double_seq_bn, seq_bn and par_bn (adapters 1.3.0).
CONFIGS: dict[str, dict[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "is_parallel": False, "non_linearity": "swish", "scaling": 1.0, "init_weights": "bert"},
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "is_parallel": False, "non_linearity": "relu", "scaling": 1.0, "init_weights": "bert"},
    "parallel": {"mh_adapter": False, "output_adapter": True, "original_ln_before": False, "is_parallel": True, "non_linearity": "relu", "scaling": 4.0, "init_weights": "mam_adapter"},
}  # fmt: skip


def base(family: str) -> Any:
    if family != "bert":
        return helpers.tiny_model(family)
    torch.manual_seed(7)
    config = BertConfig(vocab_size=helpers.VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    return BertModel(config).eval()


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=helpers.some_ids())[0]
    return result


def ours(folder: Path, family: str, **options: Any) -> Any:
    method = helpers.make_method("adapter", **options)
    model = method.apply(base(family), Context(seed=11))
    helpers.stir(model, scale=0.1)
    hf_peft.save_adapter(folder, model, method, base_model="some/base", revision=None)
    return model


def theirs(folder: Path, family: str, variant: str, name: str = "task", **changes: Any) -> dict[str, Tensor]:
    """A folder as the library writes it, random weights in it."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(5), {}
    for block in ("mh", "output") if variant == "houlsby" else ("output",):
        for layer in (0, 1):
            prefix = f"{PLACES[family][block].format(layer)}.adapters.{name}"
            for part, shape in {
                "adapter_down.0.weight": (6, 64),
                "adapter_down.0.bias": (6,),
                "adapter_up.weight": (64, 6),
                "adapter_up.bias": (64,),
            }.items():
                tensors[f"{prefix}.{part}"] = torch.randn(shape, generator=generator) * 0.1
    config = {
        **CONFIGS[variant], "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
        "inv_adapter": None, "leave_out": [], "ln_after": False, "ln_before": False, "original_ln_after": True, "phm_dim": 4, "phm_layer": False,
        "reduction_factor": 10, "residual_before_ln": True, "stochastic_depth": 0.0, "use_gating": False, **changes,
    }  # fmt: skip
    whole = {
        "config": config,
        "hidden_size": 64,
        "model_class": "X",
        "model_name": "some/base",
        "model_type": family,
        "name": name,
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    save_file(tensors, folder / "adapter.safetensors")
    return tensors


@pytest.mark.parametrize("family", list(PLACES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_has_the_librarys_keys_and_comes_back(variant: str, family: str, tmp_path: Path) -> None:
    model = ours(tmp_path / "mine", family, variant=variant)
    mine = hf_peft.read_adapter(tmp_path / "mine")
    for turn in ("one", "two"):
        adapter_hub.write(tmp_path / turn, mine, model_type=family, hidden_size=64, model_class="X", name="task")
    assert helpers.folder_bytes(tmp_path / "one") == helpers.folder_bytes(tmp_path / "two")
    written, expected = load_file(tmp_path / "one" / "adapter.safetensors"), theirs(tmp_path / "theirs", family, variant)
    assert written.keys() == expected.keys()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert {k: v for k, v in config["config"].items() if k in CONFIGS[variant] and k != "init_weights"} == {
        k: v for k, v in CONFIGS[variant].items() if k != "init_weights"
    }
    narrow = next(len(t) for k, t in written.items() if k.endswith("adapter_down.0.weight"))
    assert int(64 // config["config"]["reduction_factor"]) == narrow, "the library's own arithmetic"
    read = adapter_hub.read(tmp_path / "one")
    assert read.tensors.keys() == mine.tensors.keys()
    assert all(torch.equal(read.tensors[key], mine.tensors[key]) for key in mine.tensors)
    again = hf_peft.apply_adapter(base(family), read)
    assert torch.equal(outputs(again), outputs(model))
    assert not torch.equal(outputs(again), outputs(base(family)))


@pytest.mark.parametrize("family", list(PLACES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_the_library_is_read_and_written_again(variant: str, family: str, tmp_path: Path) -> None:
    expected = theirs(tmp_path / "theirs", family, variant)
    read = adapter_hub.read(tmp_path / "theirs")
    model = hf_peft.apply_adapter(base(family), read)
    hf_peft.save_adapter(tmp_path / "mine", model, read.method, base_model="some/base", revision=None)
    mine = hf_peft.read_adapter(tmp_path / "mine")
    adapter_hub.write(tmp_path / "again", mine, model_type=family, hidden_size=64, model_class="X", name="task")
    again = load_file(tmp_path / "again" / "adapter.safetensors")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in expected)


@pytest.mark.parametrize("narrow", [1, 5, 7, 10, 13, 64])
def test_the_library_finds_the_same_width(narrow: int, tmp_path: Path) -> None:
    """It takes the floor of a floating-point quotient, which is one too small for 64 / 5."""
    ours(tmp_path / "mine", "llama", bottleneck_size=narrow)
    mine = hf_peft.read_adapter(tmp_path / "mine")
    adapter_hub.write(tmp_path / "hub", mine, model_type="llama", hidden_size=64, model_class="X", name="task")
    factor = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["config"]["reduction_factor"]
    assert int(64 // factor) == narrow


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_before": True}, "ln_before = True is not supported"),
        ({"phm_layer": True}, "phm_layer"),
        ({"use_gating": True}, "use_gating"),
        ({"inv_adapter": "nice"}, "inv_adapter"),
        ({"scaling": "learned"}, "scaling 'learned'"),
        ({"non_linearity": "leakyrelu"}, "leakyrelu"),
        ({"mh_adapter": False, "output_adapter": False}, "architecture is not known"),
        ({"architecture": "prefix_tuning"}, "architecture is not known"),
        ({"dropout": 7}, "not sound"),
    ],
)
def test_what_ours_cannot_compute_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs(tmp_path / "hub", "llama", "houlsby", **changes)
    with pytest.raises(CheckpointError, match=message):
        adapter_hub.read(tmp_path / "hub")


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    tensors = theirs(folder, "llama", "houlsby")
    save_file(
        {**tensors, "model.layers.0.attention_adapters.adapters.other.adapter_up.weight": torch.ones(2)}, folder / "adapter.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"adapters\.other.* is not known here"):
        adapter_hub.read(folder)
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match="pickle") as caught:
        adapter_hub.read(folder)
    assert "use_safetensors" in str(caught.value.hint)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        adapter_hub.read(folder)


def test_only_bottlenecks_of_known_families_are_written(tmp_path: Path) -> None:
    helpers.write_adapter(tmp_path / "lora", "llama", {"rank": 4})
    target: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "model_class": "X", "name": "task"}
    with pytest.raises(UsageError, match="lora is no bottleneck adapter"):
        adapter_hub.write(tmp_path / "out", hf_peft.read_adapter(tmp_path / "lora"), **target)
    ours(tmp_path / "mine", "llama", modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match=r"lm_head\.weight has no place"):
        adapter_hub.write(tmp_path / "out", hf_peft.read_adapter(tmp_path / "mine"), **target)
    with pytest.raises(UsageError, match="models of type 'opt'"):
        adapter_hub.write(tmp_path / "out", hf_peft.read_adapter(tmp_path / "mine"), **{**target, "model_type": "opt"})
    with pytest.raises(UsageError, match="cannot name an adapter"):
        adapter_hub.write(tmp_path / "out", hf_peft.read_adapter(tmp_path / "mine"), **{**target, "name": "../x"})
    assert not (tmp_path / "out").exists()
