"""AdaLoRA against stock PEFT: the layers, the allocator, the files; and that the ranks really end at the target."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from peftcli.data.batching import collate
from peftcli.errors import CheckpointError, RecipeError
from peftcli.interchange import hf_peft
from peftcli.methods.adalora import AdaLora, AdaLoraLayer
from peftcli.methods.base import Loss, Tick
from peftcli.methods.kinds import adapter_layers, trainable_state
from peftcli.recipe.load import parse_recipe
from peftcli.tasks.causal_lm import CausalLM
from peftcli.train import checkpoint as checkpoints

TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj"], "llama-tied": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"]}
SCHEDULE = {"init_rank": 6, "target_rank": 3, "min_rank": 0, "initial_ratio": 0.2, "final_ratio": 0.2, "interval": 2}


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def stock(kind: str, dtype: torch.dtype, ours: Any, method: Any) -> Any:
    """Stock PEFT's AdaLoRA over the same base, with our weights."""
    o = method.config
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=o.init_rank, target_r=o.target_rank, lora_alpha=o.alpha, target_modules=TARGETS[kind],
        tinit=2, tfinal=2, total_step=10, deltaT=2, orth_reg_weight=0.5, fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(helpers.tiny_model(kind, dtype), config, autocast_adapter_dtype=False).to(dtype)
    for layer in (m for m in model.modules() if hasattr(m, "ranknum")):
        layer.ranknum["default"].data.fill_(float(o.init_rank))
        layer.ranknum["default"].requires_grad_(False)  # this version lets it train by mistake
    # Transformers' own loss function computes in float32.
    model.base_model.model.loss_function = lambda logits, labels, **_: mean_loss(logits, labels)
    tensors = {hf_peft.file_key(ours, method, name): p.detach().clone() for name, p in trainable_state(ours).items()}
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    return model


def ours_by_key(model: Any, method: Any, what: str) -> dict[str, Tensor]:
    found = {hf_peft.file_key(model, method, n): p if what == "data" else p.grad for n, p in trainable_state(model).items()}
    return {key: tensor.detach().clone() for key, tensor in found.items() if tensor is not None}


def theirs_by_key(model: Any, what: str) -> dict[str, Tensor]:
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    return {n: (p if what == "data" else p.grad).detach().clone() for n, p in named.items()}


def step_gradients(model: Any, method: Any, ids: Tensor) -> Tensor:
    """Our mean loss, backwards; returns its value."""
    batch = collate([row.numpy() for row in ids], [torch.ones(len(ids[0]), dtype=torch.bool).numpy()] * len(ids), packed=False, pad_id=3)

    def double(_: Any) -> Loss:  # our own task computes the loss in float32
        return Loss(mean_loss(model(input_ids=ids).logits, ids) * len(batch.positions), torch.zeros(()), {})

    loss = method.loss(double, batch)
    (loss.total / len(batch.positions)).backward()
    return loss.total.detach() / len(batch.positions)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_outputs_and_gradients_equal_stock_peft(kind: str, dtype: torch.dtype, limit: float) -> None:
    model, method = helpers.adapted("adalora", kind, dtype, target_modules=TARGETS[kind], **SCHEDULE)
    helpers.stir(model, scale=0.2)
    other = stock(kind, dtype, model, method)
    ids = helpers.some_ids()
    scale = max(1.0, float(helpers.logits(other).abs().max()))
    assert float((helpers.logits(model) - helpers.logits(other)).abs().max()) <= limit * scale
    assert float((helpers.logits(model) - helpers.logits(helpers.tiny_model(kind, dtype))).abs().max()) > 1e-2
    value = step_gradients(model, method, ids)
    method.penalize()
    assert method.penalty > 0
    out = other(input_ids=ids, labels=ids)
    out.loss.backward()
    assert float(value) < float(out.loss.detach()) - 0.1, "the penalty belongs to the gradient, not to the loss that is logged"
    mine, yours = ours_by_key(model, method, "grad"), theirs_by_key(other, "grad")
    assert mine.keys() == yours.keys()
    assert max(float((mine[key] - yours[key]).abs().max()) for key in mine) <= limit


