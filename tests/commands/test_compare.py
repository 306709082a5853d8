"""`peftcli compare`: recipes' differences, figures with their intervals, curves; on the terminal, as a page, and for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import helpers
import pytest
from adapter_cases import command_line

from peftcli.report.charts import Point
from peftcli.report.compare import Scale, sparkline


@pytest.fixture(scope="module")
def folders(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("compare")
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, root / "first")
    helpers.run(text, "train.max_steps=6", "train.eval_steps=3")
    other = helpers.recipe_for(tiny_folders["llama"], tiny_data, root / "second", method="{name: ia3}")
    helpers.run(other, "train.max_steps=6", "train.learning_rate=2e-3", "dataset.train.limit=20")
    return root / "first", root / "second"


def test_the_terminal_shows_figures_curves_and_differences(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    page = tmp_path / "page.html"
    code, shown, _ = command_line(monkeypatch, capsys, "compare", *folders, "--html", page)
    assert code == 0
    for words in ("first", "second", "token accuracy", " to ", "training loss", "held-out loss", "method.name", "train.learning_rate"):
        assert words in shown, words
    assert re.search(r"train\.learning_rate +0\.01 +0\.002", shown)
    assert re.search(r"dataset\.train\.0\.limit +– +20", shown)
    assert "logging_steps" not in shown, "what the recipes share is left out"
    assert "output_dir" not in shown
    assert len(re.findall("[▁▂▃▄▅▆▇█]{3,}", shown)) >= 4
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 4
    assert 'class="line run1' in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")


def test_programs_get_the_same_as_json(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = command_line(monkeypatch, capsys, "compare", *folders, "--json")
    assert code == 0
    found = json.loads(shown)
    report = json.loads((folders[0] / "report.json").read_text())
    first = found["runs"][0]
    assert first["figures"]["loss"] == report["eval"]["loss"]
    assert first["intervals"]["loss"] == report["eval"]["intervals"]["loss"]
    assert first["figures"]["train.peak_memory_bytes"] == report["train"]["peak_memory_bytes"]
    assert [step for step, _ in first["curves"]["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in first["curves"]["eval_loss"]] == [0, 3, 6], "with the base model's"
    assert found["recipe"]["method.name"] == ["lora", "ia3"]
    assert found["recipe"]["method.rank"] == [4, None]
    assert not any(key.startswith(("base_model", "output_dir")) for key in found["recipe"])


def test_a_run_differs_from_itself_in_nothing(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = command_line(monkeypatch, capsys, "compare", folders[0], folders[0])
    assert code == 0
    assert "the recipes are the same" in shown


def test_what_cannot_be_compared_says_why(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, errors = command_line(monkeypatch, capsys, "compare", folders[0])
    assert (code, "2 to 8 runs" in errors) == (2, True)
    code, _, errors = command_line(monkeypatch, capsys, "compare", folders[0], tmp_path)
    assert (code, "report.json does not exist" in errors) == (7, True)


def test_sparklines() -> None:
    points = [Point(step, float(value)) for step, value in enumerate([0, 1, 2, 3, 4, 5, 6, 7])]
    scale = Scale.around([points])
    assert scale == (0.0, 7.0, 0.0, 7.0)
    assert sparkline(points, scale, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(points, scale, 2) == "▂▇", "places hold the mean of what falls into them"
    assert sparkline(points[:2], scale, 8) == "▁▂      ", "nothing was logged there"
    assert sparkline([Point(3.0, 3.0)], Scale(3.0, 3.0, 3.0, 3.0), 1) == "▅"
    assert Scale.around([points, [Point(20.0, -1.0)]]) == (0.0, 20.0, -1.0, 7.0)
