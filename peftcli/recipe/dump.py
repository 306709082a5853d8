"""Recipes back to YAML: the resolved recipe of a run, and the commented one that `peftcli init` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from peftcli.recipe.nodes import scalar
from peftcli.recipe.schema import Recipe


class _Dumper(yaml.SafeDumper):
    """Block mappings, one-line lists of scalars, no anchors; every scalar reads back as itself here and elsewhere."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    """``repr`` is the shortest text that reads back exactly; YAML 1.1 readers want a point in ``1e-08``."""
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Quoted where our reader would take the plain text for something else (``2e-4``) or where a character has to be
    escaped (PyYAML writes U+0085 bare, and reads it as a space); lines as a block; PyYAML knows the other cases.
    """
    style = None
    if "\n" in value and value.replace("\n", "").isprintable():
        style = "|"
    elif not value.isprintable() or not isinstance(scalar(value, True), str):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _list(dumper: _Dumper, value: list[Any]) -> yaml.SequenceNode:
    nested = any(isinstance(item, (dict, list)) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=not nested)


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)


def to_yaml(value: Any) -> str:
    """Mappings, lists and scalars as YAML, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe with every default written out. The same recipe gives the same text, and the text loads as an
    equal recipe.
    """
    return to_yaml(recipe.model_dump(mode="json"))


# Section or key, value or None where only the comment's example is shown, comment. The order is the file's.
_INIT: tuple[tuple[str, object, str], ...] = (
    ("base_model.name", "HuggingFaceTB/SmolLM2-135M-Instruct", "hub id, folder, .gguf file, or package:<import name>"),
    ("#base_model.quantization", "nf4", "4 bits: nf4, fp4; 8 bits: int8"),
    ("method.name", "lora", "`peftcli methods` lists all; `peftcli methods NAME` shows one's options"),
    ("dataset.train", "train.jsonl", "JSON, JSONL, CSV, Parquet, a folder, a hub id, or a list of these"),
    ("#dataset.eval", "eval.jsonl", "held-out rows; or eval_fraction: 0.05"),
    ("#dataset.format", "auto", "alpaca, sharegpt, messages, prompt_completion, text"),
    ("dataset.max_length", 1024, "tokens; longer rows are truncated and counted"),
    ("train.epochs", 1, "or max_steps"),
    ("train.batch_size", 8, "rows; or batch_tokens"),
    ("#train.learning_rate", 2e-4, "the method's recommended one when left out"),
    ("#train.eval_steps", 100, "evaluate every N steps, not only at the end"),
    ("#train.save_steps", 100, "checkpoints for --resume"),
    ("output_dir", "runs/my-run", "everything the run leaves"),
)
# A value for the key on the left takes the one on the right out of the file.
_INSTEAD = {"train.batch_tokens": "train.batch_size"}


def commented_recipe(values: Mapping[str, object], comments: Mapping[str, str] | None = None) -> str:
    """A short recipe with comments to start from.

    Args:
        values: dotted key to value, written into the recipe; keys beyond the usual ones are added to their section.
            Nothing is validated here.
        comments: dotted key to what is said beside its value instead of the usual comment.
    """
    left, said = dict(values), comments or {}
    hidden = {_INSTEAD[key] for key in values if key in _INSTEAD}
    sections: dict[str, list[str]] = {}
    for key, default, usual in _INIT:
        name = key.lstrip("#")
        if name in hidden:
            continue
        active = name in left or not key.startswith("#")
        comment = said.get(name, usual)
        sections.setdefault(name.partition(".")[0], []).append(_line(name, left.pop(name, default), comment, active))
    for key, value in left.items():
        sections.setdefault(key.partition(".")[0], []).append(_line(key, value, said.get(key, ""), True))
    lines = ["# A peftcli recipe. `peftcli check FILE` validates it, `peftcli train FILE` runs it; the README lists every key."]
    for section, body in sections.items():
        if not (len(body) == 1 and body[0].lstrip("# ").startswith(f"{section}:")):
            lines.append(f"{section}:")
        lines += body
    return "\n".join(lines) + "\n"


def _line(key: str, value: object, comment: str, active: bool) -> str:
    section, dot, rest = key.partition(".")
    indent = "  " if dot else ""
    parts = rest.split(".") if dot else [section]
    for part in reversed(parts[1:]):
        value = {part: value}
    inline = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    text = f"{indent}{'' if active else '# '}{parts[0]}: {inline.removesuffix('...' + chr(10)).strip()}"
    return f"{text.ljust(44)}  # {comment}" if comment else text
