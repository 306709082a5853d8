"""Measure every task on real data, each with the recipe that ships for it and a budget of minutes of one CPU core.

    python scripts/measure_tasks.py --data FOLDER --models FOLDER [NAME ...]
    python scripts/measure_tasks.py --table

FOLDER of the data holds the published files (sst2/, trec/, rte/, stsb/, e2e/, formats/ ...), FOLDER of the models `from_pretrained` folders
(minilm, chinese-bert, flan-t5-small, minimind2-small). One file for each experiment is written into scripts/results/tasks; `--table` prints
them as one table.

Nothing is chosen by the test rows: learning rates are the recipe's or a usual one for so short a run, set before, there is one pass or
two over the rows, and the weights are those after the last step. Test rows are those that the publisher holds out; where there are none,
rows that are taken away before training.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from own_process import peftcli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "tasks"
SEED = 42
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """One run.

    Attributes:
        title: the task in the table. ``data``: what is learned, in words.
        recipe: under recipes/. ``model``: a folder of --models.
        rows: from the folder of the data to training and test rows.
        settings: overrides of the recipe.
        figures: those of the table, the most telling first.
        fresh: the output layer is new, so the base is no model to compare with; the table shows what a constant answer reaches.
    """

    title: str
    data: str
    recipe: str
    model: str
    rows: Callable[[Path], tuple[Rows, Rows]]
    settings: tuple[str, ...]
    figures: tuple[str, ...]
    fresh: bool = False


def lines(path: Path, encoding: str = "utf-8") -> str:
    """The text of a published file, packed or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(encoding)


def trec(data: Path) -> tuple[Rows, Rows]:
    """The six coarse types of questions."""

    def read(name: str) -> Rows:
        pairs = (line.split(" ", 1) for line in lines(data / "trec" / name, "latin-1").splitlines() if line)
        return [{"text": text, "label": kind.partition(":")[0]} for kind, text in pairs]

    return read("TREC.train"), read("TREC.test")


def rte(data: Path) -> tuple[Rows, Rows]:
    def read(name: str) -> Rows:
        found = csv.DictReader(io.StringIO(lines(data / "rte" / name)), delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{name: row[name] for name in ("sentence1", "sentence2", "label")} for row in found]

    return read("train.tsv"), read("dev.tsv")


def stsb(language: str) -> Callable[[Path], tuple[Rows, Rows]]:
    def read(path: Path) -> Rows:
        return [{"sentence1": one, "sentence2": two, "score": float(score)} for one, two, score in csv.reader(io.StringIO(lines(path)))]

    return lambda data: (read(data / "stsb" / f"stsb-{language}-train.csv"), read(data / "stsb" / f"stsb-{language}-dev.csv"))


