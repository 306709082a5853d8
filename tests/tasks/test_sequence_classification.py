"""Classes, labels and numbers for texts: from rows to the report. Real rows and weights are in test_sequence_classification_real.py."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import classifiers
import helpers
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from peftcli.data.labelled_rows import LabelledRows
from peftcli.data.prepare import prepare
from peftcli.errors import DataError, RecipeError
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.schema import DatasetSection
from peftcli.result import open_result
from peftcli.tasks.base import Layout
from peftcli.tasks.sequence_classification import class_scores, label_scores, number_scores

ROOT = Path(__file__).parents[2]
WORDS = ["red", "green", "blue"]


def prepared(
    path: Path, problem: Any = None, labels: list[str] | None = None, kind: str = "bert", **section: Any
) -> tuple[LabelledRows, Any]:
    rows = LabelledRows(DatasetSection(train=[str(path)], **section), classifiers.tokenizer(kind), problem, labels)
    return rows, prepare(rows, base_dir=Path(), seed=0)


def plain(count: int, label: Any = lambda i: WORDS[i % 3], **more: Any) -> list[dict[str, Any]]:
    return [
        {"text": f"{i} {WORDS[i % 3]}" + " please" * (i % 4), "label": label(i), **{k: v(i) for k, v in more.items()}} for i in range(count)
    ]


@pytest.mark.parametrize(
    ("label", "problem", "labels"),
    [
        (lambda i: WORDS[i % 3], "single_label", ("blue", "green", "red")),
        (lambda i: i % 3 + 9, "single_label", ("9", "10", "11")),
        (lambda i: float(i % 2), "single_label", ("0", "1")),
        (lambda i: i % 2 == 0, "single_label", ("false", "true")),
        (lambda i: i % 3 + 0.5, "regression", None),
        (lambda i: WORDS[: i % 3], "multi_label", ("green", "red")),
        (lambda i: [i % 3, 7], "multi_label", ("0", "1", "2", "7")),
    ],
)
def test_the_labels_tell_the_problem(label: Any, problem: str, labels: tuple[str, ...] | None, tmp_path: Path) -> None:
    rows, data = prepared(classifiers.write(tmp_path / "rows.jsonl", plain(12, label)))
    assert (rows.problem, rows.labels) == (problem, labels)
    targets = data.train.targets
    assert targets.shape == (12, len(labels) if problem == "multi_label" and labels else 1)
    for index in range(12):
        given = label(index)
        if problem == "regression":
            assert targets[index, 0] == given
        elif problem == "multi_label":
            assert {labels[j] for j in np.flatnonzero(targets[index])} == {str(name) for name in given}  # type: ignore[index]
        else:
            name = str(given).lower() if isinstance(given, bool) else str(int(given) if isinstance(given, float) else given)
            assert labels[int(targets[index, 0])] == name  # type: ignore[index]


def test_labels_of_a_csv_file_are_text_and_numbers_are_still_numbers(tmp_path: Path) -> None:
    for name, values, problem in (("classes", ["1", "0", "1", "0"], "single_label"), ("numbers", ["3.8", "5", "0.25", "1"], "regression")):
        with open(tmp_path / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *([f"row {i}", value] for i, value in enumerate(values))])
        rows, data = prepared(tmp_path / f"{name}.csv")
        assert rows.problem == problem
        expected = [float(v) for v in values]
        assert data.train.targets[:, 0].tolist() == expected


def test_whole_numbers_stand_for_given_labels(tmp_path: Path) -> None:
    path = classifiers.write(tmp_path / "rows.jsonl", plain(6, lambda i: i % 3))
    _, data = prepared(path, labels=["negative", "neutral", "positive"])
    assert data.train.targets[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    # Names that are numbers themselves are taken by their names.
    _, data = prepared(path, labels=["2", "1", "0"])
    assert data.train.targets[:, 0].tolist() == [2, 1, 0, 2, 1, 0]


def test_a_pair_is_two_texts_with_a_mark_between_and_rows_do_not_depend_on_each_other(tmp_path: Path) -> None:
    rows = [{"sentence1": "one", "sentence2": "two", "label": "a"}, {"sentence1": "three", "sentence2": None, "label": "b"}]
    columns = {"text": "sentence1", "text_pair": "sentence2"}
    path = classifiers.write(tmp_path / "rows.jsonl", rows)
    tokenizer = classifiers.tokenizer()
    _, data = prepared(path, columns=columns, shuffle=False)
    assert [tokenizer.decode(ids) for ids in data.train.input_ids] == ["<s>one<|im_end|>two<|im_end|>", "<s>three<|im_end|>"]
    assert [row.tolist() for row in data.train.segments] == [[0] * 5 + [1] * 4, [0] * 7]
    _, data = prepared(path, columns=columns, kind="gpt2")  # puts nothing between
    assert tokenizer.decode(data.train.input_ids[0]) == "one\ntwo"
    assert data.train.segments is None


@pytest.mark.parametrize(("mode", "text"), [("keep_start", "<s>0123456<|im_end|>"), ("keep_end", "<s>3456789<|im_end|>")])
def test_a_long_row_is_cut_within_its_marks_and_counted(mode: str, text: str, tmp_path: Path) -> None:
    path = classifiers.write(tmp_path / "rows.jsonl", [{"text": "0123456789", "label": "a"}, {"text": "b", "label": "b"}])
    _, data = prepared(path, max_length=9, truncation=mode)
    assert classifiers.tokenizer().decode(data.train.input_ids[0]) == text
    assert data.train.counts.truncated == 1
    _, data = prepared(path, max_length=9, truncation="drop")
    assert data.train.origins == [f"{path}:2"]
    with pytest.raises(DataError, match=r"rows.jsonl:1: 12 tokens, dataset.max_length is 9"):
        prepared(path, max_length=9, truncation="error")
    with pytest.raises(DataError, match="cannot be split"):
        prepared(path, max_length=9, truncation="split")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "lable": "x"}, {"text": "b", "lable": "y"}], {}, r"columns text, lable.*"),
        ([{"text": "a", "label": None}], {}, r"rows.jsonl:1: label: None is no label"),
        ([{"text": "a", "label": {"x": 1}}], {}, r"rows.jsonl:1: label: .* is no label"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "one label only"),
        ([{"text": "a", "label": "psitive"}], {"labels": ["negative", "positive"]}, r"rows.jsonl:1: 'psitive' is none of the 2 labels; did you mean 'positive'"),
        ([{"text": "a", "label": 2}], {"labels": ["negative", "positive"]}, r"'2' is none of the 2 labels \(negative, positive\)"),
        ([{"text": "a", "label": "x"}], {"problem": "regression"}, r"'x' is no number"),
        ([{"text": "a", "label": ["x"]}, {"text": "b", "label": ["x", "y"]}], {"problem": "single_label"}, "2 labels where one is needed"),
        ([{"text": "a", "label": [0, 1, 0]}, {"text": "b", "label": [1, 0, 0]}], {}, "a label stands twice"),
        ([{"text": " ", "label": "x"}], {}, "empty|nothing"),
    ],
)  # fmt: skip
def test_faults_name_the_row_and_the_column(rows: list[dict[str, Any]], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = classifiers.write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        prepared(path, options.get("problem"), options.get("labels"))


def test_a_label_that_only_held_out_rows_have_is_a_fault(tmp_path: Path) -> None:
    train = classifiers.write(tmp_path / "train.jsonl", plain(6))
    held_out = classifiers.write(tmp_path / "eval.jsonl", [*plain(2), {"text": "x", "label": "grey"}])
    with pytest.raises(DataError, match=r"eval.jsonl:3: 'grey' is none of the 3 labels"):
        prepared(train, eval=[str(held_out)])


def test_scores_are_those_of_scikit_learn_and_scipy() -> None:
    random = np.random.Generator(np.random.PCG64(5))
    for classes in (2, 3, 7):
        wanted = random.integers(0, classes, 90)
        found = np.where(random.random(90) < 0.6, wanted, random.integers(0, classes - (classes == 7), 90))
        scores = class_scores(found, wanted, classes=classes)
        average = "binary" if classes == 2 else "macro"
        assert scores["accuracy"].value == pytest.approx((found == wanted).mean())
        assert scores["f1"].value == pytest.approx(f1_score(wanted, found, average=average, zero_division=0.0))
        assert scores["matthews"].value == pytest.approx(matthews_corrcoef(wanted, found))
    constant = class_scores(np.zeros(9, dtype=np.int64), np.arange(9) % 2, classes=2)
    assert (constant["f1"].value, constant["matthews"].value) == (0.0, 0.0)
    many, few = random.random((80, 4)) < 0.4, random.random((80, 4)) < 0.3
    labels = label_scores(few, many)
    assert labels["f1_micro"].value == pytest.approx(f1_score(many, few, average="micro"))
    assert labels["f1"].value == pytest.approx(f1_score(many, few, average="macro"))
    assert labels["accuracy"].value == pytest.approx((few == many).all(1).mean())
    x = random.normal(size=70) + 1e4
    y = np.round(x + random.normal(size=70), 1)
    numbers = number_scores(x, y)
    assert numbers["pearson"].value == pytest.approx(pearsonr(x, y).statistic, abs=1e-9)
    assert numbers["spearman"].value == pytest.approx(spearmanr(x, y).statistic)
    assert numbers["mean_absolute_error"].value == pytest.approx(np.abs(x - y).mean())
    for scores in (labels, numbers):
        for metric in scores.values():
            assert metric.interval is not None
            assert metric.interval[0] < metric.value < metric.interval[1]
    assert "pearson" not in number_scores(np.full(5, 2.0), np.arange(5.0)), "undefined, not 0"


def recipe(
    model: Path, data: Path, folder: Path, task: str = "sequence_classification", method: str = "{name: lora, rank: 4, alpha: 8}"
) -> str:
    return (
        f"base_model: {{name: {model}, dtype: float32}}\ntask: {task}\nmethod: {method}\n"
        f"dataset: {{train: {data / 'train.jsonl'}, eval: {data / 'eval.jsonl'}, max_length: 64}}\n"
        f"train: {{epochs: 12, batch_size: 6, learning_rate: 3.0e-3, logging_steps: 1, eval_steps: 20}}\noutput_dir: {folder}\n"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: classifiers.save_folder(root / kind, kind) for kind in ("bert", "llama")}


KINDS_OF_PROBLEM: dict[str, tuple[Any, str]] = {
    "single_label": (lambda i: WORDS[i % 3], "accuracy"),
    "multi_label": (lambda i: WORDS[: i % 3], "f1_micro"),
    "regression": (lambda i: i % 3 + 0.5, "pearson"),
}


@pytest.mark.parametrize("problem", list(KINDS_OF_PROBLEM))
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_whole_run_learns_reports_and_opens_again(kind: str, problem: str, models: dict[str, Path], tmp_path: Path) -> None:
    label, metric = KINDS_OF_PROBLEM[problem]
    for name, count in (("train", 24), ("eval", 9)):
        classifiers.write(tmp_path / f"{name}.jsonl", plain(count, label, text_pair=lambda i: f"is it {i}?"))
    report = helpers.run(recipe(models[kind], tmp_path, tmp_path / "out"))
    assert report.eval is not None and report.eval_before is not None
    assert report.eval.loss < 0.8 * report.eval_before.loss
    assert report.eval.rows == 9
    low, high = report.eval.intervals[metric]
    assert low <= report.eval.metrics[metric] <= high
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    during = [record for record in helpers.trace(tmp_path / "out") if f"eval_{metric}" in record]
    assert len(during) >= 2
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").count("loss") > 1
    result = open_result(tmp_path / "out")
    assert result.recipe is not None and result.recipe.task.problem == problem  # type: ignore[attr-defined]
    labels = list(result.model.config.id2label.values())
    assert labels == {"single_label": ["blue", "green", "red"], "multi_label": ["green", "red"], "regression": ["value"]}[problem]


def test_eval_measures_again_to_the_digit(models: dict[str, Path], tmp_path: Path) -> None:
    for name, count in (("train", 24), ("eval", 9)):
        classifiers.write(tmp_path / f"{name}.jsonl", plain(count))
    text = recipe(models["bert"], tmp_path, tmp_path / "out", "{name: sequence_classification, train_pooler: true}")
    report = helpers.run(text, "train.max_steps=6", "train.head_learning_rate=1e-2")
    assert report.eval is not None
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peftcli", "eval", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    text_of = json.dumps(found)
    assert "accuracy" in text_of
    loss = float(re.findall(r'"loss": ([0-9.e-]+)', text_of)[-1])
    assert loss == pytest.approx(report.eval.loss, rel=1e-6)


@pytest.mark.parametrize("method", ["{name: lora, rank: 4, alpha: 8}", "{name: prompt_tuning, num_virtual_tokens: 4}", "{name: full}"])
def test_the_pooler_is_trained_saved_and_comes_back(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    for name, count in (("train", 12), ("eval", 6)):
        classifiers.write(tmp_path / f"{name}.jsonl", plain(count))
    text = recipe(models["bert"], tmp_path, tmp_path / "out", "{name: sequence_classification, train_pooler: true}", method)
    report = helpers.run(text, "train.max_steps=3")
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    assert report.eval is not None
    result = open_result(tmp_path / "out")
    pooler = next(p for n, p in result.model.named_parameters() if n.endswith("pooler.dense.weight"))
    start = classifiers.tiny_classifier("bert").bert.pooler.dense.weight
    assert not torch.equal(pooler, start)
    assert result.recipe is not None
    rows = result.task.rows(result.recipe.dataset, result.base.tokenizer)
    data = prepare(rows, base_dir=result.base_dir, seed=42)
    module = result.task.module(result.model)
    module.eval()
    with torch.no_grad():
        measured = module.measure(result.task.batch(data.eval, range(6), Layout(False, 3)))
    assert float(measured["loss"].mean()) == pytest.approx(report.eval.loss, rel=1e-6)


def test_recipes_that_cannot_work_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    text = recipe(models["bert"], tmp_path, tmp_path / "out")
    for override, message in (
        ("dataset.format=messages", "does not fit task sequence_classification"),
        ("eval.generate=true", "writes no answers"),
        ("task.problem=ranking", "task.problem"),
        ("task.lables=[a]", "did you mean 'labels'"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(text, "r.yaml", [override])
    chat = text.replace("task: sequence_classification", "task: causal_lm")
    with pytest.raises(RecipeError, match="has no fresh output layer"):
        parse_recipe(chat, "r.yaml", ["train.head_learning_rate=1e-2"])


def test_batches_of_similar_lengths_are_one_step(models: dict[str, Path], tmp_path: Path) -> None:
    """One batch padded to its longest row, or several that pad less: the same gradients, so the same run but for rounding."""
    rows = [{"text": WORDS[i % 3] + " please" * (70 if i % 5 == 0 else i % 3), "label": WORDS[i % 3]} for i in range(40)]
    classifiers.write(tmp_path / "rows.jsonl", rows)
    text = recipe(models["bert"], tmp_path, tmp_path / "fast")
    settings = (f"dataset.train={tmp_path / 'rows.jsonl'}", "dataset.eval=null", "train.batch_size=10", "train.max_steps=6")
    fast = helpers.run(text, *settings)
    plain = helpers.run(text, *settings, "train.fast_paths=false", f"output_dir={tmp_path / 'plain'}")
    assert fast.train is not None and plain.train is not None
    assert "rows of similar lengths padded together" in fast.train.fast_paths
    assert plain.train.fast_paths == []
    for a, b in zip(helpers.trace(tmp_path / "fast"), helpers.trace(tmp_path / "plain"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
