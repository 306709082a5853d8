"""Optimizers by name, their parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftcli.errors import TrainingError
from peftcli.methods.kinds import trainable_state
from peftcli.recipe.schema import TrainSection
from peftcli.train.optimizers import build_optimizer, learning_rate_factor, warmup_steps


def section(**values: Any) -> TrainSection:
    return TrainSection.model_validate(values)


@given(total=st.integers(1, 500), ratio=st.floats(0.0, 0.99), scheduler=st.sampled_from(["cosine", "linear", "constant"]))
def test_the_schedule(total: int, ratio: float, scheduler: str) -> None:
    settings = section(scheduler=scheduler, warmup_ratio=ratio)
    factors = [learning_rate_factor(step, total, settings) for step in range(1, total + 1)]
    warm = warmup_steps(settings, total)
    assert all(0.0 < factor <= 1.0 for factor in factors), "no step is taken with a learning rate of zero"
    assert max(factors) == 1.0, "the peak is reached"
    assert factors[: warm + 1] == sorted(factors[: warm + 1])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    if warm:
        assert factors[warm - 1] == 1.0
        assert factors[0] == pytest.approx(1 / warm)
    if scheduler == "constant":
        assert set(factors[warm:]) <= {1.0}


def test_the_values_of_each_schedule() -> None:
    def values(**options: Any) -> list[float]:
        return [learning_rate_factor(step, 10, section(**options)) for step in range(1, 11)]

    assert values(scheduler="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert values(scheduler="cosine", warmup_steps=2) == pytest.approx([0.5, 1.0, *cosine])
    assert values(scheduler="constant", warmup_ratio=0.25) == pytest.approx([1 / 3, 2 / 3, *[1.0] * 8])
    assert values(scheduler="constant", warmup_steps=20) == pytest.approx([k / 20 for k in range(1, 11)])


def test_the_loop_follows_the_schedule(tmp_path: Path) -> None:
    model, method = helpers.adapted("lora", rank=4)
    loop = helpers.make_loop(
        model,
        method,
        helpers.pattern_split(),
        tmp_path,
        steps=6,
        batch_size=8,
        scheduler="linear",
        warmup_steps=2,
        logging_steps=1,
        warmup_ratio=0.0,
    )
    seen: list[float] = []
    loop.display.step = lambda record: seen.append(record["learning_rate"])  # type: ignore[method-assign]
    loop.run()
    assert seen == [1e-2 * learning_rate_factor(step, 6, loop.settings) for step in range(1, 7)]


@pytest.mark.parametrize(("name", "cls"), [("adamw", torch.optim.AdamW), ("adafactor", torch.optim.Adafactor), ("sgd", torch.optim.SGD)])
def test_optimizers_by_name_and_weight_decay_of_matrices_only(name: str, cls: type, tmp_path: Path) -> None:
    method = helpers.make_method("full")
    from peftcli.methods.base import Context

    model = method.apply(helpers.tiny_model("gpt2"), Context())
    groups = method.param_groups(model, 3e-3, 0.1)
    optimizer = build_optimizer(groups, section(optimizer=name, learning_rate=3e-3), torch.device("cpu"))
    assert type(optimizer) is cls
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(trainable_state(model))
    for key, parameter in trainable_state(model).items():
        assert decays[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0), key
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_every_optimizer_learns_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    from peftcli.train import checkpoint as checkpoints

    rate = {"adamw": 1e-2, "adafactor": 5e-2, "sgd": 0.5}[name]
    ends = []
    for stop in (None, 4):
        model, method = helpers.adapted("lora", rank=4)
        folder = tmp_path / str(stop)
        loop = helpers.make_loop(
            model, method, helpers.pattern_split(), folder, steps=8, batch_size=8, optimizer=name, learning_rate=rate, save_steps=4
        )
        if stop:
            loop.total_steps = 5
            loop.run()
            model, method = helpers.adapted("lora", rank=4)
            loop = helpers.make_loop(
                model, method, helpers.pattern_split(), folder, steps=8, batch_size=8, optimizer=name, learning_rate=rate
            )
            found, _ = checkpoints.newest(folder / "checkpoints")
            progress = loop.run(found)
        else:
            progress = loop.run()
        assert progress.loss_first is not None
        assert progress.loss_last is not None
        assert progress.loss_last < progress.loss_first
        ends.append({key: p.detach().clone() for key, p in trainable_state(model).items()})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_gpu_optimizers_refuse_the_cpu_by_name(name: str) -> None:
    model, method = helpers.adapted("lora", rank=4)
    with pytest.raises(TrainingError, match=rf"train\.optimizer: {name} .*cpu"):
        build_optimizer(method.param_groups(model, 1e-3, 0.0), section(optimizer=name), torch.device("cpu"))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(TrainingError, match="nothing to train"):
        build_optimizer([], section(), torch.device("cpu"))


def test_weight_decay_shrinks_matrices_by_the_decoupled_rule(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = build_optimizer([{"params": [parameter], "lr": 0.1, "weight_decay": 0.5}], section(), torch.device("cpu"))
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(parameter.detach(), torch.full((2, 2), 3.0 * (1 - 0.1 * 0.5)))
