"""``peftcli export``: to AdapterHub's layout and back, through the command line; eval reads either."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from adapter_cases import command_line
from safetensors.torch import load_file

from peftcli.interchange import adapter_hub, hf_peft


def test_there_and_back(
    tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, hub, back = tmp_path / "run", tmp_path / "hub", tmp_path / "back"
    helpers.run(
        helpers.recipe_for(tiny_folders["llama"], tiny_data, run, method="{name: adapter, bottleneck_size: 8}"), "train.max_steps=3"
    )
    assert command_line(monkeypatch, capsys, "export", run, "-o", hub, "--name", "mine")[0] == 0
    assert json.loads((hub / adapter_hub.CONFIG).read_text(encoding="utf-8"))["name"] == "mine"
    assert command_line(monkeypatch, capsys, "export", hub, "-o", back, "--format", "peft", "--base-model", tiny_folders["llama"])[0] == 0
    ours, again = load_file(run / "adapter" / hf_peft.WEIGHTS), load_file(back / hf_peft.WEIGHTS)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    data = ("--data", tiny_data / "eval.jsonl", "--base-model", tiny_folders["llama"], "--dtype", "float32", "--json")
    figures = [json.loads(command_line(monkeypatch, capsys, "eval", folder, *data)[1])["loss"] for folder in (hub, back)]
    assert figures[0] == figures[1] == json.loads(command_line(monkeypatch, capsys, "eval", run, "--json")[1])["loss"]


def test_what_cannot_be_exported(
    tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    helpers.run(helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "run"), "train.max_steps=2")
    code, _, err = command_line(monkeypatch, capsys, "export", tmp_path / "run", "-o", tmp_path / "hub")
    assert (code, (tmp_path / "hub").exists()) == (2, False)
    assert "lora is no bottleneck adapter" in err
    code, _, err = command_line(monkeypatch, capsys, "export", tmp_path / "run", "-o", tmp_path / "hub", "--format", "gguf")
    assert code == 2
    assert "adapters, peft" in err
