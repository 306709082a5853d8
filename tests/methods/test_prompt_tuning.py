"""Prompt tuning against stock PEFT: outputs, gradients, files; layouts, generation, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import peft
import prompt_cases as cases
import pytest
import torch

from peftcli.errors import CheckpointError, RecipeError, UsageError
from peftcli.interchange import hf_peft
from peftcli.methods.base import Context
from peftcli.recipe.load import parse_recipe

NAME, OPTIONS = "prompt_tuning", {"num_virtual_tokens": 5}


def theirs() -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_outputs_and_gradients_equal_stock_peft(kind: str, dtype: torch.dtype) -> None:
    cases.check_against_stock(kind, dtype, NAME, OPTIONS, theirs(), 5)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_files_go_both_ways(kind: str, tmp_path: Path) -> None:
    cases.check_files(kind, NAME, OPTIONS, theirs(), 5, tmp_path)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_packed_padded_and_alone_are_the_same(kind: str) -> None:
    cases.check_layouts(kind, NAME, OPTIONS)
    cases.check_no_leak(kind, NAME, OPTIONS)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_batch_generates_what_each_prompt_does(kind: str) -> None:
    cases.check_generation(kind, NAME, OPTIONS)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_gradient_checkpointing(kind: str) -> None:
    cases.check_checkpointing(kind, NAME, OPTIONS)


def test_a_whole_run(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    report = cases.check_whole_run(
        "{name: prompt_tuning, init: text, init_text: 'Repeat the colour!'}", tmp_path, tiny_folders["llama-tied"], tiny_data
    )
    assert report.model.trainable_parameters == 20 * report_width(tiny_folders["llama-tied"])


def report_width(folder: Path) -> int:
    return int(helpers.tiny_model(folder.name).config.hidden_size)


def test_initial_values() -> None:
    base = helpers.tiny_model()
    table = base.get_input_embeddings().weight.detach()
    drawn = helpers.adapted(NAME, num_virtual_tokens=9)[0].prompt_embeddings.detach()
    assert all(any(torch.equal(row, entry) for entry in table) for row in drawn)
    random = helpers.adapted(NAME, init="random", num_virtual_tokens=200)[0].prompt_embeddings
    assert abs(float(random.detach().std()) - 1.0) < 0.05
    method = helpers.make_method(NAME, init="text", init_text="abc", num_virtual_tokens=5)
    model: Any = method.apply(base, Context(encode=lambda text: [40, 41, 42] if text == "abc" else []))
    assert torch.equal(model.prompt_embeddings.detach(), table[[40, 41, 42, 40, 41]])
    with pytest.raises(UsageError, match="init_text"):
        method.apply(helpers.tiny_model(), Context(encode=lambda text: []))


def test_text_initialisation_is_in_the_file_and_stock_peft_reads_it(tmp_path: Path) -> None:
    method = helpers.make_method(NAME, init="text", init_text="abc", num_virtual_tokens=5)
    model = method.apply(helpers.tiny_model(), Context(encode=lambda text: [40]))
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.prompt_tuning_init, config.prompt_tuning_init_text, config.tokenizer_name_or_path) == ("TEXT", "abc", "some/base")
    loaded = peft.PeftModel.from_pretrained(helpers.tiny_model(), tmp_path)
    assert helpers.same(cases.theirs(loaded, helpers.some_ids(), 5), helpers.logits(model))
    read = hf_peft.read_adapter(tmp_path)
    assert read.method.config == method.config
    assert torch.equal(helpers.logits(hf_peft.apply_adapter(helpers.tiny_model(), read)), helpers.logits(model))


@pytest.mark.parametrize(
    ("options", "override", "message"),
    [
        ("init: text", [], "init_text"),
        ("init_text: hello", [], "is not used with init: vocabulary"),
        ("num_virtual_tokens: 0", [], "num_virtual_tokens"),
        ("num_virtual_tokens: 4", ["base_model.new_tokens=[<a>]"], "embeddings of new tokens"),
    ],
)
def test_recipes_that_cannot_work_are_refused(options: str, override: list[str], message: str, tmp_path: Path) -> None:
    text = helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: prompt_tuning, {options}}}")
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "r.yaml", override)
    if override:
        with pytest.raises(UsageError, match="new tokens"):
            helpers.make_method(NAME).apply(helpers.tiny_model(), Context(new_token_ids=(261,)))


def test_virtual_tokens_take_positions_from_the_rows(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    method = helpers.make_method(NAME, num_virtual_tokens=30)
    assert (method.row_limit(256), method.row_limit(None)) == (226, None)
    with pytest.raises(UsageError, match="30 of the model's 31 positions"):
        method.row_limit(31)
    # GPT-2 has a table of 256 positions: a longer row would fall off its end.
    report = cases.end_to_end(
        "{name: prompt_tuning, num_virtual_tokens: 200}", tmp_path / "out", tiny_folders["gpt2"], tiny_data, "train.max_steps=2"
    )
    assert report.data.train.longest <= 56
    assert any("56 positions" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_virtual_tokens": 10**9}, "num_virtual_tokens|virtual tokens"),
        ({"num_virtual_tokens": 15000}, "15000 virtual tokens"),
        ({"num_virtual_tokens": 6}, "does not fit|needs"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_files_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    import json

    model, method = helpers.adapted(NAME, **OPTIONS)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    path = tmp_path / hf_peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(tmp_path))
