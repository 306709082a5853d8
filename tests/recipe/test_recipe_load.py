"""Reading a recipe: values, shorthands, and every fault with its place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
from pydantic import model_validator

from peftcli.errors import Fault, RecipeError, UsageError
from peftcli.methods import registry
from peftcli.methods.base import MethodConfig
from peftcli.methods.lora import LoraConfig
from peftcli.recipe import Recipe, load_recipe, parse_recipe

GOOD = """\
base_model: {name: org/model, revision: main, dtype: bfloat16}
method: {name: lora, rank: 8, alpha: 16, target_modules: [q_proj, v_proj]}
dataset: {train: rows.jsonl, eval: held_out.jsonl, format: messages, max_length: 512}
train: {epochs: 2, max_steps: null, batch_size: 4, learning_rate: 2e-4, seed: 7}
output_dir: runs/my-run
"""
SHORT = "base_model: org/model\nmethod: lora\ndataset: rows.jsonl\n"


def faults_of(text: str | bytes, *overrides: str) -> list[Fault]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.faults)


def test_a_good_recipe_has_the_written_values_and_every_default() -> None:
    recipe = parse_recipe(GOOD).recipe
    assert type(recipe) is Recipe
    assert recipe.base_model.name == "org/model"
    assert isinstance(recipe.method, LoraConfig)
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.target_modules) == (8, 16.0, ["q_proj", "v_proj"])
    assert [source.path for source in recipe.dataset.train] == ["rows.jsonl"]
    assert recipe.dataset.eval is not None
    assert recipe.dataset.eval[0].path == "held_out.jsonl"
    assert recipe.train.learning_rate == 2e-4
    assert (recipe.train.seed, recipe.train.scheduler, recipe.eval.examples) == (7, "cosine", 3)


@pytest.mark.parametrize(
    ("dataset", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("{train: a.jsonl}", ["a.jsonl"]),
        ("{train: {path: a.jsonl, weight: 2}}", ["a.jsonl"]),
        ("{train: [a.jsonl, {path: b.jsonl}]}", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_dataset_shorthands(dataset: str, paths: list[str]) -> None:
    recipe = parse_recipe(f"base_model: m\nmethod: lora\ndataset: {dataset}\n").recipe
    assert [source.path for source in recipe.dataset.train] == paths
    assert (recipe.base_model.name, recipe.method.name) == ("m", "lora")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("2.0e-4", 2e-4), ("2E-4", 2e-4), (".5", 0.5), ("5.", 5.0), ("1", 1.0), ("+1e-3", 1e-3), ("1e1", 10.0)],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert parse_recipe(f"{SHORT}train: {{learning_rate: {text}}}").recipe.train.learning_rate == value


def test_scientific_notation_may_stand_for_a_count() -> None:
    assert parse_recipe(f"{SHORT}train: {{max_steps: 1e5}}").recipe.train.max_steps == 100_000


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "1:30", "2026-01-01", "0x10", "0b1", "007", "1_000", "=", '"8"', "'null'"])
def test_other_yaml_1_1_types_stay_text(text: str) -> None:
    assert parse_recipe(f"{SHORT}output_dir: {text}").recipe.output_dir == text.strip("\"'")


@pytest.mark.parametrize("text", ["yes", "on", "1", '"true"'])
def test_only_true_and_false_are_booleans(text: str) -> None:
    (fault,) = faults_of(f"{SHORT}train: {{shuffle: 1}}".replace("shuffle: 1", f"deterministic: {text}"))
    assert fault.key == "train.deterministic"
    assert fault.allowed == "true or false"
    assert (fault.nearest == "true") == (text in ("yes", "on"))


def test_an_empty_section_means_its_defaults() -> None:
    assert parse_recipe(f"{SHORT}train:\n  # epochs: 3\neval:\n").recipe == parse_recipe(SHORT).recipe


def test_merge_keys_and_anchors() -> None:
    text = "dataset:\n  train:\n    - &a {path: a.jsonl, weight: 2}\n    - {<<: *a, path: b.jsonl}\n"
    text += "    - <<: [*a]\n      limit: 3\nbase_model: m\nmethod: lora\n"
    first, second, third = parse_recipe(text).recipe.dataset.train
    assert (second.path, second.weight) == ("b.jsonl", 2.0)
    assert (third.path, third.limit) == ("a.jsonl", 3)
    assert first.weight == 2.0


def test_all_faults_come_together_in_their_places() -> None:
    text = """\
