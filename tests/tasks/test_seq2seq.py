"""Text to text: the loss of a row depends on that row alone, generation in batches writes what it writes alone, and a run from the rows
to the merged model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from accelerate import PartialState
from adapter_cases import command_line
from torch import Tensor

from peftcli.errors import DataError, ModelError, UsageError
from peftcli.evaluate import Evaluator
from peftcli.generate import generate
from peftcli.interchange import hf_peft
from peftcli.report.schema import Report
from peftcli.result import open_result
from peftcli.tasks.base import Layout
from peftcli.tasks.seq2seq import EncoderDecoder

ROOT = Path(__file__).parents[2]
KINDS = ["t5", "flan-t5"]
RAGGED = [(7, 3), (4, 9), (12, 2), (3, 6), (9, 5)]
LAYOUT = Layout(False, 3)
TASK: Any = helpers.SEQ2SEQ


def module(kind: str = "flan-t5", dtype: torch.dtype = torch.float64) -> EncoderDecoder:
    return EncoderDecoder(helpers.tiny_model(kind, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_own_summed(kind: str) -> None:
    """Against the model's loss from labels: its shift, its mean over the tokens that are not -100."""
    split, task = helpers.make_pairs(RAGGED), module(kind)
    batch = TASK.batch(split, range(5), LAYOUT)
    assert batch.labels[0].tolist() == [*split.target_ids[0].tolist(), *[-100] * 6]
    with torch.no_grad():
        theirs = task.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        found, logits = task(batch), task.logits(batch)
    assert len(batch.positions) == sum(target for _, target in RAGGED)
    assert float(found.total) == pytest.approx(float(theirs.loss) * 25, rel=1e-9)
    whole, labels = theirs.logits.flatten(0, 1), batch.labels.flatten()
    assert int(found.correct) == int((whole.argmax(-1) == labels).sum())
    assert torch.equal(logits, whole[labels != -100])


def test_a_row_measures_the_same_in_any_company() -> None:
    split, task = helpers.make_pairs(RAGGED), module()
    with torch.no_grad():
        alone = [task.measure(TASK.batch(split, [row], LAYOUT)) for row in range(5)]
        for rows in ([0, 1, 2, 3, 4], [4, 2], [1, 3, 0]):
            found = task.measure(TASK.batch(split, rows, LAYOUT))
            assert found["units"].tolist() == [split.units(row) for row in rows]
            for place, row in enumerate(rows):
                assert float(found["loss"][place]) == pytest.approx(float(alone[row]["loss"]), rel=1e-9)
                assert int(found["correct"][place]) == int(alone[row]["correct"])


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    split, task, tokenizer = helpers.make_pairs(RAGGED), module(dtype=torch.float32), helpers.tiny_tokenizer()
    found = [Evaluator(PartialState(), TASK, split, tokenizer, LAYOUT, size).scores(task) for size in (1, 2, 16)]
    for scores in found[1:]:
        assert scores.loss == pytest.approx(found[0].loss, rel=1e-6)
        assert scores.metrics["token_accuracy"] == found[0].metrics["token_accuracy"]
    assert found[0].units == 25
    assert found[0].metrics["perplexity"] == pytest.approx(math.exp(found[0].loss))


def test_a_silent_batch_changes_nothing_and_keeps_the_graph() -> None:
    model, method = helpers.adapted("lora", "flan-t5")
    helpers.stir(model)
    loss = method.loss(TASK.module(model), TASK.batch(helpers.make_pairs(RAGGED), [0, 1], LAYOUT, silent=True))
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0
    assert int(loss.correct) == 0
    grads = helpers.gradients(model)
    assert grads
    assert not any(bool(g.any()) for g in grads.values())


def test_the_decoder_sees_no_token_that_it_is_to_write() -> None:
    split, task = helpers.make_pairs([(8, 6)]), module()
    before = task.logits(TASK.batch(split, [0], LAYOUT))
    split.target_ids[0][4] = (int(split.target_ids[0][4]) + 1) % 200 + 4
    after = task.logits(TASK.batch(split, [0], LAYOUT))
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5], after[5])


