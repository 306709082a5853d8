"""Whole runs over rows that are streamed, and over files with faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest

from peftcli.errors import DataError


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("stream")
    model = helpers.save_folder(folder / "model", "llama")
    data = folder / "data"
    data.mkdir()
    helpers.write_rows(data / "train.jsonl", 14)
    helpers.write_rows(data / "eval.jsonl", 4, offset=100)
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([*lines[:3], '{"cut o', *lines[3:]]) + "\n")
    return folder, model, data


def test_a_streamed_run_is_the_run_in_memory_and_lists_what_it_skipped(
    places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, data = places
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    reports: list[Any] = []
    for name, streaming in (("memory", "false"), ("stream", "true")):
        text = helpers.recipe_for(model, data, folder / name)
        reports.append(helpers.run(text, "dataset.on_error=skip", f"dataset.streaming={streaming}", "train.epochs=1"))
    memory, stream = reports
    assert memory.data.batch_order_sha256 == stream.data.batch_order_sha256
    weights = [(folder / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("memory", "stream")]
    assert weights[0] == weights[1]
    for name, report in (("memory", memory), ("stream", stream)):
        skipped = [json.loads(line) for line in (folder / name / "skipped.jsonl").read_text().splitlines()]
        assert [row["origin"] for row in skipped] == [f"{data / 'train.jsonl'}:4"] and "not valid JSON" in skipped[0]["reason"]
        assert report.data.train.dropped == 1 and report.checks.label_audit["skipped"] == 1
        assert any("skipped 1 faulty rows" in note for note in report.notes)


def test_a_fault_ends_the_run_unless_the_recipe_says_otherwise(places: tuple[Path, Path, Path]) -> None:
    folder, model, data = places
    with pytest.raises(DataError, match=r"train.jsonl:4: not valid JSON"):
        helpers.run(helpers.recipe_for(model, data, folder / "refused"))
