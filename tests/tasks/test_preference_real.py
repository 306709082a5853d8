"""Preferences on real weights: answers to unseen requests are ranked better after a few steps."""

from __future__ import annotations

import os
from pathlib import Path

import helpers
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("PEFTCLI_MODELS_DIR", "")) / "minimind2-small"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="PEFTCLI_MODELS_DIR holds no minimind2-small"),
]


def test_reward_accuracy_rises_on_held_out_pairs(tmp_path: Path) -> None:
    text = (
        f"base_model: {{name: {MODEL}, dtype: float32}}\n"
        "task: dpo\n"
        "method: {name: lora, rank: 8, alpha: 16}\n"
        f"dataset: {{train: {ROOT / 'recipes/data/commands.pairs.jsonl'}, eval_fraction: 0.2, max_length: 128, limit: 40, eval_limit: 32}}\n"
        "train: {max_steps: 10, batch_size: 4, learning_rate: 5e-4, logging_steps: 1}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    report = helpers.run(text)
    before, after = report.eval_before, report.eval
    assert before is not None and after is not None and after.rows == 32
    assert before.metrics["reward_accuracy"] == 0.5 and before.metrics["reward_margin"] == 0, "the base against itself"
    low, _ = after.intervals["reward_accuracy"]
    assert low > 0.5, "above chance beyond doubt"
    assert after.metrics["reward_margin"] > 0 and after.loss < before.loss
