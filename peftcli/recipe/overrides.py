"""Command-line overrides (``train.learning_rate=1e-4``), shorthands, and a method's recommended values.

All three edit the tree of :mod:`peftcli.recipe.nodes` before validation, so faults keep their places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from peftcli.errors import Fault
from peftcli.recipe.nodes import Node, Scalar, Stop, dotted, read, show

COMMAND_LINE = "<command line>"

# Writing one of a pair by hand keeps a recommended value away from the other.
ALTERNATIVES = (
    ("train.batch_size", "train.batch_tokens"),
    ("train.warmup_ratio", "train.warmup_steps"),
    ("dataset.eval", "dataset.eval_fraction"),
)


def expand(root: Node) -> None:
    """Write out every shorthand in place: plain strings, one source instead of a list, an empty section."""
    top = root.value
    if not isinstance(top, dict):
        return
    for key, field in (("base_model", "name"), ("task", "name"), ("method", "name"), ("dataset", "train")):
        node = top.get(key)
        if node is not None and (isinstance(node.value, str) or (key == "dataset" and isinstance(node.value, list))):
            top[key] = node.around({field: node})
    for key in ("train", "eval", "expect"):
        node = top.get(key)
        if node is not None and node.value is None:
            node.value = {}
    expect = top.get("expect")
    if expect is not None and isinstance(expect.value, dict):
        expect.value = dict(_flat(expect.value))
    dataset = top.get("dataset")
    if dataset is None or not isinstance(dataset.value, dict):
        return
    for key in ("train", "eval"):
        node = dataset.value.get(key)
        if node is not None and isinstance(node.value, (str, dict)):
            node = dataset.value[key] = node.around([node])
        if node is not None and isinstance(node.value, list):
            node.value = [item.around({"path": item}) if isinstance(item.value, str) else item for item in node.value]


def _flat(children: Mapping[str, Node], path: str = "") -> Iterator[tuple[str, Node]]:
    """Nested keys as dotted ones: ``eval: {loss: ...}`` means ``eval.loss: ...``, and so does ``expect.eval.loss=...``."""
    for key, child in children.items():
        if isinstance(child.value, dict) and child.value:
            yield from _flat(child.value, f"{path}{key}.")
        else:
            yield f"{path}{key}", child


def _shift(node: Node, line: int, columns: int) -> None:
    """Move a value that was read on its own to its place behind ``key=`` in override number ``line``."""
    if node.line == 1:
        node.column += columns
    if node.key_line == 1:
        node.key_column += columns
    node.line = node.key_line = line
    for child in _children(node):
        _shift(child, line, columns)


def _children(node: Node) -> Iterable[Node]:
    if isinstance(node.value, dict):
        return node.value.values()
    return node.value if isinstance(node.value, list) else ()


def apply(root: Node, overrides: Iterable[str]) -> list[Fault]:
    """Apply overrides in order; returns the faults of those that could not be."""
    faults: list[Fault] = []
    for number, override in enumerate(overrides, start=1):
        expand(root)
        try:
            faults += _apply(root, override, number)
        except Stop as stop:
            faults += stop.faults
    expand(root)
    return faults


def _apply(root: Node, override: str, number: int) -> list[Fault]:
    left, equals, right = override.partition("=")
    segments = [segment.strip() for segment in left.split(".")]

    def stop(message: str, column: int = 1, upto: int | None = None, allowed: str | None = None) -> Stop:
        return Stop([Fault(message, COMMAND_LINE, number, column, dotted(segments[:upto]), show(left), allowed)])

    if not equals:
        raise stop("an override is written key=value", allowed="for example train.learning_rate=1e-4")
    if not left.isprintable() or not all(segments) or len(segments) > 16:
        raise stop("the key of an override is a dotted path", allowed="for example train.learning_rate=1e-4")
    columns = len(left) + 1
    if segments[0] == "expect" and right.startswith(">") and "'" not in right:
        # To YAML a plain `>` begins a block of text; the shell has taken the quotes that a file would have.
        right = f"'{right}'"
    try:
        value, faults = read(right, COMMAND_LINE)
    except Stop as error:
        raise Stop(list(_moved(error.faults, left, number, columns))) from None
    faults = list(_moved(faults, left, number, columns))
    if value is None:
        value = Node(None, COMMAND_LINE, 1, 1, 1, 1, plain=True)
    _shift(value, number, columns)

    node, column = root, 1
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        here = column
        column += len(left.split(".")[index]) + 1
        if node.value is None and not last:
            node.value = {}
        if isinstance(node.value, list) and not segment.isdecimal() and node.implicit and len(node.value) == 1:
            node = node.value[0]  # `dataset.train.weight` where one source stands for the list
        following: list[Node] | dict[str, Node] = [] if not last and segments[index + 1].isdecimal() else {}
        child = value if last else Node(following, COMMAND_LINE, number, here, number, here)
        child.key_line, child.key_column = number, here
        if isinstance(node.value, dict):
            if last or segment not in node.value or node.value[segment].value is None:
                node.value[segment] = child
            node = node.value[segment]
        elif isinstance(node.value, list):
            size = len(node.value)
            position = int(segment) if segment.isdecimal() and len(segment) < 6 else size + 1
            if position > size:
                raise stop("not an entry of this list", here, index + 1, f"0 to {size} ({size} appends)")
            node.value[position : position + 1] = [child] if last or position == size else [node.value[position]]
            node = node.value[position]
        else:
            raise stop("a single value stands here; it has no keys", here, index)
    return faults


def _moved(faults: Iterable[Fault], left: str, number: int, columns: int) -> Iterator[Fault]:
    for fault in faults:
        column = (fault.column or 1) + (columns if fault.line in (None, 1) else 0)
        key = dotted([left]) if fault.key.startswith("(") else f"{dotted([left])}.{fault.key}"
        yield Fault(fault.message, COMMAND_LINE, number, column, key, fault.found, fault.allowed, fault.nearest)


def find(root: Node, key: str) -> Node | None:
    """The node at a dotted path of keys, or ``None``."""
    node: Node | None = root
    for part in key.split("."):
        node = node.value.get(part) if node is not None and isinstance(node.value, dict) else None
    return node


def recommend(root: Node, values: Mapping[str, object]) -> None:
    """Put a method's recommended values (dotted path to value) where the user wrote nothing."""
    # What the user wrote is looked up first, so that two recommended values never hide each other.
    written = {key for pair in ALTERNATIVES for key in pair if find(root, key) is not None}
    source = find(root, "method") or root
    for key, value in values.items():
        if any(key in pair and written & set(pair) for pair in ALTERNATIVES):
            continue
        node = root
        *parents, leaf = key.split(".")
        for part in parents:
            if isinstance(node.value, dict):
                node = node.value.setdefault(part, source.around({}))
        if isinstance(node.value, dict) and leaf not in node.value:
            node.value[leaf] = _lift(value, source)


def _lift(value: object, source: Node) -> Node:
    if isinstance(value, Mapping):
        return source.around({str(key): _lift(item, source) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return source.around([_lift(item, source) for item in value])
    node = source.around({})
    plain: Scalar = value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
    node.value, node.text, node.plain, node.implicit = plain, str(value), True, False
    return node