def e2e(data: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Attributes of restaurants and their descriptions, one for each set of attributes, mixed: the published order goes by name."""

    def read(name: str) -> list[tuple[str, str]]:
        rows = csv.DictReader(io.StringIO(lines(data / "e2e" / name)))
        first: dict[str, str] = {}
        for row in rows:
            first.setdefault(row["mr"], row["ref"])
        pairs = sorted(first.items())
        random.Random(SEED).shuffle(pairs)
        return pairs

    return read("trainset.csv.gz"), read("devset.csv")


def descriptions(data: Path) -> tuple[Rows, Rows]:
    train, test = e2e(data)
    return [{"mr": mr, "ref": ref} for mr, ref in train], [{"mr": mr, "ref": ref} for mr, ref in test]


def attributes(data: Path) -> tuple[Rows, Rows]:
    """Which kinds of attributes does a description tell? Several labels for each text."""

    def labelled(pairs: list[tuple[str, str]]) -> Rows:
        return [{"text": ref, "label": [part.partition("[")[0].strip() for part in mr.split(", ")]} for mr, ref in pairs]

    train, test = e2e(data)
    return labelled(train), labelled(test)


def preferences(language: str) -> Callable[[Path], tuple[Rows, Rows]]:
    """Real preference pairs; every third is held out."""

    def read(data: Path) -> tuple[Rows, Rows]:
        rows: Rows = json.loads(lines(data / "formats" / f"dpo_{language}_demo.json"))
        return [row for i, row in enumerate(rows) if i % 3], rows[::3]

    return read


def commands(name: str) -> Callable[[Path], tuple[Rows, Rows]]:
    """The shipped pairs: their last quarter is held out."""

    def read(_: Path) -> tuple[Rows, Rows]:
        rows = [json.loads(line) for line in lines(ROOT / "recipes" / "data" / f"commands.{name}.jsonl").splitlines()]
        return rows[: 3 * len(rows) // 4], rows[3 * len(rows) // 4 :]

    return read


def slots(data: Path) -> tuple[Rows, Rows]:
    """Where the values of a restaurant's attributes stand in its description: tags of words, in IOB2."""
    train, test = e2e(data)
    return [tagged(*pair) for pair in train], [tagged(*pair) for pair in test]


_WORD = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")


def tagged(attributes: str, text: str) -> dict[str, Any]:
    """A description's words with the tags of the values that it says word for word."""
    words = _WORD.findall(text)
    lower, tags = [word.lower() for word in words], ["O"] * len(words)
    for slot, value in re.findall(r"(\w[\w ]*)\[([^\]]*)\]", attributes):
        wanted = _WORD.findall(value.lower())
        for start in range(len(words) - len(wanted) + 1) if slot != "familyFriendly" else ():
            place = slice(start, start + len(wanted))
            if lower[place] == wanted and set(tags[place]) == {"O"}:
                name = slot.replace(" ", "_")
                tags[place] = [f"B-{name}", *[f"I-{name}"] * (len(wanted) - 1)]
    return {"tokens": words, "tags": tags}


PAIRS = "chosen and rejected commands (shipped)"
ANSWERS = ("reward_accuracy", "reward_margin", "loss")
SHORT = ("dataset.max_length=96", "train.batch_size=8", "train.gradient_accumulation_steps=1", "train.epochs=1")
EXPERIMENTS = {
    "trec": Experiment(
        "classes", "TREC: six types of questions", "classification/minilm.yaml", "minilm", trec,
        ("dataset.limit=2400", "train.epochs=1", "dataset.max_length=48"), ("accuracy", "f1", "matthews", "loss"), fresh=True,
    ),
    "rte": Experiment(
        "classes of pairs", "RTE: does a sentence follow?", "classification/minilm-pairs.yaml", "minilm", rte,
        ("dataset.limit=800", "train.epochs=1", "dataset.max_length=96"), ("accuracy", "f1", "matthews", "loss"), fresh=True,
    ),
    "stsb-en": Experiment(
        "a number for a pair", "STS-B, English: similarity from 0 to 5", "classification/minilm-similarity.yaml", "minilm", stsb("en"),
        ("dataset.limit=1600", "dataset.eval_limit=500", "train.epochs=1", "dataset.max_length=64"),
        ("pearson", "spearman", "mean_absolute_error", "loss"), fresh=True,
    ),
    "stsb-zh": Experiment(
        "a number for a pair", "STS-B, Chinese: similarity from 0 to 5", "classification/chinese-bert-similarity.yaml", "chinese-bert",
        stsb("zh"), ("dataset.limit=960", "dataset.eval_limit=400", "train.epochs=1", "dataset.max_length=64"),
        ("pearson", "spearman", "mean_absolute_error", "loss"), fresh=True,
    ),
    "attributes": Experiment(
        "several labels", "E2E: which attributes does a text tell?", "classification/minilm-labels.yaml", "minilm", attributes,
        ("dataset.limit=800", "dataset.eval_limit=300", "train.epochs=1", "dataset.max_length=64"),
        ("f1_micro", "f1", "accuracy", "loss"), fresh=True,
    ),
    "slots": Experiment(
        "tags of words", "E2E: where the attributes' values stand", "token_classification/minilm-entities.yaml", "minilm", slots,
        ("dataset.limit=480", "dataset.eval_limit=200", "train.epochs=1", "train.batch_size=8", "dataset.max_length=128"),
        ("entity_f1", "entity_precision", "entity_recall", "token_accuracy", "loss"), fresh=True,
    ),
    "e2e": Experiment(
        "text to text", "E2E: describe a restaurant by its attributes", "seq2seq/flan-t5-base.yaml", "flan-t5-small", descriptions,
        (
            "base_model.dtype=float32", "dataset.limit=800", "dataset.eval_limit=80", "train.epochs=1", "eval.max_new_tokens=64",
            "eval.metrics=[rouge, bleu, chrf]", "eval.batch_size=25",
        ),
        ("rouge_l", "rouge_1", "rouge_2", "bleu", "chrf", "token_accuracy", "perplexity", "loss"),
    ),
    "dpo": Experiment(
        "`dpo`", PAIRS, "preference/dpo.yaml", "minimind2-small", commands("pairs"),
        (*SHORT, "train.epochs=2", "train.learning_rate=5e-4"), ANSWERS,
    ),
    "orpo": Experiment(
        "`orpo`", PAIRS, "preference/orpo.yaml", "minimind2-small", commands("pairs"), (*SHORT, "train.learning_rate=5e-4"), ANSWERS,
    ),
    "simpo": Experiment(
        "`simpo`", PAIRS, "preference/simpo.yaml", "minimind2-small", commands("pairs"), (*SHORT, "train.learning_rate=5e-4"), ANSWERS,
    ),
    "kto": Experiment(
        "`kto`", "commands, each right or wrong (shipped)", "preference/kto.yaml", "minimind2-small", commands("judged"),
        (*SHORT, "train.learning_rate=5e-4", "method.name=lora"), ANSWERS,
    ),
    # One epoch at 1e-3 had left it at 52 % of the test pairs: this one was chosen after that was seen.
    "reward": Experiment(
        "`reward`", PAIRS, "preference/reward.yaml", "minimind2-small", commands("pairs"),
        (*SHORT, "train.learning_rate=3e-4", "train.epochs=5"), ANSWERS, fresh=True,
    ),
    "dpo-zh": Experiment(
        "`dpo`", "published Chinese preferences", "preference/dpo.yaml", "minimind2-small", preferences("zh"),
        (*SHORT, "dataset.max_length=160", "train.learning_rate=5e-4"), ANSWERS,
    ),
}  # fmt: skip
# Of every run: nothing is looked at, kept or chosen on the way.
PLAIN = ("train.eval_steps=null", "train.save_steps=null", "train.load_best_model_at_end=false", f"train.seed={SEED}")


def constant(train: Rows, test: Rows) -> dict[str, float]:
    """What one answer for all rows reaches: the most frequent label, or for numbers the mean."""
    if "score" in train[0]:
        middle = statistics.mean(row["score"] for row in train)
        return {"pearson": 0.0, "spearman": 0.0, "mean_absolute_error": statistics.mean(abs(row["score"] - middle) for row in test)}
    if "label" in train[0]:
        most = Counter(json.dumps(row["label"]) for row in train).most_common(1)[0][0]
        return {"accuracy": statistics.mean(json.dumps(row["label"]) == most for row in test)}
    if "tags" in train[0]:
        return {"entity_f1": 0.0, "entity_recall": 0.0}
    return {"reward_accuracy": 0.5, "reward_margin": 0.0}


def asked(row: Mapping[str, Any]) -> str:
    """A row without its answer: some published test rows stand in the training file too, and are left out."""
    return json.dumps([value for key, value in row.items() if key not in ("label", "score", "tags", "ref", "chosen", "rejected")])


def measure(name: str, data: Path, models: Path, work: Path) -> dict[str, Any]:
    """Train, and what is to be kept of the report.

    Raises:
        SystemExit: the run failed, or a file is not there.
    """
    one = EXPERIMENTS[name]
    folder = work.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train, test = one.rows(data)
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}; --data names the folder of the published data") from None
    known = {asked(row) for row in train}
    test = [row for row in test if asked(row) not in known]
    for part, rows in (("train", train), ("test", test)):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    settings = [*PLAIN, *(["eval.before=false"] if one.fresh else []), *one.settings]
    places = [f"dataset.train={folder / 'train.jsonl'}", f"dataset.eval={folder / 'test.jsonl'}", "dataset.eval_fraction=0"]
    model = [f"base_model.name={models / one.model}", "base_model.dtype=float32"]
    command = ["train", str(ROOT / "recipes" / one.recipe), *model, *places, *settings, f"output_dir={folder / 'run'}", "--overwrite"]
    peftcli(command, folder / "log")
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return kept(name, report, settings, constant(train, test[: report["eval"]["rows"]]) if one.fresh else None)


