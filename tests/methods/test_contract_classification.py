"""What every method promises on classifiers: a BERT-, a GPT-2- and a LLaMA-like body with a fresh head, dense and over quantized weights.

Padding is the trap here (rows have different lengths, and decoders judge by the last token), and the head, which every method trains and
saves whole.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import classifiers
import helpers
import pytest
import torch
from safetensors.torch import load_file
from test_contract import CAPS, DENSE, EVERYWHERE, QUANTIZED
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peftcli import output
from peftcli.data.batching import Plan
from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.kernels import attention
from peftcli.merge import logits_of, merge, parity
from peftcli.methods import targets
from peftcli.methods.base import Context
from peftcli.methods.kinds import Wrapper, trainable_state
from peftcli.model.load import Base
from peftcli.model.source import Source
from peftcli.quantization import is_quantized
from peftcli.recipe.load import parse_recipe
from peftcli.train import checkpoint as checkpoints
from peftcli.train.signals import Interrupted

KINDS = classifiers.KINDS


def fits(name: str, kind: str) -> bool:
    """Whether the method has something to train in this kind of body (bitfit: biases)."""
    try:
        classifiers.adapted(name, kind)
    except UsageError:
        return False
    return True


FITS = {name: [kind for kind in KINDS if fits(name, kind)] for name in CAPS}
EVERY = [(name, quantization, kind) for name, quantization in EVERYWHERE for kind in FITS[name]]
DENSE_EVERY = [(name, kind) for name in DENSE for kind in FITS[name]]
MERGEABLE = [(name, kind) for name, kind in DENSE_EVERY if CAPS[name].mergeable]


def heads(model: nn.Module) -> list[str]:
    """Names of the parameters of the head, in a model with a method on it."""
    inner: Any = model.base if isinstance(model, Wrapper) else model
    before = "base." if isinstance(model, Wrapper) else ""
    names = targets.classification_heads(inner)
    return [f"{before}{key}" for key, _ in inner.named_parameters() if key.startswith(tuple(f"{name}." for name in names))]


def test_only_biases_are_missing_anywhere() -> None:
    assert {name: kinds for name, kinds in FITS.items() if kinds != KINDS} == {"bitfit": ["bert", "gpt2"]}


@pytest.mark.parametrize(("name", "quantization", "kind"), [case for case in EVERY if CAPS[case[0]].identity_at_init])
def test_before_the_first_step_the_model_is_the_base(name: str, quantization: str | None, kind: str) -> None:
    base = classifiers.judged(classifiers.tiny_classifier(kind, quantization=quantization))
    assert torch.equal(classifiers.judged(classifiers.adapted(name, kind, quantization=quantization)[0]), base)


@pytest.mark.parametrize(("name", "quantization", "kind"), EVERY)
def test_the_head_and_what_the_method_trains_move_and_nothing_else(name: str, quantization: str | None, kind: str, tmp_path: Path) -> None:
    model, method = classifiers.adapted(name, kind, quantization=quantization)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert heads(model)
    assert {p.dtype for p in trainable_state(model).values()} == {torch.float32}
    classifiers.loop(model, method, classifiers.labelled_split(), tmp_path, steps=4, batch_size=8).run()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
    assert all(model.get_parameter(key).requires_grad for key in heads(model))
    if not CAPS[name].whole_model and name not in ("freeze", "bitfit"):
        # Nothing of the body itself moves.
        body = {n for n, _ in classifiers.tiny_classifier(kind).named_parameters()} - {h.removeprefix("base.") for h in heads(model)}
        assert not body & {key.replace("base.", "") for key in trainable_state(model)}


@pytest.mark.parametrize(("name", "quantization", "kind"), EVERY)
def test_saved_and_loaded_gives_the_same_logits(name: str, quantization: str | None, kind: str, tmp_path: Path) -> None:
    model, method = classifiers.adapted(name, kind, quantization=quantization)
    helpers.stir(model)
    expected = classifiers.judged(model)
    recipe = parse_recipe(
        f"{{base_model: tiny, task: sequence_classification, method: {{name: {name}}}, dataset: rows.jsonl}}",
        "r.yaml",
        [f"base_model.quantization={quantization or 'null'}"],
    ).recipe
    base = Base(model, helpers.tiny_tokenizer(), Source("tiny", "tiny", None, True), torch.float32, quantization, None, (), 0)
    saved = output.save_result(tmp_path, model, method, classifiers.TASK, base, recipe)
    if method.caps.whole_model:
        again = AutoModelForSequenceClassification.from_pretrained(saved, attn_implementation=attention.register())
    else:
        fresh = classifiers.tiny_classifier(kind, quantization=quantization)
        helpers.stir(
            fresh.get_submodule(targets.classification_heads(fresh)[0]).requires_grad_(True), seed=8
        )  # its own start must not matter
        again = hf_peft.apply_adapter(fresh, hf_peft.read_adapter(saved), Context(seed=99))
        assert {t.dtype for t in load_file(saved / hf_peft.WEIGHTS).values()} == {torch.float32}
    assert torch.equal(classifiers.judged(again), expected)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("name", "kind"), MERGEABLE)
def test_merged_equals_unmerged_with_the_head_kept(name: str, kind: str, dtype: torch.dtype, limit: float) -> None:
    model, _ = classifiers.adapted(name, kind, dtype)
    helpers.stir(model)
    before, trained = classifiers.judged(model), {key: model.get_parameter(key).detach().clone() for key in heads(model)}
    merged = merge(model)
    assert type(merged) is type(classifiers.tiny_classifier(kind))
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert float((classifiers.judged(merged) - before).abs().max()) <= limit
    assert trained
    assert all(torch.equal(merged.get_parameter(key), value) for key, value in trained.items())


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", [name for name in QUANTIZED if name != "qlora"])
def test_over_a_quantized_encoder_the_head_is_dense_and_the_task_is_learned(name: str, quantization: str, tmp_path: Path) -> None:
    model, method = classifiers.adapted(name, "bert", quantization=quantization)
    inner: Any = model.base if isinstance(model, Wrapper) else model
    assert any(is_quantized(module) for module in inner.modules())
    assert not any(is_quantized(module) for head in targets.classification_heads(inner) for module in inner.get_submodule(head).modules())
    losses: list[float] = []
    loop = classifiers.loop(model, method, classifiers.labelled_split(), tmp_path, steps=8, batch_size=13)
    loop.display.step = lambda record: losses.append(record["loss"])  # type: ignore[method-assign]
    loop.run()
    assert losses[-1] < 0.9 * losses[0]
    if CAPS[name].mergeable:
        rows = [row.numpy() for row in helpers.some_ids(24, 20)]
        device = torch.device("cpu")
        before = logits_of(classifiers.TASK, model, rows, device)  # an evaluation must not spoil the stored weights
        found = parity(before, logits_of(classifiers.TASK, merge(model), rows, device), exact=False)
        assert found.kl <= 5e-3


@pytest.mark.parametrize(("name", "quantization"), EVERYWHERE)
def test_resumed_equals_uninterrupted_to_the_byte(name: str, quantization: str | None, tmp_path: Path) -> None:
    states: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    split, settings = classifiers.labelled_split(), {"batch_size": 5, "save_steps": 5}  # 3 steps for each epoch, the last one partial
    kind = FITS[name][0]
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        torch.manual_seed(1)
        model, method = classifiers.adapted(name, kind, quantization=quantization)
        loop = classifiers.loop(model, method, split, folder, steps=8, **settings)
        if interrupted:
            loop.display.advance = lambda step: signal.raise_signal(signal.SIGTERM) if step == 5 else None  # type: ignore[method-assign]
            with loop.stop, pytest.raises(Interrupted):
                loop.run()
            torch.manual_seed(77)
            model, method = classifiers.adapted(name, kind, quantization=quantization)
            loop = classifiers.loop(model, method, split, folder, steps=8, **settings)
            found, notes = checkpoints.newest(folder / "checkpoints")
            assert found is not None
            assert not notes
            assert loop.run(found).step == 8
        else:
            loop.run()
        states.append((trainable_state(model), checkpoints.optimizer_tensors(loop.optimizer)[0]))
    for one, two in zip(*states, strict=True):
        assert one.keys() == two.keys()
        assert one
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("name", "quantization", "kind"), EVERY)
def test_a_small_task_is_learned(name: str, quantization: str | None, kind: str, tmp_path: Path) -> None:
    model, method = classifiers.adapted(name, kind, quantization=quantization)
    losses: list[float] = []
    rate = 1e-2 if float(method.recommended.get("train.learning_rate", 2e-4)) > 1e-3 else 3e-3  # type: ignore[arg-type]
    loop = classifiers.loop(model, method, classifiers.labelled_split(), tmp_path, steps=30, batch_size=13, learning_rate=rate)
    loop.display.step = lambda record: losses.append(record["loss"])  # type: ignore[method-assign]
    loop.run()
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(("name", "kind"), DENSE_EVERY)
def test_a_row_is_judged_alike_alone_and_beside_longer_ones(name: str, kind: str) -> None:
    model, _ = classifiers.adapted(name, kind, torch.float64)
    helpers.stir(model)
    split = classifiers.labelled_split()
    together = classifiers.judged(model, split)
    alone = torch.cat([classifiers.judged(model, split, [row]) for row in range(len(split.origins))])
    assert float((together - alone).abs().max()) <= 1e-9
    assert float((together - together[:1]).abs().max()) > 1e-3, "the rows must matter"


@pytest.mark.parametrize(("name", "kind"), DENSE_EVERY)
def test_checkpointing_and_the_split_of_a_step_change_no_gradient(name: str, kind: str) -> None:
    split = classifiers.labelled_split()
    found: list[dict[str, Tensor]] = []
    for checkpointing, batches in (
        (False, [list(range(13))]),
        (True, [list(range(13))]),
        (False, [[0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12]]),
    ):
        model, method = classifiers.adapted(name, kind, torch.float64)
        helpers.stir(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        module = classifiers.TASK.module(model)
        for rows in batches:
            (method.loss(module, classifiers.batch_of(split, rows)).total / len(split.origins)).backward()
        found.append(helpers.gradients(model))
    assert found[0].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(float(grad.abs().max()) > 0 for grad in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, grad in found[0].items():
            assert float((other[key] - grad).abs().max()) <= 1e-9 * max(1.0, float(grad.abs().max())), key


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in DENSE_EVERY if kind != "gpt2"])
def test_a_silent_batch_carries_nothing_but_keeps_every_gradient(name: str, kind: str) -> None:
    """What a process without rows of its own in a step runs: its gradients must be there, and zero."""
    model, method = classifiers.adapted(name, kind)
    model.train()
    split = classifiers.labelled_split()
    batch = classifiers.TASK.batch(split, [0, 1], classifiers.Layout(False, classifiers.PAD), silent=True)
    loss = method.loss(classifiers.TASK.module(model), batch)
    assert float(loss.total.detach()) == 0.0
    loss.total.backward()
    found = helpers.gradients(model)
    assert found.keys() == trainable_state(model).keys()
    assert all(not grad.any() for grad in found.values())


def test_the_plan_covers_every_row_once() -> None:
    """The tests above rely on a partial last step."""
    plan = Plan(lengths=classifiers.labelled_split().lengths, batch_size=5, batch_tokens=None, accumulation=1, processes=1, seed=0)
    assert len(plan.epoch(0)) == 3
