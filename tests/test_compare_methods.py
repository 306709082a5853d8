"""The comparison of methods: a whole one on a tiny model, what it remembers, and what its table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare_methods as cm
import pytest

from peftcli.methods import registry


@pytest.fixture
def trec(tmp_path: Path) -> Path:
    """A folder with a file like each of TREC's, Latin-1 letters included."""
    folder = tmp_path / "data" / "trec"
    folder.mkdir(parents=True)
    labels = ("NUM:dist", "LOC:city", "HUM:desc")
    for name, count in (("train", cm.TUNE_ROWS + 60), ("test", 9)):
        lines = [f"{labels[row % 3]} Où is thing {name} {row} ?" for row in range(count)]
        (folder / f"TREC.{name}").write_bytes("\n".join(lines).encode("latin-1") + b"\n")
    return folder.parent


def compare(trec: Path, model: Path, work: Path, *more: str) -> dict[str, Any]:
    budget = ["--steps", "3", "--batch-size", "4", "--eval-rows", "6", "--dtype", "float32", "--seeds", "1"]
    chosen = ["--methods", "lora", "bitfit", "ia3", "--data", str(trec), "--model", str(model)]
    assert cm.main([*budget, *chosen, "--work", str(work), "--results", str(work / "results.json"), *more]) == 0
    found: dict[str, Any] = json.loads((work / "results.json").read_text(encoding="utf-8"))
    return found


def test_a_whole_comparison_and_that_it_goes_on_where_it_stood(
    trec: Path, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    found = compare(trec, tiny_folders["llama"], work)
    assert capsys.readouterr().out.strip().endswith(cm.table(found))
    assert set(found["rows"]) == {"lora", "bitfit", "ia3"}
    assert "no biases" in found["rows"]["bitfit"]["error"] and not found["rows"]["bitfit"]["runs"]
    (lora,), (ia3,) = found["rows"]["lora"]["runs"], found["rows"]["ia3"]["runs"]
    assert lora["trainable_parameters"] > ia3["trainable_parameters"] > 0
    assert lora["result_bytes"] > ia3["result_bytes"] > 4 * ia3["trainable_parameters"]
    assert lora["learning_rate"] == (cm.CONTENDERS["lora"].learning_rate or 2e-4)
    assert lora["tokens_per_cpu_second"] > 0 and lora["peak_memory_bytes"] > 2**20
    assert lora["loss"] < found["bases"]["float32"]["loss"]
    assert 0 <= found["majority"] <= 1
    assert not list((work / "runs").iterdir())

    # Nothing is measured twice, and what was lost is measured again, to the same figures.
    kept = {path: path.stat().st_mtime_ns for path in (work / "records").iterdir()}
    assert compare(trec, tiny_folders["llama"], work) == found
    assert {path: path.stat().st_mtime_ns for path in (work / "records").iterdir()} == kept
    lost = next(path for path in kept if path.name.startswith("ia3"))
    lost.unlink()
    again = compare(trec, tiny_folders["llama"], work)["rows"]["ia3"]["runs"][0]
    assert (again["loss"], again["score"]) == (ia3["loss"], ia3["score"])

    # Other settings are other runs.
    rated = compare(trec, tiny_folders["llama"], work, "--learning-rates", "1e-3", "--held-out", "tune")
    assert [row["runs"][0]["learning_rate"] for row in rated["rows"].values() if row["runs"]] == [1e-3, 1e-3]
    assert len(list((work / "records").iterdir())) > len(kept)


def test_rows_for_tuning_and_for_the_table_are_not_trained_on(trec: Path, tmp_path: Path) -> None:
    lines = (trec / "trec" / "TREC.train").read_bytes()
    (trec / "trec" / "TREC.train").write_bytes(lines + b"LOC:city O\xf9 is thing test 1 ?\n")
    cm.convert(trec, tmp_path)
    rows = {name: (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("train", "tune", "test")}
    assert {name: len(lines) for name, lines in rows.items()} == {"train": 60, "tune": cm.TUNE_ROWS, "test": 9}
    assert not (set(rows["train"]) | set(rows["tune"])) & set(rows["test"]) and not set(rows["train"]) & set(rows["tune"])
    assert json.loads(rows["test"][1]) == {"prompt": "Question: Où is thing test 1 ?\nType:", "completion": " location"}


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"TREC.train: No such file.*--data"):
        cm.convert(tmp_path, tmp_path)


def test_every_method_takes_part() -> None:
    assert {contender.method["name"] for contender in cm.CONTENDERS.values()} >= set(registry.names())
    for contender in cm.CONTENDERS.values():
        registry.get(contender.method["name"]).Config.model_validate(contender.method)
    assert set(cm.PAPERS) <= set(registry.names())


@pytest.mark.parametrize(
    ("before", "after", "is_learned"),
    [
        (2.0, [1.0, 1.0], True),
        (2.0, [1.9, 1.9], False),  # too little
        (2.0, [1.9], False),
        (2.0, [1.0], True),
        (2.0, [0.8, 1.6], False),  # too scattered
        (2.0, [3.0, 3.0], False),
    ],
)
def test_learned_means_clearly_below(before: float, after: list[float], is_learned: bool) -> None:
    assert cm.learned(before, after) is is_learned


def test_the_table_says_who_is_weak_and_who_does_not_apply() -> None:
    def runs(score: float) -> list[dict[str, Any]]:
        one = {"learning_rate": 1e-3, "parameters": 1000, "trainable_parameters": 10, "base": "bfloat16", "loss": 0.5, "score": score}
        one |= {"tokens_per_cpu_second": 100.0, "peak_memory_bytes": 2**30, "result_bytes": 2048}
        return [one, one | {"score": score + 0.1}]

    found = {
        "budget": {"model": "m", "dtype": "bfloat16", "steps": 1, "batch_size": 1, "eval_rows": 1},
        "majority": 0.25,
        "bases": {"bfloat16": {"loss": 8.0, "score": 0.0}},
        "environment": {"device_name": "cpu", "cpu_capability": "AVX512", "torch": "2", "transformers": "5"},
        "rows": {
            "lora": {"method": {"name": "lora"}, "runs": runs(0.8)},
            "ia3": {"method": {"name": "ia3"}, "runs": runs(0.3)},
            "bitfit": {"method": {"name": "bitfit"}, "runs": [], "error": "no biases"},
        },
    }
    text = cm.table(found)
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert "8.00 → 0.50 ± 0.00" in rows["lora"] and "85 ± 7 %" in rows["lora"] and "1.00%" in rows["lora"]
    assert "not applicable" in rows["bitfit"] and rows["bitfit"].count("|") == rows["lora"].count("|")
    assert f"`ia3` is weak at this budget. {cm.PAPERS['ia3']}" in text and "`lora` is weak" not in text
    assert "- `bitfit`: no biases." in text
