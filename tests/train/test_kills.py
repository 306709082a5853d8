"""SIGKILL at any moment, half of the times inside a save: what is resumed ends in the bytes of the run that was never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    """By the script of `make soak`, which does it for hours: LoRA with dropout, two epochs and a half, a partial accumulation window."""
    results = tmp_path / "soak.json"
    parts = ["--methods", "lora", "--kills", "20", "--recipes", "0", "--adapters", "40", "--checkpoints", "20", "--results", str(results)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), *parts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(results.read_text())
    killed = found["kills"]["lora"]
    assert killed["kills"] == 20
    assert killed["inside_a_save"] >= 3
    assert killed["runs"] == killed["identical"] >= 1
    assert killed["faults"] == []
    assert (found["adapters"]["tracebacks"], found["adapters"]["forbidden"]) == (0, 0)
    assert found["adapters"]["refused"] + found["adapters"]["loaded"] == 40
    assert found["checkpoints"] == {"corrupted": 20, "passed_over": 20, "silent_loads": 0, "tracebacks": 0, "faults": []}
