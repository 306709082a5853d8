"""A recipe from a file or text and the command line's overrides, with all its faults reported together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationError, create_model

from peftcli.errors import Fault, RecipeError, UsageError, nearest
from peftcli.methods import registry
from peftcli.methods.base import MethodConfig
from peftcli.recipe import nodes, rules
from peftcli.recipe import overrides as edits
from peftcli.recipe.faults import Collector, place
from peftcli.recipe.nodes import Node, Stop
from peftcli.recipe.schema import Recipe
from peftcli.recipe.tasks import TASKS, CausalLMTask, TaskSection
from peftcli.recipe.words import Lookup, schema_of


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where it came from.

    Attributes:
        recipe: with all defaults filled in; ``recipe.method`` is the named method's own config.
        path: the file, or ``None`` for text.
        base_dir: the recipe's folder (the current one for text).
    """

    recipe: Recipe
    path: Path | None
    base_dir: Path

    def resolve_path(self, path: str | Path) -> Path:
        """Where a path written in the recipe leads: as seen from the current folder if something is there, else from
        the recipe's folder if something is there, else ``path`` itself (a hub id, say). No variable is expanded.
        """
        given = Path(path)
        try:
            if not given.exists() and (self.base_dir / given).exists():
                return self.base_dir / given
        except (OSError, ValueError):  # too long, or a NUL: no file has that name
            pass
        return given


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and validate a recipe file.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value`` from the command line; later ones win, all win over the file.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        RecipeError: the recipe has faults.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(nodes.MAX_BYTES + 1)
    except IsADirectoryError:
        inside = next((f"; it holds {entry.name!r}" for entry in sorted(path.glob("*.y*ml"))), "")
        raise UsageError(f"{path} is a folder, not a recipe{inside}", hint="give the path of a recipe file (.yaml).") from None
    except FileNotFoundError:
        near = _neighbour(path)
        hint = f"did you mean {near}?" if near else "`peftcli init` writes a commented recipe to start from."
        raise UsageError(f"there is no recipe at {path}", hint=hint) from None
    except (OSError, ValueError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or "not a usable path"
        shown = str(path) if str(path).isprintable() else ascii(str(path))
        raise UsageError(f"cannot read the recipe {shown}: {cause}", hint="check the path and its permissions.") from None
    return _parse(data, str(path), overrides, path)


def parse_recipe(text: str | bytes, file_name: str = "<recipe>", overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Validate a recipe's text; ``file_name`` is what faults call it.

    Raises:
        RecipeError: the recipe has faults.
    """
    return _parse(text, file_name, overrides, None)


def _neighbour(path: Path) -> Path | None:
    try:
        found = nearest(path.name, [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")])
    except OSError:
        return None
    return path.parent / found if found else None


def _parse(text: str | bytes, file: str, overrides: Sequence[str], path: Path | None) -> LoadedRecipe:
    faults: list[Fault] = []
    try:
        root, faults = nodes.read(nodes.decode(text, file) if isinstance(text, bytes) else text, file)
        if root is None and not overrides:
            raise Stop([Fault("is empty", file, 1, 1, nodes.DOCUMENT, allowed="base_model, method, dataset, ...")])
        root = root or Node({}, file, 1, 1, 1, 1)
        if not isinstance(root.value, dict):
            kind = "a list" if isinstance(root.value, list) else "a single value"
            raise Stop([*faults, Fault("is not a mapping", file, root.line, root.column, nodes.DOCUMENT, kind, "keys with values")])
        faults += edits.apply(root, overrides)
        recipe = _validate(root, faults)
    except Stop as stop:
        raise RecipeError(stop.faults) from None
    return LoadedRecipe(recipe, path, path.parent if path is not None else Path())


def _validate(root: Node, faults: list[Fault]) -> Recipe:
    config, method = _method(root)
    task = _task(root)
    if method is not None:
        edits.recommend(root, method.recommended)
    model = recipe_class(config, task or _AnyTask)
    collector = Collector(root, _lookup(config, task or _AnyTask), list(faults))
    collector.scan()
    if method is None:
        collector.unknown_name("method", registry.names())
    if task is None:
        collector.unknown_name("task", list(TASKS))
    bad = list(collector.settled)
    recipe: Recipe | None = None
    try:
        recipe = model.model_validate_json(_json(root), strict=True)
    except ValidationError as error:
        bad += collector.add(error.errors(include_url=False, include_context=False, include_input=False))
    rules.check(collector, task)
    if method is not None and (checkable := recipe or _sound_part(model, root, bad)) is not None:
        for key, message in method.check_recipe(checkable):
            steps = [int(part) if part.isdecimal() else part for part in key.split(".")]
            found = place(root, steps, missing=True)
            if not any(found.path[: len(path)] == path for path in bad):
                collector.at(found, message)
    # Faults that stand before validation (a duplicate key, a refused override) hold even where the rest is sound.
    if collector.faults or recipe is None:
        from_line = edits.COMMAND_LINE
        raise Stop(sorted(dict.fromkeys(collector.faults), key=lambda f: (f.file == from_line, f.line or 0, f.column or 0)))
    # A plain Recipe: two recipes of one method compare equal whatever class validated them.
    return Recipe(**{name: getattr(recipe, name) for name in Recipe.model_fields})


class _AnyMethod(MethodConfig):
    """Stands in where no method is named, so that the rest of the recipe is checked all the same."""

    model_config = ConfigDict(extra="allow")


class _AnyTask(TaskSection):
    """The same for a task."""

    model_config = ConfigDict(extra="allow")


def _task(root: Node) -> type[TaskSection] | None:
    """The named task's class of options; that of the default where none is named, ``None`` where there is no such task."""
    node = edits.find(root, "task.name")
    if node is None:
        section = edits.find(root, "task")
        return CausalLMTask if section is None else None
    return TASKS.get(node.value) if isinstance(node.value, str) else None


def _method(root: Node) -> tuple[type[MethodConfig], Any]:
    """The named method's config class and the method itself, or a stand-in and ``None``."""
    node = edits.find(root, "method.name")
    if node is None or not isinstance(node.value, str) or node.value not in registry.names():
        return _AnyMethod, None
    method = registry.get(node.value)
    return method.Config, method


@lru_cache(maxsize=256)
def recipe_class(config: type[MethodConfig], task: type[TaskSection] = CausalLMTask) -> type[Recipe]:
    """A recipe whose ``method`` and ``task`` are of one class each, so that one pass validates everything."""
    fields: dict[str, Any] = {
        "method": (SerializeAsAny[config], ...),  # type: ignore[misc, valid-type]
        "task": (SerializeAsAny[task], Field(default_factory=CausalLMTask)),  # type: ignore[misc, valid-type]
    }
    return create_model("Recipe", __base__=Recipe, **fields)


@lru_cache(maxsize=256)
def _lookup(config: type[MethodConfig], task: type[TaskSection]) -> Lookup:
    return Lookup(schema_of(recipe_class(config, task)))


def _json(root: Node, without: Sequence[nodes.Path] = ()) -> str:
    def plain(node: Node, path: nodes.Path) -> Any:
        if isinstance(node.value, dict):
            return {key: plain(child, (*path, key)) for key, child in node.value.items() if (*path, key) not in without}
        if isinstance(node.value, list):
            return [plain(child, (*path, index)) for index, child in enumerate(node.value) if (*path, index) not in without]
        if isinstance(node.value, float) and not abs(node.value) < float("inf"):
            return None  # reported by the scan
        if isinstance(node.value, str):
            return "".join(char for char in node.value if not "\ud800" <= char <= "\udfff")  # reported by the reader
        return node.value

    # Keys with half a surrogate pair are reported by the reader too; JSON has no place for them.
    return json.dumps(plain(root, ()), ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


def _sound_part(model: type[Recipe], root: Node, bad: Sequence[nodes.Path]) -> Recipe | None:
    """The recipe without its values at fault, so that the method's own rules are reported in the same go."""
    if () in bad:
        return None
    try:
        return model.model_validate_json(_json(root, bad), strict=True)
    except ValidationError:
        return None
