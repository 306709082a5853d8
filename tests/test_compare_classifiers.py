"""The comparison of methods on a classifier: a whole one on a tiny encoder, and that no test row chooses a learning rate."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import classifiers
import compare_classifiers as cc
import pytest


def test_a_whole_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, work = tmp_path / "data" / "sst2", tmp_path / "work"
    folder.mkdir(parents=True)
    for name, count in (("train.tsv.gz", 40), ("dev.tsv", 8)):
        rows = [(f'"{name} thing {row} is {("bad", "good")[row % 2]}', row % 2) for row in range(count)]
        with (
            gzip.open(folder / name, "wt", encoding="utf-8") if name.endswith("gz") else open(folder / name, "w", encoding="utf-8") as file
        ):
            csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None).writerows([("sentence", "label"), *rows])
    model = classifiers.save_folder(tmp_path / "minilm", "bert")
    places = ["--data", str(tmp_path / "data"), "--work", str(work), "--results", str(tmp_path / "out.json"), "--model", str(model)]
    budget = ["--methods", "lora", "head_only", "--rows", "24", "--choice-rows", "16", "--validation-rows", "8", "--seeds", "2"]
    assert cc.main([*places, *budget]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    for name, row in found["rows"].items():
        assert tuple(tried["learning_rate"] for tried in row["tried"]) == cc.CONTENDERS[name].rates
        assert row["learning_rate"] == min(row["tried"], key=lambda tried: tried["loss"])["learning_rate"]
        assert [run["seed"] for run in row["runs"]] == [42, 43]
        assert all(run["rows"] == 8 and run["interval"][0] <= run["accuracy"] <= run["interval"][1] for run in row["runs"])
    table = capsys.readouterr().out
    assert "| `lora` |" in table and "2 seeds" in table

    # Chosen by rows of the training file that no run learned from; the test rows come only after the choice.
    parts = {name: set((work / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) for name in ("train", "validation", "test")}
    assert [len(rows) for rows in parts.values()] == [32, 8, 8] and not parts["train"] & parts["validation"]
    looked = {path.stem: json.loads(path.read_text(encoding="utf-8"))["dataset"]["eval"] for path in work.glob("*.json")}
    assert {name for name, file in looked.items() if file.endswith("test.jsonl")} == {
        f"{name}-{row['learning_rate']:g}-test-{seed}" for name, row in found["rows"].items() for seed in (42, 43)
    }
    # What was measured is not measured again.
    kept = {path: path.stat().st_mtime_ns for path in work.glob("*/report.json")}
    assert cc.main([*places, *budget]) == 0
    assert {path: path.stat().st_mtime_ns for path in work.glob("*/report.json")} == kept
