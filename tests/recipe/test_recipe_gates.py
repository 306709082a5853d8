"""`expect` in a recipe: what could never be judged is a fault with its place, before anything is trained."""

from __future__ import annotations

import pytest

from peftcli.errors import Fault, RecipeError
from peftcli.recipe import parse_recipe
from peftcli.recipe.render import dump_recipe
from peftcli.recipe.tasks import TASKS

ROWS = "base_model: m\nmethod: lora\ndataset: {train: a.jsonl, eval: b.jsonl}\n"
GENERATED = ROWS + "eval: {generate: true, metrics: [exact_match, rouge]}\n"


def faults_of(text: str, *overrides: str) -> list[Fault]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return list(caught.value.faults)


def test_gates_are_read_in_either_writing_and_from_the_command_line() -> None:
    dotted = parse_recipe(ROWS + 'expect: {eval.loss: "<= 1.2", train.steps: "== 5"}\n').recipe
    nested = parse_recipe(ROWS + 'expect: {eval: {loss: "<= 1.2"}, train: {steps: "== 5"}}\n').recipe
    given = parse_recipe(ROWS + 'expect: {eval.loss: "<= 9", train.steps: "== 5"}\n', "r", ["expect.eval.loss=<= 1.2"]).recipe
    assert dotted.expect == {"eval.loss": "<= 1.2", "train.steps": "== 5"}
    assert dotted == nested == given
    assert parse_recipe(ROWS + "expect:\n").recipe.expect == {}
    assert parse_recipe(dump_recipe(dotted)).recipe == dotted


@pytest.mark.parametrize(
    ("line", "column", "message", "nearest"),
    [
        ('eval.los: "< 1"', 3, "is no figure of the report", "eval.loss"),
        ('loss: "< 1"', 3, "is no figure of the report", "eval.loss"),
        ('train.memory: "< 1"', 3, "is no figure of the report", None),
        ('eval.exact_match: "> 1"', 3, "is measured of generated answers", None),
        ('eval.matthews: "> 1"', 3, "is no figure of this task", None),
        ("eval.loss: 1.2", 14, "must be text; put it in quotes", None),
        ('eval.loss: "1.2"', 14, "is not written as it has to be", None),
        ('eval.loss: "<= 1.2 nats"', 14, "is not written as it has to be", None),
        ('eval.loss: "<= nan"', 14, "is not written as it has to be", None),
        ("eval.loss: [1]", 14, "has the wrong type", None),
    ],
)
def test_a_gate_that_cannot_be_judged_is_a_fault_in_its_place(line: str, column: int, message: str, nearest: str | None) -> None:
    (fault,) = faults_of(ROWS + f"expect:\n  {line}\n")
    assert (fault.line, fault.column, fault.message) == (5, column, message)
    assert fault.nearest == nearest or (nearest is None and fault.message == "is no figure of the report")
    assert fault.allowed


def test_figures_that_the_run_would_not_measure() -> None:
    rest = "base_model: m\nmethod: lora\ndataset: a.jsonl\n"
    assert [f.message for f in faults_of(rest + 'expect: {eval.loss: "< 1"}\n')] == ["is measured on held-out rows"]
    assert [f.message for f in faults_of(ROWS, "eval.before=false", "expect.comparisons.loss.p_value=< 0.05")] == [
        "needs the base model's figures"
    ]
    assert [f.message for f in faults_of(GENERATED, "expect.eval.bleu=> 3")] == ["is not measured"]
    for key in ("eval.rouge_l", "eval.exact_match", "eval_before.exact_match", "comparisons.rouge_1.difference", "data.eval.rows"):
        assert parse_recipe(GENERATED, "r", [f"expect.{key}=> 0"]).recipe.expect == {key: "> 0"}
    assert parse_recipe(rest, "r", ["expect.train.peak_memory_bytes=<= 4e9"]).recipe.expect


def test_a_block_sign_without_quotes_is_explained() -> None:
    (fault,) = faults_of(ROWS + "expect:\n  eval.loss: >= 1\n")
    assert "put text that begins with one in quotes" in fault.message
    assert fault.line == 5


# Every task and figures that it tells; for each what it does not.
TASKS_FIGURES = {
    "causal_lm": (("perplexity", "token_accuracy"), "accuracy"),
    "seq2seq": (("perplexity", "token_accuracy"), "reward_accuracy"),
    "sequence_classification": (("accuracy", "f1", "f1_micro", "matthews", "pearson", "spearman", "mean_absolute_error"), "perplexity"),
    "{name: sequence_classification, problem: regression}": (("pearson", "spearman", "mean_absolute_error"), "accuracy"),
    "{name: sequence_classification, problem: multi_label}": (("accuracy", "f1", "f1_micro"), "matthews"),
    "{name: sequence_classification, problem: single_label}": (("accuracy", "f1", "matthews"), "f1_micro"),
    "token_classification": (("entity_f1", "entity_precision", "entity_recall", "f1", "token_accuracy"), "accuracy"),
    "dpo": (("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob"), "f1"),
    "orpo": (("reward_accuracy", "chosen_log_prob"), "kl"),
    "simpo": (("reward_accuracy", "reward_margin"), "token_accuracy"),
    "kto": (("reward_accuracy", "reward_margin", "kl"), "perplexity"),
    "reward": (("reward_accuracy", "reward_margin"), "chosen_log_prob"),
}


def test_every_task_is_listed() -> None:
    assert {"sequence_classification" if task.startswith("{") else task for task in TASKS_FIGURES} == set(TASKS)


@pytest.mark.parametrize("task", TASKS_FIGURES)
def test_gates_fit_the_task(task: str) -> None:
    own, other = TASKS_FIGURES[task]
    for name in ("loss", *own):
        for key in (f"eval.{name}", f"eval_before.{name}", f"comparisons.{name}.p_value"):
            assert parse_recipe(ROWS + f"task: {task}\n", "r", [f"expect.{key}=> 0"]).recipe.expect == {key: "> 0"}
    (fault,) = faults_of(ROWS + f"task: {task}\n", f"expect.eval.{other}=> 0")
    assert fault.message == "is no figure of this task"
    assert own[0] in str(fault.allowed) and other not in str(fault.allowed).split(", ")
