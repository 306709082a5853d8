"""Every preference loss against its formula, written out over one row after another: losses, rewards, gradients; packed as padded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import preference_cases as cases
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from peftcli.tasks.base import Layout
from peftcli.tasks.kto import pairs_right
from peftcli.tasks.orpo import log_1_minus_exp

LAYOUTS = {"packed": Layout(True, 3), "padded": Layout(False, 3)}
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def gain(policy: Tensor, reference: Tensor) -> Tensor:
    return policy.sum() - reference.sum()


def dpo(loss: str, beta: float, noise: float = 0.0) -> Formula:
    def formula(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        rewards = torch.stack([beta * gain(c, ref_c), beta * gain(r, ref_r)])
        m = rewards[0] - rewards[1]
        if loss == "ipo":
            return ((c - ref_c).mean() - (r - ref_r).mean() - 1 / (2 * beta)) ** 2, rewards
        if loss == "hinge":
            return (1 - m).clamp(min=0), rewards
        if loss == "robust":
            return (-(1 - noise) * logsigmoid(m) + noise * logsigmoid(-m)) / (1 - 2 * noise), rewards
        return -(1 - noise) * logsigmoid(m) - noise * logsigmoid(-m), rewards

    return formula


def free(c: Tensor, r: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    rewards = 0.2 * torch.stack([c.sum(), r.sum()])
    return -logsigmoid(rewards[0] - rewards[1]), rewards


def simpo(c: Tensor, r: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    rewards = 2.5 * torch.stack([c.mean(), r.mean()])
    return -logsigmoid(rewards[0] - rewards[1] - 0.8), rewards


def orpo(c: Tensor, r: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    p, q = c.mean().exp(), r.mean().exp()
    ratio = (p / (1 - p)) / (q / (1 - q))
    return -c.mean() - 0.2 * logsigmoid(ratio.log()), 0.2 * torch.stack([c.mean(), r.mean()])


PAIRS: dict[str, Formula] = {
    "{name: dpo, beta: 0.2}": dpo("sigmoid", 0.2),
    "{name: dpo, beta: 0.2, label_smoothing: 0.1}": dpo("sigmoid", 0.2, 0.1),
    "{name: dpo, beta: 0.2, loss_type: hinge}": dpo("hinge", 0.2),
    "{name: dpo, beta: 0.2, loss_type: ipo}": dpo("ipo", 0.2),
    "{name: dpo, beta: 0.2, loss_type: robust, label_smoothing: 0.2}": dpo("robust", 0.2, 0.2),
    "{name: dpo, beta: 0.2, reference_free: true}": free,
    "{name: simpo, beta: 2.5, gamma: 0.8}": simpo,
    "{name: orpo, beta: 0.2}": orpo,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.folder(tmp_path_factory.mktemp("preferences"))


def models() -> tuple[Any, Any]:
    """A base and a policy that has moved away from it, in float64."""
    base, policy = helpers.tiny_model("llama", torch.float64), helpers.tiny_model("llama", torch.float64)
    policy.requires_grad_(True)
    helpers.stir(policy)
    return base, policy


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return helpers.gradients(module)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("task", PAIRS)
def test_pairs(task: str, layout: Layout, rows: Path) -> None:
    made, split = cases.opened(task, rows / "pairs" / "train.jsonl", limit=5)
    base, policy = models()
    split = cases.with_base(made, split, base, layout)
    module = made.module(policy)
    losses, rewards = [], []
    for chosen, rejected in split.rows:
        with torch.no_grad():
            references = [cases.answer_log_probs(base, row) for row in (chosen, rejected)]
        loss, reward = PAIRS[task](*(cases.answer_log_probs(policy, row) for row in (chosen, rejected)), *references)
        losses.append(loss)
        rewards.append(reward)
    expected = gradients(policy, torch.stack(losses).sum())
    batch = made.batch(split, range(5), layout)
    found = module(batch)
    assert found.total.item() == pytest.approx(torch.stack(losses).sum().item(), abs=1e-10)
    actual = gradients(policy, found.total)
    assert all(torch.allclose(actual[key], expected[key], rtol=0, atol=1e-10) for key in expected)
    margins = torch.stack(rewards)[:, 0] - torch.stack(rewards)[:, 1]
    assert float(found.parts["reward_margin"]) == pytest.approx(float(margins.sum()), abs=1e-10)
    assert float(found.parts["reward_accuracy"]) == int((margins > 0).sum()) == int(found.correct)
    with torch.no_grad():
        measured = module.measure(batch)
    assert torch.allclose(measured["loss"], torch.stack(losses).detach(), rtol=0, atol=1e-10)
    assert torch.allclose(measured["rewards"], torch.stack(rewards).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_kto(layout: Layout, rows: Path) -> None:
    made, split = cases.opened(
        "{name: kto, beta: 0.2, desirable_weight: 1.5, undesirable_weight: 0.5}", rows / "judged" / "train.jsonl", limit=6
    )
    base, policy = models()
    split = cases.with_base(made, split, base, layout)
    module = made.module(policy)
    with torch.no_grad():
        moved = [gain(cases.answer_log_probs(policy, other), cases.answer_log_probs(base, other)) for _, other in split.rows]
    z = torch.stack(moved).mean().clamp(min=0)
    losses = []
    for (own, _), wanted in zip(split.rows, split.labels, strict=True):
        with torch.no_grad():
            reference = cases.answer_log_probs(base, own)
        r = gain(cases.answer_log_probs(policy, own), reference)
        losses.append(1.5 * (1 - torch.sigmoid(0.2 * (r - z))) if wanted else 0.5 * (1 - torch.sigmoid(0.2 * (z - r))))
    expected = gradients(policy, torch.stack(losses).sum())
    batch = made.batch(split, range(6), layout)
    found = module(batch)
    assert found.total.item() == pytest.approx(torch.stack(losses).sum().item(), abs=1e-10)
    assert float(found.parts["kl"]) == pytest.approx(6 * float(z), abs=1e-10)
    actual = gradients(policy, found.total)
    assert all(torch.allclose(actual[key], expected[key], rtol=0, atol=1e-10) for key in expected)
    with torch.no_grad():
        halves = [module.measure(made.batch(split, part, layout)) for part in (range(4), range(4, 6))]
    together = made.together({key: torch.cat([half[key] for half in halves]) for key in halves[0]})
    assert torch.allclose(together["loss"], torch.stack(losses).detach(), rtol=0, atol=1e-10), "an evaluation knows no batches"
    scores = made.scores(together, split)
    assert {"reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "kl"} <= scores.keys()


def test_kto_holds_back_only_as_far_as_the_model_has_moved_in_general(rows: Path) -> None:
    """A divergence below zero is an error of the estimate and counts as none."""
    made, split = cases.opened("kto", rows / "judged" / "train.jsonl", limit=4)
    base, _ = models()
    layout = LAYOUTS["packed"]
    split = cases.with_base(made, split, base, layout)
    split.reference[:, 1] += 5.0
    found = made.module(base)(made.batch(split, range(4), layout))
    assert float(found.parts["kl"]) == 0
    assert float(found.total) == pytest.approx(4 * 0.5, abs=1e-9)


def test_orpo_learns_the_prompt_where_all_is_trained_on(rows: Path) -> None:
    made, split = cases.opened("{name: orpo, beta: 0.2}", rows / "pairs" / "train.jsonl", limit=3, train_on="all")
    _, policy = models()
    expected = []
    for chosen, rejected in split.rows:
        c, r = (cases.answer_log_probs(policy, row) for row in (chosen, rejected))
        ids = torch.from_numpy(chosen.input_ids.astype("int64"))[None]
        whole = -policy(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None]).mean()
        expected.append(orpo(c, r)[0] + c.mean() + whole)
    found = made.module(policy)(made.batch(split, range(3), LAYOUTS["packed"]))
    assert found.total.item() == pytest.approx(torch.stack(expected).sum().item(), abs=1e-10)


def test_the_odds_are_exact_at_both_ends() -> None:
    x = torch.tensor([-1e-12, -1e-3, -0.6, -0.7, -50.0, 0.0], dtype=torch.float64, requires_grad=True)
    found = log_1_minus_exp(x)
    exact = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()[:-1]]
    assert found[:-1].tolist() == pytest.approx(exact, rel=1e-14)
    found.sum().backward()
    assert x.grad is not None and torch.isfinite(found).all() and torch.isfinite(x.grad[:-1]).all()


@pytest.mark.parametrize("task", cases.TASKS)
def test_a_silent_batch_adds_exactly_nothing_and_keeps_the_graph(task: str, rows: Path) -> None:
    made, split = cases.opened(task, rows / ("judged" if task == "kto" else "pairs") / "train.jsonl", limit=4)
    layout = LAYOUTS["packed"]
    if task == "reward":
        from transformers import AutoModelForSequenceClassification

        config = helpers.tiny_config("llama")
        config.num_labels = 1
        model: Any = AutoModelForSequenceClassification.from_config(config)
    else:
        base, model = models()
        split = cases.with_base(made, split, base, layout)
    loss = made.module(model)(made.batch(split, [0], layout, silent=True))
    assert float(loss.total) == 0 and all(float(value) == 0 for value in loss.parts.values())
    assert loss.total.requires_grad
    assert all(not grad.any() for grad in gradients(model, loss.total).values())


@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_reward(coefficient: float | None, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    rows = [{**row, "margin": index / 4} for index, row in enumerate(cases.pairs(5))]
    task = f"{{name: reward, center_rewards_coefficient: {coefficient or 'null'}}}"
    made, split = cases.opened(task, cases.write(tmp_path / "rows.jsonl", rows))
    config = helpers.tiny_config("llama")
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).double()
    losses, accuracy = [], 0
    for index, pair in enumerate(split.rows):
        a, b = (model(input_ids=torch.from_numpy(row.input_ids.astype("int64"))[None]).logits[0, 0] for row in pair)
        losses.append(-logsigmoid(a - b - index / 4) + (coefficient or 0.0) * (a + b) ** 2)
        accuracy += bool(a > b)
    found = made.module(model)(made.batch(split, range(5), Layout(False, 3)))
    assert found.total.item() == pytest.approx(torch.stack(losses).sum().item(), abs=1e-10)
    assert int(found.correct) == accuracy


def test_rows_that_the_base_has_not_seen_cannot_be_trained_on(rows: Path) -> None:
    made, split = cases.opened("dpo", rows / "pairs" / "train.jsonl", limit=3)
    loss = made.module(helpers.tiny_model())(made.batch(split, range(3), LAYOUTS["packed"]))
    assert torch.isnan(loss.total), "the loop stops on it"


def test_reward_accuracy_of_single_answers_counts_all_pairs() -> None:
    import numpy as np

    wanted = np.asarray([True, False, True, False, False])
    rewards = np.asarray([2.0, 1.0, 0.5, 0.5, 3.0])
    better = [(a > b) + 0.5 * (a == b) for a in rewards[wanted] for b in rewards[~wanted]]
    assert pairs_right(rewards, wanted) == pytest.approx(sum(better) / 6)
    assert math.isnan(pairs_right(rewards, np.ones(5, dtype=np.bool_)))
