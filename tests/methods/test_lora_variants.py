"""The variants of LoRA against stock PEFT: DoRA, LoRA+, initial values, biases, embeddings, chosen blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import Tensor

from peftcli.errors import CheckpointError, RecipeError, UsageError
from peftcli.interchange import hf_peft
from peftcli.merge import logits_of, merge, parity
from peftcli.methods.base import Context
from peftcli.methods.kinds import adapter_layers, trainable_state
from peftcli.methods.lora_init import olora, pissa
from peftcli.methods.lora_layers import weight_of
from peftcli.methods.targets import is_linear
from peftcli.recipe.load import parse_recipe
from peftcli.train import checkpoint as checkpoints

SMALL: dict[str, Any] = {"rank": 4, "alpha": 6}
PEFT_SMALL: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
ALL = {"llama": "all-linear", "llama-tied": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}
# case -> (kind of model, our options, PEFT's options)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}, {"use_dora": True}),
    "dora tied": ("llama-tied", {"use_dora": True}, {"use_dora": True}),
    "dora Conv1D with biases": ("gpt2", {"use_dora": True}, {"use_dora": True}),
    "dora rslora": ("llama", {"use_dora": True, "use_rslora": True}, {"use_dora": True, "use_rslora": True}),
    "dora embedding": (
        "llama",
        {"use_dora": True, "adapt_embeddings": True, "target_modules": ["embed_tokens", "q_proj"]},
        {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "dora tied embedding": (
        "llama-tied",
        {"use_dora": True, "adapt_embeddings": True, "target_modules": ["embed_tokens"]},
        {"use_dora": True, "target_modules": ["embed_tokens"]},
    ),
    "biases of all": ("gpt2", {"bias": "all"}, {"bias": "all"}),
    "biases of the adapted": ("gpt2", {"bias": "lora_only"}, {"bias": "lora_only"}),
    "embedding": (
        "llama", {"adapt_embeddings": True, "target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "tied embedding": ("llama-tied", {"adapt_embeddings": True, "target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}),
    "block": (
        "llama",
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    ),
}  # fmt: skip
SHIFTED = ["pissa", "olora", "pissa_niter_8"]


def stock(kind: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"target_modules": ALL[kind], "fan_in_fan_out": kind == "gpt2", **PEFT_SMALL, **options})
    return peft.get_peft_model(helpers.tiny_model(kind, dtype), config, autocast_adapter_dtype=False)


def by_key(model: Any, method: Any) -> dict[str, Tensor]:
    ours = method.to_file(model, {name: p.detach().clone() for name, p in trainable_state(model).items()})
    return {hf_peft.file_key(model, method, name): tensor for name, tensor in ours.items()}


def backward(model: Any) -> None:
    model.train()
    ids = helpers.some_ids()
    F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_stock_peft(case: str, dtype: torch.dtype, limit: float) -> None:
    kind, options, theirs = CASES[case]
    model, method = helpers.adapted("lora", kind, dtype, **SMALL, **options)
    helpers.stir(model)
    other = stock(kind, dtype, theirs)
    result = peft.set_peft_model_state_dict(other, by_key(model, method))
    assert not result.unexpected_keys
    moving = {re.sub(r"\.default\b", "", n).replace("vector.weight", "vector"): p for n, p in other.named_parameters() if p.requires_grad}
    assert moving.keys() == by_key(model, method).keys()
    backward(model)
    backward(other)
    scale = max(1.0, float(helpers.logits(other).abs().max()))
    assert float((helpers.logits(model) - helpers.logits(other)).abs().max()) <= limit * scale
    assert float((helpers.logits(model) - helpers.logits(helpers.tiny_model(kind, dtype))).abs().max()) > 1e-2
    for name, parameter in trainable_state(model).items():
        key = hf_peft.file_key(model, method, name)
        theirs_grad = moving[key].grad
        assert float((parameter.grad - theirs_grad).abs().max()) <= limit * max(1.0, float(theirs_grad.abs().max())), key  # type: ignore[operator]


@pytest.mark.parametrize("case", CASES)
def test_files_both_ways_and_merging(case: str, tmp_path: Path) -> None:
    kind, options, theirs = CASES[case]
    model, method = helpers.adapted("lora", kind, **SMALL, **options)
    helpers.stir(model)
    expected = helpers.logits(model)
    hf_peft.save_adapter(tmp_path / "ours", model, method, base_model="", revision=None)
    assert helpers.same(helpers.logits(peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path / "ours")), expected)
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path / "ours"))
    assert torch.equal(helpers.logits(again), expected)
    other = stock(kind, torch.float32, theirs)
    peft.set_peft_model_state_dict(other, by_key(model, method))
    other.save_pretrained(tmp_path / "theirs")
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path / "theirs"))
    assert helpers.same(helpers.logits(again), expected)
    model.double()
    before = helpers.logits(model)
    assert float((helpers.logits(merge(model)) - before).abs().max()) <= 1e-9


def test_dora_starts_as_the_base_and_runs_over_quantized_ones(tmp_path: Path) -> None:
    for quantization in (None, "nf4", "int8"):
        base = helpers.tiny_model(quantization=quantization)
        model, method = helpers.adapted("lora", quantization=quantization, **SMALL, use_dora=True)
        assert torch.equal(helpers.logits(model), helpers.logits(base))
        vectors = [p for n, p in trainable_state(model).items() if n.endswith("magnitude_vector")]
        assert len(vectors) == 14
        helpers.make_loop(model, method, helpers.pattern_split(), tmp_path / str(quantization), steps=3, batch_size=8).run()
        rows = [row.numpy() for row in helpers.some_ids(8, 40)]
        before = logits_of(helpers.CAUSAL_LM, model, rows, torch.device("cpu"))
        found = parity(before, logits_of(helpers.CAUSAL_LM, merge(model), rows, torch.device("cpu")), exact=quantization is None)
        assert found.kl <= 5e-3
        assert quantization == "int8" or found.max_difference <= 1e-4


def test_dropout_of_dora_acts_on_the_whole_product() -> None:
    ours, method = helpers.adapted("lora", dtype=torch.float64, **SMALL, use_dora=True, dropout=0.5, target_modules=["down_proj"])
    helpers.stir(ours)
    other = stock("llama", torch.float64, {"use_dora": True, "lora_dropout": 0.5, "target_modules": ["down_proj"]})
    peft.set_peft_model_state_dict(other, by_key(ours, method))
    outputs = []
    for model in (ours, other):
        model.train()
        torch.manual_seed(5)
        outputs.append(model(input_ids=helpers.some_ids()).logits)
    assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-9
    assert float((outputs[0] - helpers.logits(ours)).abs().max()) > 1e-3


def test_lora_plus_groups_are_those_of_stock_peft() -> None:
    model, method = helpers.adapted("lora", **SMALL, loraplus_lr_ratio=16.0, use_dora=True)
    groups = method.param_groups(model, 1e-3, 0.1)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in trainable_state(model).items():
        assert rates[id(parameter)] == pytest.approx(1e-3 * (16 if name.endswith("lora_B") else 1)), name
        assert decays[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0)
    assert len(rates) == len(trainable_state(model))
    other = stock("llama", torch.float32, {})
    theirs = create_loraplus_optimizer(other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    names = {id(p): n for n, p in other.named_parameters()}
    for group in theirs.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(1e-3 * (16 if "lora_B" in names[id(parameter)] else 1))


def test_gaussian_start() -> None:
    model, _ = helpers.adapted("lora", rank=8, init_lora_weights="gaussian")
    assert torch.equal(helpers.logits(model), helpers.logits(helpers.tiny_model()))
    values = torch.cat([p.flatten() for n, p in trainable_state(model).items() if n.endswith("lora_A")])
    assert float(values.std()) == pytest.approx(1 / 8, rel=0.03)
    assert float(values.abs().max()) > 3 / 8, "not uniform"


def test_orthogonal_start() -> None:
    model, method = helpers.adapted("lora", rank=6, init_lora_weights="orthogonal")
    assert helpers.same(helpers.logits(model), helpers.logits(helpers.tiny_model()))
    reference = stock("llama", torch.float32, {"r": 6, "init_lora_weights": "orthogonal"})
    sizes = {name: p.std() for name, p in reference.named_parameters() if "lora_" in name}
    for name, parameter in trainable_state(model).items():
        key = hf_peft.file_key(model, method, name).replace(".weight", ".default.weight")
        assert float(parameter.std()) == pytest.approx(float(sizes[key]), rel=0.5), "away from zero, as far as peft's"
    with pytest.raises(UsageError, match=r"even ranks, and .*q_proj has 5"):
        helpers.adapted("lora", rank=5, init_lora_weights="orthogonal")


@pytest.mark.parametrize("rank", [1, 5])
def test_pissa_is_the_best_approximation_and_olora_the_qr(rank: int) -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    for kind, limit in (("pissa", 1e-5), ("pissa_niter_16", 1e-2)):
        a, b = pissa(weight, rank, 1.5, kind, torch.Generator().manual_seed(0))
        assert float((1.5 * b @ a - best).abs().max()) <= limit
        assert float((a @ a.t() - b.t() @ b).abs().max()) <= 1e-4, "the singular values are shared evenly"
    a, b = olora(weight, rank)
    assert float((b.t() @ b - torch.eye(rank)).abs().max()) <= 1e-5
    assert float((a.triu() - a).abs().max()) == 0.0


# Not OLoRA on GPT-2: this version of peft decomposes the transposed weight of Conv1D there, and fails on its shape.
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("start", "kind"), [("pissa", "llama"), ("pissa", "llama-tied"), ("pissa", "gpt2"), ("olora", "llama"), ("olora", "llama-tied")]
)
def test_shifted_starts_compute_what_stock_peft_computes(start: str, kind: str, dora: bool) -> None:
    """PEFT takes the start out of the base; the outputs and gradients are the same."""
    model, method = helpers.adapted("lora", kind, **SMALL, init_lora_weights=start, use_dora=dora)
    other = stock(kind, torch.float32, {"init_lora_weights": start, "use_dora": dora})
    ours = {hf_peft.file_key(model, method, name): p for name, p in trainable_state(model).items()}
    theirs = {n.replace(".default", "").replace("vector.weight", "vector"): p for n, p in other.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    base = helpers.logits(helpers.tiny_model(kind))
    assert helpers.same(helpers.logits(model), base)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for key in sorted(ours):
            assert float((ours[key] - theirs[key]).abs().max()) <= 1e-5, key
            step = torch.randn(ours[key].shape, generator=generator) * 0.05
            for parameter in (ours[key], theirs[key]):
                parameter += step
    backward(model)
    backward(other)
    # PEFT's base holds W - s B A rounded to float32, ours the original.
    assert float((helpers.logits(model) - helpers.logits(other)).abs().max()) <= 2e-5
    assert float((helpers.logits(model) - base).abs().max()) > 1e-2
    for key, parameter in ours.items():
        assert float((parameter.grad - theirs[key].grad).abs().max()) <= 2e-5, key  # type: ignore[operator]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", SHIFTED)
@pytest.mark.parametrize(("kind", "quantization"), [("llama", None), ("gpt2", None), ("llama", "nf4"), ("llama", "int8")])
def test_shifted_starts_are_saved_relative_to_the_original_base(
    kind: str, quantization: str | None, start: str, dora: bool, tmp_path: Path
) -> None:
    options = {**SMALL, "init_lora_weights": start, "rank_pattern": {"0.*": 2}, "use_dora": dora}
    model, method = helpers.adapted("lora", kind, quantization=quantization, **options)
    helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=3, batch_size=8, learning_rate=1e-3).run()
    hf_peft.save_adapter(tmp_path / "adapter", model, method, base_model="some/base", revision=None)
    fields = json.loads((tmp_path / "adapter" / hf_peft.CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["init_lora_weights"]) == (8, 12, True)
    assert set(fields["rank_pattern"].values()) == {4}
    expected = helpers.logits(model)
    again = hf_peft.apply_adapter(helpers.tiny_model(kind, quantization=quantization), hf_peft.read_adapter(tmp_path / "adapter"))
    assert helpers.same(helpers.logits(again), expected)
    if quantization != "int8":  # stock peft's own layers over int8 need a GPU
        base = helpers.tiny_model(kind, quantization=quantization)
        base.is_loaded_in_4bit = quantization == "nf4"
        assert helpers.same(helpers.logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    if quantization is None:
        model.double()
        before = helpers.logits(model)
        assert float((helpers.logits(merge(model)) - before).abs().max()) <= 1e-9
    else:
        rows = [row.numpy() for row in helpers.some_ids(8, 40)]
        before = logits_of(helpers.CAUSAL_LM, model, rows, torch.device("cpu"))
        found = parity(before, logits_of(helpers.CAUSAL_LM, merge(model), rows, torch.device("cpu")), exact=False)
        assert found.kl <= 5e-3
        assert quantization == "int8" or found.max_difference <= 1e-4


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_files_of_stock_peft_with_a_changed_base_are_read(start: str, tmp_path: Path) -> None:
    """A file that PEFT did not convert means: take the start out of the base first."""
    other = stock("llama", torch.float32, {"init_lora_weights": start})
    helpers.stir(other)
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / hf_peft.CONFIG).read_text())["init_lora_weights"] == start
    again = hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(tmp_path))
    assert float((helpers.logits(again) - helpers.logits(other)).abs().max()) <= 2e-5
    assert float((helpers.logits(again) - helpers.logits(helpers.tiny_model())).abs().max()) > 1e-2


def test_starts_that_only_peft_can_repeat_are_refused(tmp_path: Path) -> None:
    other = stock("llama", torch.float32, {})
    other.save_pretrained(tmp_path)
    good = json.loads((tmp_path / hf_peft.CONFIG).read_text())
    for start, reason in (
        ("corda", "statistics"),
        ("loftq", "quantization"),
        ("lora_ga", "gradients"),
        ("pissa_niter_4", "random numbers"),
    ):
        (tmp_path / hf_peft.CONFIG).write_text(json.dumps({**good, "init_lora_weights": start}))
        with pytest.raises(CheckpointError, match=f"{start}.*{reason}") as caught:
            hf_peft.read_adapter(tmp_path)
        assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)
    for change, message in (
        ({"init_lora_weights": "nonsense"}, "nonsense"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"velora_config": {}}, "velora"),
    ):
        (tmp_path / hf_peft.CONFIG).write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            hf_peft.read_adapter(tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_starts_that_leave_the_base_alone_do_not_matter(start: Any, tmp_path: Path) -> None:
    other = stock("llama", torch.float32, {"init_lora_weights": start})
    helpers.stir(other)
    other.save_pretrained(tmp_path)
    assert json.loads((tmp_path / hf_peft.CONFIG).read_text())["init_lora_weights"] == start
    again = hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(tmp_path))
    assert helpers.same(helpers.logits(again), helpers.logits(other))
    assert not helpers.same(helpers.logits(again), helpers.logits(helpers.tiny_model()))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_resume_brings_the_start_back(start: str, tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        model, method = helpers.adapted("lora", **SMALL, init_lora_weights=start)
        loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=4, batch_size=4, save_steps=2)
        loop.run()
        if interrupted:
            model, method = helpers.adapted("lora", **SMALL, init_lora_weights=start)
            with torch.no_grad():  # as on a machine whose decomposition ends in other bits
                for layer in method.layers.values():  # type: ignore[attr-defined]
                    layer.start_A.mul_(-1.5)
            loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=4, batch_size=4)
            loop.run(checkpoints.read(folder / "checkpoints" / "step-2"))
        ends.append({**trainable_state(model), "logits": helpers.logits(model)})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize(
    ("options", "quantization"),
    [
        ("use_dora: true", "null"), ("init_lora_weights: pissa", "null"), ("init_lora_weights: pissa", "nf4"),
        ("init_lora_weights: olora", "nf4"), ("init_lora_weights: olora, use_dora: true", "nf4"), ("loraplus_lr_ratio: 4", "null"), ("bias: all", "null"),
    ],
)  # fmt: skip
def test_whole_runs(options: str, quantization: str, tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    kind = "gpt2" if "bias" in options else "llama"
    text = helpers.recipe_for(tiny_folders[kind], tiny_data, tmp_path / "out", method=f"{{name: lora, rank: 4, alpha: 8, {options}}}")
    report = helpers.run(text, "train.max_steps=6", "train.learning_rate=1e-3", f"base_model.quantization={quantization}")
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed, report.checks.live_adapter
    assert len(load_file(tmp_path / "out" / "adapter" / hf_peft.WEIGHTS)) == report.checks.live_adapter.keys


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loftq_makes_up_for_what_quantization_lost(kind: str, quantization: str, tmp_path: Path) -> None:
    dense = helpers.tiny_model(kind)
    weights = {n: weight_of(m).clone() for n, m in dense.named_modules() if is_linear(m)}
    method = helpers.make_method("lora", rank=8, alpha=4, init_lora_weights="loftq")
    assert method.needs_dense_weights()
    base = helpers.tiny_model(kind, quantization=quantization)
    model = method.apply(base, Context(frozen_quantized=True, dense_weights=weights))
    for name, layer in method.layers.items():  # type: ignore[attr-defined]
        lost = weights[name] - weight_of(layer.base)
        values = torch.linalg.svdvals(lost)
        left = lost - layer.scaling * (layer.lora_B @ layer.lora_A)
        assert float(torch.linalg.norm(left)) == pytest.approx(float(values[8:].norm()), rel=1e-4), "the best of this rank"
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    again = hf_peft.apply_adapter(helpers.tiny_model(kind, quantization=quantization), hf_peft.read_adapter(tmp_path))
    assert torch.equal(helpers.logits(again), helpers.logits(model))
    if quantization != "int8":
        plain = helpers.logits(helpers.tiny_model(kind, quantization=quantization))
        exact = helpers.logits(dense)
        assert float((helpers.logits(model) - exact).norm()) < 0.9 * float((plain - exact).norm())


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_loftq_in_a_whole_run(name: str, tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    text = helpers.recipe_for(
        tiny_folders["llama"], tiny_data, tmp_path / "out", method=f"{{name: {name}, rank: 4, alpha: 8, init_lora_weights: loftq}}"
    )
    report = helpers.run(text, "train.max_steps=4", "base_model.quantization=nf4", "train.learning_rate=1e-3")
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed, report.checks.live_adapter
    with pytest.raises(RecipeError, match="loftq makes up|needs a 4-bit base"):
        parse_recipe(text, "r.yaml", ["base_model.quantization=null"])


def test_refusals(tmp_path: Path) -> None:
    for options, message in (
        ({"target_modules": ["embed_tokens"]}, "adapts linear layers only"),
        ({"layers_to_transform": [1, 7]}, r"no target lies in block 7; blocks with targets: \[0, 1\]"),
        ({"init_lora_weights": "pissa", "rank": 65}, "at most 64 for .*q_proj|at most 32 for"),
        ({"bias": "all"}, "no biases"),
    ):
        with pytest.raises(UsageError, match=message):
            helpers.adapted("lora", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="quantized"):
        helpers.make_method("lora", bias="all").apply(helpers.tiny_model("gpt2", quantization="nf4"), Context(frozen_quantized=True))
    assert all("lora_embedding" not in name for name in adapter_layers(helpers.adapted("lora")[0]))
