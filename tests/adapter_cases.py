"""Adapters in folders over tiny bases, and the command line in this process, shared by the tests of several adapters."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest

from peftcli import cli
from peftcli.interchange import hf_peft
from peftcli.methods.base import Context
from peftcli.model.load import Base
from peftcli.model.source import Source

OPTIONS: dict[str, dict[str, Any]] = {
    "freeze": {"patterns": ["norm|layers.1.mlp|ln_1"]},
    "lora": {"rank": 3, "modules_to_save": ["lm_head"]},
}


def base_of(model: Any, quantization: str | None = None) -> Base:
    return Base(model, helpers.tiny_tokenizer(), Source("base", "base", None, True), model.dtype, quantization, None, (), 0)


def write(
    folder: Path, name: str, kind: str, seed: int, quantization: str | None = None, new_ids: tuple[int, ...] = ()
) -> hf_peft.AdapterFile:
    options = OPTIONS.get(name, {})
    if name == "freeze" and kind == "llama-tied":
        options = {**options, "embeddings": True}  # and with them the tied output layer
    method = helpers.make_method(name, **options)
    model = helpers.tiny_model(kind, quantization=quantization)
    model = method.apply(model, Context(seed=11, frozen_quantized=quantization is not None, new_token_ids=new_ids))
    helpers.stir(model, seed=seed)
    hf_peft.save_adapter(folder, model, method, base_model="base", revision=None)
    return hf_peft.read_adapter(folder)


def folder_adapter(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    """An adapter with a tokenizer beside it, as a run leaves it."""
    write(folder, "lora", "llama", seed)
    fields = json.loads((folder / hf_peft.CONFIG).read_text())
    (folder / hf_peft.CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": str(base), **config}))
    helpers.tiny_tokenizer().save_pretrained(folder)
    return folder


def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object, stdin: str = ""
) -> tuple[int, str, str]:
    """Run the command line in this process: (exit code, standard output, standard error with its lines joined)."""
    monkeypatch.setattr(sys, "argv", ["peftcli", *map(str, args)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    try:
        cli.main()
        code: Any = 0
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())