def test_the_allocator_decides_as_stock_peft_does() -> None:
    """Ten steps of gradient descent with both allocators: the same masks, weights and final ranks."""
    model, method = helpers.adapted("adalora", dtype=torch.float64, target_modules=TARGETS["llama"], **SCHEDULE)
    assert isinstance(method, AdaLora)
    helpers.stir(model, scale=0.1)
    other = stock("llama", torch.float64, model, method)
    allocator = other.base_model.rankallocator
    cuts = 0
    for step in range(1, 11):
        ids = helpers.some_ids(seed=step)
        model.zero_grad()
        other.zero_grad()
        step_gradients(model, method, ids)
        other(input_ids=ids, labels=ids).loss.backward()
        tick = Tick(step, 10, 0)
        method.before_step(model, tick)
        if step <= 8:
            allocator.update_ipt(other.base_model.model)  # before the update, as the paper's algorithm has it
        with torch.no_grad():
            for one in (model, other):
                for parameter in one.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.05 * parameter.grad
        method.after_step(model, tick)
        budget, due = allocator.budget_schedule(step)
        if step <= 8:
            assert budget == method.budget.size(step)
        if (due and step < 8) or step == 8:
            other.peft_config["default"].rank_pattern = allocator.mask_to_budget(other.base_model.model, budget)
            cuts += 1
        elif step > 8:
            allocator.mask_using_rank_pattern(other.base_model.model, other.peft_config["default"].rank_pattern)
        mine, yours = ours_by_key(model, method, "data"), theirs_by_key(other, "data")
        assert max(float((mine[key] - yours[key]).abs().max()) for key in mine) <= 1e-9, step
        if due:
            assert sum(int((mine[key] != 0).sum()) for key in mine if key.endswith("lora_E")) == budget
    assert cuts == 3
    theirs = {n.replace(".lora_E.default", ""): mask for n, mask in other.peft_config["default"].rank_pattern.items()}
    assert {name: mask.tolist() for name, mask in method.budget.kept.items()} == theirs


def finished(folder: Path, **options: Any) -> tuple[Any, Any]:
    """An adapter after a whole run, its ranks settled."""
    model, method = helpers.adapted("adalora", **{"target_modules": TARGETS["llama"], **SCHEDULE, **options})
    helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=12, batch_size=8).run()
    return model, method


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("min_rank", [0, 1])
def test_the_ranks_end_at_the_target_and_stay_there(min_rank: int, quantization: str | None, tmp_path: Path) -> None:
    model, method = helpers.adapted("adalora", quantization=quantization, **{**SCHEDULE, "min_rank": min_rank})
    seen: list[tuple[int, float]] = []
    loop = helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=20, batch_size=8, logging_steps=1)
    loop.display.step = lambda record: seen.append((record["step"], record["average_rank"]))  # type: ignore[method-assign]
    loop.run()
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, AdaLoraLayer)]
    ranks = [int((layer.lora_E != 0).sum()) for layer in layers]
    assert sum(ranks) == 3 * len(layers)
    assert len(set(ranks)) > 1, "equal ranks everywhere would be no allocation"
    assert min(ranks) >= min_rank
    budgets = [rank for _, rank in seen]
    assert budgets[:4] == [6.0] * 4
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-4:] == [3.0] * 4


