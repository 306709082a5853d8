"""Code that comes with a model runs only by the command line's flag and at a pinned commit; a recipe alone cannot have it."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest

from peftcli.errors import ModelError
from peftcli.model.load import open_base
from peftcli.recipe.schema import BaseModelSection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose config is a class of its own; to import it leaves a mark."""
    home = tmp_path / "model"
    helpers.tiny_tokenizer().save_pretrained(home)
    code = f"import pathlib\nfrom transformers import LlamaConfig\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    (home / "configuration_own.py").write_text(code + "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n")
    (home / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}))
    return home


@pytest.mark.parametrize(
    ("revision", "allowed", "message"),
    [
        (None, False, "cannot be loaded"),
        ("0" * 40, False, "cannot be loaded"),
        (None, True, "only run at a pinned base_model.revision"),
        ("main", True, "only run at a pinned base_model.revision"),
        ("0" * 39, True, "only run at a pinned base_model.revision"),
    ],
)
def test_it_does_not_run(revision: str | None, allowed: bool, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        open_base(BaseModelSection(name=str(folder), revision=revision), trust_remote_code=allowed)
    assert not (tmp_path / "mark").exists()


def test_it_runs_when_both_allow_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    opened = open_base(BaseModelSection(name=str(folder), revision="0" * 40), trust_remote_code=True)
    assert (tmp_path / "mark").exists()
    assert opened.config.model_type == "own"
