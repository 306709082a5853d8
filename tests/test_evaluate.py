"""Measuring: independent of the batch size for every task and for generation, the same in a run, after a resume and in `peftcli eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import classifiers
import helpers
import pytest
import torch
import transformers
from accelerate import PartialState
from typer.testing import CliRunner

from peftcli.cli import app
from peftcli.data.prepare import prepare
from peftcli.errors import UsageError
from peftcli.evaluate import Evaluator, Scores
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import TASKS
from peftcli.report.catalogue import FIGURES
from peftcli.tasks import registry as tasks
from peftcli.tasks.base import Layout, Task
from peftcli.tasks.intervals import share

WORDS = ["red", "green", "blue", "gold", "grey"]


def word(index: int) -> str:
    return WORDS[index % 5]


# A row of the first format of each task: different lengths, several kinds of answers.
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "messages": lambda i: {"messages": [{"role": "user", "content": word(i) * (1 + i % 3)}, {"role": "assistant", "content": f"{i}!"}]},
    "classification": lambda i: {"text": f"{word(i)} " * (1 + i % 4), "label": word(i % 3)},
    "tagging": lambda i: {"tokens": [word(i)] * (1 + i % 4) + ["x"], "tags": ["B-A"] + ["I-A"] * (i % 4) + ["O"]},
    "text_to_text": lambda i: {"source": f"{word(i)} " * (1 + i % 4), "target": word(i + 1) * (1 + i % 2)},
    "preference": lambda i: {"prompt": f"{word(i)}? ", "chosen": word(i) * (1 + i % 3), "rejected": word(i).upper()},
    "kto": lambda i: {"prompt": f"{word(i)}? ", "completion": word(i) * (1 + i % 3), "label": i % 3 == 0},
}


@lru_cache(maxsize=8)
def config_of(auto_model: str) -> Any:
    return classifiers.tiny_config("t5") if auto_model == "AutoModelForSeq2SeqLM" else classifiers.tiny_config("llama")


def opened(name: str, folder: Path) -> tuple[Task[Any], Any, Any]:
    """A task with its held-out rows, and a tiny random model for it in float64."""
    task = tasks.make(TASKS[name]())
    row = ROWS[task.section.formats[0]]
    for part, count in (("train", 20), ("eval", 13)):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)), encoding="utf-8")
    section = DatasetSection(train=[str(folder / "train.jsonl")], eval=[str(folder / "eval.jsonl")], max_length=128)
    kind = task.rows(section, helpers.tiny_tokenizer())
    split = prepare(kind, base_dir=folder, seed=0).eval
    task.settle(kind)
    config = config_of(task.auto_model)
    head = task.head()
    if head is not None:
        config.num_labels = len(head.labels)
    torch.manual_seed(5)
    model = getattr(transformers, task.auto_model).from_config(config).double().eval()
    return task, split, model


def close(one: Scores, other: Scores) -> None:
    assert one.rows == other.rows and one.units == other.units
    assert one.plain() == pytest.approx(other.plain(), rel=1e-9, abs=1e-12)
    assert one.intervals.keys() == other.intervals.keys()
    for name, interval in one.intervals.items():
        assert interval == pytest.approx(other.intervals[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("name", tasks.names())
def test_the_batch_size_has_no_influence(name: str, tmp_path: Path) -> None:
    """Loss, figures and intervals of every task at batches of 1, 4 and 16."""
    task, split, model = opened(name, tmp_path)

    def evaluator(size: int, packed: bool, rows: Any) -> Evaluator:
        return Evaluator(PartialState(cpu=True), task, rows, helpers.tiny_tokenizer(), Layout(packed, 3), size)

    def scores(size: int, packed: bool = False) -> Scores:
        rows = evaluator(size, packed, split).with_base(model) if task.has_reference else split
        return evaluator(size, packed, rows).scores(task.module(model))

    alone = scores(1)
    assert alone.rows == 13 and alone.loss > 0
    # The paired test of a model with itself finds nothing.
    assert alone.paired and all(test.p_value == 1.0 and test.value == 0.0 for test in alone.since(alone).values())
    assert {"loss", *alone.metrics} <= set(FIGURES), "a figure has no words"
    assert set(alone.metrics) == set(task.figures), "gates are refused and judged by what the task says that it measures"
    assert set(alone.intervals) == {"loss", *alone.metrics}
    for size in (4, 16):
        close(scores(size), alone)
    if task.packs(model, helpers.VOCABULARY, max(split.lengths)):
        close(scores(16, packed=True), alone)


def tiny_recipe(tiny_folders: dict[str, Path], tiny_data: Path, output: Path, method: str = "{name: lora, rank: 4, alpha: 8}") -> str:
    return helpers.recipe_for(tiny_folders["llama"], tiny_data, output, method=method)


def test_base_and_tuned_are_compared_row_by_row(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    """In the run, in a resumed run, and by `eval --compare-base`: the same tests of the same rows."""
    text = (
        tiny_recipe(tiny_folders, tiny_data, tmp_path / "run")
        + "eval: {generate: true, max_new_tokens: 8, metrics: [exact_match, rouge, chrf]}\n"
    )
    whole = helpers.run(text, "train.save_steps=4")
    assert whole.eval is not None and whole.eval_before is not None
    assert {"loss", "perplexity", "token_accuracy", "exact_match", "rouge_1", "rouge_2", "rouge_l", "chrf"} == set(whole.comparisons)
    assert whole.comparisons["exact_match"].test == "mcnemar" and whole.comparisons["loss"].test == "bootstrap"
    for name, test in whole.comparisons.items():
        before, after = whole.eval_before.figure(name), whole.eval.figure(name)
        assert before is not None and after is not None
        assert test.difference == pytest.approx(after - before)
        assert test.interval[0] <= test.difference <= test.interval[1]
    assert whole.comparisons["loss"].p_value < 0.01

    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert (checkpoints[-1] / "state.json").stat().st_size < 100_000
    resumed = helpers.run(text, "train.save_steps=4", resume=True)
    assert resumed.train.resumed_from is not None
    assert resumed.comparisons == whole.comparisons

    found = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--compare-base", "--json"])
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    assert printed["comparisons"].keys() == whole.comparisons.keys()
    for name, test in whole.comparisons.items():
        assert printed["comparisons"][name]["p_value"] == pytest.approx(test.p_value, abs=0.01)
        assert printed["comparisons"][name]["value"] == pytest.approx(test.difference, rel=1e-4, abs=1e-6)
    shown = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--compare-base", "--no-generate"], env={"COLUMNS": "200"})
    assert "base" in shown.output and "p ≤ 0.002" in shown.output and "exact match" not in shown.output


def test_figures_have_the_same_names_during_training(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    report = helpers.run(tiny_recipe(tiny_folders, tiny_data, tmp_path / "run"), "train.eval_steps=3", "train.report_to=[tensorboard]")
    assert report.eval is not None
    records = [record for record in helpers.trace(tmp_path / "run") if "eval_loss" in record]
    assert len(records) > 2
    for record in records:
        names = {f"eval_{name}" for name in ("loss", "intervals", *report.eval.metrics)}
        assert {name for name in record if name.startswith("eval_")} == names
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(path.parent for path in (tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    names = {f"eval/{name}" for name in ("loss", *report.eval.metrics)}
    assert names <= set(events.Tags()["scalars"])
    last = events.Scalars("eval/token_accuracy")[-1].value
    assert last == pytest.approx(report.eval.metrics["token_accuracy"], rel=1e-5)


def test_measures_of_answers_need_answers(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    text = tiny_recipe(tiny_folders, tiny_data, tmp_path / "run")
    with pytest.raises(UsageError, match=r"eval.metrics: measures generated answers"):
        parse_recipe(text + "eval: {metrics: [rouge]}\n", "recipe.yaml")
    assert parse_recipe(text + "eval: {metrics: [exact_match], generate: false}\n", "recipe.yaml").recipe.eval.metrics == ["exact_match"]
    with pytest.raises(UsageError, match="bleu"):
        parse_recipe(text + "eval: {generate: true, metrics: [bleuu]}\n", "recipe.yaml")


def test_the_command_line_refuses_what_does_not_go_together(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    helpers.run(tiny_recipe(tiny_folders, tiny_data, tmp_path / "run"), "train.max_steps=1")

    def refused(*options: str) -> str:
        found = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), *options], env={"COLUMNS": "300"})
        assert found.exit_code != 0
        return found.output + str(found.exception)

    assert "did you mean" in str(refused("--metrics", "roug")) or "not one of" in refused("--metrics", "roug")
    assert "go with --tasks" in refused("--num-fewshot", "2")
    assert "takes the place of" in refused("--tasks", "hellaswag", "--metrics", "rouge")
    whole = CliRunner().invoke(app, ["eval", str(tiny_folders["llama"]), "--compare-base", "--data", str(tiny_data / "eval.jsonl")])
    assert "no recipe" in str(whole.exception) or "without a recipe" in str(whole.exception)


def test_without_the_harness_its_tasks_name_the_command_that_installs_it(tmp_path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is not None:
        found = CliRunner().invoke(app, ["eval", str(tmp_path), "--tasks", "hellaswag"])
        assert "neither a run nor an adapter" in str(found.exception)
        return
    from peftcli.commands.harness import check_installed

    with pytest.raises(UsageError, match="not installed") as caught:
        check_installed()
    assert "-m pip install 'lm-eval[hf]'" in str(caught.value.hint)


def test_scores_of_hits_survive_json() -> None:
    one = Scores(1.0, {"exact_match": 0.5}, {}, 4, 4, 0.0, paired={"exact_match": share([True, False, True, False]).paired or ""})
    again = Scores(**json.loads(json.dumps(one.__dict__)))
    assert again.since(one)["exact_match"].p_value == 1.0


def test_metrics_and_their_intervals_are_logged_during_training(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    """Those of written answers too; the last line is what the report says."""
    text = tiny_recipe(tiny_folders, tiny_data, tmp_path / "run")
    text += "eval: {generate: true, max_new_tokens: 4, metrics: [exact_match, rouge], before: false}\n"
    report = helpers.run(text, "train.max_steps=4", "train.eval_steps=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "eval_loss" in line]
    names = {"loss", "perplexity", "token_accuracy", "exact_match", "rouge_1", "rouge_2", "rouge_l"}
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        assert {f"eval_{name}" for name in names} <= set(line)
        assert set(line["eval_intervals"]) == names
    assert report.eval is not None
    assert {name: logged[-1][f"eval_{name}"] for name in names} == pytest.approx({"loss": report.eval.loss, **report.eval.metrics})
    assert logged[-1]["eval_intervals"] == {name: list(ends) for name, ends in report.eval.intervals.items()}
