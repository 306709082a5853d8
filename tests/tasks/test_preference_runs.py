"""Whole runs of the preference tasks on tiny models: what is learned, measured, saved, resumed and shared among processes."""

from __future__ import annotations

import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import helpers
import preference_cases as cases
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from peftcli.cli import app
from peftcli.report.catalogue import FIGURES
from peftcli.result import open_result
from peftcli.train.loop import Loop
from peftcli.train.signals import Interrupted

REFERRED = ("dpo", "kto")
# One method of each family, and where it has something to train.
FAMILIES = {
    "{name: lora, rank: 4, alpha: 8}": "llama",
    "{name: ia3}": "llama",
    "{name: adapter}": "llama",
    "{name: prompt_tuning, num_virtual_tokens: 4}": "llama",
    "{name: prefix_tuning, num_virtual_tokens: 4}": "llama",
    "{name: bitfit}": "gpt2",
    "{name: full}": "llama-tied",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.folder(tmp_path_factory.mktemp("preferences"))


def evaluated(folder: Path) -> dict[str, Any]:
    """What the command says of a run's held-out rows."""
    found = CliRunner().invoke(app, ["eval", str(folder), "--json"])
    assert found.exit_code == 0, found.output
    numbers: dict[str, Any] = json.loads(found.stdout)
    return numbers


@pytest.mark.parametrize("task", cases.TASKS)
def test_a_run(task: str, rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    text = cases.text(task, tiny_folders["llama"], rows, tmp_path / "out")
    report = helpers.run(text, "train.epochs=4")
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    before, after = report.eval_before, report.eval
    assert before is not None and after is not None
    assert after.metrics["reward_accuracy"] > before.metrics["reward_accuracy"]
    assert after.metrics["reward_margin"] > before.metrics["reward_margin"]
    assert after.loss < before.loss
    if task in REFERRED:
        assert before.metrics["reward_accuracy"] == 0.5 and before.metrics["reward_margin"] == 0, "the base against itself"
    assert after.metrics.keys() <= FIGURES.keys() and after.metrics.keys() <= after.intervals.keys()
    steps = [record for record in helpers.trace(tmp_path / "out") if "loss" in record]
    logged = {"kl"} if task == "kto" else {"reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward"}
    assert all(logged <= record.keys() for record in steps)
    assert steps[0]["supervised_tokens"] == 4, "a row counts as one"
    found = evaluated(tmp_path / "out")
    assert found["loss"] == pytest.approx(after.loss, rel=1e-6)
    for name, value in after.metrics.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_dpo_starts_at_log_2_and_the_parts_are_means(rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    text = cases.text("dpo", tiny_folders["llama"], rows, tmp_path / "out", method="{name: lora, rank: 4, alpha: 8}")
    first = helpers.run(text, "train.logging_steps=3", "train.max_steps=6")
    assert first.train.loss_first == pytest.approx(0.6931471805599453, abs=1e-6)
    one = [record for record in helpers.trace(tmp_path / "out") if "loss" in record]
    helpers.run(text, f"output_dir={tmp_path / 'each'}", "train.max_steps=6")
    each = [record for record in helpers.trace(tmp_path / "each") if "loss" in record]
    # 22 rows in steps of 4: the sixth step has two.
    weights = [b["supervised_tokens"] - a["supervised_tokens"] for a, b in pairwise(each[2:6])]
    assert weights == [4, 4, 2]
    for key in ("loss", "reward_margin", "chosen_reward"):
        mean = sum(weight * record[key] for weight, record in zip(weights, each[3:6], strict=True)) / 10
        assert one[2][key] == pytest.approx(mean, rel=1e-9), key


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_every_family_of_methods(task: str, method: str, rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    text = cases.text(task, tiny_folders[FAMILIES[method]], rows, tmp_path / "out", method=method)
    report = helpers.run(text, "train.max_steps=4", "train.gradient_checkpointing=true")
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    assert report.eval is not None
    found = evaluated(tmp_path / "out")
    assert found["loss"] == pytest.approx(report.eval.loss, rel=1e-5), "eval finds the same reference, whatever the method"
    assert found["reward_margin"] == pytest.approx(report.eval.metrics["reward_margin"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("task", cases.TASKS)
def test_over_a_quantized_base(task: str, rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    text = cases.text(task, tiny_folders["llama"], rows, tmp_path / "out", method="{name: qlora, rank: 4, alpha: 8}")
    report = helpers.run(text, "train.max_steps=4", "train.optimizer=adamw")
    assert report.model.quantization == "nf4"
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    if task in REFERRED:
        assert report.eval_before is not None and report.eval_before.metrics["reward_margin"] == 0


@pytest.mark.parametrize("task", cases.TASKS)
def test_resumed_equals_uninterrupted_to_the_byte(
    task: str, rows: Path, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cases.text(task, tiny_folders["llama"], rows, tmp_path / "whole").replace("logging_steps: 1", "logging_steps: 3, save_steps: 4")
    helpers.run(plain)
    split = plain.replace(str(tmp_path / "whole"), str(tmp_path / "split"))
    log = Loop._log

    def stop(self: Loop, progress: Any, **rest: Any) -> None:
        log(self, progress, **rest)
        if progress.step == 7 and self.resumed_from is None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Loop, "_log", stop)
    with pytest.raises(Interrupted):
        helpers.run(split)
    assert helpers.run(split, resume=True).train.resumed_from == "step-7"
    assert helpers.trace(tmp_path / "split") == helpers.trace(tmp_path / "whole")
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "split")]
    assert weights[0] == weights[1]


def test_two_processes_are_one_with_twice_the_batch(rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """22 rows in steps of 12: at an epoch's end a process has no rows of its own. KTO's estimate is of all processes' rows."""
    recipes = []
    for task in cases.TASKS:
        for where, batch in (("two", 3), ("one", 6)):
            (tmp_path / where).mkdir(exist_ok=True)
            text = cases.text(task, tiny_folders["llama"], rows, tmp_path / where / task, method="{name: lora, rank: 4, alpha: 8}")
            path = tmp_path / where / f"{task}.yaml"
            path.write_text(text.replace("batch_size: 4", f"batch_size: {batch}, gradient_accumulation_steps: 2").replace("1e-2", "2e-3"))
        recipes.append(tmp_path / "two" / f"{task}.yaml")
    cases.launch(2, recipes)
    for task in cases.TASKS:
        helpers.run((tmp_path / "one" / f"{task}.yaml").read_text())
        two, one = helpers.trace(tmp_path / "two" / task), helpers.trace(tmp_path / "one" / task)
        assert len(one) == len(two) == 5
        for a, b in zip(two, one, strict=True):
            assert a.keys() == b.keys()
            # Equal rewards are told apart by rounding, so the first steps' accuracy is not compared.
            for key in b.keys() - {"reward_accuracy", "eval_intervals"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-6), (task, key)
        first, second = (load_file(tmp_path / "two" / f"{task}.rank-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("task", ["dpo", "orpo", "simpo", "reward"])
def test_pairs_do_not_depend_on_how_a_step_is_cut(task: str, rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    text = cases.text(task, tiny_folders["llama"], rows, tmp_path / "one", method="{name: lora, rank: 4, alpha: 8}")
    helpers.run(text, "train.batch_size=12")
    helpers.run(text, "train.batch_size=3", "train.gradient_accumulation_steps=4", f"output_dir={tmp_path / 'four'}")
    for a, b in zip(helpers.trace(tmp_path / "four"), helpers.trace(tmp_path / "one"), strict=True):
        for key in b.keys() - {"reward_accuracy", "eval_intervals"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-6), key


def test_the_reference_is_the_base_also_when_a_run_begins_with_an_adapter(
    rows: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    text = cases.text("dpo", tiny_folders["llama"], rows, tmp_path / "first", method="{name: lora, rank: 4, alpha: 8}")
    first = helpers.run(text, "train.epochs=3")
    again = helpers.run(
        text, f"output_dir={tmp_path / 'second'}", "train.max_steps=1", "train.learning_rate=1e-9", init_adapter=tmp_path / "first"
    )
    assert first.eval is not None and again.eval is not None and again.eval_before is not None
    assert again.eval_before.metrics["reward_margin"] == 0
    assert again.eval.metrics["reward_margin"] == pytest.approx(first.eval.metrics["reward_margin"], rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stock_peft_loads_a_reward_model(kind: str, rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    helpers.run(cases.text("reward", tiny_folders[kind], rows, tmp_path / "out"), "train.max_steps=4")
    ours = open_result(tmp_path / "out").model
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folders[kind], num_labels=1)
    base.config.pad_token_id = 3
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    ids = helpers.some_ids()
    ids[0, 8:] = 3
    mask = (ids != 3).long()
    with torch.no_grad():
        found, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, theirs))
        alone = ours(input_ids=ids[:1, :8], attention_mask=mask[:1, :8]).logits
    assert found.shape == (3, 1) and torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found[:1], alone, atol=1e-5), "the last token that is not padding is read"


def test_a_reward_model_reads_the_eos_token_where_it_pads_too(rows: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """As in SmolLM2 and everywhere without a padding token. The saved tokenizer says what pads, so other tools find the same token."""
    shutil.copytree(tiny_folders["llama"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    helpers.run(cases.text("reward", tmp_path / "model", rows, tmp_path / "out"), "train.max_steps=4")
    result, saved = open_result(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")
    assert saved.pad_token_id == result.base.tokenizer.pad_token_id == result.model.config.pad_token_id != saved.eos_token_id
    texts = ["red? red" + saved.eos_token, "a longer question? blue" + saved.eos_token]
    batch = saved(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    states: list[torch.Tensor] = []
    result.model.score.register_forward_hook(lambda _, inputs, output: states.append(output))
    with torch.no_grad():
        found = result.model(**batch).logits[:, 0]
    last = batch["attention_mask"].sum(-1) - 1
    assert batch["input_ids"].gather(1, last[:, None]).flatten().tolist() == [saved.eos_token_id] * 2
    assert torch.equal(found, states[0][torch.arange(2), last, 0])
    assert not torch.allclose(found, states[0][torch.arange(2), last - 1, 0])
