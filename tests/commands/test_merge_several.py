"""``peftcli merge A B``: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from adapter_cases import command_line, folder_adapter, write
from transformers import AutoModelForCausalLM

from peftcli.interchange import hf_peft
from peftcli.result import open_result


@pytest.fixture(scope="module")
def bases(tiny_folders: dict[str, Path]) -> dict[str, Path]:
    return tiny_folders


def plain_lora(folder: Path, base: Path, seed: int, method: str = "lora", **options: Any) -> Path:
    model, applied = helpers.adapted(method, **({"rank": 4, "alpha": 8} | options if method == "lora" else options))
    helpers.stir(model, seed=seed, scale=0.1)
    hf_peft.save_adapter(folder, model, applied, base_model=str(base), revision=None)
    helpers.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    return [plain_lora(root / "a", bases["llama"], 1), plain_lora(root / "b", bases["llama"], 2, rank=6)]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().float() for name, p in model.named_parameters()}


def merged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    code, out, err = command_line(monkeypatch, capsys, "merge", *args, "--json")
    assert code == 0, err
    facts: dict[str, Any] = json.loads(out)
    return facts


def test_a_merged_model_is_the_weighted_sum(
    pair: list[Path], bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = merged(monkeypatch, capsys, *pair, "--weights", "0.7,0.3", "-o", tmp_path / "ab", "--dtype", "float32")
    assert facts["passed"] is True
    assert facts["combine"] == "linear"
    assert facts["adapters"] == {"a": [str(pair[0]), 0.7], "b": [str(pair[1]), 0.3]}
    for index, path in enumerate(pair):
        merged(monkeypatch, capsys, path, "-o", tmp_path / str(index), "--dtype", "float32")
    plain, a, b, both = (
        weights(AutoModelForCausalLM.from_pretrained(f)) for f in (bases["llama"], tmp_path / "0", tmp_path / "1", tmp_path / "ab")
    )
    # The base is rounded to the machine's dtype where that is bfloat16.
    base = {key: value.to(open_dtype(pair[0])).float() for key, value in plain.items()}
    assert max(float((both[k] - base[k] - 0.7 * (a[k] - base[k]) - 0.3 * (b[k] - base[k])).abs().max()) for k in base) < 2e-6
    assert max(float((both[k] - base[k]).abs().max()) for k in base) > 1e-2


def open_dtype(path: Path) -> torch.dtype:
    return open_result(path, with_adapter=False).base.dtype


def test_without_weights_it_is_the_mean(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = merged(monkeypatch, capsys, *pair, "-o", tmp_path / "mean")
    assert [weight for _, weight in facts["adapters"].values()] == [0.5, 0.5]
    facts = merged(monkeypatch, capsys, *pair, "-o", tmp_path / "ties", "--combine", "ties")
    assert [weight for _, weight in facts["adapters"].values()] == [1.0, 1.0], "ties takes a mean by itself"
    assert facts["density"] == 0.2


def test_an_adapter_that_stock_peft_loads(
    pair: list[Path], bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = merged(monkeypatch, capsys, *pair, "--weights", "0.7,-0.3", "-o", tmp_path / "ab", "--as", "adapter")
    assert (facts["exact"], facts["rank"], facts["energy_discarded"]) == (True, 10, 0.0)
    assert facts["passed"] is True
    assert "max_difference" in facts["limits"]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), pair[0], adapter_name="a")
    model.load_adapter(pair[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "c", combination_type="cat")
    model.set_adapter("c")
    ours = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), tmp_path / "ab")
    assert helpers.same(helpers.logits(ours), helpers.logits(model))
    assert "0.7 a, -0.3 b" in (tmp_path / "ab" / "README.md").read_text()
    # What was written is a result like any other.
    code, out, err = command_line(monkeypatch, capsys, "chat", tmp_path / "ab", "-p", "Hello", "--max-new-tokens", 4)
    assert (code, bool(out.strip())) == (0, True), err


@pytest.mark.parametrize("rule", ["svd", "ties", "dare", "linear"])
def test_cut_to_a_rank(
    rule: str, pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*pair, "--combine", rule, "--rank", 3, "--as", "adapter", "-o", tmp_path / rule]
    facts = merged(monkeypatch, capsys, *args)
    assert (facts["rank"], facts["exact"], facts["limits"]) == (3, False, {})
    assert 0.01 < facts["energy_discarded"] < 1.0
    assert facts["kl"] > 0.0
    code, out, _ = command_line(monkeypatch, capsys, "merge", *args, "--overwrite")
    assert code == 0
    out = " ".join(out.split())
    assert "an approximation" in out
    assert f"the rank leaves out {facts['energy_discarded']:.2%} of the change's energy" in out


@pytest.mark.parametrize(
    "options", [["--combine", "dare", "--seed", 5, "--density", 0.4], ["--combine", "ties", "--density", 0.3]], ids=str
)
def test_the_same_bytes_twice(
    options: list[object], pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "xy":
        torch.manual_seed(ord(name))
        facts = merged(monkeypatch, capsys, *pair, *options, "-o", tmp_path / name)
        assert facts["passed"] is True
    assert helpers.folder_bytes(tmp_path / "x") == helpers.folder_bytes(tmp_path / "y")


def test_svd_of_one_compresses_it(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = merged(monkeypatch, capsys, pair[1], "--as", "adapter", "--rank", 2, "--weights", "1", "-o", tmp_path / "small")
    assert facts["rank"] == 2
    wide, small = (hf_peft.read_adapter(folder).tensors for folder in (pair[1], tmp_path / "small"))
    assert {tuple(t.shape) for k, t in small.items() if "lora_A" in k} == {(2, 64), (2, 128)}
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    target = wide[key.format("B")] @ wide[key.format("A")] * (8 / 6)
    found = small[key.format("B")] @ small[key.format("A")]
    values = torch.linalg.svdvals(target)
    assert float((target - found).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4)


def test_runs_over_nf4_and_other_methods(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a = plain_lora(tmp_path / "a", bases["llama"], 1)
    b = plain_lora(tmp_path / "b", bases["llama"], 2, method="lokr")
    facts = merged(monkeypatch, capsys, a, b, "-o", tmp_path / "ab", "--quantization", "nf4")
    assert facts["passed"] is True
    assert facts["limits"] == {"kl": 5e-3, "top1": 0.99}
    code, _, err = command_line(monkeypatch, capsys, "merge", a, b, "-o", tmp_path / "c", "--as", "adapter")
    assert code == 2
    assert "no rank to go by" in err
    facts = merged(monkeypatch, capsys, a, b, "-o", tmp_path / "c", "--as", "adapter", "--rank", 8)
    assert 0.0 < facts["energy_discarded"] < 1.0


def test_whole_runs_are_task_arithmetic(
    bases: dict[str, Path], tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("full", "lora"):
        text = helpers.recipe_for(bases["llama"], tiny_data, tmp_path / method, method=f"{{name: {method}}}")
        helpers.run(text, "train.max_steps=3")
    facts = merged(monkeypatch, capsys, tmp_path / "full", tmp_path / "lora", "--weights", "0.5,1", "-o", tmp_path / "both")
    assert facts["passed"] is True
    assert "max_difference" in facts["limits"], "the recipes compute in float32"
    assert list(facts["adapters"]) == ["full", "lora"]
    norms = [
        weights(AutoModelForCausalLM.from_pretrained(f))["model.norm.weight"]
        for f in (bases["llama"], tmp_path / "full" / "model", tmp_path / "both")
    ]
    assert torch.allclose(norms[2], (norms[0] + norms[1]) / 2, atol=1e-6)
    assert not torch.equal(norms[0], norms[1])


def test_what_is_refused(
    pair: list[Path], bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folder_adapter(tmp_path / "other", bases["llama-tied"], 3)
    prompts = tmp_path / "prompts"
    write(prompts, "prompt_tuning", "llama", 4)
    fields = json.loads((prompts / hf_peft.CONFIG).read_text())
    (prompts / hf_peft.CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": str(bases["llama"])}))
    head = plain_lora(tmp_path / "head", bases["llama"], 5, modules_to_save=["embed_tokens"])
    cases: list[tuple[list[object], str]] = [
        ([*pair, "--weights", "1"], "1 weights for 2 adapters"),
        ([*pair, "--weights", "1,nan"], "not finite"),
        ([*pair, "--weights", "1;2"], "is no list of numbers"),
        ([*pair, "--combine", "slerp"], "'slerp' is not one of linear, ties, dare, svd"),
        ([*pair, "--as", "lora"], "'lora' is not one of model, adapter"),
        ([*pair, "--density", "0.5"], "--density is for --combine ties and dare"),
        ([*pair, "--combine", "ties", "--density", "0"], "0.0 is not above 0"),
        ([*pair, "--combine", "ties", "--seed", "1"], "--seed is for --combine dare"),
        ([*pair, "--rank", "4"], "--rank is for --combine svd and --as adapter"),
        ([*pair, "--as", "adapter", "--dtype", "float32"], "--dtype is of a merged model"),
        ([*pair, "--dtype", "float16"], "'float16' is not one of"),
        ([*pair, "--quantization", "nf5"], "'nf5' is not one of"),
        ([pair[0], other], "the results are of different bases"),
        ([pair[0], prompts], "prompts is a result of prompt_tuning, which cannot be folded"),
        ([pair[0], head, "--as", "adapter"], "model.embed_tokens (Embedding) changes"),
        ([pair[0], bases["llama"]], "whole model that does not say which base"),
    ]
    for args, message in cases:
        code, out, err = command_line(monkeypatch, capsys, "merge", *args, "-o", tmp_path / "out")
        assert (code, out) == (2, ""), (args, err)
        assert message in err, err
        assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    code, _, err = command_line(monkeypatch, capsys, "merge", *pair, "-o", tmp_path / "there")
    assert code == 2
    assert "is not empty" in err
