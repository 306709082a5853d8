"""Gates of whole runs: `train` and `eval` end with a code of their own, and leave what CI reads."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import helpers
import pytest
from accelerate.state import AcceleratorState

from peftcli import cli
from peftcli.report.write import read_report


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr("sys.argv", ["peftcli", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    found = capsys.readouterr()
    return int(end.value.code or 0), found.out, found.err


@pytest.fixture
def recipe(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out"))
    return path


def failures(path: Path) -> list[str]:
    return [case.get("name", "") for case in ET.parse(path).iter("testcase") if case.find("failure") is not None]


def test_train_and_eval_judge_the_gates(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["train", str(recipe), "train.max_steps=2", "expect.train.steps=== 2", "expect.eval.loss=<= 100"]
    code, _, _ = command(capsys, monkeypatch, *words)
    assert code == 0
    assert failures(out / "report.junit.xml") == []
    code, shown, errors = command(capsys, monkeypatch, *words, "expect.eval.token_accuracy=>= 0.999", "--overwrite")
    assert code == 10
    assert "gate: FAILED, eval.token_accuracy is" in " ".join(shown.split())
    assert "1 gate of 3 failed" in errors
    report = read_report(out)
    assert report.status == "completed", "the run itself ended well, and its result is kept"
    assert [gate.passed for gate in report.gates] == [True, True, False]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert failures(out / "report.junit.xml") == ["eval.token_accuracy >= 0.999"]
    assert "✗ FAILED" in (out / "report.md").read_text()

    code, shown, _ = command(capsys, monkeypatch, "eval", str(out), "--json")
    assert code == 10
    assert [(gate["key"], gate["passed"]) for gate in json.loads(shown)["gates"]] == [("eval.loss", True), ("eval.token_accuracy", False)]
    assert failures(out / "eval.junit.xml") == ["eval.token_accuracy >= 0.999"]
    assert "| `eval.token_accuracy` |" in (out / "eval.md").read_text()
    code, _, _ = command(capsys, monkeypatch, *words, "--overwrite")
    assert code == 0
    assert not (out / "eval.junit.xml").exists(), "an earlier run's verdict does not stay beside a new run"
