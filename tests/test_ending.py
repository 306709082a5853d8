"""How a command ends, and that no secret of the environment leaves the process: terminal, reports, checkpoints, a crash."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from adapter_cases import command_line

from peftcli import ending
from peftcli.redact import redact

# Nothing in its shape says that it is a secret.
VALUE = "correct horse battery"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    monkeypatch.setenv("SHORT_TOKEN", "the")


def ended(app: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as caught:
        ending.run(app)
    out, err = capsys.readouterr()
    return caught.value.code, out + err


def test_values_of_the_environment_are_hidden_whatever_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact(f"a {VALUE}, the end") == "a <hidden>, the end"
    monkeypatch.setenv("WANDB_API_KEY", VALUE + " staple")
    assert redact(f"{VALUE} staple") == "<hidden>", "no part of the longer one is left"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("WANDB_API_KEY")
    assert redact(VALUE) == VALUE


def test_a_crash_is_told_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    def crash() -> None:
        sys.stdout.write(f"before: {VALUE}\n")
        raise KeyError(f"no such thing: {VALUE}")

    code, shown = ended(crash, capsys)
    assert code == 1
    assert "before: <hidden>" in shown
    assert "Traceback" in shown
    assert "no such thing: <hidden>" in shown
    assert VALUE not in shown


def test_errors_and_a_whole_run_are_told_without_secrets(
    tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worst case: it stands in every row, so the base is asked about it and answers are written into the reports."""
    recipe = tmp_path / "recipe.yaml"
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (tiny_data / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps({"prompt": f"{VALUE} {row['prompt']}", "completion": VALUE}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe.write_text(helpers.recipe_for(tiny_folders["llama"], tmp_path, tmp_path / "out"))
    words = ["train.max_steps=3", "train.save_steps=2", "eval.generate=true", "eval.max_new_tokens=2", "dataset.max_length=256"]
    code, out, err = command_line(monkeypatch, capsys, "train", recipe, *words)
    assert code == 0, err
    assert (tmp_path / "out" / "checkpoints" / "step-2").is_dir()
    assert "<hidden>" in (tmp_path / "out" / "report.html").read_text()
    written = helpers.folder_bytes(tmp_path / "out")
    assert not [name for name, content in written.items() if VALUE.encode() in content]
    assert VALUE not in out + err
    code, out, err = command_line(monkeypatch, capsys, "check", recipe)
    assert code == 0, err
    assert "<hidden>" in out + err, "the label audit shows a row"
    assert VALUE not in out + err
    code, out, err = command_line(monkeypatch, capsys, "train", recipe, f"dataset.train={VALUE}.jsonl", "--overwrite")
    assert code == 3
    assert "<hidden>.jsonl" in err
    assert VALUE not in out + err


def test_what_has_no_deterministic_path_is_refused_by_name(
    tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch keeps the list of what is not, for each device; a run asks it to refuse, and says which operation it was."""
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")
    plain = torch.nn.functional.embedding

    def scatter(*args: Any, **kwargs: Any) -> Any:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", scatter)
    code, shown = ended(lambda: helpers.run(text, "train.max_steps=1"), capsys)
    assert code == 5
    assert "train.deterministic: torch has no deterministic path for put_ on this device" in " ".join(shown.split())
    assert "train.deterministic=false" in shown
    try:
        report = helpers.run(text, "train.max_steps=1", "train.deterministic=false", overwrite=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert report.train.steps == 1
    assert not report.environment.deterministic
