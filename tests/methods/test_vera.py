"""VeRA against stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from peftcli.errors import CheckpointError
from peftcli.interchange import hf_peft
from peftcli.methods.kinds import trainable_state

TARGETS: dict[str, Any] = {"llama": ["q_proj", "k_proj", "down_proj"], "llama-tied": "all-linear", "gpt2": ["c_attn", "c_proj"]}


def stock(kind: str, dtype: torch.dtype, ours: Any, method: Any) -> Any:
    config = peft.VeraConfig(task_type="CAUSAL_LM", r=16, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2")
    model = peft.get_peft_model(helpers.tiny_model(kind, dtype), config, autocast_adapter_dtype=False).to(dtype)
    tensors = method.to_file(ours, {name: p.detach().clone() for name, p in trainable_state(ours).items()})
    result = peft.set_peft_model_state_dict(model, {hf_peft.file_key(ours, method, name): t.to(dtype) for name, t in tensors.items()})
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_outputs_and_gradients_equal_stock_peft(kind: str, dtype: torch.dtype, limit: float) -> None:
    model, method = helpers.adapted("vera", kind, dtype, rank=16, target_modules=TARGETS[kind])
    helpers.stir(model)
    other = stock(kind, dtype, model, method)
    ids = helpers.some_ids()
    for one in (model, other):
        one.train()
        F.cross_entropy(one(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    scale = max(1.0, float(helpers.logits(other).abs().max()))
    assert float((helpers.logits(model) - helpers.logits(other)).abs().max()) <= limit * scale
    assert float((helpers.logits(model) - helpers.logits(helpers.tiny_model(kind, dtype))).abs().max()) > 1e-2
    theirs = {n.replace(".default", ""): p.grad for n, p in other.named_parameters() if p.requires_grad}
    mine = {hf_peft.file_key(model, method, n): p.grad for n, p in trainable_state(model).items()}
    assert mine.keys() == theirs.keys()
    assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) <= limit  # type: ignore[operator]


@pytest.mark.parametrize("kind", list(TARGETS))
def test_files_both_ways(kind: str, tmp_path: Path) -> None:
    model, method = helpers.adapted("vera", kind, rank=16, target_modules=TARGETS[kind])
    helpers.stir(model)
    expected = helpers.logits(model)
    hf_peft.save_adapter(tmp_path / "ours", model, method, base_model="", revision=None)
    assert {"base_model.vera_A", "base_model.vera_B"} < set(load_file(tmp_path / "ours" / hf_peft.WEIGHTS))
    assert helpers.same(helpers.logits(peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path / "ours")), expected)
    stock(kind, torch.float32, model, method).save_pretrained(tmp_path / "theirs")
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path / "theirs"))
    assert torch.equal(helpers.logits(again), expected)


def test_a_file_without_its_projections_is_refused(tmp_path: Path) -> None:
    config = peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], save_projection=False)
    peft.get_peft_model(helpers.tiny_model(), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="save_projection=False"):
        hf_peft.read_adapter(tmp_path)


def test_all_layers_share_one_pair_and_a_run_passes_its_checks(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    model, _ = helpers.adapted("vera", rank=16)
    layers = [m for m in model.modules() if hasattr(m, "vera_lambda_d")]
    assert len(layers) == 14
    assert len({id(layer.shared) for layer in layers}) == 1
    assert sum(p.numel() for p in trainable_state(model).values()) == sum(16 + len(layer.vera_lambda_b) for layer in layers)
    report = helpers.run(helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out", method="{name: vera, rank: 16}"))
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed, report.checks.live_adapter
