"""Whatever a recipe holds: a valid recipe, or faults that all name key, line, column and cause. Nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peftcli.errors import RecipeError
from peftcli.recipe import LoadedRecipe, parse_recipe
from peftcli.recipe.render import dump_recipe

SHORT = "base_model: m\nmethod: lora\ndataset: rows.jsonl\n"
FULL = dump_recipe(parse_recipe(SHORT).recipe)
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    10**30,
    0.5,
    -2.5,
    "",
    "x",
    "nf4",
    "yes",
    "\u2028",
    "a\0b",
    [],
    [1, [2]],
    {},
    {"a": {"b": 1}},
    "hf_" + "a1B2" * 6,
]


def outcome(text: str | bytes, overrides: list[str] | None = None) -> LoadedRecipe | None:
    try:
        return parse_recipe(text, "fuzz.yaml", overrides or [])
    except RecipeError as error:
        faults = error.faults
    assert faults
    for fault in faults:
        assert fault.message
        assert fault.key
        assert fault.file in ("fuzz.yaml", "<command line>")
        assert fault.line is not None
        assert fault.column is not None
        assert fault.line >= 1
        assert fault.column >= 1
        assert str(fault).replace("\n", "").isprintable()
    return None


def mutate(node: Any, random_: random.Random) -> Any:
    """``node`` with one random change somewhere inside."""
    if isinstance(node, dict) and node and random_.random() < 0.9:
        key = random_.choice(list(node))
        kind = random_.randrange(6)
        copy = dict(node)
        if kind == 0:
            position = random_.randrange(len(key) + 1)
            copy[key[:position] + random_.choice("xe_. ") + key[position:]] = copy.pop(key)
        elif kind == 1:
            del copy[key]
        else:
            copy[key] = mutate(node[key], random_)
        return copy
    if isinstance(node, list) and node and random_.random() < 0.8:
        return [mutate(item, random_) for item in node]
    return random_.choice(JUNK)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 5))
def test_changed_recipes(seed: int, changes: int) -> None:
    random_ = random.Random(seed)
    document = yaml.safe_load(FULL)
    for _ in range(changes):
        document = mutate(document, random_)
    outcome(json.dumps(document))
    outcome(yaml.safe_dump(document, allow_unicode=True))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), noise=st.binary(min_size=1, max_size=4))
def test_damaged_text(seed: int, noise: bytes) -> None:
    random_ = random.Random(seed)
    data = FULL.encode()
    start = random_.randrange(len(data))
    outcome(data[:start] + noise + data[start + random_.randrange(8) :])
    outcome(data[:start])


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("a:-{}[],&*!|>'\"%@`#? \n\t\\.0e<~=") | st.characters(), max_size=60))
@example(text="%YAML " + "9" * 5000)
@example(text="%TAG ! tag:%ff\n--- !a b")
@example(text="<<: &a {<<: *a}")
@example(text="? &a [*a]\n: *a")
def test_random_text(text: str) -> None:
    outcome(text)
    outcome(SHORT + text)
    outcome(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60))
def test_random_bytes(data: bytes) -> None:
    outcome(data)


KEYS = st.sampled_from(
    ["train", "dataset", "0", "1", "path", "method", "name", "eval", "epochs", "", " ", "base_model", "é", "columns", "\n", "9" * 30]
)
VALUES = st.sampled_from(
    ["", "1", "[a", "{a: b}", "x: y", "*x", "1e-4", "!!int 3", "\0", "\ud800", '"\\ud800"', "null", "- a\n- b", "---", "nan", ".nan"]
)


@settings(max_examples=120, deadline=None)
@given(pairs=st.lists(st.tuples(st.lists(KEYS, max_size=4), st.sampled_from(["=", "==", ""]), VALUES | st.text(max_size=10)), max_size=3))
def test_random_overrides(pairs: list[tuple[list[str], str, str]]) -> None:
    outcome(SHORT, [".".join(keys) + equals + value for keys, equals, value in pairs])