def test_the_masks_are_those_of_the_sources() -> None:
    batch = TASK.batch(helpers.make_pairs(RAGGED), range(5), LAYOUT)
    tokens, learned = TASK.masks(batch)
    assert tokens.sum(1).tolist() == [source for source, _ in RAGGED]
    assert torch.equal(tokens, learned)


CASES = [("lora", {}), ("prompt_tuning", {}), ("prefix_tuning", {}), ("p_tuning", {}), ("full", {})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_generation_in_batches_writes_what_it_writes_alone(name: str, options: dict[str, Any]) -> None:
    model, _ = helpers.adapted(name, "flan-t5", **options)
    helpers.stir(model)
    model.eval()
    prompts = [row.tolist() for row in helpers.make_pairs([(9, 2), (3, 2), (14, 2), (6, 2), (3, 2)]).input_ids]
    tokenizer = helpers.tiny_tokenizer()
    texts = [generate(model, tokenizer, prompts, 8, size, (1,)) for size in (1, 2, 5)]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1, "what is read must matter"
    # And what greedy search over plain forward passes writes.
    for prompt, text in zip(prompts[:2], texts[0], strict=False):
        written = [3]
        for _ in range(8):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([written])).logits
            written.append(int(out[0, -1].argmax()))
            if written[-1] == 1:
                break
        assert tokenizer.decode(written[1:], skip_special_tokens=True).strip() == text


