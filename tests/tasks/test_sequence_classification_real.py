"""Real rows and weights: types of English questions, and whether two Chinese sentences say the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import helpers
import measure_tasks
import pytest

DATA, MODELS = os.environ.get("PEFTCLI_DATA_DIR"), os.environ.get("PEFTCLI_MODELS_DIR")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None or MODELS is None, reason="PEFTCLI_DATA_DIR and PEFTCLI_MODELS_DIR are not set"),
]


def learned(
    tmp_path: Path,
    model: str,
    train: list[dict[str, Any]],
    test: list[dict[str, Any]],
    method: str,
    *,
    epochs: int = 1,
    learning_rate: float,
) -> Any:
    """The report of a run on real weights."""
    for name, rows in (("train", train), ("eval", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return helpers.run(
        f"base_model: {{name: {Path(str(MODELS)) / model}, dtype: float32}}\n"
        f"task: {{name: sequence_classification, train_pooler: true}}\nmethod: {method}\n"
        f"dataset: {{train: {tmp_path / 'train.jsonl'}, eval: {tmp_path / 'eval.jsonl'}, max_length: 64}}\n"
        f"train: {{epochs: {epochs}, batch_size: 16, learning_rate: {learning_rate}, head_learning_rate: 1e-3}}\n"
        f"eval: {{before: false, batch_size: 32}}\noutput_dir: {tmp_path / 'run'}\n"
    )


def test_types_of_questions(tmp_path: Path) -> None:
    train, test = measure_tasks.trec(Path(str(DATA)))
    report = learned(tmp_path, "minilm", train[:400], test[:150], "{name: lora, rank: 8, alpha: 16}", epochs=2, learning_rate=3e-3)
    assert report.eval.intervals["accuracy"][0] > 0.6, "one of six classes, none of them above a third"
    assert report.eval.metrics["matthews"] > 0.5 and report.eval.metrics["f1"] > 0.4


def test_chinese_sentences_that_say_the_same(tmp_path: Path) -> None:
    """STS-B in Chinese as two classes: rows judged 4 or more against rows judged 1 or less. The upper layers alone learn it."""
    train, test = (
        [
            {"text": row["sentence1"], "text_pair": row["sentence2"], "label": "same" if row["score"] >= 4 else "other"}
            for row in rows
            if row["score"] >= 4 or row["score"] <= 1
        ]
        for rows in measure_tasks.stsb("zh")(Path(str(DATA)))
    )
    method = "{name: lora, rank: 8, alpha: 16, layers_to_transform: [8, 9, 10, 11]}"
    report = learned(tmp_path, "chinese-bert", train[:160], test[:96], method, learning_rate=1e-3)
    assert report.eval.intervals["accuracy"][0] > 0.6