def kept(name: str, report: Mapping[str, Any], settings: Sequence[str], baseline: Mapping[str, float] | None) -> dict[str, Any]:
    """The result file of an experiment, from its run's report."""
    one = EXPERIMENTS[name]

    def figures(part: Mapping[str, Any]) -> dict[str, Any]:
        values = {**part["metrics"], "loss": part["loss"]}
        return {key: {"value": values[key], "interval": part["intervals"].get(key)} for key in one.figures if key in values}

    where, method = report["environment"], report["method"]
    return {
        "experiment": name,
        "data": one.data,
        "recipe": f"recipes/{one.recipe}",
        "overrides": list(settings),
        "model": one.model,
        "parameters": report["model"]["parameters"],
        "method": method["name"],
        "trainable_parameters": report["model"]["trainable_parameters"],
        "train_rows": report["data"]["train"]["rows"],
        "test_rows": report["eval"]["rows"],
        "steps": report["train"]["steps"],
        "seconds": report["train"]["seconds"],
        "constant_answer": baseline,
        "base": figures(report["eval_before"]) if report["eval_before"] else None,
        "tuned": figures(report["eval"]),
        "comparisons": {key: test for key, test in report["comparisons"].items() if key in one.figures},
        "environment": {key: where[key] for key in ("device_name", "cpu_capability", "torch", "transformers")},
    }


