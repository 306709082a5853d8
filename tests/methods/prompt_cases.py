"""What the tests of the prompt methods share: stock PEFT over the same base with the same weights, and padded against packed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import peft
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcli.data.batching import collate
from peftcli.interchange import hf_peft
from peftcli.methods.base import Context
from peftcli.tasks.base import Layout
from peftcli.tasks.causal_lm import CausalLM

KINDS = ["llama", "llama-mha", "llama-tied", "gpt2"]
ROWS = [7, 12, 3, 9]


def stock(kind: str, dtype: torch.dtype, config: Any, ours: Any) -> Any:
    """Stock PEFT, trainable, with the weights of ``ours``."""
    model = peft.get_peft_model(helpers.tiny_model(kind, dtype), config, autocast_adapter_dtype=False)
    encoder = model.prompt_encoder["default"].to(dtype)
    state = {name.removeprefix("encoder."): p.detach() for name, p in ours.named_parameters() if p.requires_grad}
    if "prompt_embeddings" in state:
        state = {"embedding.weight": state["prompt_embeddings"]}
    encoder.load_state_dict(state)
    return model


def theirs(model: Any, ids: Tensor, count: int = 0) -> Tensor:
    """PEFT's logits at the real tokens; ``count`` virtual ones are in front of them."""
    model.eval()
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, count:]
    return result


def gradients_of_both(ours: Any, other: Any, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the mean loss on the same ids by parameter name; ``count`` virtual positions are in PEFT's logits."""
    ids = helpers.some_ids()
    for model, skip in ((ours, 0), (other, count)):
        model.train()
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, skip:]
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = {name.removeprefix("encoder."): p.grad for name, p in ours.named_parameters() if p.requires_grad}
    expected = {n.removeprefix("prompt_encoder.default."): p.grad for n, p in other.named_parameters() if p.requires_grad}
    if "prompt_embeddings" in found:
        found = {"embedding.weight": found["prompt_embeddings"]}
    return found, expected


def check_against_stock(kind: str, dtype: torch.dtype, name: str, options: dict[str, Any], config: Any, count: int) -> None:
    """Outputs and gradients of ours and PEFT's with the same weights."""
    limit = 1e-9 if dtype == torch.float64 else 1e-6
    ours, _ = helpers.adapted(name, kind, dtype, **options)
    helpers.stir(ours)
    other = stock(kind, dtype, config, ours)
    one, two = helpers.logits(ours), theirs(other, helpers.some_ids(), count)
    assert float((one - helpers.logits(helpers.tiny_model(kind, dtype))).abs().max()) > 1e-2, "the prompt must matter"
    assert float((one - two).abs().max()) <= limit * max(1.0, float(two.abs().max()))
    found, expected = gradients_of_both(ours, other, count)
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert float((found[key] - grad).abs().max()) <= limit * max(1.0, float(grad.abs().max())), key
        assert float(grad.abs().max()) > 0.0, key


def check_files(kind: str, name: str, options: dict[str, Any], config: Any, count: int, folder: Path) -> None:
    """Our file in stock PEFT, PEFT's file here: the same fields, bitwise the same tensor, the same logits."""
    ours, method = helpers.adapted(name, kind, **options)
    helpers.stir(ours)
    hf_peft.save_adapter(folder / "ours", ours, method, base_model="some/base", revision=None)
    loaded = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), folder / "ours")
    assert helpers.same(theirs(loaded, helpers.some_ids(), count), helpers.logits(ours))
    other = stock(kind, torch.float32, config, ours)
    other.save_pretrained(folder / "theirs")
    written, stored = (load_file(folder / who / hf_peft.WEIGHTS) for who in ("ours", "theirs"))
    assert written.keys() == stored.keys() == {"prompt_embeddings"}
    assert torch.equal(written["prompt_embeddings"], stored["prompt_embeddings"])
    mine, yours = (json.loads((folder / who / hf_peft.CONFIG).read_text()) for who in ("ours", "theirs"))
    initial = {"base_model_name_or_path", "prompt_tuning_init"}
    assert {k: v for k, v in mine.items() if k not in initial} == {k: v for k, v in yours.items() if k not in initial}
    read = hf_peft.read_adapter(folder / "theirs")
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), read, Context(seed=5))
    assert torch.equal(helpers.logits(again), helpers.logits(ours))
    # What was loaded and saved once more is the same file.
    hf_peft.save_adapter(folder / "again", again, read.method, base_model="some/base", revision=None)
    assert (folder / "again" / hf_peft.WEIGHTS).read_bytes() == (folder / "ours" / hf_peft.WEIGHTS).read_bytes()


def rows(lengths: list[int] = ROWS, seed: int = 0) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """Ids and masks; the first token carries no loss."""
    split = helpers.make_split(lengths, seed=seed)
    return list(split.input_ids), list(split.supervised)


def check_layouts(kind: str, name: str, options: dict[str, Any]) -> None:
    """Packed, padded and one by one: the same losses and gradients, in float64."""
    model, _ = helpers.adapted(name, kind, torch.float64, **options)
    helpers.stir(model)
    model.eval()
    task = CausalLM(model)
    ids, masks = rows()
    outcomes = []
    for layout in ("packed", "padded", "alone"):
        model.zero_grad()
        if layout == "alone":
            loss = sum(task(collate([i], [m], packed=True)).total for i, m in zip(ids, masks, strict=True))
        else:
            loss = task(collate(ids, masks, packed=layout == "packed", pad_id=3)).total
        loss.backward()
        outcomes.append((float(loss.detach()), helpers.gradients(model)))
    first, gradients = outcomes[0]
    assert gradients
    for total, others in outcomes[1:]:
        assert abs(total - first) <= 1e-9
        assert others.keys() == gradients.keys()
        assert all(float((others[key] - grad).abs().max()) <= 1e-9 for key, grad in gradients.items())


