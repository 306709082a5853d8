"""What is generated from the schema: the JSON Schema for editors and the README's reference.

``python -m peftcli.recipe.render --write`` brings ``recipe.schema.json`` up to date.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftcli.methods import registry
from peftcli.recipe.dump import commented_recipe, dump_recipe, to_yaml
from peftcli.recipe.load import recipe_class
from peftcli.recipe.schema import Recipe
from peftcli.recipe.tasks import TASKS
from peftcli.recipe.words import Lookup, Schema, schema_of

__all__ = ["commented_recipe", "dump_recipe", "json_schema", "reference_markdown", "schema_text"]

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")


def json_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of a whole recipe: shorthands allowed, unknown keys refused, and ``method`` one of
    the registered methods, told apart by ``name``. Rules between fields are beyond it.
    """
    schema = schema_of(Recipe)
    definitions: dict[str, Any] = schema["$defs"]
    for name in ("MethodConfig", "TaskSection"):
        definitions.pop(name, None)
    methods = {name: registry.get(name).Config for name in registry.names()}
    schema["properties"]["method"] = _one_of(definitions, "method", methods) | {"description": "The method, with its options."}
    schema["properties"]["task"] = _one_of(definitions, "task", TASKS) | {"description": "What is learned.", "default": "causal_lm"}
    schema = _tidy(copy.deepcopy(schema))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "peftcli recipe", **schema}


def _one_of(definitions: dict[str, Any], section: str, configs: Mapping[str, type[BaseModel]]) -> Schema:
    """A section that is one of several classes of options, told apart by ``name``; its name alone will do."""
    branches: list[Schema] = [{"enum": list(configs), "type": "string"}]
    for name, cls in configs.items():
        config = cls.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, definition in config.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = definition
        config["properties"]["name"] = {"const": name, "type": "string", "description": f"Name of the {section}."}
        config["required"] = list(dict.fromkeys(["name", *config.get("required", [])]))
        config["additionalProperties"] = False
        definitions[f"{section}.{name}"] = config
        branches.append({"$ref": f"#/$defs/{section}.{name}"})
    return {"anyOf": branches}


def _tidy(node: Any) -> Any:
    """``node`` without the titles that pydantic makes up, which say nothing that the keys do not."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if not (key == "title" and isinstance(value, str))}
        return {key: _tidy(value) for key, value in kept.items()}
    return [_tidy(item) for item in node] if isinstance(node, list) else node


def schema_text() -> str:
    """:func:`json_schema` as the shipped file holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def reference_markdown() -> str:
    """Tables of every key of a recipe and of every method's options: key, what is allowed, default, meaning."""
    lookup = Lookup(schema_of(Recipe))
    parts = [
        _table("", [row for key in ("output_dir", "expect") for row in _rows(lookup, (key,))], "These keys and the sections below."),
        _table("base_model", _section(lookup, ("base_model",)), "A plain string is its `name`."),
        _table("dataset", _section(lookup, ("dataset",)), "A plain string or a list is its `train`."),
        _table(
            "dataset.train.N", _section(lookup, ("dataset", "train", 0)), "One source, of `train` or `eval`. A plain string is its `path`."
        ),
        _table("train", _section(lookup, ("train",))),
        _table("eval", _section(lookup, ("eval",))),
    ]
    config = registry.get(registry.names()[0]).Config
    for name, task in TASKS.items():
        options = Lookup(schema_of(recipe_class(config, task)))
        rows = [row for row in _section(options, ("task",)) if row[0] != "name"]
        parts.append(_table(f"task: {name}", rows, f"{task.summary} Formats: {', '.join(f'`{format}`' for format in task.formats)}."))
    for name in registry.names():
        method = registry.get(name)
        options = Lookup(schema_of(recipe_class(method.Config)))
        rows = [row for row in _section(options, ("method",)) if row[0] != "name"]
        notes = [method.summary]
        if method.recommended:
            chosen = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in method.recommended.items())
            notes.append(f"Where the recipe says nothing: {chosen}.")
        parts.append(_table(f"method: {name}", rows, " ".join(notes)))
    return "\n\n".join(parts) + "\n"


Row = tuple[str, str, str, str]


def _section(lookup: Lookup, path: tuple[str | int, ...]) -> list[Row]:
    return [row for key in lookup.keys(path) for row in _rows(lookup, (*path, key))]


def _rows(lookup: Lookup, path: tuple[str | int, ...]) -> Iterator[Row]:
    for parent in lookup.at(path[:-1]):
        key = str(path[-1])
        field = parent.get("properties", {}).get(key)
        if field is None:
            continue
        if path[:1] == ("dataset",) and len(path) == 2 and key in ("train", "eval"):
            allowed = "a source or a list of sources" + (" or null" if key == "eval" else "")
        else:
            allowed = lookup.words(list(lookup.branches(field)))
        default = f"`{_yaml(field['default'])}`" if "default" in field else "required"
        yield key, allowed, default, str(field.get("description", ""))


def _yaml(value: Any) -> str:
    return to_yaml([value]).strip()[1:-1] if not isinstance(value, (dict, list)) else json.dumps(value)


def _table(title: str, rows: list[Row], note: str = "") -> str:
    lines = [f"#### `{title}`", ""] if title else []
    lines += [note, ""] if note else []
    if rows:
        lines += ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{row[0]}`", *row[1:])) + " |" for row in rows]
    else:
        lines += ["No options."]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """``--write`` updates the shipped file; without it, exit code 1 says that the file is out of date."""
    text = schema_text()
    if "--write" in arguments:
        SCHEMA_FILE.write_text(text, encoding="utf-8")
        return 0
    current = SCHEMA_FILE.exists() and SCHEMA_FILE.read_text(encoding="utf-8") == text
    print(f"{SCHEMA_FILE.name} is {'current' if current else 'out of date; run with --write'}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
