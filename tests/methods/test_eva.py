"""EVA against stock PEFT on the same batches, and in whole runs: files, resume, packing, quantized bases, processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from peft.tuners.lora.eva import initialize_lora_eva_weights
from safetensors.torch import load_file
from torch import Tensor

from peftcli.data.batching import Plan, collate
from peftcli.data.splits import Split
from peftcli.errors import CheckpointError, RecipeError, UsageError
from peftcli.interchange import hf_peft
from peftcli.methods.base import Context, TrainingBatch
from peftcli.methods.incremental_pca import Directions
from peftcli.methods.kinds import adapter_layers, trainable_state
from peftcli.methods.lora import Lora
from peftcli.recipe.load import parse_recipe
from peftcli.tasks.base import Layout
from peftcli.train import checkpoint as checkpoints
from peftcli.train.preview import training_batches

LENGTHS = [30, 44, 25, 51, 38, 29, 47, 33, 36, 40, 28, 45]
METHOD = "{name: lora, rank: 4, alpha: 8, init_lora_weights: eva, eva_tau: 0.9}"


def structured(kind: str, quantization: str | None = None) -> Any:
    """A tiny model whose embeddings have directions of different weight, as those of trained models have."""
    model = helpers.tiny_model(kind)
    weight = model.get_input_embeddings().weight
    left, _, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    weight.data = (left * (3.0 * 0.85 ** torch.arange(64.0, dtype=torch.float64)) @ right).float()
    if quantization is not None:
        helpers.quantize(model, quantization, double=True, compute_dtype=torch.float32, device=torch.device("cpu"))
    return model


def rows_of(kind: str) -> Split:
    return helpers.make_split(LENGTHS, seed=5, prompt=6)


def batches(split: Split, *, packed: bool, processes: int = 1, shuffle: bool = False) -> Callable[[], Iterator[TrainingBatch]]:
    plan = Plan(split.lengths, 4 // processes, None, 1, processes, seed=1, shuffle=shuffle)
    return lambda: training_batches(plan, split, helpers.CAUSAL_LM, Layout(packed, 3))


def eva(kind: str = "llama", *, packed: bool = False, quantization: str | None = None, **options: Any) -> tuple[Any, Lora]:
    method = helpers.make_method("lora", **{"rank": 4, "alpha": 8, "init_lora_weights": "eva", **options})
    assert isinstance(method, Lora)
    ctx = Context(seed=11, frozen_quantized=quantization is not None, batches=batches(rows_of(kind), packed=packed))
    return method.apply(structured(kind, quantization), ctx), method


def stock(kind: str, options: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Stock PEFT's EVA on the same batches; our mask says which *outputs* carry loss, so its labels are moved by one."""
    split, loader = rows_of(kind), []
    for start in range(0, len(split.input_ids), 4):
        ids, masks = split.input_ids[start : start + 4], split.supervised[start : start + 4]
        batch = collate(ids, masks, packed=False, pad_id=3)
        labels = torch.full((batch.input_ids.numel(),), -100)
        labels[batch.positions] = batch.targets
        loader.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels.view_as(batch.input_ids)})
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else "all-linear"
    config = peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights="eva", eva_config=peft.EvaConfig(**settings),
        fan_in_fan_out=kind == "gpt2", **{"target_modules": targets, **options},
    )  # fmt: skip
    model = peft.get_peft_model(structured(kind), config)
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    return model


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "defaults": ("llama", {}, {}, {}),
    "gpt2": ("gpt2", {}, {}, {}),
    "all tokens": ("llama", {"eva_use_label_mask": False}, {}, {"use_label_mask": False}),
    "no redistribution": ("llama", {"eva_rho": 1.0}, {}, {"rho": 1.0}),
    "whitened": ("llama", {"eva_whiten": True}, {}, {"whiten": True}),
    "fixed alpha": ("llama", {"eva_adjust_scaling_factors": False}, {}, {"adjust_scaling_factors": False}),
    "rslora": ("llama", {"use_rslora": True}, {"use_rslora": True}, {}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ranks_scales_and_directions_are_those_of_stock_peft(case: str) -> None:
    kind, options, theirs, settings = CASES[case]
    model, method = eva(kind, **options)
    other = stock(kind, theirs, settings)
    reference = {name.removeprefix("base_model.model."): layer for name, layer in other.named_modules() if hasattr(layer, "lora_A")}
    assert method.layers.keys() == reference.keys(), "the same layers lost every rank"
    assert {name: layer.rank for name, layer in method.layers.items()} == {name: layer.r["default"] for name, layer in reference.items()}
    assert sum(method.ranks.values()) == (4 * len(method.ranks) if case != "patterns" else 4 * 14 - 4)
    for name, layer in method.layers.items():
        assert layer.scaling == pytest.approx(reference[name].scaling["default"]), name
        ours, wanted = layer.lora_A.detach(), reference[name].lora_A["default"].weight.detach()
        cosines = torch.nn.functional.cosine_similarity(ours, wanted)
        assert float(cosines.min()) >= 0.999, (name, cosines)
        # This version of peft divides directions that several layers share once for each of them.
        if case != "whitened" or name.endswith(("o_proj", "down_proj")):
            assert float((ours.norm(dim=1) / wanted.norm(dim=1) - 1).abs().max()) <= 5e-3
        assert not layer.lora_B.any()
    assert helpers.same(helpers.logits(model), helpers.logits(structured(kind)))
    assert len({layer.rank for layer in method.layers.values()}) == (
        1 if case == "no redistribution" else len(set(method.ranks.values()) - {0})
    )


def test_batch_by_batch_finds_what_all_vectors_together_have() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    x = torch.randn(600, 40, generator=generator) * (5.0 * 0.7 ** torch.arange(40.0)) @ basis + torch.randn(40, generator=generator)
    directions = Directions(6, 0.99, generator)
    for part in x.split([3, 2, 95, 200, 100, 200]):  # the first two wait for the third
        directions.update(part)
    centred = (x - x.mean(0)).double()
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    assert directions.components is not None
    assert float(torch.nn.functional.cosine_similarity(directions.components, right[:6].float()).abs().min()) >= 0.995
    assert torch.allclose(directions.values, values[:6].float(), rtol=1e-2)
    assert torch.allclose(directions.ratios, (values[:6] ** 2 / centred.square().sum()).float(), rtol=2e-2)
    assert directions.settled.all()
    found = directions.components.clone()
    directions.update(torch.randn(400, 40, generator=generator) * 50 @ basis.flip(0))
    assert not directions.settled.all(), "other data turns them"
    assert not torch.equal(found, directions.components)


@pytest.mark.parametrize("options", [{}, {"eva_use_label_mask": False}])
def test_padding_does_not_matter(options: dict[str, Any]) -> None:
    packed, padded = (eva(packed=packed, **options)[1] for packed in (True, False))
    assert packed.ranks == padded.ranks
    for name, layer in packed.layers.items():
        assert float((layer.lora_A - padded.layers[name].lora_A).abs().max()) <= 1e-3


def test_two_processes_see_the_rows_that_one_sees() -> None:
    split = helpers.make_split(LENGTHS, seed=5)
    one, two = (batches(split, packed=True, processes=count, shuffle=True)() for count in (1, 2))
    for _ in range(5):  # into the second epoch
        assert torch.equal(next(one).supervised, torch.cat([next(two).supervised, next(two).supervised], dim=1))


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize(
    "extra", [{}, {"use_dora": True}, {"adapt_embeddings": True, "target_modules": ["embed_tokens", "q_proj", "down_proj", "lm_head"]}]
)
def test_files_hold_each_layers_rank(extra: dict[str, Any], quantization: str | None, tmp_path: Path) -> None:
    model, method = eva(quantization=quantization, packed=True, eva_rho=4.0, **extra)
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    expected = helpers.logits(model)
    again = hf_peft.apply_adapter(structured("llama", quantization), hf_peft.read_adapter(tmp_path))
    assert torch.equal(helpers.logits(again), expected)
    fields = json.loads((tmp_path / hf_peft.CONFIG).read_text())
    assert len(set(fields["rank_pattern"].values())) > 1
    if quantization is None:
        assert helpers.same(helpers.logits(peft.PeftModel.from_pretrained(structured("llama"), tmp_path)), expected)


def test_layers_without_a_rank_get_no_adapter() -> None:
    model, method = eva(eva_rho=8.0, rank=1)
    none = [name for name, rank in method.ranks.items() if rank == 0]
    assert none
    assert sum(method.ranks.values()) == 14
    assert not set(none) & set(adapter_layers(model))
    assert {name for name, rank in method.ranks.items() if rank} == set(method.layers)


def without_data() -> Iterator[TrainingBatch]:
    raise AssertionError("a resumed run knows its ranks")


def test_resume_takes_the_ranks_from_the_checkpoint(tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        model, method = eva(packed=True)
        loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=4, batch_size=4, save_steps=2)
        loop.run()
        if interrupted:
            found = checkpoints.read(folder / "checkpoints" / "step-2")
            method = helpers.make_method("lora", rank=4, alpha=8, init_lora_weights="eva")  # type: ignore[assignment]
            model = method.apply(structured("llama"), Context(seed=11, batches=without_data, resumed=found.method))
            loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=4, batch_size=4)
            loop.run(found)
        ends.append({**trainable_state(model), **method.state(), "logits": helpers.logits(model)})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    with pytest.raises(CheckpointError, match="ranks for 3 layers, and 14"):
        ctx = Context(resumed={"eva_ranks": torch.tensor([1, 2, 3])})
        helpers.make_method("lora", init_lora_weights="eva").apply(structured("llama"), ctx)


