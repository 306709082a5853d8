"""Real tokenizers and published data, where they are at hand."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def load_model_tokenizer() -> Callable[[str], Any]:
    """Loads a fresh tokenizer of a real model; skips without ``PEFTCLI_MODELS_DIR``."""

    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        folder = os.environ.get("PEFTCLI_MODELS_DIR")
        if not folder:
            pytest.skip("PEFTCLI_MODELS_DIR is not set: no real tokenizer at hand")
        if name not in loaded:
            loaded[name] = AutoTokenizer.from_pretrained(Path(folder) / name)
        return copy.deepcopy(loaded[name])

    return load


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of published datasets; skips without ``PEFTCLI_DATA_DIR``."""
    folder = os.environ.get("PEFTCLI_DATA_DIR")
    if not folder:
        pytest.skip("PEFTCLI_DATA_DIR is not set: no published datasets at hand")
    return Path(folder)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON Lines and gives the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return str(path)

    return write