def test_eva_says_that_it_does_not_read_encoder_decoders() -> None:
    with pytest.raises(UsageError, match="an encoder-decoder has rows of two kinds"):
        helpers.adapted("lora", "t5", init_lora_weights="eva")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different lengths whose target is told by the source."""
    root, words = tmp_path_factory.mktemp("pairs"), ["red", "green", "blue", "gold", "grey"]
    for name, start, count in (("train", 0, 22), ("eval", 100, 6)):
        rows = [
            {"mr": f"{i} {words[i % 5]}" + " please" * (i % 3), "ref": f"{words[i % 5]}!" * (1 + i % 2)}
            for i in range(start, start + count)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: helpers.save_folder(root / kind, kind) for kind in (*KINDS, "llama")}


def recipe(model: Path, data: Path, output: Path, method: str = "{name: lora, rank: 4, alpha: 8, dropout: 0.1}") -> str:
    text = helpers.recipe_for(model, data, output, method=method) + "task: {name: seq2seq, max_target_length: 32}\n"
    return text.replace("max_length: 128", "max_length: 48, columns: {source: mr, target: ref}")


def report_of(text: str, *overrides: str, **options: Any) -> Report:
    return helpers.run(text, "eval.generate=true", "eval.max_new_tokens=6", *overrides, **options)


@pytest.mark.parametrize("method", ["lora", "full", "prefix_tuning", "prompt_tuning"])
def test_a_whole_run(method: str, folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    report = report_of(recipe(folders["flan-t5"], data, tmp_path / "out", f"{{name: {method}}}"))
    assert report.status == "completed"
    assert report.eval is not None and report.eval_before is not None
    assert report.eval.loss < report.eval_before.loss
    assert {"perplexity", "token_accuracy", "exact_match"} <= report.eval.metrics.keys()
    assert report.eval.rows == report.eval.generated == 6
    assert report.eval.supervised_tokens == sum(len(f"{w}!" * (1 + i % 2)) + 1 for i, w in zip(range(100, 106), ["red", "green", "blue", "gold", "grey", "red"], strict=True))  # fmt: skip
    check = report.checks.live_adapter
    assert check is not None and check.passed, check
    example = report.examples[0]
    assert (example.prompt, example.reference) == ("100 red please", "red!")
    assert example.before is not None
    assert report.checks.label_audit["eos_supervised"] == 22
    result = open_result(tmp_path / "out")
    assert result.task.section.max_target_length == 32
    from peftcli.data.prepare import prepare_eval

    assert result.recipe is not None
    rows = result.task.rows(result.recipe.dataset, result.base.tokenizer)
    split = prepare_eval(rows, base_dir=result.base_dir, seed=result.recipe.train.seed)
    again = Evaluator(PartialState(), result.task, split, result.base.tokenizer, LAYOUT, 16)
    scores = again.scores(result.task.module(result.model), generate=True, max_new_tokens=6)
    assert scores.loss == report.eval.loss
    assert scores.answers[: len(report.examples)] == [example.after for example in report.examples]


@pytest.mark.parametrize(
    "overrides", [["base_model.quantization=nf4"], ["train.gradient_checkpointing=true"], ["base_model.dtype=bfloat16"]]
)
def test_a_run_over_other_bases(overrides: list[str], folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    report = report_of(recipe(folders["flan-t5"], data, tmp_path / "out"), "train.max_steps=4", *overrides)
    assert report.eval is not None and report.eval_before is not None
    assert report.eval.loss < report.eval_before.loss
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed


def test_a_resumed_run_ends_as_one_that_was_not_stopped(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    saved = []
    for name in ("whole", "halves"):
        text = recipe(folders["t5"], data, tmp_path / name)
        if name == "halves":
            helpers.run(text, "train.save_steps=4")
            (tmp_path / name / "adapter" / hf_peft.WEIGHTS).unlink()
            helpers.run(text, "train.save_steps=4", resume=True)
        else:
            helpers.run(text)
        saved.append((tmp_path / name / "adapter" / hf_peft.WEIGHTS).read_bytes())
    assert saved[0] == saved[1]


def test_two_processes_are_one_with_twice_the_batch(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """22 rows in steps of 12: in the last one of an epoch a process has no rows of its own in a micro step."""
    for name, batch in (("two", 3), ("one", 6)):
        text = recipe(folders["flan-t5"], data, tmp_path / name, "{name: lora, rank: 4, alpha: 8}").replace(
            "batch_size: 4", f"batch_size: {batch}, gradient_accumulation_steps: 2"
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace("1e-2", "2e-3") + "eval: {generate: true, max_new_tokens: 6}\n", encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peftcli", "train", str(tmp_path / "two.yaml")]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    helpers.run((tmp_path / "one.yaml").read_text())
    two, one = helpers.trace(tmp_path / "two"), helpers.trace(tmp_path / "one")
    assert len(two) == len(one) >= 4
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for key in b.keys() - {"eval_intervals"}:
            exact = key in ("step", "epoch", "learning_rate", "tokens", "supervised_tokens")
            assert a[key] == (b[key] if exact else pytest.approx(b[key], rel=2e-4, abs=1e-7)), key


def test_eval_merge_chat_and_check(
    folders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(folders["t5"], data, tmp_path / "out") + "eval: {generate: true, max_new_tokens: 6}\n", encoding="utf-8")
    code, out, err = command_line(monkeypatch, capsys, "check", path, "--json")
    assert code == 0, err
    seen = json.loads(out)
    assert seen["train"]["rows"] == 22
    assert seen["label_audit"]["example"][1] == ["red!<|im_end|>", True]
    assert seen["memory_bytes"]["activations"] > 0
    report = helpers.run(path.read_text())
    assert report.eval is not None
    code, out, err = command_line(monkeypatch, capsys, "eval", tmp_path / "out", "--generate", "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] == report.eval.loss
    assert len(json.loads(out)["answers"]) == 6
    code, out, err = command_line(monkeypatch, capsys, "merge", tmp_path / "out", "--output", tmp_path / "merged", "--json")
    assert code == 0, err
    assert json.loads(out)["passed"]
    assert json.loads(out)["max_difference"] <= 1e-4
    # The merged folder says itself what it is; so does an adapter's.
    for place in ("merged", "out/adapter"):
        answers = command_line(monkeypatch, capsys, "chat", tmp_path / place, "--prompt", "100 red please", "--max-new-tokens", "6")
        assert answers[0] == 0, answers[2]
        opened = open_result(tmp_path / place)
        assert type(opened.task).__name__ == "Seq2Seq"
        asked = opened.base.tokenizer("100 red please")["input_ids"]
        assert answers[1].strip() == generate(opened.model, opened.base.tokenizer, [asked], 6, 1, (1,))[0]


def test_adapters_without_a_recipe_are_read_by_their_task_type(folders: dict[str, Path], tmp_path: Path) -> None:
    model, method = helpers.adapted("lora", "t5", rank=2)
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model=str(folders["t5"]), revision=None, task_type="SEQ_2_SEQ_LM")
    helpers.tiny_tokenizer().save_pretrained(tmp_path)
    opened = open_result(tmp_path, dtype="float32")
    assert type(opened.task).__name__ == "Seq2Seq"
    assert torch.equal(helpers.logits(opened.model), helpers.logits(model))


def test_the_wrong_kind_of_model_is_named(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no encoder-decoder .llama.; it cannot be trained to turn text into text") as fault:
        report_of(recipe(folders["llama"], data, tmp_path / "one"))
    assert "task: causal_lm" in str(fault.value.hint)
    text = helpers.recipe_for(folders["t5"], data, tmp_path / "two").replace(
        "max_length", "columns: {prompt: mr, completion: ref}, max_length"
    )
    with pytest.raises(ModelError, match="is an encoder-decoder .t5.; it cannot be trained to continue text") as fault:
        helpers.run(text)
    assert "task: seq2seq" in str(fault.value.hint)
    with pytest.raises(DataError, match="cannot be split"):
        helpers.run(recipe(folders["t5"], data, tmp_path / "three"), "dataset.truncation=split")


def test_a_probe_writes_the_row_that_it_reads() -> None:
    model, ids = helpers.tiny_model("flan-t5"), helpers.some_ids(1, 9)
    with torch.no_grad():
        found = TASK.probe(model, ids)
        start = torch.cat([torch.tensor([[3]]), ids[:, :-1]], dim=1)
        expected: Tensor = model(input_ids=ids, decoder_input_ids=start).logits[0]
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.skipif("PEFTCLI_DATA_DIR" not in os.environ or "PEFTCLI_MODELS_DIR" not in os.environ, reason="needs data and models")
def test_flan_t5_learns_to_describe_restaurants(tmp_path: Path) -> None:
    """A short run on E2E: the held-out loss falls far, and the model writes a sentence that names the place, batched as alone."""
    models, rows = Path(os.environ["PEFTCLI_MODELS_DIR"]), Path(os.environ["PEFTCLI_DATA_DIR"]) / "e2e"
    text = (
        f"base_model: {{name: {models / 'flan-t5-small'}, dtype: float32}}\n"
        "task: {name: seq2seq, max_target_length: 64}\n"
        "method: {name: lora, rank: 8, alpha: 16, target_modules: [q, v]}\n"
        f"dataset: {{train: {rows / 'trainset.csv.gz'}, eval: {rows / 'devset.csv'}, columns: {{source: mr, target: ref}}, "
        "limit: 192, eval_limit: 24, max_length: 96}\n"
        "train: {max_steps: 16, batch_size: 8, learning_rate: 2.0e-3, logging_steps: 4}\n"
        "eval: {generate: true, max_new_tokens: 40, batch_size: 4, examples: 4, metrics: [bleu, rouge], before: true}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    report = helpers.run(text)
    assert report.eval is not None and report.eval_before is not None
    assert report.eval.loss < report.eval_before.loss - 0.5
    assert report.checks.live_adapter is not None and report.checks.live_adapter.passed
    assert report.model.parameters == 76_961_152
    # The first 24 rows ask for four restaurants: each is described once, and measured against all that people wrote of it.
    assert (report.eval.rows, report.eval.generated, len({example.prompt for example in report.examples})) == (24, 4, 4)
    assert sum(example.reference.count("\nor: ") + 1 for example in report.examples) > 16
    assert report.eval.metrics["bleu"] > report.eval_before.metrics["bleu"]
    # So short a run may misspell one of the names.
    assert sum(example.prompt.partition("name[")[2].partition("]")[0] in example.after for example in report.examples) >= 3
    assert all(len(example.after.split()) > 5 for example in report.examples)
    result = open_result(tmp_path / "run")
    sources = [example.prompt for example in report.examples]
    prompts = [result.base.tokenizer(source)["input_ids"] for source in sources]
    alone = generate(result.model, result.base.tokenizer, prompts, 40, 1, (1,))
    assert alone == [example.after for example in report.examples]
