"""pydantic's errors as faults with a place, the offending text, what is allowed and the nearest name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftcli.errors import Fault, nearest
from peftcli.recipe.nodes import Node, Path, dotted, show
from peftcli.recipe.words import Lookup
from peftcli.redact import HIDDEN, is_secret, is_secret_key, redact

# Names from other tools whose spelling is far from ours.
_OTHER_NAMES = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "lr_scheduler_type": "train.scheduler",
    "lr_scheduler": "train.scheduler",
    "optim": "train.optimizer",
    "max_seq_length": "dataset.max_length",
    "max_seq_len": "dataset.max_length",
    "sequence_len": "dataset.max_length",
    "cutoff_len": "dataset.max_length",
    "val_set_size": "dataset.eval_fraction",
    "model": "base_model",
    "model_name_or_path": "base_model.name",
    "datasets": "dataset",
    "load_in_4bit": "base_model.quantization",
    "load_in_8bit": "base_model.quantization",
    "torch_dtype": "base_model.dtype",
    "peft": "method",
    "adapter": "method",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_target_modules": "method.target_modules",
}
_REMOTE_CODE = (
    "is not a recipe key: a recipe alone cannot allow remote code. Give --trust-remote-code on the command line "
    "and pin base_model.revision to a commit"
)


@dataclass
class Place:
    """Where an error's location leads in the tree.

    Attributes:
        path: keys and indices that exist in the tree, as validated.
        shown: the same as the user wrote it, without what a shorthand implies.
        node: the deepest node.
        tagged: a step was the name of an alternative, not a key.
        rest: a last step that is not in the tree (a missing key).
    """

    path: Path
    shown: Path
    node: Node
    tagged: bool = False
    rest: str | None = None


def place(root: Node, steps: Sequence[str | int], missing: bool = False) -> Place:
    """Follow ``steps`` from ``root``, skipping the steps that name alternatives."""
    found = Place((), (), root)
    implied: Path = ()  # keys that a shorthand stands for; shown only on the way to a key that somebody wrote
    for index, step in enumerate(steps):
        parent = found.node
        child: Node | None = None
        if isinstance(parent.value, dict) and isinstance(step, str):
            child = parent.value.get(step)
        elif isinstance(parent.value, list) and isinstance(step, int) and 0 <= step < len(parent.value):
            child = parent.value[step]
        if child is None:
            if missing and index == len(steps) - 1 and isinstance(step, str):
                found.rest = step
                break
            found.tagged = True
            continue
        found.path = (*found.path, step)
        found.node = child
        if parent.implicit and (child.file, child.line, child.column) == (parent.file, parent.line, parent.column):
            implied = implied if isinstance(step, int) else (*implied, step)
        else:
            found.shown, implied = (*found.shown, *implied, step), ()
    return found


@dataclass
class Collector:
    """Gathers the faults of one recipe, at most one for each place and kind."""

    root: Node
    lookup: Lookup
    faults: list[Fault] = field(default_factory=list)
    settled: set[Path] = field(default_factory=set)

    def at(self, where: Place, message: str, *, key: bool = False, **extra: str | None) -> None:
        """A fault at a place; ``key`` points at the key rather than the value."""
        node = where.node
        line, column = (node.key_line, node.key_column) if key else (node.line, node.column)
        shown = where.shown if where.rest is None else (*where.shown, where.rest)
        texts = {name: redact(text) for name, text in extra.items() if text is not None}
        self.faults.append(Fault(redact(message), node.file, line, column, dotted(shown), **texts))

    def scan(self) -> None:
        """Faults that need no schema: secrets, numbers that are not finite, control characters in the output folder."""
        self._scan(self.root, ())
        found = place(self.root, ["output_dir"])
        if found.path and isinstance(found.node.value, str) and found.node.value and not found.node.value.isprintable():
            self._settle(found, "holds a character that cannot be part of a folder's name", found=show(found.node.text, found.node.plain))

    def _settle(self, where: Place, message: str, **extra: str | None) -> None:
        self.settled.add(where.path)
        self.at(where, message, key=False, **extra)

    def _scan(self, node: Node, path: Path) -> None:
        here = place(self.root, path)
        name = path[-1] if path else None
        if isinstance(name, str) and (is_secret(name) or (is_secret_key(name) and node.value not in (None, "", {}, []))):
            self._secret(here)
        elif isinstance(node.value, dict):
            for key, child in node.value.items():
                self._scan(child, (*path, key))
        elif isinstance(node.value, list):
            for index, child in enumerate(node.value):
                self._scan(child, (*path, index))
        elif is_secret(node.text):
            self._secret(here)
        elif isinstance(node.value, float) and not abs(node.value) < float("inf"):
            self._settle(here, "is not a finite number", found=show(node.text), allowed="a finite number, or text in quotes")

    def unknown_name(self, section: str, names: Sequence[str]) -> None:
        """The fault of a ``method.name`` or ``task.name`` that names none; a missing one is left to the schema."""
        found = place(self.root, [section, "name"])
        if found.path == (section, "name") and not self._is_settled(found.path):
            near = nearest(found.node.text, names)
            self._settle(found, f"no {section} has this name", found=_found(found.node), allowed=", ".join(names), nearest=near)

    def _secret(self, here: Place) -> None:
        self._settle(
            here,
            "looks like a secret; secrets do not belong in a recipe",
            found=HIDDEN,
            allowed="nothing here: tokens come from the environment (HF_TOKEN, WANDB_API_KEY)",
        )

    def _is_settled(self, path: Path) -> bool:
        return any(path[:length] in self.settled for length in range(len(path) + 1))

    def add(self, errors: Iterable[Mapping[str, Any]]) -> list[Path]:
        """Turn pydantic's errors into faults; returns the paths of the values that are at fault."""
        groups: dict[tuple[Path, str | None], list[tuple[Place, Mapping[str, Any]]]] = {}
        for error in errors:
            found = place(self.root, error["loc"], error["type"] == "missing")
            if not self._is_settled(found.path):
                groups.setdefault((found.path, found.rest), []).append((found, error))
        paths = []
        for (path, _rest), group in groups.items():
            deeper = any(len(other) > len(path) and other[: len(path)] == path for other, _ in groups)
            if deeper and all(found.tagged for found, _ in group):
                continue  # one alternative fitted well enough to complain about its inside
            self._one(group[0][0], [error for _, error in group])
            paths.append(path)
        return paths

    def _one(self, found: Place, errors: Sequence[Mapping[str, Any]]) -> None:
        kind = str(errors[0]["type"])
        if kind == "missing":
            name = found.rest or ""
            self.at(found, "is missing", key=True, allowed=self.lookup.describe((*found.path, name)))
        elif kind == "extra_forbidden":
            self._unknown(found)
        elif len(errors) > 1 and not any(error["type"] == "literal_error" for error in errors):
            self._wrong(found, "has the wrong type")
        else:
            self._wrong(found, _message(errors, found.node))

    def _unknown(self, found: Place) -> None:
        name = str(found.path[-1])
        parent = found.path[:-1]
        keys = self.lookup.keys(parent)
        if name == "trust_remote_code":
            self.at(found, _REMOTE_CODE, key=True, found=show(name))
            return
        near = nearest(name, keys) or self._elsewhere(name)
        self.at(found, "unknown key", key=True, found=show(name), allowed=", ".join(keys) or "no key", nearest=near)

    def _elsewhere(self, name: str) -> str | None:
        """The dotted key that ``name`` stands for in another section or another tool."""
        for section in ("", "train", "dataset", "base_model", "method", "eval"):
            if name in self.lookup.keys((section,) if section else ()):
                return f"{section}.{name}" if section else name
        other = _OTHER_NAMES.get(name)
        return other if other and self.lookup.at(other.split(".")) else None

    def _wrong(self, found: Place, message: str) -> None:
        node = found.node
        choices = self.lookup.choices(found.path)
        near = nearest(node.text, choices) if choices and isinstance(node.value, str) else None
        if any(option.get("type") == "boolean" for option in self.lookup.at(found.path)):
            near = near or {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(node.text.lower())
        self.at(found, message, found=_found(node), allowed=self.lookup.describe(found.path), nearest=near)


def _found(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    return "null" if node.value is None else show(node.text, node.plain)


def _message(errors: Sequence[Mapping[str, Any]], node: Node) -> str:
    error = errors[0]
    kind = str(error["type"])
    if any(each["type"] == "literal_error" for each in errors):
        return "is not one of the allowed values"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind == "string_type" and node.plain and isinstance(node.value, (int, float)):
        return "must be text; put it in quotes"
    if kind.endswith(("_type", "_parsing")) or kind == "int_from_float":
        return "has the wrong type"
    if kind.startswith(("greater_than", "less_than")):
        return "is out of range"
    if kind == "string_pattern_mismatch":
        return "is not written as it has to be"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    return str(error["msg"])
