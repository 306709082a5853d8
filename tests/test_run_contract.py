"""What a run leaves in its output folder: the contract that others script against."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import helpers
import pytest
import yaml

from peftcli.recipe.load import load_recipe
from peftcli.report.schema import Report

ADAPTER = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
]
TOP = ["metrics.jsonl", "recipe.lock", "recipe.yaml", "report.html", "report.json", "report.md"]


@pytest.fixture(scope="module")
def folder(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contract") / "out"
    helpers.run(
        helpers.recipe_for(tiny_folders["llama"], tiny_data, out),
        "train.save_steps=5", "train.eval_steps=4", "eval.generate=true", "eval.max_new_tokens=4", "eval.examples=2",
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return Report.model_validate_json((folder / "report.json").read_text(encoding="utf-8"))


def test_the_folder_holds_exactly_what_is_documented(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted([*TOP, "adapter", "checkpoints"])
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == ADAPTER
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-10", "step-5"]


def test_a_run_that_trains_everything_leaves_a_model_folder(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = helpers.recipe_for(tiny_folders["llama-tied"], tiny_data, tmp_path / "out", method="{name: full}")
    report = helpers.run(text, "train.learning_rate=1e-3")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*TOP, "model"])
    assert report.model.trainable_parameters == report.model.parameters
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    AutoTokenizer.from_pretrained(tmp_path / "out" / "model")


def test_every_artefact_is_listed_with_its_sha256(folder: Path, report: Report) -> None:
    assert sorted(report.files) == sorted([*(f"adapter/{name}" for name in ADAPTER), "metrics.jsonl", "recipe.lock", "recipe.yaml"])
    for name, digest in report.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_the_resolved_recipe_has_every_default_and_runs_again(folder: Path) -> None:
    values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert set(values) == {"base_model", "task", "method", "dataset", "train", "eval", "expect", "output_dir"}
    assert values["base_model"]["dtype"] == "float32"
    assert values["train"]["adam_beta2"] == 0.999
    assert values["method"]["dropout"] == 0.1
    assert load_recipe(folder / "recipe.yaml").recipe.train.save_steps == 5


def test_metrics_are_one_object_for_each_logged_step_and_evaluation(folder: Path) -> None:
    records = helpers.trace(folder)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert all({"epoch", "learning_rate", "grad_norm", "tokens", "supervised_tokens"} <= set(r) for r in steps)
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in steps)
    assert [r["step"] for r in records if "eval_loss" in r][:2] == [4, 8]
    assert [r["epoch"] for r in steps] == sorted(r["epoch"] for r in steps)


def test_the_report_says_what_happened(folder: Path, report: Report) -> None:
    plain = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert plain["report_version"] == 2
    assert report.status == "completed"
    steps = [r for r in helpers.trace(folder) if "loss" in r]
    assert (report.train.steps, report.train.epochs) == (12, 2.0)
    assert (report.train.loss_first, report.train.loss_last) == (steps[0]["loss"], steps[-1]["loss"])
    assert report.train.tokens == steps[-1]["tokens"] == 2 * report.data.train.tokens
    assert report.train.supervised_tokens == 2 * report.data.train.supervised_tokens
    assert report.data.train.rows == 22
    assert report.model.trainable_parameters == 2 * (4 * (64 + 64) * 2 + 4 * (64 + 32) * 2 + 4 * (64 + 128) * 3)
    assert report.train.peak_memory_bytes > 0
    assert len(report.data.files) == 2
    assert report.environment.threads >= 1


def test_both_evaluations_and_both_checks_are_there(report: Report) -> None:
    for scores in (report.eval_before, report.eval):
        assert scores is not None
        assert scores.rows == 6
        assert scores.metrics["perplexity"] == pytest.approx(math.exp(scores.loss))
        assert scores.metrics["exact_match"] is not None
        assert {"loss", "token_accuracy", "exact_match"} <= set(scores.intervals)
        low, high = scores.intervals["loss"]
        assert low <= scores.loss <= high
    assert report.eval is not None
    assert report.eval_before is not None
    assert report.eval.loss < report.eval_before.loss
    assert report.checks.label_audit["rows"] == 22
    assert report.checks.label_audit["eos_supervised"] == 22
    live = report.checks.live_adapter
    assert live is not None
    assert live.passed
    assert live.keys == 28
    assert live.loss_before_save == live.loss_after_reload
    assert len(report.examples) == 2


def test_the_live_check_sees_a_dead_adapter(
    tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    from peftcli import output
    from peftcli.errors import CheckFailed

    real = output.save_result

    def dead(folder: Path, *args: object) -> Path:
        saved = real(folder, *args)  # type: ignore[arg-type]
        path = saved / "adapter_model.safetensors"
        save_file({key.replace("model.model", "model._orig_mod.model"): value for key, value in load_file(path).items()}, path)
        return saved

    monkeypatch.setattr(output, "save_result", dead)
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")
    with pytest.raises(CheckFailed, match="live-adapter check failed"):
        helpers.run(text, "train.max_steps=2")
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report.checks.live_adapter is not None
    assert not report.checks.live_adapter.passed
    assert len(report.checks.live_adapter.missing) == 28


def test_the_live_check_sees_weights_that_never_moved(tiny_folders: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    from peftcli.errors import CheckFailed

    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out")
    with pytest.raises(CheckFailed, match="unmoved"):
        helpers.run(text, "train.learning_rate=1e-30", "train.max_steps=3")
