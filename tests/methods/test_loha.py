"""LoHa and LoKr against stock PEFT."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization as stock_factorization
from safetensors.torch import load_file

from peftcli.errors import CheckpointError, UsageError
from peftcli.interchange import hf_peft
from peftcli.merge import merge
from peftcli.methods.base import Context
from peftcli.methods.kinds import adapter_layers, trainable_state
from peftcli.methods.loha import DeltaLayer
from peftcli.methods.lokr import factorization

STOCK: dict[str, Any] = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
MLP = r".*\.mlp\..*_proj"
# name: method, our options, PEFT's. PEFT rounds the scaling of LoHa to float32: alpha / rank is a sum of halves here.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "loha": ("loha", {"rank": 4, "alpha": 6}, {"r": 4, "alpha": 6, "target_modules": "all-linear"}),
    "loha patterns": (
        "loha",
        {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"q_proj": 2, r"1\.mlp\..*": 1}, "alpha_pattern": {"v_proj": 2.0}},
        {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"q_proj": 2, r"1\.mlp\..*": 1}, "alpha_pattern": {"v_proj": 2}},
    ),
    "lokr factors": ("lokr", {"rank": 2, "alpha": 5}, {"r": 2, "alpha": 5, "target_modules": "all-linear"}),
    "lokr whole": ("lokr", {"rank": 32}, {"r": 32, "target_modules": "all-linear"}),
    "lokr both": (
        "lokr",
        {"rank": 2, "decompose_both": True, "decompose_factor": 16, "target_modules": MLP},
        {"r": 2, "decompose_both": True, "decompose_factor": 16, "target_modules": MLP},
    ),
    "lokr factor": ("lokr", {"rank": 3, "decompose_factor": 4}, {"r": 3, "decompose_factor": 4, "target_modules": "all-linear"}),
    "lokr odd factor": ("lokr", {"rank": 3, "decompose_factor": 5}, {"r": 3, "decompose_factor": 5, "target_modules": "all-linear"}),
    "loha whole modules": (
        "loha",
        {"rank": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip


def reference(name: str, kind: str, dtype: torch.dtype, options: dict[str, Any], ours: Any, method: Any) -> Any:
    """Stock PEFT over the same base, with our adapter's weights."""
    config = STOCK[name](task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(helpers.tiny_model(kind, dtype), config, autocast_adapter_dtype=False).to(dtype)
    tensors = {hf_peft.file_key(ours, method, key): p.detach().clone() for key, p in trainable_state(ours).items()}
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "hada_" in key or "lokr_" in key or "modules_to_save" in key]
    return model


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_stock_peft(case: str, kind: str, dtype: torch.dtype, limit: float) -> None:
    name, options, theirs = CASES[case]
    model, method = helpers.adapted(name, kind, dtype, **options)
    helpers.stir(model, scale=0.1)
    other = reference(name, kind, dtype, theirs, model, method)
    ids = helpers.some_ids()
    for one in (model, other):
        one.train()
        out = one(input_ids=ids)
        torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = helpers.logits(other)
    assert float((helpers.logits(helpers.tiny_model(kind, dtype)) - expected).abs().max()) > 1e-2, "the adapter must matter"
    assert float((helpers.logits(model) - expected).abs().max()) <= limit * max(1.0, float(expected.abs().max()))
    found = {re.sub(r"\.(default|modules_to_save\.default)\b", "", n): p.grad for n, p in other.named_parameters() if p.requires_grad}
    state = trainable_state(model)
    assert sum(p.numel() for p in found.values() if p is not None) == sum(p.numel() for p in state.values())
    for key, parameter in state.items():
        there = found[hf_peft.file_key(model, method, key)]
        assert parameter.grad is not None
        assert there is not None
        assert float((parameter.grad - there).abs().max()) <= limit * max(1.0, float(there.abs().max())), key


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("loha", {"rank_dropout": 0.3}),
        ("loha", {"module_dropout": 0.5}),
        ("lokr", {"rank_dropout": 0.3}),
        ("lokr", {"rank_dropout": 0.3, "rank_dropout_scale": True}),
        ("lokr", {"module_dropout": 0.5}),
    ],
)
def test_dropout_equals_stock_peft_and_rests_outside_of_training(name: str, dropout: dict[str, Any]) -> None:
    options = {"module_dropout": 1e-9, **dropout}  # PEFT draws a number for the module in any case
    model, method = helpers.adapted(name, dtype=torch.float64, rank=2, **options)
    helpers.stir(model, scale=0.1)
    other = reference(name, "llama", torch.float64, {"r": 2, "alpha": 8, "target_modules": "all-linear", **options}, model, method)
    answers = []
    for one in (model, other):
        one.train()
        torch.manual_seed(5)
        answers.append(one(input_ids=helpers.some_ids()).logits.detach())
    quiet, _ = helpers.adapted(name, dtype=torch.float64, rank=2)
    helpers.stir(quiet, scale=0.1)
    assert torch.equal(helpers.logits(model), helpers.logits(quiet))
    assert not torch.allclose(answers[0], helpers.logits(quiet))
    # PEFT's LoKr divides by the share of rows in float32.
    assert float((answers[0] - answers[1]).abs().max()) <= (1e-6 if "rank_dropout_scale" in dropout else 1e-9)