def check_no_leak(kind: str, name: str, options: dict[str, Any]) -> None:
    """Another first row changes no bit of the second one's logits; a packed row gives what it gives alone."""
    model, _ = helpers.adapted(name, kind, torch.float64, **options)
    helpers.stir(model)
    model.eval()
    task = CausalLM(model)
    tail = np.arange(20, 29, dtype=np.int32)
    whole, none = np.ones(9, dtype=np.bool_), np.zeros(6, dtype=np.bool_)
    with torch.no_grad():
        answers = [task.logits(collate([np.full(6, start, dtype=np.int32), tail], [none, whole], packed=True)) for start in (5, 200)]
        alone = task.logits(collate([tail], [whole], packed=True))
    assert torch.equal(answers[0], answers[1])
    assert float((answers[0] - alone).abs().max()) <= 1e-10


def check_generation(kind: str, name: str, options: dict[str, Any]) -> None:
    """A batch padded on the left gives what each prompt gives alone, and what greedy search over plain forward passes gives."""
    from transformers import GenerationConfig

    model, _ = helpers.adapted(name, kind, **options)
    helpers.stir(model)
    model.eval()
    config = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=3, eos_token_id=None)
    prompts = [[10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[3] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert torch.equal(together[:, :longest], ids)
    for row, prompt in enumerate(prompts):
        alone = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), generation_config=config)  # fmt: skip
        written = list(prompt)
        for _ in range(7):
            written.append(int(helpers.logits(model, torch.tensor([written]))[0, -1].argmax()))
        assert alone[0].tolist() == written
        assert together[row, longest:].tolist() == written[len(prompt) :]


def check_checkpointing(kind: str, name: str, options: dict[str, Any]) -> None:
    """Gradient checkpointing changes no gradient, packed or padded, and every trainable parameter has one."""
    ids, masks = rows()
    for packed in (True, False):
        found = []
        for checkpointing in (False, True):
            model, _ = helpers.adapted(name, kind, torch.float64, **options)
            helpers.stir(model)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            CausalLM(model)(collate(ids, masks, packed=packed, pad_id=3)).total.backward()
            found.append(helpers.gradients(model))
        assert found[0].keys() == found[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        for key, grad in found[0].items():
            assert float(grad.abs().max()) > 0.0, key
            assert float((found[1][key] - grad).abs().max()) <= 1e-9, key


def end_to_end(method: str, folder: Path, model: Path, data: Path, *overrides: str, resume: bool = False) -> Any:
    """A whole run of the recipe that the tests share."""
    return helpers.run(helpers.recipe_for(model, data, folder, method=method), *overrides, resume=resume)


def check_whole_run(method: str, tmp_path: Path, model: Path, data: Path) -> Any:
    """Train, save, check, evaluate with generation; the result opens again with the same held-out loss."""
    from peftcli.evaluate import Evaluator
    from peftcli.result import open_result

    report = end_to_end(method, tmp_path / "out", model, data, "eval.generate=true", "eval.max_new_tokens=5")
    check = report.checks.live_adapter
    assert check is not None
    assert check.passed, check
    assert check.keys == 1
    assert report.eval is not None
    assert report.eval_before is not None
    assert report.eval.loss < report.eval_before.loss
    result = open_result(tmp_path / "out")
    from accelerate import PartialState

    from peftcli.data.prepare import prepare_eval

    assert result.recipe is not None
    split = prepare_eval(
        result.task.rows(result.recipe.dataset, result.base.tokenizer), base_dir=result.base_dir, seed=result.recipe.train.seed
    )
    scores = Evaluator(PartialState(), result.task, split, result.base.tokenizer, Layout(True, 3), 16).scores(CausalLM(result.model))
    assert scores.loss == report.eval.loss
    return report


def check_resume(name: str, options: dict[str, Any], folder: Path) -> None:
    """A run that stopped and went on ends with the bytes of one that did not."""
    from peftcli.methods.kinds import trainable_state
    from peftcli.train import checkpoint as checkpoints

    split = helpers.make_split([7, 9, 4, 12, 6, 8, 5, 10, 11, 7])
    settings: dict[str, Any] = {"batch_size": 4, "save_steps": 3, "gradient_accumulation_steps": 2}
    ends = []
    for stopped in (False, True):
        torch.manual_seed(1)
        model, method = helpers.adapted(name, **options)
        loop = helpers.make_loop(model, method, split, folder / str(stopped), steps=4 if stopped else 6, **settings)
        loop.run()
        if stopped:
            torch.manual_seed(2)
            model, method = helpers.adapted(name, **options)
            loop = helpers.make_loop(model, method, split, folder / str(stopped), steps=6, **settings)
            found, notes = checkpoints.newest(loop.folder)
            assert found is not None
            assert found.progress.step == 3
            assert not notes
            loop.run(found)
        ends.append((trainable_state(model), method.to_file(model, {})))
    for one, two in zip(*ends, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
