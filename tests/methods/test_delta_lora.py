"""Delta-LoRA's telescoped form against the literal loop, which moves the weights themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcli.data.batching import collate
from peftcli.errors import RecipeError
from peftcli.interchange import hf_peft
from peftcli.merge import merge
from peftcli.methods.base import Tick
from peftcli.methods.delta_lora import DeltaLora
from peftcli.methods.kinds import trainable_state
from peftcli.recipe.load import parse_recipe
from peftcli.tasks.causal_lm import CausalLM
from peftcli.train import checkpoint as checkpoints

OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8, "delta_ratio": 0.5, "start_ratio": 0.34}
STEPS, K, RATE = 9, 3, 0.2


def backward(model: Any, step: int, *, packed: bool = True) -> None:
    split = helpers.make_split([7, 4, 9], seed=step)
    batch = collate(split.input_ids, split.supervised, packed=packed, pad_id=3)
    logits = CausalLM(model).logits(batch)
    torch.nn.functional.cross_entropy(logits, batch.targets).backward()


def descend(model: Any) -> None:
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter -= RATE * parameter.grad  # type: ignore[operator]
            parameter.grad = None


def literal(kind: str, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """The published loop: after K steps, W += lambda (alpha / r) (B' A' - B A), in the weight itself."""
    model, method = helpers.adapted("lora", kind, dtype, rank=4, alpha=8)
    layers = list(method.layers.values())  # type: ignore[attr-defined]
    for step in range(1, STEPS + 1):
        before = [(layer.lora_B @ layer.lora_A).detach() for layer in layers]
        backward(model, step)
        descend(model)
        if step > K:
            for layer, old in zip(layers, before, strict=True):
                change = 0.5 * layer.scaling * ((layer.lora_B @ layer.lora_A).detach() - old)
                layer.base.weight.data += change.t() if kind == "gpt2" else change
    return model, [layer.lora_B.detach() for layer in layers]


def telescoped(kind: str, dtype: torch.dtype, quantization: str | None = None) -> tuple[Any, DeltaLora]:
    model, method = helpers.adapted("delta_lora", kind, dtype, quantization=quantization, **OPTIONS)
    assert isinstance(method, DeltaLora)
    for step in range(1, STEPS + 1):
        backward(model, step)
        method.before_step(model, Tick(step, STEPS, 0))
        descend(model)
        method.after_step(model, Tick(step, STEPS, 0))
    return model, method


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 5e-7)])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_the_telescoped_form_is_the_literal_loop(kind: str, dtype: torch.dtype, limit: float) -> None:
    reference, _ = literal(kind, dtype)
    model, _ = telescoped(kind, dtype)
    ours, theirs = merge(model), merge(reference)
    start = dict(helpers.tiny_model(kind, dtype).named_parameters())
    furthest = 0.0
    for name, parameter in ours.named_parameters():
        assert float((parameter - theirs.get_parameter(name)).abs().max()) <= limit, name
        furthest = max(furthest, float((parameter - start[name]).abs().max()))
    assert furthest > 1e-3, "the weights must have moved"
    plain, _ = helpers.adapted("lora", kind, dtype, rank=4, alpha=8)
    for step in range(1, STEPS + 1):
        backward(plain, step)
        descend(plain)
    merged = merge(plain)
    assert max(float((p - merged.get_parameter(n)).abs().max()) for n, p in ours.named_parameters()) > 1e-4, "it is not plain LoRA"


def test_the_moved_weight_is_a_constant_for_the_factors_and_not_for_the_layers_below() -> None:
    """At one point of the loop, the gradients of every factor equal those of the literal form."""
    model, method = telescoped("llama", torch.float64)
    reference, literal_method = helpers.adapted("lora", "llama", torch.float64, rank=4, alpha=8)
    with torch.no_grad():
        for one, two in zip(method.layers.values(), literal_method.layers.values(), strict=True):  # type: ignore[attr-defined]
            two.lora_A.copy_(one.lora_A)
            two.lora_B.copy_(one.lora_B)
            two.base.weight += 0.5 * one.scaling * (one.lora_B @ one.lora_A - one.start_B @ one.start_A)  # type: ignore[operator]
    for packed in (True, False):
        for each in (model, reference):
            each.zero_grad()
            backward(each, 77, packed=packed)
        mine, theirs = helpers.gradients(model), helpers.gradients(reference)
        assert mine.keys() == theirs.keys()
        assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) <= 1e-10


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"0.*": 2}, "alpha_pattern": {"1.*": 3.0}}])
def test_the_file_is_an_ordinary_lora_of_twice_the_rank(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, method = helpers.adapted("delta_lora", kind, **OPTIONS, **options)
    helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=6, batch_size=8).run()
    expected = helpers.logits(model)
    hf_peft.save_adapter(tmp_path / "adapter", model, method, base_model="some/base", revision=None)
    fields = json.loads((tmp_path / "adapter" / hf_peft.CONFIG).read_text())
    assert (fields["peft_type"], fields["r"]) == ("LORA", 8)
    assert fields["lora_alpha"] == pytest.approx(8 * 2**0.5 if options.get("use_rslora") else 16)
    assert max(t.shape[0] for k, t in load_file(tmp_path / "adapter" / hf_peft.WEIGHTS).items() if "lora_A" in k) == 8
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), hf_peft.read_adapter(tmp_path / "adapter"))
    assert helpers.same(helpers.logits(again), expected)
    stock = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path / "adapter")
    assert helpers.same(helpers.logits(stock), expected)
    assert float((expected - helpers.logits(helpers.tiny_model(kind))).abs().max()) > 1e-2


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_quantized_bases(quantization: str, tmp_path: Path) -> None:
    model, method = telescoped("llama", torch.float32, quantization)
    before = {n: b.clone() for n, b in helpers.tiny_model(quantization=quantization).named_parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name.replace(".base.", ".")]), name
    expected = helpers.logits(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    again = hf_peft.apply_adapter(helpers.tiny_model(quantization=quantization), hf_peft.read_adapter(tmp_path))
    assert helpers.same(helpers.logits(again), expected)


@pytest.mark.parametrize("at", [2, 3, 4, 7])
def test_resume_is_exact_before_and_after_the_snapshot(at: int, tmp_path: Path) -> None:
    ends = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        model, method = helpers.adapted("delta_lora", **OPTIONS)
        loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=9, batch_size=4, save_steps=at, save_total_limit=9)
        loop.run()
        if interrupted:
            model, method = helpers.adapted("delta_lora", **OPTIONS)
            loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=9, batch_size=4)
            loop.run(checkpoints.read(folder / "checkpoints" / f"step-{at}"))
        ends.append({**trainable_state(model), **{f"state.{key}": value for key, value in method.state().items()}})
    assert ends[0].keys() == ends[1].keys()
    assert len(ends[0]) == 2 * len(trainable_state(model))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_run(kind: str, tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    text = helpers.recipe_for(tiny_folders[kind], tiny_data, tmp_path / "out", method="{name: delta_lora, rank: 4, alpha: 8}")
    report = helpers.run(text)
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed, report.checks.live_adapter


@pytest.mark.parametrize(
    ("options", "message"),
    [("dropout: 0.1", "no dropout"), ("use_dora: true", "plain LoRA"), ("init_lora_weights: pissa", "plain LoRA")],
)
def test_options_that_do_not_telescope(options: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: delta_lora, {options}}}"), "r.yaml")