@pytest.mark.parametrize("extra", ["", "base_model.quantization=nf4", "train.gradient_checkpointing=true", "base_model.dtype=bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_whole_runs(kind: str, extra: str, tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    text = helpers.recipe_for(tiny_folders[kind], tiny_data, tmp_path / "out", method=METHOD)
    report = helpers.run(text, "train.max_steps=4", "train.learning_rate=1e-3", *filter(None, [extra]))
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed, report.checks.live_adapter
    fields = json.loads((tmp_path / "out" / "adapter" / hf_peft.CONFIG).read_text())
    assert fields["rank_pattern"]
    ranks = [len(t) for key, t in load_file(tmp_path / "out" / "adapter" / hf_peft.WEIGHTS).items() if ".lora_A" in key]
    assert sum(ranks) == 4 * {"llama": 14, "gpt2": 8}[kind]


def test_a_run_is_repeated_to_the_byte(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "one", method=METHOD)
    for name in ("one", "two"):
        helpers.run(text, "train.max_steps=3", f"output_dir={tmp_path / name}")
    one, two = (helpers.folder_bytes(tmp_path / name / "adapter") for name in ("one", "two"))
    assert one == two


def test_two_processes_start_alike(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    text = helpers.recipe_for(
        tiny_folders["llama"], tiny_data, tmp_path / "two", method=METHOD.replace("}", ", eva_use_label_mask: false}")
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("batch_size: 4", "batch_size: 2"))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peftcli", "train", str(path), "--processes", "2", "train.max_steps=4"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert '"passed": true' in (tmp_path / "two" / "report.json").read_text()


def test_refusals(tmp_path: Path) -> None:
    class Reached:
        """A batch that runs the first half of the model only."""

        def __call__(self, model: Any) -> Tensor:
            inner: Tensor = model.model.embed_tokens(helpers.some_ids())
            return inner

    mask = torch.ones(3, 12, dtype=torch.bool)
    method = helpers.make_method("lora", init_lora_weights="eva")
    with pytest.raises(UsageError, match=r"nothing goes into model\.layers\.0\.self_attn\.q_proj"):
        method.apply(structured("llama"), Context(batches=lambda: itertools.repeat(TrainingBatch(Reached(), mask, mask))))
    model = structured("llama")
    padded = TrainingBatch(lambda model: model(helpers.some_ids()), mask[:, :11].logical_not(), mask[:, :11])
    with pytest.raises(UsageError, match=r"cannot tell which of the inputs of .* are padding"):
        method.apply(model, Context(batches=lambda: itertools.repeat(padded)))
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks.values()], "no hook is left behind"
    text = helpers.recipe_for(tmp_path, tmp_path, tmp_path, method="{name: lora, eva_rho: 3}")
    with pytest.raises(RecipeError, match="eva_rho needs init_lora_weights: eva, not default"):
        parse_recipe(text, "r.yaml")
