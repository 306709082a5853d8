"""recipes/ci: the example workflow runs commands that exist, on a recipe that is valid and whose gates its run measures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from peftcli import cli
from peftcli.output import RESULTS
from peftcli.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes" / "ci"
STEPS = yaml.safe_load((FOLDER / "github-actions.yml").read_text(encoding="utf-8"))["jobs"]["train-verify-gate"]["steps"]
COMMANDS = [step["run"] for step in STEPS if "peftcli" in step.get("run", "")]


def test_the_recipe_is_valid_and_gated() -> None:
    recipe = load_recipe(FOLDER / "recipe.yaml").recipe
    assert {"eval.loss", "train.peak_memory_bytes"} <= set(recipe.expect)
    assert recipe.output_dir == "runs/ci"


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_workflow_exists(line: str) -> None:
    program, name, *arguments = shlex.split(line)
    assert program == ".venv/bin/peftcli"
    command: Any = typer.main.get_command(cli.app)
    command.commands[name].make_context(name, list(arguments))


def test_the_workflow_trains_verifies_and_gates_and_keeps_what_is_written() -> None:
    assert [line.split()[1] for line in COMMANDS] == ["check", "train", "verify", "eval"]
    text = (FOLDER / "github-actions.yml").read_text(encoding="utf-8")
    for pattern in re.findall(r"runs/ci/(\S+)", text):
        assert any(Path(name).match(pattern) for name in RESULTS), pattern
