"""Tiny model folders and data files, made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ``from_pretrained`` folder of each kind of tiny model."""
    import helpers

    root = tmp_path_factory.mktemp("models")
    return {kind: helpers.save_folder(root / kind, kind) for kind in ("llama", "llama-tied", "gpt2")}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.jsonl`` with 22 rows (no multiple of the batch) and ``eval.jsonl`` with 6."""
    import helpers

    root = tmp_path_factory.mktemp("data")
    helpers.write_rows(root / "train.jsonl", 22)
    helpers.write_rows(root / "eval.jsonl", 6, offset=100)
    return root


@pytest.fixture(autouse=True)
def _any_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results must not depend on the machine that runs the tests: one thread, and `dtype: auto` is float32 but for real models."""
    import sys

    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        if request.node.get_closest_marker("slow") is None:
            for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
                monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
