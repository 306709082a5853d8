"""Writing recipes back, and what is generated from the schema."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peftcli.methods import registry
from peftcli.recipe import parse_recipe
from peftcli.recipe.render import SCHEMA_FILE, commented_recipe, dump_recipe, json_schema, main, reference_markdown, schema_text
from peftcli.recipe.schema import Recipe

SHORT = "base_model: m\nmethod: lora\ndataset: rows.jsonl\n"
RECIPES = [
    SHORT,
    SHORT.replace("lora", "qlora"),
    SHORT.replace("lora", "full"),
    f"{SHORT}train: {{batch_tokens: 4096, warmup_steps: 5, learning_rate: 3.3e-7, report_to: [wandb]}}",
    "base_model: {name: m, new_tokens: [<a>, 'x: y', '5', '2026-01-01']}\n"
    "method: {name: lora, target_modules: 'all-linear', rank_pattern: {q_proj: 4}}\n"
    'dataset: {train: [a, {path: b, weight: 0.1, columns: {text: \'no\'}}], eval: c, system: "two\\nlines: \\"é\\""}\n'
    "train: {eval_steps: 5, load_best_model_at_end: true, max_grad_norm: null}\neval: {generate: true}\n",
]


@pytest.mark.parametrize("text", RECIPES)
def test_a_dumped_recipe_reloads_as_its_equal(text: str) -> None:
    recipe = parse_recipe(text).recipe
    dumped = dump_recipe(recipe)
    assert parse_recipe(dumped).recipe == recipe
    assert dump_recipe(parse_recipe(dumped).recipe) == dumped


@pytest.mark.parametrize("text", RECIPES)
def test_plain_yaml_readers_see_the_same_values(text: str) -> None:
    recipe = parse_recipe(text).recipe
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json")


def test_every_default_is_written_in_the_schema_s_order() -> None:
    document = yaml.safe_load(dump_recipe(parse_recipe(SHORT).recipe))
    assert list(document) == list(Recipe.model_fields)
    for section in ("base_model", "dataset", "train", "eval"):
        assert list(document[section]) == list(getattr(parse_recipe(SHORT).recipe, section).__class__.model_fields)
    assert document["method"]["rank"] == 16


@settings(max_examples=60, deadline=None)
@given(value=st.floats(min_value=1e-300, max_value=99.0, exclude_min=True))
def test_floats_round_trip_exactly(value: float) -> None:
    recipe = parse_recipe(SHORT).recipe
    recipe.train.learning_rate = value
    dumped = dump_recipe(recipe)
    assert parse_recipe(dumped).recipe.train.learning_rate == value
    assert yaml.safe_load(dumped)["train"]["learning_rate"] == value


YAML_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
TRICKY = st.sampled_from(
    ["2e-4", "1e5", ".5", "yes", "null", "~", "true", "0x1", "1_000", "a: b", "- a", "#x", " x ", "x\n", "<<", "*a", "!t", ".inf"]
)


@settings(max_examples=60, deadline=None)
@example(text="\x85")
@example(text="a word " * 60)
@example(text="  two lines,\n\n  one blank \nand a long one: " + "word " * 60 + "\n\n")
@example(text="\n x")
@given(text=st.one_of(YAML_TEXT, TRICKY))
def test_text_round_trips_exactly(text: str) -> None:
    recipe = parse_recipe(SHORT).recipe
    recipe.dataset.system = text
    recipe.dataset.columns = {text: "x"}
    recipe.base_model.new_tokens = [text]
    assert parse_recipe(dump_recipe(recipe)).recipe == recipe


def test_the_shipped_schema_is_current() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run: python -m peftcli.recipe.render --write"
    assert json.loads(files("peftcli.recipe").joinpath("recipe.schema.json").read_text(encoding="utf-8")) == json_schema()
    assert main([]) == 0


def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("text", [*RECIPES, "base_model: m\nmethod: lora\ndataset: [a, {path: b}]\ntrain:\n", commented_recipe({})])
def test_the_schema_takes_good_recipes(text: str) -> None:
    assert list(validator().iter_errors(yaml.safe_load(text.replace("3.3e-7", "3.3e-07")))) == []
    assert list(validator().iter_errors(yaml.safe_load(dump_recipe(parse_recipe(text).recipe)))) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["extra"], 1),
        (["base_model", "extra"], 1),
        (["method", "extra"], 1),
        (["method", "name"], "lorra"),
        (["method", "rank"], "x"),
        (["dataset", "extra"], 1),
        (["dataset", "train"], []),
        (["dataset", "train"], [{"path": "a", "extra": 1}]),
        (["dataset", "eval"], []),
        (["train", "extra"], 1),
        (["train", "learning_rate"], 0),
        (["train", "scheduler"], "cosin"),
        (["eval", "examples"], -1),
        (["output_dir"], 3),
        (["base_model"], ""),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(path: list[str], value: object) -> None:
    document = yaml.safe_load(dump_recipe(parse_recipe(SHORT).recipe))
    assert validator().is_valid(document)
    changed = copy.deepcopy(document)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert not validator().is_valid(changed)


def test_every_method_has_its_options_in_the_schema() -> None:
    schema = json_schema()
    for name in registry.names():
        branch = schema["$defs"][f"method.{name}"]
        assert branch["additionalProperties"] is False
        assert branch["properties"]["name"]["const"] == name
        assert set(branch["properties"]) == set(registry.get(name).Config.model_fields)


def test_every_field_is_described_and_listed_in_the_reference() -> None:
    reference = reference_markdown()
    schema = Recipe.model_json_schema()
    for section in ("BaseModelSection", "SourceSection", "DatasetSection", "TrainSection", "EvalSection"):
        for key, field in schema["$defs"][section]["properties"].items():
            assert field.get("description"), f"{section}.{key} has no description"
            assert f"| `{key}` |" in reference
    for name in registry.names():
        assert f"`method: {name}`" in reference
    assert "| `learning_rate` | a number > 0 and < 100 | `0.0002` | Peak learning rate. |" in reference


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"base_model.name": "package:x: y", "method.name": "qlora", "method.rank": 4, "output_dir": "runs/é"},
        {"dataset.train": ["a", "b"], "dataset.eval": "c", "eval.generate": True, "train.learning_rate": 3e-7},
        {"train.batch_tokens": 4096, "dataset.columns.prompt": "q", "dataset.eval_fraction": 0.05, "train.warmup_steps": 3},
        {"dataset.train": "2e-4", "base_model.new_tokens": ["# no"], "base_model.quantization": "int8"},
    ],
)
def test_the_commented_recipe_is_short_valid_and_holds_the_values(values: dict[str, object]) -> None:
    text = commented_recipe(values)
    assert 10 <= len(text.splitlines()) <= 22
    assert text.count("#") > 8
    recipe = parse_recipe(text).recipe
    for key, value in values.items():
        found: Any = recipe.model_dump()
        for part in key.split("."):
            found = found[part]
        if key in ("dataset.train", "dataset.eval"):
            value = [value] if isinstance(value, str) else value
            found = [source["path"] for source in found]
        assert found == value


def test_every_suggestion_in_the_commented_recipe_is_valid() -> None:
    lines = commented_recipe({}).splitlines()[1:]
    text = "\n".join(line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in lines)
    assert parse_recipe(text).recipe.train.eval_steps == 100
