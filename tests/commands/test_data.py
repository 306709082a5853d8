"""``peftcli data show`` and ``data stats``: what they print is what is trained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import classifiers
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
    assert train["supervised_share"] == train["supervised"] / train["tokens"]
    assert facts["steps"] == 12
    assert 0 < facts["padding_waste"] < 1
    code, out, _ = command_line(monkeypatch, capsys, "data", "stats", recipe)
    assert code == 0
    assert "12 steps" in out
    for what in ("exact duplicates of an earlier row", "in the training rows too", "asked there, otherwise answered"):
        line = next(line for line in out.splitlines() if what in line)
        assert line.rstrip(" │").endswith(" 0") or "│         0 │" in line, "nothing found is said, too"


REAL = {
    "trec": (
        r"""
  train: {path: trec/TREC.train, encoding: latin-1, pattern: '(?P<label>\w+):(?P<fine>\w+) (?P<text>.*)'}
  eval: {path: trec/TREC.test, encoding: latin-1, pattern: '(?P<label>\w+):(?P<fine>\w+) (?P<text>.*)'}""",
        (5452, 500, 71, 10),
    ),
    "cola": (
        """
  train: {path: cola/in_domain_train.tsv, header: [source, label, star, text], limit: 2000}
  eval: {path: cola/in_domain_dev.tsv, header: [source, label, star, text]}""",
        (2000, 527, 0, 3),
    ),
    "stsb": (
        """
  train: {path: stsb/stsb-zh-train.csv, header: [text, text_pair, label], limit: 2000}
  eval: {path: stsb/stsb-zh-dev.csv, header: [text, text_pair, label]}""",
        (2000, 1500, 10, 7),
    ),
    "rte": (
        """
  train: rte/train.tsv
  eval: rte/dev.tsv
  columns: {text: sentence1, text_pair: sentence2}""",
        (2490, 277, 2, 0),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_published_files_are_counted_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files without a header, in another encoding, taken apart by a pattern: read as a recipe says."""
    folder = os.environ.get("PEFTCLI_DATA_DIR")
    if not folder:
        pytest.skip("PEFTCLI_DATA_DIR is not set: no published datasets at hand")
    dataset, expected = REAL[name]
    dataset = dataset.replace(f" {name}/", f" {folder}/{name}/")
    model = classifiers.save_folder(tmp_path / "bert", "bert")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base_model: {model}\nmethod: lora\ntask: sequence_classification\ndataset:{dataset}\n", encoding="utf-8")
    code, out, err = command_line(monkeypatch, capsys, "data", "stats", path, "--json")
    assert code == 0, err
    facts = json.loads(out)
    audit = facts["audit"]
    assert (facts["train"]["rows"], facts["eval"]["rows"], audit["duplicates"], audit["leaked_rows"]) == expected
    assert facts["train"]["supervised"] is None, "a label is no token"


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora", "llama-tied"),
        ("dpo", "llama-tied"),
        ("kto", "llama-tied"),
        ("seq2seq", "flan-t5"),
        ("sequence_classification", "bert"),
        ("token_classification", "bert"),
    ],
)
def test_rows_of_every_task_are_shown_and_counted(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped recipes with their data; only the model is a tiny one."""
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "smoke" / f"{name}.yaml"
    folder = (classifiers.save_folder if kind == "bert" else helpers.save_folder)(tmp_path / "model", kind)
    chosen = (f"base_model.name={folder}", "base_model.dtype=float32")
    for split in ("train", "eval"):
        code, out, err = command_line(monkeypatch, capsys, "data", "show", recipe, *chosen, "--split", split, "--json")
        assert code == 0, err
        rows = json.loads(out)
        assert rows and all(any(learned for _, learned in row["runs"]) and row["units"] > 0 for row in rows)
    code, out, err = command_line(monkeypatch, capsys, "data", "stats", recipe, *chosen, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert 0 <= facts["padding_waste"] < 1 and facts["train"]["tokens"] == facts["audit"]["tokens"]
    assert sum(part["rows"] for part in facts["train"]["histogram"]) == facts["train"]["rows"]
