"""Command-line overrides."""

from __future__ import annotations

import pytest

from peftcli.errors import Fault, RecipeError
from peftcli.methods.lora import LoraConfig
from peftcli.recipe import Recipe, parse_recipe

SHORT = "base_model: m\nmethod: lora\ndataset: rows.jsonl\n"
LIST = "base_model: m\nmethod: lora\ndataset: {train: [a, {path: b, weight: 3}], eval: c}\ntrain: {epochs: 1}\n"


def read(*overrides: str, text: str = SHORT) -> Recipe:
    return parse_recipe(text, "r.yaml", overrides).recipe


def fault(*overrides: str, text: str = SHORT) -> Fault:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    (only,) = caught.value.faults
    return only


def test_scalars_lists_and_mappings() -> None:
    recipe = read("train.learning_rate=1e-4", "method.rank=4", "method.target_modules=[q_proj, v_proj]", "dataset.columns={text: body}")
    assert isinstance(recipe.method, LoraConfig)
    assert (recipe.train.learning_rate, recipe.method.rank, recipe.method.target_modules) == (1e-4, 4, ["q_proj", "v_proj"])
    assert recipe.dataset.columns == {"text": "body"}


def test_later_ones_win_and_all_win_over_the_file() -> None:
    assert read("train.epochs=2", "train.epochs=3", text=LIST).train.epochs == 3.0


def test_values_follow_the_yaml_rules() -> None:
    recipe = read(
        "output_dir=a=b", 'base_model.revision="1234567"', "train.max_grad_norm=", "dataset.system='x: y'", "train.warmup_steps=0"
    )
    assert (recipe.output_dir, recipe.base_model.revision, recipe.train.max_grad_norm) == ("a=b", "1234567", None)
    assert (recipe.dataset.system, recipe.train.warmup_steps) == ("x: y", 0)


def test_shorthands_become_mappings() -> None:
    recipe = read("base_model.dtype=float32", "method.rank=4", "dataset.max_length=64", "dataset.eval=held.jsonl")
    assert (recipe.base_model.name, recipe.base_model.dtype) == ("m", "float32")
    assert recipe.dataset.eval is not None
    assert (recipe.dataset.max_length, recipe.dataset.train[0].path, recipe.dataset.eval[0].path) == (64, "rows.jsonl", "held.jsonl")


def test_whole_sections_may_be_replaced() -> None:
    recipe = read("base_model=other", "base_model.dtype=float32", "dataset=[a, b]", "method=full")
    assert (recipe.base_model.name, recipe.method.name, len(recipe.dataset.train)) == ("other", "full", 2)


@pytest.mark.parametrize("override", ["dataset.train.weight=2", "dataset.train.0.weight=2"])
def test_into_the_only_source(override: str) -> None:
    assert read(override).dataset.train[0].weight == 2.0


def test_list_entries_by_index() -> None:
    recipe = read("dataset.train.0.weight=2", "dataset.train.1=d", "dataset.train.2.path=e", "train.report_to.0=wandb", text=LIST)
    assert [(source.path, source.weight) for source in recipe.dataset.train] == [("a", 2.0), ("d", 1.0), ("e", 1.0)]
    assert recipe.train.report_to == ["wandb"]


def test_an_override_alone_may_make_a_recipe() -> None:
    assert read("base_model=m", "method=lora", "dataset=a", text="").base_model.name == "m"


@pytest.mark.parametrize(
    ("override", "key", "column", "near"),
    [
        ("train.lerning_rate=1", "train.lerning_rate", 7, "learning_rate"),
        ("trian.learning_rate=1", "trian", 1, "train"),
        ("train.learning_rate=fast", "train.learning_rate", 21, None),
        ("train.scheduler=lineer", "train.scheduler", 17, "linear"),
        ("dataset.train.weigth=2", "dataset.train.weigth", 15, "weight"),
        ("dataset.train.7.weight=2", "dataset.train.7", 15, None),
        ("train.epochs.x=2", "train.epochs", 7, None),
        ("method=lorra", "method", 8, "lora"),
        ("train.report_to=[wandb, wandbb]", "train.report_to.1", 25, "wandb"),
        ("train.epochs", "train.epochs", 1, None),
        ("=3", "(document)", 1, None),
        ("train..epochs=3", "train..epochs", 1, None),
        ("output_dir=[a", "output_dir", 14, None),
        ("output_dir=!!str x", "output_dir", 12, None),
        ("train={epochs: 1, epochs: 2}", "train.epochs", 19, None),
        ("output_dir=*x", "output_dir", 12, None),
        ("trust_remote_code=true", "trust_remote_code", 1, None),
    ],
)
def test_faults_have_their_column_in_the_override(override: str, key: str, column: int, near: str | None) -> None:
    found = fault("train.seed=1", override)
    assert (found.file, found.line, found.column, found.key, found.nearest) == ("<command line>", 2, column, key, near)
    assert found.message


def test_a_value_in_the_file_has_no_keys_below_it() -> None:
    assert "a single value stands here" in fault("train.epochs.x=2", text=LIST).message