@pytest.mark.parametrize("min_rank", [0, 1])
def test_our_file_in_stock_peft(min_rank: int, tmp_path: Path) -> None:
    model, method = finished(tmp_path, min_rank=min_rank)
    hf_peft.save_adapter(tmp_path / "adapter", model, method, base_model="some/base", revision=None)
    tensors = load_file(tmp_path / "adapter" / hf_peft.WEIGHTS)
    fields = json.loads((tmp_path / "adapter" / hf_peft.CONFIG).read_text())
    assert {len(tensors[f"base_model.model.{name}"]): 0 for name in fields["rank_pattern"]}
    for name, mask in fields["rank_pattern"].items():
        assert len(mask) == 6
        assert len(tensors[f"base_model.model.{name}"]) == sum(mask)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        other = peft.PeftModel.from_pretrained(helpers.tiny_model(), tmp_path / "adapter")
    assert helpers.same(helpers.logits(model), helpers.logits(other))
    again = hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(tmp_path / "adapter"))
    assert torch.equal(helpers.logits(again), helpers.logits(model))
    assert not helpers.same(helpers.logits(again), helpers.logits(helpers.tiny_model()))


def test_a_file_of_stock_peft_is_read_and_written_again(tmp_path: Path) -> None:
    model, method = helpers.adapted("adalora", target_modules=TARGETS["llama"], **SCHEDULE)
    helpers.stir(model, scale=0.1)
    other = stock("llama", torch.float32, model, method)
    allocator = other.base_model.rankallocator
    ids = helpers.some_ids()
    other(input_ids=ids, labels=ids).loss.backward()
    allocator.update_ipt(other.base_model.model)
    other.peft_config["default"].rank_pattern = allocator.mask_to_budget(other.base_model.model, 24)
    other.save_pretrained(tmp_path / "theirs")
    assert min(t.numel() for t in load_file(tmp_path / "theirs" / hf_peft.WEIGHTS).values()) == 0, "a matrix that lost every rank"
    read = hf_peft.read_adapter(tmp_path / "theirs")
    again = hf_peft.apply_adapter(helpers.tiny_model(), read)
    assert helpers.same(helpers.logits(again), helpers.logits(other))
    fresh = AdaLora(read.method.config)
    applied = fresh.apply(helpers.tiny_model(), helpers.Context())
    hf_peft.load_tensors(applied, fresh, read.tensors, tmp_path)
    hf_peft.save_adapter(tmp_path / "ours", applied, fresh, base_model="some/base", revision=None)
    one, two = load_file(tmp_path / "theirs" / hf_peft.WEIGHTS), load_file(tmp_path / "ours" / hf_peft.WEIGHTS)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    fields = [json.loads((tmp_path / name / hf_peft.CONFIG).read_text()) for name in ("theirs", "ours")]
    assert fields[0]["rank_pattern"] == fields[1]["rank_pattern"]


def test_damaged_rank_patterns_are_refused(tmp_path: Path) -> None:
    model, method = finished(tmp_path)
    folder = tmp_path / "adapter"
    hf_peft.save_adapter(folder, model, method, base_model="some/base", revision=None)
    good = json.loads((folder / hf_peft.CONFIG).read_text())
    first = next(name for name, mask in good["rank_pattern"].items() if not all(mask))
    for change, message in [
        ({"rank_pattern": {**good["rank_pattern"], first: [True]}}, "init_rank = 6"),
        ({"rank_pattern": {**good["rank_pattern"], "nowhere.lora_E": [True] * 6}}, "nowhere"),
        ({"rank_pattern": {**good["rank_pattern"], first: [True] * 6}}, "rank_pattern does not say"),
        ({"rank_pattern": None}, "rank_pattern does not say"),
        ({"init_r": 9999, "rank_pattern": None}, "rank 9999"),
        ({"bias": "all"}, "bias"),
    ]:
        (folder / hf_peft.CONFIG).write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(folder))


