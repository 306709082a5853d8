"""The experiments on real data: a whole one on a tiny model, what is kept of it, and that every other one could start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import classifiers
import measure_tasks as mt
import pytest

from peftcli.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with files like TREC's; a test question stands in the training file as well, with another label."""
    folder = tmp_path / "data" / "trec"
    folder.mkdir(parents=True)
    kinds = ("NUM:dist", "LOC:city", "HUM:desc")
    train = [f"{kinds[row % 3]} Où is thing {row} ?" for row in range(40)]
    test = [f"{kinds[row % 3]} Who was {row} ?" for row in range(9)]
    (folder / "TREC.train").write_bytes("\n".join(train).encode("latin-1"))
    (folder / "TREC.test").write_bytes("\n".join([*test, "HUM:desc Où is thing 1 ?"]).encode("latin-1"))
    return folder.parent


def test_a_whole_experiment(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    classifiers.save_folder(tmp_path / "models" / "minilm", "bert")
    places = [
        "--data",
        str(data),
        "--models",
        str(tmp_path / "models"),
        "--work",
        str(tmp_path / "work"),
        "--results",
        str(tmp_path / "out"),
    ]
    assert mt.main(["trec", *places]) == 0
    text = (tmp_path / "out" / "trec.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert (found["train_rows"], found["test_rows"], found["steps"]) == (40, 9, 3), "the question that is known is left out"
    assert found["base"] is None and found["constant_answer"] == {"accuracy": pytest.approx(1 / 3)}
    assert set(found["tuned"]) == {"accuracy", "f1", "matthews", "loss"}
    low, high = found["tuned"]["accuracy"]["interval"]
    assert low <= found["tuned"]["accuracy"]["value"] <= high
    assert str(tmp_path) not in text
    capsys.readouterr()
    assert mt.main(["--table", "--results", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "| classes | TREC: six types of questions; minilm | 40, 9 | Accuracy | 33.3 % * |" in table


@pytest.mark.parametrize("name", mt.EXPERIMENTS)
def test_every_experiment_has_a_recipe_that_takes_its_settings(name: str) -> None:
    one = mt.EXPERIMENTS[name]
    settings = [*mt.PLAIN, *(["eval.before=false"] if one.fresh else []), *one.settings, "dataset.train=a", "dataset.eval=b"]
    recipe = load_recipe(ROOT / "recipes" / one.recipe, [*settings, "dataset.eval_fraction=0"]).recipe
    assert not recipe.train.load_best_model_at_end and recipe.train.eval_steps is None, "no test row chooses anything"
    written = {"rouge_l", "rouge_1", "rouge_2", "bleu", "chrf"} if recipe.eval.generate else set()
    assert set(one.figures) <= {"loss", *recipe.task.figures} | written


def test_recorded_results_are_of_known_experiments_and_hold_no_machine_s_path() -> None:
    for path in mt.RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        assert found["experiment"] == path.stem and path.stem in mt.EXPERIMENTS
        assert not re.search(r'"[^"]*(?<![a-z])/(home|tmp|work|root)/', text), path
        assert found["tuned"] and all(figure["interval"] for figure in found["tuned"].values()), path
        assert found["train_rows"] > 0 and found["test_rows"] > 0


def test_unknown_names_and_missing_places_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PEFTCLI_DATA_DIR", "PEFTCLI_MODELS_DIR"):
        monkeypatch.delenv(name, raising=False)
    for arguments, message in ((["tric"], "'tric' is none of trec"), (["trec"], "name the folders of the data and of the models")):
        with pytest.raises(SystemExit):
            mt.main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"trec/TREC\.train: No such file"):
        mt.main(
            ["trec", "--data", str(tmp_path), "--models", str(tmp_path), "--work", str(tmp_path / "w"), "--results", str(tmp_path / "r")]
        )
