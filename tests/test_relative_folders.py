"""A run whose output_dir is relative, as in every shipped recipe, started from another folder than its recipe's."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest

from peftcli.report.files import hash_file
from peftcli.result import open_result


def test_a_relative_output_dir(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = helpers.recipe_for(tiny_folders["llama"], tiny_data, Path("runs/here"))
    report = helpers.run(recipe, "train.max_steps=2")
    folder = tmp_path / "runs" / "here"
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert written["status"] == report.status == "completed"
    assert {"recipe.yaml", "metrics.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(written["files"])
    assert all(hash_file(folder / name) == digest for name, digest in written["files"].items())
    monkeypatch.chdir(tmp_path.parent)
    opened = open_result(Path(tmp_path.name) / "runs" / "here")
    assert opened.recipe is not None and opened.recipe.train.max_steps == 2
