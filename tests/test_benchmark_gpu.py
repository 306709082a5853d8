"""The GPU benchmark: what it compares, and that it runs to its end without a GPU on a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import benchmark_gpu
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "benchmark_gpu.py"


def test_every_side_gets_the_same_rows() -> None:
    by_kind = {case.kind: benchmark_gpu.rows_of(case) for case in benchmark_gpu.cases(3, tiny=True) if not case.memory}
    assert by_kind["bf16"] == by_kind["nf4"] == by_kind["fp8"]
    assert [len(row) for row in by_kind["bf16"]] == [64] * 6


def test_the_cases_of_the_goals_are_there() -> None:
    goals = {case.name: case.goal for case in benchmark_gpu.cases(12, tiny=False) if case.goal}
    assert goals == {
        "8b-bf16": 17_000.0, "8b-nf4": 15_000.0, "8b-fp8": 22_000.0, "8b-nf4-memory": 6.0e9, "70b-nf4-memory": 40.0e9,
    }  # fmt: skip


def test_the_table_claims_no_more_than_was_measured() -> None:
    case = {"name": "8b-nf4-memory", "goal": 6.0e9, "memory": True}
    run = {"case": case, "side": "peftcli", "variant": "", "tokens_per_second": 10.0, "steps": [{"loss": 1.0}]}
    assert "not measured" in benchmark_gpu.table([{**run, "peak_bytes": 0}])
    assert "6.0 GB: reached" in benchmark_gpu.table([{**run, "peak_bytes": 5.9e9}])
    assert "6.0 GB: not reached" in benchmark_gpu.table([{**run, "peak_bytes": 6.1e9}])
    assert "failed: no such GPU" in benchmark_gpu.table([{"case": case, "side": "unsloth", "variant": "best", "failed": "no such GPU"}])


@pytest.mark.parametrize("kind", ["bf16", "nf4", "fp8"])
def test_our_side_trains_the_random_model(kind: str, tmp_path: Path) -> None:
    (case,) = (case for case in benchmark_gpu.cases(3, tiny=True) if case.kind == kind and not case.memory)
    (tmp_path / "rows.json").write_text(json.dumps(benchmark_gpu.rows_of(case)), encoding="utf-8")
    benchmark_gpu.ours(case, tmp_path, tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    # Random tokens: the loss is near that of a guess among all of them.
    assert [step["loss"] for step in found["steps"]] == pytest.approx([6.24] * 3, abs=0.1)
    assert ("frozen products in 8 bits" in found["fast_paths"]) is (kind == "fp8")


@pytest.mark.slow
def test_it_runs_to_its_end_on_any_machine() -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--steps", "3", "--peers", "--only", "tiny-bf16", "tiny-nf4-memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["tiny-bf16", "tiny-nf4-memory"]
    assert "failed" not in done.stdout
