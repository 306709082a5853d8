"""``peftcli data show`` and ``data stats``: what they print is what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
from adapter_cases import command_line

from peftcli.data.prepare import prepare
from peftcli.data.splits import TextSplit
from peftcli.recipe.load import load_recipe


@pytest.fixture
def recipe(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "run"), encoding="utf-8")
    return path


def prepared_train(recipe: Path) -> TextSplit:
    loaded = load_recipe(recipe).recipe
    rows = helpers.CAUSAL_LM.rows(loaded.dataset, helpers.tiny_tokenizer())
    split = prepare(rows, base_dir=recipe.parent, seed=loaded.train.seed).train
    assert isinstance(split, TextSplit)
    return split


def test_rows_are_shown_as_they_are_trained(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command_line(monkeypatch, capsys, "data", "show", recipe, "--rows", 22, "--json")
    split, tokenizer = prepared_train(recipe), helpers.tiny_tokenizer()
    shown = json.loads(out)
    assert code == 0
    assert [row["origin"] for row in shown] == split.origins
    for row, ids, mask in zip(shown, split.input_ids, split.supervised, strict=True):
        assert "".join(text for text, _ in row["runs"]) == tokenizer.decode(ids)
        assert "".join(text for text, learned in row["runs"] if learned) == tokenizer.decode(ids[mask])
        assert (row["tokens"], row["units"]) == (len(ids), int(mask[1:].sum()))
    code, out, _ = command_line(monkeypatch, capsys, "data", "show", recipe, "--row", 3)
    assert code == 0
    assert "⟦blue!blue!blue!<|im_end|>⟧" in out
    assert "row 3 of 22" in out


def test_counts_are_those_of_the_rows(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command_line(monkeypatch, capsys, "data", "stats", recipe, "--json")
    facts, split = json.loads(out), prepared_train(recipe)
    lengths = split.lengths
    assert code == 0
    train = facts["train"]
    assert (train["rows"], train["tokens"], train["longest"], train["shortest"]) == (22, sum(lengths), max(lengths), min(lengths))
    assert train["supervised"] == sum(int(mask[1:].sum()) for mask in split.supervised)
    assert sum(bin_["rows"] for bin_ in train["histogram"]) == 22
    assert sum(length <= train["quantiles"]["0.5"] for length in lengths) >= 11
    assert facts["steps"] == 12
    assert 0 < facts["padding_waste"] < 1
    code, out, _ = command_line(monkeypatch, capsys, "data", "stats", recipe)
    assert code == 0
    assert "12 steps" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row", 23], "there are 22 rows"),
        (["--split", "test"], "neither train nor eval"),
        (["--split", "eval", "--row", 7], "there are 6"),
    ],
)
def test_what_is_not_there(
    options: list[object], message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command_line(monkeypatch, capsys, "data", "show", recipe, *options)
    assert code == 2
    assert message in err