@pytest.mark.parametrize("at", [3, 7, 11])
def test_resume_is_exact_in_every_phase(at: int, tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        model, method = helpers.adapted("adalora", target_modules=TARGETS["llama"], **SCHEDULE)
        loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=12, batch_size=4, save_steps=at, save_total_limit=9)
        loop.run()
        if interrupted:
            model, method = helpers.adapted("adalora", target_modules=TARGETS["llama"], **SCHEDULE)
            loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=12, batch_size=4)
            loop.run(checkpoints.read(folder / "checkpoints" / f"step-{at}"))
        ends.append({**trainable_state(model), **{f"state.{key}": value for key, value in method.state().items()}})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_run(kind: str, tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    text = helpers.recipe_for(
        tiny_folders[kind], tiny_data, tmp_path / "out", method="{name: adalora, init_rank: 4, target_rank: 2, min_rank: 0, interval: 2}"
    )
    report = helpers.run(text, "train.max_steps=12")
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed, report.checks.live_adapter
    fields = json.loads((tmp_path / "out" / "adapter" / hf_peft.CONFIG).read_text())
    assert sum(map(sum, fields["rank_pattern"].values())) == 2 * len(fields["rank_pattern"])
    assert fields["total_step"] == 12
    assert all("average_rank" in record for record in helpers.trace(tmp_path / "out") if "loss" in record)


def test_a_run_that_ends_before_the_ranks_are_settled_says_so(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out", method="{name: adalora, init_rank: 6, target_rank: 3}")
    stop = ("train.eval_steps=1", "train.early_stopping_patience=1", "train.early_stopping_threshold=100", "train.epochs=20")
    report = helpers.run(text, *stop)
    assert report.status == "stopped_early"
    when = f"the weights are those of step {report.train.steps}, before the ranks were settled"
    note = f"adalora: {when}: each matrix has 6, the target is 3 on average"
    assert report.notes == [note]
    assert note in (tmp_path / "out" / "report.md").read_text()
    assert load_file(tmp_path / "out" / "adapter" / hf_peft.WEIGHTS).popitem()[1].numel()
    assert helpers.run(text, overwrite=True).notes == []


def test_packed_and_padded_rows_train_alike() -> None:
    gradients = []
    for packed in (True, False):
        model, method = helpers.adapted("adalora", dtype=torch.float64, **SCHEDULE)
        helpers.stir(model)
        split = helpers.make_split([7, 4, 9])
        method.loss(CausalLM(model), collate(split.input_ids, split.supervised, packed=packed, pad_id=3)).total.backward()
        gradients.append(helpers.gradients(model))
    assert all(float((gradients[0][key] - gradients[1][key]).abs().max()) <= 1e-9 for key in gradients[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("target_rank: 20", "above init_rank"),
        ("min_rank: 9", "above target_rank"),
        ("initial_ratio: 0.6, final_ratio: 0.5", "leave no steps"),
        ("kept: {q_proj: [true]}", "init_rank = 12"),
        ("total_step: 100", "total_step"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str, tmp_path: Path) -> None:
    text = helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: adalora, {options}}}")
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_recipe(text, "r.yaml")


def test_two_processes_share_one_penalty_and_one_budget(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    """22 rows, 2 x 3 x 2 for each step: in the last step of an epoch the second process has a micro batch without rows."""
    method = "{name: adalora, init_rank: 4, target_rank: 2, interval: 2, orthogonality: 5.0}"
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "two", method=method)
    text = text.replace("batch_size: 4", "batch_size: 3, gradient_accumulation_steps: 2").replace("epochs: 2", "epochs: 4")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peftcli", "train", str(path), "--processes", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    helpers.run(text, f"output_dir={tmp_path / 'one'}", "train.batch_size=6")
    two, one = helpers.trace(tmp_path / "two"), helpers.trace(tmp_path / "one")
    assert [r["step"] for r in two] == [r["step"] for r in one]
    for a, b in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "average_rank"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4), (key, b["step"])
    patterns = [json.loads((tmp_path / name / "adapter" / hf_peft.CONFIG).read_text())["rank_pattern"] for name in ("one", "two")]
    assert patterns[0] == patterns[1]
