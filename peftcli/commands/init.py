"""``peftcli init``: write a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from peftcli.errors import UsageError
from peftcli.recipe.load import parse_recipe
from peftcli.recipe.render import commented_recipe


def run(path: Path, *, model: str | None, data: str | None, method: str | None, overwrite: bool) -> None:
    """Write the recipe and say what to do next."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already", hint="name another file, or replace it with --overwrite.")
    given = {"base_model.name": model, "dataset.train": data, "method.name": method}
    text = commented_recipe({key: value for key, value in given.items() if value is not None})
    parse_recipe(text, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    Console().print(f"wrote {path}; next: peftcli check {path}, then peftcli train {path}", markup=False)
