"""YAML text to a tree in which every key and value still knows its line and column.

PyYAML scans and composes; the values are made here, so that no tag, import or object construction exists at all, and
numbers and booleans follow YAML 1.2 (``2e-4`` is a number, ``on`` is text).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.error import Mark

from peftcli.errors import Fault
from peftcli.redact import redact

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_CHARACTERS = 4 * MAX_BYTES
DOCUMENT = "(document)"

Path = tuple[str | int, ...]
Scalar = None | bool | int | float | str

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_SCIENTIFIC_INTEGER = re.compile(r"[-+]?[0-9]+[eE]\+?[0-9]{1,2}")
_FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NON_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_SYNTAX = {
    "expected <block end>, but found": "this line does not fit the lines above; check the indentation, quotes and brackets",
    "found undefined alias": "an alias (`*name`) without its anchor (`&name`); put the text in quotes if it is meant literally",
    "but found another document": "more than one document; a recipe is a single one, without `---` between parts",
    "found character '\\t' that cannot start": "a tab; YAML is indented with spaces",
    "found unexpected end of stream": "the text ends inside quotes or brackets",
    "expected chomping or indentation indicators": "`>` and `|` begin a block of text; put text that begins with one in quotes",
    "could not find expected ':'": "a key without `:` after it",
    "mapping values are not allowed here": "a second `:` in one line; put text that contains `: ` in quotes",
}


@dataclass(slots=True)
class Node:
    """A value with its place.

    Attributes:
        value: a scalar, or children by key or in order.
        file, line, column: where the value starts (1-based).
        key_line, key_column: where its key starts; for a list item and the document, where the value starts.
        text: a scalar as it was written, without quotes.
        plain: whether the scalar was written without quotes.
        implicit: made from a shorthand, so its keys do not stand in the file.
    """

    value: dict[str, Node] | list[Node] | Scalar
    file: str
    line: int
    column: int
    key_line: int
    key_column: int
    text: str = ""
    plain: bool = False
    implicit: bool = False

    def around(self, value: dict[str, Node] | list[Node]) -> Node:
        """A node for what the shorthand ``self`` stands for."""
        return Node(value, self.file, self.line, self.column, self.key_line, self.key_column, implicit=True)

    def to_plain(self) -> Any:
        """The value as plain mappings, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.to_plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.to_plain() for child in self.value]
        return self.value


class Stop(Exception):
    """Reading cannot go on; carries the faults so far."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__()
        self.faults = list(faults)


def dotted(path: Sequence[str | int]) -> str:
    """``("dataset", "train", 0)`` as ``dataset.train.0``, safe to print."""
    parts = [part if part.isprintable() else ascii(part)[1:-1] for part in map(str, path)]
    text = redact(".".join(part if len(part) <= 60 else part[:57] + "..." for part in map(redact, parts)))
    return text or DOCUMENT


def scalar(text: str, plain: bool) -> Scalar:
    """The value of a YAML scalar; quoted text stays text.

    ``1e5`` (no point, no negative exponent) is a whole number, so that it may stand for a count as well.
    """
    if not plain:
        return text
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= 20 else float(text)
    if _SCIENTIFIC_INTEGER.fullmatch(text) and abs(float(text)) <= 1e15:
        return int(float(text))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NON_FINITE.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


class _Composer(yaml.SafeLoader):
    """PyYAML's composer with limits; it never constructs."""

    def __init__(self, text: str) -> None:
        self.path: list[str | int] = []
        self.count = 0
        self.tags: list[tuple[Mark, Path]] = []
        super().__init__(text)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(index, (str, int)):
            step: str | int | None = index
        else:
            step = index.value if isinstance(index, yaml.ScalarNode) else None
        if step is not None:
            self.path.append(step)
        self.count += 1
        if self.count > 2 * MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values", event.start_mark)
        if len(self.path) > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        if getattr(event, "tag", None) is not None:
            self.tags.append((event.start_mark, tuple(self.path)))
        node: yaml.Node | None = super().compose_node(parent, index)
        # Not in a finally clause: after a syntax error the path says where the reader was.
        if step is not None:
            self.path.pop()
        return node


