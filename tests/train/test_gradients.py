"""The gradient of a step: exact under accumulation, checkpointing and adapters on the output layer; never taken on a NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from torch import Tensor

from peftcli.data.splits import TextSplit
from peftcli.errors import TrainingError
from peftcli.evaluate import Evaluator
from peftcli.methods.kinds import trainable_state
from peftcli.tasks.base import Layout

# Rows whose supervised tokens differ widely: a mean of means would be visibly wrong.
RAGGED = [3, 20, 5, 11, 2, 17, 9, 4]


def step_gradients(
    split: TextSplit,
    folder: Path,
    *,
    steps: int = 1,
    kind: str = "llama",
    name: str = "lora",
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> list[dict[str, Tensor]]:
    """Gradients of the first ``steps`` optimizer steps; the weights stay as they are."""
    options = {"rank": 4} if name == "lora" else {}
    model, method = helpers.adapted(name, kind, dtype, **options)
    helpers.stir(model)
    found: list[dict[str, Tensor]] = []
    method.before_step = lambda model, tick: found.append(helpers.gradients(model))  # type: ignore[method-assign]
    loop = helpers.make_loop(model, method, split, folder, steps=steps, optimizer="sgd", **settings)
    loop.optimizer.step = lambda *args: None  # type: ignore[method-assign, assignment]
    loop.run()
    return found


def full_batch(split: TextSplit, rows: list[int], name: str = "lora", kind: str = "llama") -> dict[str, Tensor]:
    """The gradient of the mean loss over the supervised tokens of ``rows``, each row by itself, by plain cross-entropy."""
    model, _ = helpers.adapted(name, kind, torch.float64, **({"rank": 4} if name == "lora" else {}))
    helpers.stir(model)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.from_numpy(split.input_ids[row].astype(np.int64))[None]
        keep = torch.from_numpy(split.supervised[row][1:])
        logits = model(input_ids=ids).logits[0, :-1][keep]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:][keep], reduction="sum")
        count += int(keep.sum())
    (total / count).backward()
    return helpers.gradients(model)


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    assert max(float(g.abs().max()) for g in one.values()) > 1e-4
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_accumulation_equals_the_full_batch(name: str, size: int, accumulation: int, packed: bool, tmp_path: Path) -> None:
    split = helpers.make_split(RAGGED)
    (found,) = step_gradients(split, tmp_path, name=name, batch_size=size, gradient_accumulation_steps=accumulation, packed=packed)
    assert worst(found, full_batch(split, list(range(8)), name)) <= 1e-10


@pytest.mark.parametrize(("size", "accumulation"), [(4, 2), (1, 8), (3, 3)])
def test_in_float32_within_its_rounding(size: int, accumulation: int, tmp_path: Path) -> None:
    split = helpers.make_split(RAGGED)
    settings: dict[str, Any] = {"dtype": torch.float32, "batch_size": size, "gradient_accumulation_steps": accumulation}
    (found,) = step_gradients(split, tmp_path, **settings)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert worst({name: gradient.double() for name, gradient in found.items()}, full_batch(split, list(range(8)))) <= 1e-6


def test_a_partial_last_window_is_neither_dropped_nor_scaled_wrongly(tmp_path: Path) -> None:
    split = helpers.make_split([*RAGGED, 6, 13, 3])  # 11 rows: windows of 2 x 4 = 8 and 3
    found = step_gradients(split, tmp_path, steps=4, batch_size=2, gradient_accumulation_steps=4)
    loop_plan = helpers.make_loop(*helpers.adapted("lora"), split, tmp_path, steps=1, batch_size=2, gradient_accumulation_steps=4).plan
    windows = [step.rows for epoch in (0, 1) for step in loop_plan.epoch(epoch)]
    assert [len(rows) for rows in windows] == [8, 3, 8, 3]
    for gradient, rows in zip(found, windows, strict=True):
        assert worst(gradient, full_batch(split, rows)) <= 1e-10


def test_batches_by_tokens_give_the_same_gradient(tmp_path: Path) -> None:
    split = helpers.make_split(RAGGED)
    (found,) = step_gradients(split, tmp_path, batch_tokens=30, gradient_accumulation_steps=20)
    assert worst(found, full_batch(split, list(range(8)))) <= 1e-10


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "full"])
def test_checkpointing_with_frozen_inputs_changes_no_gradient(name: str, kind: str, tmp_path: Path) -> None:
    split = helpers.make_split(RAGGED)
    found = []
    for checkpointing in (False, True):
        model, method = helpers.adapted(name, kind, torch.float64)
        helpers.stir(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        seen: list[dict[str, Tensor]] = []
        method.before_step = lambda model, tick, seen=seen: seen.append(helpers.gradients(model))  # type: ignore[method-assign]
        loop = helpers.make_loop(model, method, split, tmp_path, steps=2, batch_size=8)
        before = {key: p.detach().clone() for key, p in trainable_state(model).items()}
        loop.run()
        assert all(not torch.equal(before[key], p) for key, p in trainable_state(model).items()), "every tensor moves"
        assert seen[0].keys() == before.keys()
        found.append(seen[0])
    assert worst(*found) <= 1e-10


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_an_adapter_on_the_output_layer_gets_the_plain_gradient(kind: str, tmp_path: Path) -> None:
    split = helpers.make_split(RAGGED)
    found = []
    for plain in (False, True):
        model, method = helpers.adapted("lora", kind, torch.float64, rank=4, target_modules=["lm_head", "q_proj"])
        helpers.stir(model)
        if plain:
            ids = [torch.from_numpy(row.astype(np.int64)) for row in split.input_ids]
            losses = [
                torch.nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:], reduction="none")[
                    torch.from_numpy(mask[1:])
                ]
                for row, mask in zip(ids, split.supervised, strict=True)
            ]
            torch.cat(losses).mean().backward()
            found.append(helpers.gradients(model))
        else:
            seen: list[dict[str, Tensor]] = []
            method.before_step = lambda model, tick, seen=seen: seen.append(helpers.gradients(model))  # type: ignore[method-assign]
            helpers.make_loop(model, method, split, tmp_path, steps=1, batch_size=8).run()
            found.append(seen[0])
    assert any("lm_head.lora_A" in key for key in found[0])
    assert worst(*found) <= 1e-10


@pytest.mark.parametrize("where", ["base weight", "adapter weight", "gradient"])
def test_a_nan_stops_the_run_before_the_step(where: str, tmp_path: Path) -> None:
    model, method = helpers.adapted("lora", rank=4)
    helpers.stir(model)
    split = helpers.make_split(RAGGED)
    loop = helpers.make_loop(model, method, split, tmp_path, steps=5, batch_size=4, optimizer="adamw", max_grad_norm=1.0)
    bad = model.model.layers[1].mlp.up_proj
    original = method.before_step

    def poison(model: Any, tick: Any) -> None:
        original(model, tick)
        if where == "gradient" and tick.step == 3:
            bad.lora_A.grad[0, 0] = float("inf")

    method.before_step = poison  # type: ignore[method-assign]
    if where != "gradient":
        method.after_step = lambda model, tick: (  # type: ignore[method-assign]
            (bad.base.weight if where == "base weight" else bad.lora_A).data[0].fill_(float("nan")) if tick.step == 2 else None
        )
    weights: dict[str, Tensor] = {}
    real_step = loop.optimizer.step
    taken: list[int] = []

    def step(*args: Any) -> Any:
        taken.append(1)
        return real_step(*args)

    loop.optimizer.step = step  # type: ignore[method-assign, assignment]
    after = method.after_step

    def remember(model: Any, tick: Any) -> None:
        after(model, tick)
        weights.update({key: p.detach().clone() for key, p in trainable_state(model).items()})

    method.after_step = remember  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"step 3: the (loss|gradient) is not a number; no step was taken.*rows\.jsonl:\d") as caught:
        loop.run()
    assert caught.value.exit_code == 5
    assert len(taken) == 2
    for key, parameter in trainable_state(model).items():
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(weights[key])), key


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    split = helpers.make_split(RAGGED)
    (plain,) = step_gradients(split, tmp_path, batch_size=8)
    norm = float(torch.cat([g.flatten() for g in plain.values()]).norm())
    model, method = helpers.adapted("lora", "llama", torch.float64, rank=4)
    helpers.stir(model)
    before = {key: p.detach().clone() for key, p in trainable_state(model).items()}
    loop = helpers.make_loop(
        model, method, split, tmp_path, steps=1, batch_size=8, optimizer="sgd", learning_rate=1.0, max_grad_norm=norm / 4
    )
    loop.run()
    moved = torch.cat([(before[key] - p).flatten() for key, p in trainable_state(model).items()])
    assert float(moved.norm()) == pytest.approx(norm / 4, rel=1e-4)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_evaluation_does_not_depend_on_the_batch_size(kind: str, packed: bool, tmp_path: Path) -> None:
    model, method = helpers.adapted("lora", kind, rank=4)
    helpers.stir(model)
    split = helpers.make_split([*RAGGED, *range(2, 33)])
    loop = helpers.make_loop(model, method, split, tmp_path, steps=1)
    task = loop.module
    scores = [
        Evaluator(loop.accelerator, helpers.CAUSAL_LM, split, helpers.tiny_tokenizer(), Layout(packed, 3), size).scores(task)
        for size in (1, 4, 16)
    ]  # type: ignore[arg-type]
    with torch.no_grad():
        plain = float(helpers.loss_of(model, split, packed=False)) / sum(int(mask[1:].sum()) for mask in split.supervised)
    for score in scores:
        assert score.loss == pytest.approx(scores[0].loss, rel=1e-6)
        assert score.loss == pytest.approx(plain, rel=1e-5)
        assert score.metrics["token_accuracy"] == scores[0].metrics["token_accuracy"]
        assert score.units == sum(int(mask[1:].sum()) for mask in split.supervised)