@pytest.mark.parametrize("rescale", [True, False])
def test_rows_that_rest_are_made_up_for(rescale: bool) -> None:
    class Plain(DeltaLayer):
        def update(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(*x.shape[:-1], 6)

    base = torch.nn.Linear(4, 6, bias=False)
    torch.nn.init.zeros_(base.weight)
    layer = Plain(base, 1.0, 0.5, 0.0, rescale=rescale).train()
    torch.manual_seed(2)
    kept = torch.rand(6) > 0.5
    torch.manual_seed(2)
    row = layer(torch.ones(1, 4))[0]
    expected = kept.float() / kept.float().mean() if rescale else kept.float()
    assert torch.equal(row, expected)
    assert 0 < int(kept.sum()) < 6


def test_all_rows_may_rest() -> None:
    model, _ = helpers.adapted("loha", rank=2, rank_dropout=0.999)
    helpers.stir(model)
    model.train()
    torch.manual_seed(0)
    assert model(input_ids=helpers.some_ids()).logits.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_our_file_in_stock_peft(case: str, tmp_path: Path) -> None:
    name, options, _ = CASES[case]
    model, method = helpers.adapted(name, **options)
    helpers.stir(model, scale=0.1)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        other = peft.PeftModel.from_pretrained(helpers.tiny_model(), tmp_path)
    loaded = peft.get_peft_model_state_dict(other)
    mine = load_file(tmp_path / hf_peft.WEIGHTS)
    assert loaded.keys() == mine.keys()
    assert all(torch.equal(loaded[key], mine[key]) for key in mine)
    assert helpers.same(helpers.logits(model), helpers.logits(other))


@pytest.mark.parametrize("case", CASES)
def test_stock_pefts_file_here(case: str, tmp_path: Path) -> None:
    name, _, theirs = CASES[case]
    torch.manual_seed(0)
    other = peft.get_peft_model(helpers.tiny_model(), STOCK[name](task_type="CAUSAL_LM", init_weights=False, **theirs))
    other.save_pretrained(tmp_path)
    model = hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(tmp_path), Context())
    expected = helpers.logits(other)
    assert not helpers.same(expected, helpers.logits(helpers.tiny_model()))
    assert helpers.same(helpers.logits(model), expected)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_initial_values_follow_pefts_rule(name: str) -> None:
    ours = trainable_state(helpers.adapted(name, rank=2)[0])
    torch.manual_seed(0)
    model, method = helpers.adapted(name, rank=2)
    stock = peft.get_peft_model(helpers.tiny_model(), STOCK[name](task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    theirs = peft.get_peft_model_state_dict(stock)
    assert {hf_peft.file_key(model, method, key): p.shape for key, p in ours.items()} == {key: t.shape for key, t in theirs.items()}
    for key, parameter in ours.items():
        other = theirs[hf_peft.file_key(model, method, key)]
        assert bool(parameter.any()) == bool(other.any()), key
        bound = 1.0 / parameter.shape[1] ** 0.5
        assert float(parameter.detach().abs().max()) <= bound
        assert float(other.abs().max()) <= bound
        if parameter.any() and parameter.numel() > 60:
            assert float(parameter.detach().abs().max()) > 0.8 * bound


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_the_update_is_what_is_folded(name: str, kind: str) -> None:
    """Over GPT-2's Conv1D too, which PEFT's LoHa and LoKr refuse."""
    model, _ = helpers.adapted(name, kind, torch.float64, rank=3, alpha=5)
    helpers.stir(model, scale=0.1)
    for layer in adapter_layers(model).values():
        assert isinstance(layer, DeltaLayer)
        delta = layer.delta(torch.float64)
        x = torch.randn(2, 3, delta.shape[1], dtype=torch.float64)
        assert float((layer.update(x) - x @ delta.t()).abs().max()) <= 1e-12
    before = helpers.logits(model)
    assert float((helpers.logits(merge(model)) - before).abs().max()) <= 1e-9


def test_lohas_memory_grows_as_loras() -> None:
    layer = helpers.make_method("loha", rank=2).make_layer("x", torch.nn.Linear(256, 256), Context())  # type: ignore[attr-defined]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(4, 256, requires_grad=True))
    assert sorted(kept)[-2] < 256 * 256, "only the base's own weight is as large as the layer"


@pytest.mark.parametrize("factor", [-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 100])
def test_factorization_is_pefts(factor: int) -> None:
    sizes = [*range(1, 200), 576, 1536, 2048, 4096, 11008, 49152]
    assert [factorization(size, factor) for size in sizes] == [stock_factorization(size, factor) for size in sizes]


def test_packed_rows_equal_rows_alone() -> None:
    split = helpers.make_split([7, 12, 5])
    for name in ("loha", "lokr"):
        model, _ = helpers.adapted(name, dtype=torch.float64, rank=2)
        helpers.stir(model, scale=0.1)
        packed, alone = helpers.loss_of(model, split), helpers.loss_of(model, split, packed=False)
        assert abs((packed - alone).detach()) <= 1e-9 * float(alone.detach())


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_half_precision_with_float32_parameters(name: str) -> None:
    model, _ = helpers.adapted(name, dtype=torch.bfloat16, rank=2)
    helpers.stir(model, scale=0.1)
    wide, _ = helpers.adapted(name, rank=2)
    helpers.stir(wide, scale=0.1)
    for one in (model, wide):
        helpers.loss_of(one, helpers.make_split([7, 12, 5])).backward()
    narrow, exact = helpers.gradients(model), helpers.gradients(wide)
    assert {g.dtype for g in narrow.values()} == {torch.float32}
    for key, grad in exact.items():
        assert float((narrow[key] - grad).norm()) <= 0.1 * float(grad.norm()), key


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_faults(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="near: q_proj"):
        helpers.adapted(name, target_modules=["q_porj"])
    with pytest.raises(ValueError, match="rank"):
        helpers.make_method(name, rank=0)


def test_files_are_the_same_to_the_byte(tmp_path: Path) -> None:
    for name in ("loha", "lokr"):
        for turn in ("one", "two"):
            model, method = helpers.adapted(name, rank=2)
            hf_peft.save_adapter(tmp_path / name / turn, model, method, base_model="some/base", revision=None)
        assert helpers.folder_bytes(tmp_path / name / "one") == helpers.folder_bytes(tmp_path / name / "two")
        fields = json.loads((tmp_path / name / "one" / hf_peft.CONFIG).read_text(encoding="utf-8"))
        assert fields["peft_type"] == name.upper()
        assert fields["target_modules"] == sorted(fields["target_modules"])


def test_layers_to_transform_of_stock_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for layers, expected in ((1, 1), ([0, 1], 2)):
        config = peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layers_to_transform=layers, init_weights=False)
        other = peft.get_peft_model(helpers.tiny_model(), config)
        other.save_pretrained(tmp_path)
        model = hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(tmp_path), Context())
        assert len(adapter_layers(model)) == expected
        assert helpers.same(helpers.logits(model), helpers.logits(other))
    path = tmp_path / hf_peft.CONFIG
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, "layers_to_transform": [[[]]]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="not sound"):
        hf_peft.read_adapter(tmp_path)