def table(folder: Path = RESULTS) -> str:
    """All recorded experiments as Markdown, in the order of :data:`EXPERIMENTS`."""
    from peftcli.report.catalogue import FIGURES
    from peftcli.report.schema import PairedTest
    from peftcli.report.text import metric, p_value

    rows = [
        "| task | data and model | rows: train, test | figure | before | tuned (95 % interval) | difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    seen = []
    for name, one in EXPERIMENTS.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        seen.append(found)
        for place, key in enumerate(key for key in one.figures if key in found["tuned"] and key != "loss"):
            tuned, test = found["tuned"][key], found["comparisons"].get(key)
            before = found["base"][key]["value"] if found["base"] else (found["constant_answer"] or {}).get(key)
            interval = tuned["interval"]
            between = f" ({metric(key, interval[0])} to {metric(key, interval[1])})" if interval else ""
            about = (one.title, f"{one.data}; {found['model']}", f"{found['train_rows']:,}, {found['test_rows']:,}")
            cells = (
                *(about if place == 0 else ("", "", "")),
                FIGURES[key].label,
                "" if before is None else metric(key, before) + ("" if found["base"] else " *"),
                metric(key, tuned["value"]) + between,
                p_value(PairedTest.model_validate(test)) if test else "",
            )
            rows.append("| " + " | ".join(cells) + " |")
    if not seen:
        raise SystemExit(f"{folder} holds no results; scripts/measure_tasks.py --data FOLDER --models FOLDER")
    where = seen[0]["environment"]
    return "\n".join(rows) + (
        "\n\n\\* What one answer for all rows reaches (the most frequent label, the mean number, no entity, no preference): the output "
        "layer is new, so there is no base model to compare with. Elsewhere *before* is the base model, and *difference* the paired test "
        f"of both on the same rows. {where['device_name']}, {where['cpu_capability']}, one thread, torch {where['torch']}, transformers "
        f"{where['transformers']}."
    )


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, or print the table."""
    parser = argparse.ArgumentParser(description="Measure every task on real data.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--data", type=Path, default=os.environ.get("PEFTCLI_DATA_DIR"), help="folder of the published data")
    parser.add_argument("--models", type=Path, default=os.environ.get("PEFTCLI_MODELS_DIR"), help="folder of the models")
    parser.add_argument("--work", type=Path, default=Path("runs/tasks"), help="where the runs lie")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that is written into")
    parser.add_argument("--table", action="store_true", help="only print the recorded table")
    chosen = parser.parse_args(arguments)
    if chosen.table:
        print(table(chosen.results))
        return 0
    if strange := [name for name in chosen.names if name not in EXPERIMENTS]:
        parser.error(f"{strange[0]!r} is none of {', '.join(EXPERIMENTS)}")
    if chosen.data is None or chosen.models is None:
        parser.error("--data and --models (or PEFTCLI_DATA_DIR and PEFTCLI_MODELS_DIR) name the folders of the data and of the models")
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen.results.mkdir(parents=True, exist_ok=True)
    for name in chosen.names or EXPERIMENTS:
        found = measure(name, Path(chosen.data), Path(chosen.models), chosen.work)
        (chosen.results / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        tuned = ", ".join(f"{key} {figure['value']:.3f}" for key, figure in found["tuned"].items())
        print(f"{name}: {tuned}, {found['seconds']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
