"""YAML that is refused: syntax, limits, encodings, duplicates, tags. Each with its place."""

from __future__ import annotations

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe import parse_recipe
from peftcli.recipe.nodes import MAX_BYTES, MAX_DEPTH, MAX_NODES

SHORT = "base_model: m\nmethod: lora\ndataset: rows.jsonl\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", (1, 1), "is empty"),
        ("# only a comment\n", (1, 1), "is empty"),
        ("- a\n- b\n", (1, 1), "is not a mapping"),
        ("just text", (1, 1), "is not a mapping"),
        (f"{SHORT}---\na: 1\n", (4, 1), "more than one document"),
        (f"{SHORT}train:\n\tepochs: 1\n", (5, 1), "a tab"),
        (f"{SHORT}train: {{epochs: 1\n", (5, 1), None),
        (f'{SHORT}output_dir: "abc\n', (5, 1), "ends inside quotes"),
        (f"{SHORT}output_dir: a: b\n", (4, 14), "a second `:`"),
        (f"{SHORT}output_dir: *x\n", (4, 13), "an alias"),
        (f"{SHORT}output_dir: !!python/object/apply:os.system [ls]\n", (4, 13), "tags"),
        (f"{SHORT}output_dir: !env HOME\n", (4, 13), "tags"),
        (f"{SHORT}output_dir: !!str 5\n", (4, 13), "tags"),
        (f"{SHORT}output_dir: !!binary aGVsbG8=\n", (4, 13), "tags"),
        (f"{SHORT}output_dir: a\noutput_dir: b\n", (5, 1), "duplicate key; it stands at line 4"),
        (f"{SHORT}train: {{epochs: 1, epochs: 2}}\n", (4, 20), "duplicate key"),
        (f"{SHORT}[a, b]: 1\n", (4, 1), "a key must be a single word"),
        (f"{SHORT}: 1\n", (4, 1), None),
        (f'{SHORT}"": 1\n', (4, 1), "a key is missing"),
        (f"{SHORT}~: 1\n", (4, 1), "a key is missing"),
        (f"{SHORT}train:\n  <<: 3\n", (5, 7), "`<<` merges"),
        (f"{SHORT}train: &t\n  a: *t\n", (4, 8), "an alias inside its own anchor"),
        (f'{SHORT}output_dir: "\\ud800"\n', (4, 13), "U+D800"),
        (f'{SHORT}output_dir: "\\UFFFFFFFF"\n', (4, 16), "out of range"),
        (f"{SHORT}output_dir: a\x07b\n", (4, 14), "U+0007"),
        (f"{SHORT}train: {'[' * 40}{']' * 40}\n", (4, 8 + MAX_DEPTH), "levels deep"),
        (f"{SHORT}train: {'[' * 100_000}\n", (4, 8 + MAX_DEPTH), "levels deep"),
        (f"{SHORT}{'a: ' + chr(10)}" + "".join(f"  k{i}: 1\n" for i in range(MAX_NODES + 1)), None, "more than"),
        (LAUGHS, None, "once aliases are filled in"),
        (f"{SHORT}a: &a {'x' * 500_000}\nb: [{', '.join(['*a'] * 50)}]\n", None, "once aliases are filled in"),
        (f"# {'x' * MAX_BYTES}\n{SHORT}", (1, 1), "larger than"),
        (SHORT.encode("utf-16"), (1, 1), "byte order mark"),
        (b"\xef\xbb\xbf" + SHORT.encode(), (1, 1), "byte order mark"),
        (SHORT.encode() + "# é\noutput_dir: é".encode("latin-1"), (4, 3), "not UTF-8"),
        (SHORT.encode() + b"output_dir: \xff\n", (4, 13), "not UTF-8"),
        (b"a: \0\n", (1, 4), "U+0000"),
    ],
)
def test_refused_yaml(text: str | bytes, place: tuple[int, int] | None, words: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    matching = [fault for fault in caught.value.faults if words is None or words in fault.message]
    assert matching, caught.value
    assert matching[0].file == "r.yaml"
    assert matching[0].key
    if place is not None:
        assert (matching[0].line, matching[0].column) == place
    assert len(str(caught.value)) < 20_000


def test_a_syntax_fault_names_the_key_that_was_being_read() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{SHORT}train:\n  report_to: [wandb, *x]\n")
    assert caught.value.faults[0].key == "train.report_to.1"


def test_depth_and_size_just_inside_the_limits_are_read() -> None:
    assert parse_recipe(f"{SHORT}# {'x' * 100_000}\n").recipe.output_dir == "runs/default"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{SHORT}x: {'[' * (MAX_DEPTH - 1)}{']' * (MAX_DEPTH - 1)}\n")
    assert [fault.message for fault in caught.value.faults] == ["unknown key"]


def test_crlf_and_unicode_are_fine() -> None:
    recipe = parse_recipe((SHORT + "output_dir: runs/größe-模型\n").replace("\n", "\r\n").encode()).recipe
    assert recipe.output_dir == "runs/größe-模型"