base_model: {dtyp: bfloat16, quantization: nf5}
method:
  name: lora
  rnk: 16
  rank: 0
  target_modules: 3
dataset:
  train:
    - path: a.jsonl
      weigth: 2
    - 7
  max_length: 0
train:
  epochs: two
  learning_rate: .nan
  batch_size: 8
  batch_tokens: 4096
learning_rate: 3
"""
    assert [(f.key, f.line, f.column, f.found, f.nearest) for f in faults_of(text)] == [
        ("base_model.name", 1, 1, None, None),
        ("base_model.dtyp", 1, 14, "dtyp", "dtype"),
        ("base_model.quantization", 1, 44, "nf5", "nf4"),
        ("method.rnk", 4, 3, "rnk", "rank"),
        ("method.rank", 5, 9, "0", None),
        ("method.target_modules", 6, 19, "3", None),
        ("dataset.train.0.weigth", 10, 7, "weigth", "weight"),
        ("dataset.train.1", 11, 7, "7", None),
        ("dataset.max_length", 12, 15, "0", None),
        ("train.epochs", 14, 11, "two", None),
        ("train.learning_rate", 15, 18, ".nan", None),
        ("train.batch_tokens", 17, 17, "4096", None),
        ("learning_rate", 18, 1, "learning_rate", "train.learning_rate"),
    ]


@pytest.mark.parametrize(
    ("tail", "key", "place", "allowed"),
    [
        ("train: {scheduler: cosin}", "train.scheduler", (4, 20), "cosine, linear, constant"),
        ("train: {learning_rate: 0}", "train.learning_rate", (4, 24), "a number > 0 and < 100"),
        ("train: {batch_size: 1.5}", "train.batch_size", (4, 21), "a whole number >= 1 or null"),
        ('train: {batch_size: "8"}', "train.batch_size", (4, 21), "a whole number >= 1 or null"),
        ("train: {seed: true}", "train.seed", (4, 15), "a whole number >= 0 and < 4294967296"),
        ("train: {report_to: [wandb, wandbb]}", "train.report_to.1", (4, 28), "tensorboard, wandb, mlflow, comet_ml, trackio"),
        ("train: [1]", "train", (4, 8), None),
        ("eval: {examples: 101}", "eval.examples", (4, 18), "a whole number >= 0 and <= 100"),
        ("eval: {metrics: [[rouge]]}", "eval.metrics.0", (4, 18), None),
        ("output_dir: 2026", "output_dir", (4, 13), "text"),
        ('output_dir: ""', "output_dir", (4, 13), "text"),
        ('output_dir: "a\\0b"', "output_dir", (4, 13), None),
        ('output_dir: "a\\nb"', "output_dir", (4, 13), None),
        ("train: {seed: 123456789012345678901234567890}", "train.seed", (4, 15), None),
        ("train: {seed: 1e999}", "train.seed", (4, 15), None),
    ],
)
def test_one_fault(tail: str, key: str, place: tuple[int, int], allowed: str | None) -> None:
    first = faults_of(SHORT + tail)[0]
    assert (first.key, (first.line, first.column), first.file) == (key, place, "r.yaml")
    assert allowed is None or first.allowed == allowed
    assert f"r.yaml:{place[0]}:{place[1]}: {key}: " in str(first)


@pytest.mark.parametrize(
    ("tail", "key", "words"),
    [
        ("train: {batch_size: null}", "train.batch_size", "train.batch_tokens"),
        ("train: {batch_size: 2, batch_tokens: 3}", "train.batch_tokens", "excludes train.batch_size"),
        ("train: {warmup_ratio: 0.1, warmup_steps: 3}", "train.warmup_steps", "excludes train.warmup_ratio"),
        ("train: {eval_steps: 5, load_best_model_at_end: true}", "train.load_best_model_at_end", "held-out rows"),
        ("train: {eval_steps: 5, early_stopping_patience: 2}", "train.early_stopping_patience", "held-out rows"),
        ("eval: {generate: true}", "eval.generate", "held-out rows"),
    ],
)
def test_rules_between_fields(tail: str, key: str, words: str) -> None:
    (fault,) = faults_of(SHORT + tail)
    assert fault.key == key
    assert words in fault.message


def test_held_out_rows_come_from_one_place_and_early_stopping_needs_evaluations() -> None:
    text = "base_model: m\nmethod: lora\ndataset: {train: a, eval: b, eval_fraction: 0.1}\ntrain: {early_stopping_patience: 1}\n"
    first, second = faults_of(text)
    assert (first.key, first.line, first.column) == ("dataset.eval_fraction", 3, 45)
    assert (second.key, second.allowed) == ("train.early_stopping_patience", "together with train.eval_steps")


def test_a_twin_takes_its_partner_s_default_away() -> None:
    train = parse_recipe(f"{SHORT}train: {{batch_tokens: 4096, warmup_steps: 10}}").recipe.train
    assert (train.batch_size, train.batch_tokens, train.warmup_ratio, train.warmup_steps) == (None, 4096, 0.0, 10)


@pytest.mark.parametrize("text", ["method: lorra", "method: {name: lorra, rank: 8}"])
def test_an_unknown_method_is_one_fault_among_the_others(text: str) -> None:
    first, second = faults_of(f"base_model: m\n{text}\ndataset: a\ntrain: {{epoch: 1}}\n")
    assert (first.found, first.nearest) == ("lorra", "lora")
    assert first.allowed is not None
    assert ", ".join(registry.names()) in first.allowed
    assert (second.key, second.nearest) == ("train.epoch", "epochs")


def test_a_method_without_a_name_is_only_missing_its_name() -> None:
    (fault,) = faults_of("base_model: m\nmethod: {rank: 8}\ndataset: a\n")
    assert (fault.key, fault.line, fault.column, fault.message) == ("method.name", 2, 1, "is missing")


def test_missing_sections_have_the_place_of_the_document() -> None:
    faults = faults_of("# a comment\noutput_dir: x\n")
    assert [(f.key, f.line, f.column) for f in faults] == [("base_model", 2, 1), ("method", 2, 1), ("dataset", 2, 1)]


@pytest.mark.parametrize("where", ["trust_remote_code: true", "base_model: {name: m, trust_remote_code: true}"])
def test_remote_code_is_no_recipe_key(where: str) -> None:
    text = where if where.startswith("base_model") else f"base_model: m\n{where}"
    (fault,) = faults_of(f"{text}\nmethod: lora\ndataset: a\n")
    assert "--trust-remote-code" in fault.message
    assert "revision" in fault.message


@pytest.mark.parametrize(("key", "ours"), [("lr", "train.learning_rate"), ("lora_alpha", "method.alpha"), ("model", "base_model")])
def test_names_from_other_tools_are_understood(key: str, ours: str) -> None:
    assert faults_of(f"{SHORT}{key}: 1")[0].nearest == ours


def test_environment_variables_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "elsewhere")
    assert parse_recipe(f"{SHORT}output_dir: $PLACE/${{PLACE}}").recipe.output_dir == "$PLACE/${PLACE}"


class TinyConfig(MethodConfig):
    name: Literal["tiny"] = "tiny"
    pair: tuple[int, int] = (1, 2)
    loud: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> TinyConfig:
        if self.pair[0] > self.pair[1]:
            raise ValueError("the pair must be in order")
        return self


class Tiny:
    Config = TinyConfig
    summary = "For tests."
    recommended: ClassVar[dict[str, object]] = {"train.batch_size": 3, "train.learning_rate": 0.5, "method.loud": True, "eval.examples": 1}

    @classmethod
    def check_recipe(cls, recipe: Any) -> list[tuple[str, str]]:
        return [("base_model.dtype", "tiny needs float32")] if recipe.base_model.dtype != "float32" else []


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("recipe_tiny_method")
    vars(module)["Tiny"] = Tiny
    monkeypatch.setitem(sys.modules, "recipe_tiny_method", module)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register("tiny", "recipe_tiny_method:Tiny")


TINY = "base_model: {name: m, dtype: float32}\nmethod: {name: tiny, pair: [2, 5]}\ndataset: a\n"


@pytest.mark.usefixtures("tiny")
def test_recommended_values_fill_only_what_the_user_left_out() -> None:
    recipe = parse_recipe(TINY).recipe
    assert (recipe.train.batch_size, recipe.train.learning_rate, recipe.eval.examples) == (3, 0.5, 1)
    assert recipe.method == TinyConfig(pair=(2, 5), loud=True)
    written = parse_recipe(f"{TINY}train: {{learning_rate: 0.1}}", overrides=["eval.examples=2"]).recipe
    assert (written.train.batch_size, written.train.learning_rate, written.eval.examples) == (3, 0.1, 2)
    assert parse_recipe(f"{TINY}train: {{batch_tokens: 99}}").recipe.train.batch_size is None


@pytest.mark.usefixtures("tiny")
def test_a_method_s_own_validators_and_rules_come_with_the_other_faults() -> None:
    faults = faults_of("base_model: {name: m, dtype: bfloat16}\nmethod: {name: tiny, pair: [5, 2]}\ndataset: a\ntrain: {sed: 1}\n")
    assert [(f.key, f.line, f.column, f.message) for f in faults] == [
        ("method", 2, 9, "the pair must be in order"),
        ("train.sed", 4, 9, "unknown key"),
    ]
    faults = faults_of("base_model: {name: m, dtype: bfloat16}\nmethod: {name: tiny, pair: [2, 5]}\ndataset: a\ntrain: {sed: 1}\n")
    assert [(f.key, f.line, f.column, f.message) for f in faults] == [
        ("base_model.dtype", 1, 30, "tiny needs float32"),
        ("train.sed", 4, 9, "unknown key"),
    ]


def test_qlora_asks_for_a_four_bit_base() -> None:
    assert parse_recipe(SHORT.replace("lora", "qlora")).recipe.base_model.quantization == "nf4"
    (fault,) = faults_of(SHORT.replace("lora", "qlora"), "base_model.quantization=int8")
    assert (fault.file, fault.line, fault.column, fault.key) == ("<command line>", 1, 25, "base_model.quantization")


def test_paths_lead_to_the_current_folder_first_and_then_to_the_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    home = tmp_path / "recipes"
    home.mkdir()
    (home / "r.yaml").write_text(SHORT)
    (home / "rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_recipe("../recipes/r.yaml")
    assert loaded.resolve_path("rows.jsonl").samefile(home / "rows.jsonl")
    Path("rows.jsonl").write_text("")
    assert loaded.resolve_path("rows.jsonl") == Path("rows.jsonl")
    assert loaded.resolve_path("org/data") == Path("org/data")
    assert loaded.resolve_path("x" * 5000) == Path("x" * 5000)


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(SHORT)
    with pytest.raises(UsageError, match=r"there is no recipe at") as missing:
        load_recipe(tmp_path / "recip.yaml")
    assert "recipe.yaml" in str(missing.value.hint)
    with pytest.raises(UsageError, match="is a folder") as folder:
        load_recipe(tmp_path)
    assert folder.value.hint
    with pytest.raises(UsageError, match="cannot read"):
        load_recipe("a\0b.yaml")

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match="Permission denied") as denied:
        load_recipe(tmp_path / "recipe.yaml")
    assert not isinstance(denied.value, RecipeError)
    assert denied.value.hint
