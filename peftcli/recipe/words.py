"""The recipe's JSON Schema: looked up by path, and put into plain words for messages and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]


def schema_of(model: type[BaseModel]) -> Schema:
    """The JSON Schema of a recipe class, with the shorthands that the reader writes out before validation."""
    schema = model.model_json_schema()
    text = {"type": "string", "minLength": 1}

    def shorthand(field: Schema, *also: Schema) -> None:
        inner = field.pop("anyOf", None) or [{key: field.pop(key) for key in ("$ref", "type", "items", "minItems") if key in field}]
        field["anyOf"] = [*also, *inner]

    properties = schema["properties"]
    for key in ("base_model", "task", "method", "dataset"):
        if "$ref" in properties[key]:
            shorthand(properties[key], dict(text))
    source = {"$ref": "#/$defs/SourceSection"}
    for key in ("train", "eval"):
        field = schema["$defs"]["DatasetSection"]["properties"][key]
        shorthand(field, dict(text), dict(source))
        for branch in field["anyOf"]:
            if branch.get("type") == "array":
                branch["items"] = {"anyOf": [dict(text), dict(source)]}
        shorthand(properties[key], {"type": "null"})
    sources = {"type": "array", "minItems": 1, "items": {"anyOf": [dict(text), dict(source)]}}
    properties["dataset"]["anyOf"].insert(1, sources)
    return schema


class Lookup:
    """Answers questions about the place at a path of a schema."""

    def __init__(self, schema: Schema) -> None:
        self.root = schema

    def branches(self, node: Schema) -> Iterator[Schema]:
        """The alternatives of ``node``, with references followed."""
        if "$ref" in node:
            name = str(node["$ref"]).rpartition("/")[2]
            yield from self.branches(self.root["$defs"][name])
        elif "anyOf" in node or "oneOf" in node:
            for branch in node.get("anyOf") or node["oneOf"]:
                yield from self.branches(branch)
        else:
            yield node

    def at(self, path: Sequence[str | int]) -> list[Schema]:
        """Every alternative that may stand at ``path``; empty where nothing may."""
        found = list(self.branches(self.root))
        for step in path:
            following: list[Schema] = []
            for node in found:
                if isinstance(step, int):
                    inner = node.get("items")
                else:
                    inner = node.get("properties", {}).get(step, node.get("additionalProperties"))
                if isinstance(inner, dict):
                    following += self.branches(inner)
            found = following
        return found

    def keys(self, path: Sequence[str | int]) -> list[str]:
        """The keys that the mapping at ``path`` may have."""
        return list(dict.fromkeys(key for node in self.at(path) for key in node.get("properties", {})))

    def choices(self, path: Sequence[str | int]) -> list[str]:
        """The words that may stand at ``path``, where it is a choice."""
        return [str(word) for node in self.at(path) for word in node.get("enum", [node["const"]] if "const" in node else [])]

    def describe(self, path: Sequence[str | int]) -> str:
        """What may stand at ``path``, in plain words."""
        return self.words(self.at(path))

    def words(self, nodes: Sequence[Schema]) -> str:
        """Alternatives in plain words, joined by *or*."""
        parts = [self._words(node) for node in nodes]
        parts.sort(key="null".__eq__)
        return " or ".join(dict.fromkeys(part for part in parts if part)) or "any value"

    def _words(self, node: Schema) -> str:
        if "const" in node or "enum" in node:
            return ", ".join(str(word) for word in node.get("enum", [node.get("const")]))
        kind = node.get("type")
        if kind in ("integer", "number"):
            bounds = [
                f"{sign} {node[word]:g}" if abs(node[word]) < 1e6 else f"{sign} {node[word]}"
                for word, sign in (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
                if word in node
            ]
            return " ".join(filter(None, ("a whole number" if kind == "integer" else "a number", " and ".join(bounds))))
        if kind == "array":
            items = node.get("items", {})
            return "a list of " + self.words(list(self.branches(items))) if items else "a list"
        if kind == "object":
            extra = node.get("additionalProperties")
            if isinstance(extra, dict):
                return "a mapping of names to " + self.words(list(self.branches(extra)))
            return "a mapping of " + ", ".join(node.get("properties", {}) or ["names to values"])
        if kind == "string":
            if "examples" in node:
                return f"text such as {' or '.join(map(repr, node['examples']))}"
            return f"text that matches {node['pattern']}" if "pattern" in node else "text"
        return {"boolean": "true or false", "null": "null"}.get(str(kind), "")