class _Builder:
    """Makes the tree of one document."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.nodes = 0
        self.characters = 0
        self.open: set[int] = set()

    def fault(self, mark: Mark, path: Path, message: str, **extra: str | None) -> Fault:
        made = Fault(redact(message), self.file, mark.line + 1, mark.column + 1, dotted(path), **extra)
        self.faults.append(made)
        return made

    def build(self, source: yaml.Node, path: Path, key: yaml.Node | None = None) -> Node:
        mark = source.start_mark
        key_mark = key.start_mark if key is not None else mark
        node = Node(None, self.file, mark.line + 1, mark.column + 1, key_mark.line + 1, key_mark.column + 1)
        self.nodes += 1
        self.characters += len(source.value) if isinstance(source.value, str) else 0
        if self.nodes > MAX_NODES or self.characters > MAX_CHARACTERS:
            self.fault(mark, path, f"more than {MAX_NODES} values or {MAX_CHARACTERS} characters once aliases are filled in")
            raise Stop(self.faults)
        if id(source) in self.open:
            self.fault(mark, path, "an alias inside its own anchor")
            raise Stop(self.faults)
        if len(path) > MAX_DEPTH:
            self.fault(mark, path, f"nested more than {MAX_DEPTH} levels deep")
            raise Stop(self.faults)
        self.open.add(id(source))
        if isinstance(source, yaml.MappingNode):
            node.value = self._mapping(source, path)
        elif isinstance(source, yaml.SequenceNode):
            node.value = [self.build(item, (*path, index)) for index, item in enumerate(source.value)]
        else:
            node.text, node.plain = source.value, isinstance(source, yaml.ScalarNode) and source.style is None
            node.value = scalar(node.text, node.plain)
            self._check_text(node.text, mark, path)
        self.open.discard(id(source))
        return node

    def _check_text(self, text: str, mark: Mark, path: Path) -> None:
        for char in text:
            if char == "\0" or "\ud800" <= char <= "\udfff":
                self.fault(mark, path, f"the character U+{ord(char):04X} is not allowed in text")
                return

    def _mapping(self, source: yaml.MappingNode, path: Path) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in source.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fault(key.start_mark, path, "a key must be a single word, not a list or mapping")
                continue
            name = key.value
            inner = (*path, name)
            if name == "<<" and key.style is None:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in parts:
                    if not isinstance(part, yaml.MappingNode):
                        self.fault(part.start_mark, inner, "`<<` merges a mapping or a list of mappings")
                        continue
                    child = self.build(part, inner, key).value
                    if isinstance(child, dict):
                        merged = {**child, **merged}
                continue
            self._check_text(name, key.start_mark, inner)
            if name in own:
                first = own[name]
                self.fault(key.start_mark, inner, f"duplicate key; it stands at line {first.key_line} already", found=show(name))
                continue
            if name == "" or (key.style is None and name in _NULLS):
                self.fault(key.start_mark, inner, "a key is missing before `:`")
            own[name] = self.build(value, inner, key)
        return {**own, **{name: child for name, child in merged.items() if name not in own}}


def show(text: str, plain: bool = True) -> str:
    """``text`` for a message: secrets hidden, at most 60 characters, nothing that moves the cursor."""
    text = redact(text)
    text = text if text.isprintable() else ascii(text)[1:-1]
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if plain and text else f'"{text}"'


def decode(data: bytes, file: str) -> str:
    """The text of a recipe file.

    Raises:
        Stop: too large, a byte order mark, or not UTF-8.
    """
    if len(data) > MAX_BYTES:
        raise Stop([Fault(f"larger than {MAX_BYTES} bytes", file, 1, 1, DOCUMENT, allowed="a recipe of at most 1 MiB")])
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise Stop([Fault("starts with a byte order mark", file, 1, 1, DOCUMENT, allowed="UTF-8 without a byte order mark")])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = _position(data[: error.start].decode("utf-8"))
        found = f"byte 0x{data[error.start]:02x}"
        raise Stop([Fault("not UTF-8 text", file, line, column, DOCUMENT, found=found, allowed="UTF-8")]) from None


def _position(before: str) -> tuple[int, int]:
    lines = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", before)
    return len(lines), len(lines[-1]) + 1


def read(text: str, file: str) -> tuple[Node | None, list[Fault]]:
    """The document of ``text`` and the faults found on the way; ``None`` for an empty document.

    Raises:
        Stop: the text is not YAML, or exceeds a limit.
    """
    if len(text) > MAX_BYTES:
        raise Stop([Fault(f"larger than {MAX_BYTES} bytes", file, 1, 1, DOCUMENT, allowed="a recipe of at most 1 MiB")])
    loader: _Composer | None = None
    try:
        loader = _Composer(text)
        source = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, column = _position(text[: error.position])
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise Stop([Fault(f"the character U+{code:04X} is not allowed", file, line, column, DOCUMENT)]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "not valid YAML"
        problem = next((plain for start, plain in _SYNTAX.items() if problem.startswith(start)), problem)
        place = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        raise Stop([Fault(redact(problem), file, *place, dotted(loader.path if loader else ()))]) from None
    except (ValueError, OverflowError):  # escapes such as "\UFFFFFFFF" reach chr() unchecked
        mark = loader.get_mark() if loader else None
        place = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        raise Stop(
            [Fault("not valid YAML: a number or escape out of range", file, *place, dotted(loader.path if loader else ()))]
        ) from None
    if source is None:
        return None, []
    builder = _Builder(file)
    for mark, path in loader.tags:
        builder.fault(mark, path, "tags (`!...`) are not allowed", allowed="plain values; quotes make a value text")
    return builder.build(source, ()), builder.faults
