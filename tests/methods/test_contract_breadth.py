"""What every method promises under the conditions of real runs: gradient checkpointing, grouped-query attention, half-precision bases,
accumulation, packing, tied embeddings, new tokens, an evaluation before the save. Every name in the registry, in float64 where rounding
could hide a fault."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from test_contract import CAPS, DENSE, EVERYWHERE, HOME, NAMES, QUANTIZED, fits
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftcli.data.batching import collate
from peftcli.data.splits import Split
from peftcli.errors import RecipeError, UsageError
from peftcli.interchange import hf_peft
from peftcli.kernels import attention
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import NewTokens, trainable_state, trains_base_weights
from peftcli.recipe.load import parse_recipe
from peftcli.tasks.causal_lm import CausalLM, supports_packing

# One kind with grouped-query attention (with biases for the method that needs them), one without, one with Conv1D.
ATTENTION = {"grouped": ["llama", "llama-bias"], "multi-head": ["llama-mha", "gpt2"]}
SHAPES = [(name, attends, next(k for k in kinds if fits(name, k))) for name in DENSE for attends, kinds in ATTENTION.items()]
RAGGED = [3, 20, 5, 11, 2, 17, 9, 4]


def pair(name: str, kind: str | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Method[Any]]:
    """A method on a tiny model, moved away from its start so that no gradient is zero by construction."""
    model, method = helpers.adapted(name, kind or HOME[name], dtype, **options)
    helpers.stir(model)
    return model, method


def gradients(
    model: Any, method: Method[Any], split: Split, rows: list[list[int]], *, packed: bool, autocast: bool = False
) -> dict[str, Tensor]:
    """The gradient of the mean loss over the supervised tokens, in batches of ``rows``."""
    model.train()
    model.zero_grad(set_to_none=True)
    task, count = CausalLM(model), sum(int(mask[1:].sum()) for mask in split.supervised)
    for batch in rows:
        ids, masks = [split.input_ids[i] for i in batch], [split.supervised[i] for i in batch]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = method.loss(task, collate(ids, masks, packed=packed, pad_id=3))
        # Divided first, as the loop does: the norms of these models compute in float32 even in a float64 model.
        (loss.total / count).backward()
    found = helpers.gradients(model)
    assert found.keys() == trainable_state(model).keys(), "every trainable tensor takes part"
    assert max(float(g.abs().max()) for g in found.values()) > 1e-5
    return found


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def everything(split: Split) -> list[list[int]]:
    return [list(range(len(split.input_ids)))]


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "attends", "kind"), SHAPES)
def test_gradient_checkpointing_changes_no_gradient(name: str, attends: str, kind: str, packed: bool) -> None:
    config = helpers.tiny_config(kind)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert (heads < config.num_attention_heads) == (attends == "grouped")
    split = helpers.make_split([7, 12, 5])
    model, method = pair(name, kind)
    plain = gradients(model, method, split, everything(split), packed=packed)
    assert all(bool(g.any()) for g in plain.values()), "a tensor without a gradient never moves"
    assert worst(gradients(checkpointed(model), method, split, everything(split), packed=packed), plain) <= 1e-12


@pytest.mark.parametrize("name", QUANTIZED)
def test_gradient_checkpointing_over_quantized_layers(name: str) -> None:
    split = helpers.make_split([7, 12, 5])
    model, method = pair(name, dtype=torch.float32, quantization="nf4")
    plain = gradients(model, method, split, everything(split), packed=True)
    again = gradients(checkpointed(model), method, split, everything(split), packed=True)
    assert worst(again, plain) <= 1e-6 * max(1.0, max(float(g.abs().max()) for g in plain.values()))


@pytest.mark.parametrize("name", NAMES)
def test_over_a_bfloat16_base_the_gradient_keeps_its_direction(name: str) -> None:
    """As a run computes: the frozen base in bfloat16, autocast where its own weights are trained."""
    split = helpers.make_split(RAGGED)
    exact = gradients(*pair(name, dtype=torch.float32), split, everything(split), packed=True)
    dtype = torch.float32 if CAPS[name].whole_model else torch.bfloat16
    model, method = pair(name, dtype=dtype)
    found = gradients(model, method, split, everything(split), packed=True, autocast=trains_base_weights(model))
    assert {g.dtype for g in found.values()} == {torch.float32}
    one, two = (torch.cat([grads[key].flatten() for key in sorted(exact)]) for grads in (exact, found))
    assert not torch.equal(one, two)
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.98
    assert float(two.norm() / one.norm()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", DENSE)
def test_accumulation_splits_are_one_gradient(name: str) -> None:
    """Packed or padded, in one batch or in many, by rows or by each row alone: the gradient of a step is one."""
    split = helpers.make_split(RAGGED)
    model, method = pair(name)
    alone = gradients(model, method, split, [[i] for i in range(8)], packed=False)
    for size in (8, 3, 2):
        rows = [list(range(i, min(i + size, 8))) for i in range(0, 8, size)]
        for packed in (True, False):
            assert worst(gradients(model, method, split, rows, packed=packed), alone) <= 1e-10, (size, packed)


@pytest.mark.parametrize("name", DENSE)
def test_the_loop_accumulates_to_the_same_gradient(name: str, tmp_path: Path) -> None:
    split, found = helpers.make_split(RAGGED), []
    for size, accumulation in ((8, 1), (3, 3)):
        model, method = pair(name)
        seen: list[dict[str, Tensor]] = []
        method.before_step = lambda model, tick, seen=seen: seen.append(helpers.gradients(model))  # type: ignore[method-assign]
        method.after_step = lambda model, tick: None  # type: ignore[method-assign]
        helpers.make_loop(model, method, split, tmp_path, steps=1, batch_size=size, gradient_accumulation_steps=accumulation).run()
        found.append(seen[0])
    assert worst(*found) <= 1e-10
    model, method = pair(name)
    assert worst(gradients(model, method, split, [[i] for i in range(8)], packed=False), found[0]) <= 1e-10


@pytest.mark.parametrize("name", DENSE)
def test_packed_rows_do_not_see_each_other(name: str) -> None:
    model, _ = pair(name)
    model.eval()
    assert supports_packing(model, helpers.VOCABULARY)
    split, other = helpers.make_split([7, 9]), helpers.make_split([7, 9], seed=5)
    task = CausalLM(model)
    with torch.no_grad():
        masks = [np.zeros(7, dtype=np.bool_), split.supervised[1]]
        first, second = (
            task.logits(collate([one, split.input_ids[1]], masks, packed=True)) for one in (split.input_ids[0], other.input_ids[0])
        )
        alone = task.logits(collate([split.input_ids[1]], [masks[1]], packed=False, pad_id=3))
    assert torch.equal(first, second), "a row reaches into its neighbour"
    assert float((first - alone).abs().max()) <= 1e-10


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in DENSE for kind in ("llama-tied", "gpt2") if fits(name, kind)])
def test_tied_embeddings_stay_tied_or_say_that_they_are_not(name: str, kind: str, tmp_path: Path) -> None:
    model, method = helpers.adapted(name, kind)
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    helpers.make_loop(model, method, helpers.pattern_split(), tmp_path, steps=2, batch_size=8).run()
    shared = model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert shared == bool(model.config.tie_word_embeddings)
    assert torch.equal(embedding, before) != embedding.requires_grad
    if not shared:
        assert model.get_output_embeddings().weight.requires_grad, "untied without a need"


def resized(kind: str, noise: int) -> Any:
    """A tiny model with three more tokens; what their rows hold before an adapter is loaded must not matter."""
    model = helpers.tiny_model(kind)
    model.resize_token_embeddings(helpers.VOCABULARY + 3, mean_resizing=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(noise)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[helpers.VOCABULARY :] = torch.randn(3, 64, generator=generator) * 0.1
    return model


def takes_new_tokens(name: str) -> bool:
    """Whether the recipe may add tokens; what refuses them says so there, before anything is loaded."""
    text = helpers.recipe_for(Path("m"), Path("d"), Path("o"), method=f"{{name: {name}}}")
    try:
        parse_recipe(text, "r.yaml", ["base_model.new_tokens=[<new>]"])
    except RecipeError as error:
        assert "base_model.new_tokens" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", [name for name in DENSE if not takes_new_tokens(name)])
def test_new_tokens_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match=r"base_model\.new_tokens: .*would stay at their initial values"):
        helpers.make_method(name).apply(resized("llama", noise=1), Context(new_token_ids=(helpers.VOCABULARY,)))


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in DENSE if takes_new_tokens(n) for k in ("llama", "llama-bias", "llama-tied", "gpt2") if fits(n, k)]
)
def test_new_tokens_are_trained_saved_and_come_back(name: str, kind: str, tmp_path: Path) -> None:
    ids = tuple(range(helpers.VOCABULARY, helpers.VOCABULARY + 3))
    method = helpers.make_method(name)
    model = method.apply(resized(kind, noise=1), Context(seed=11, new_token_ids=ids))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    split = helpers.make_split([9, 7, 11, 8])
    for row, new in zip(split.input_ids, [*ids, ids[0]], strict=True):
        row[-2:] = [new, ids[0]]
    helpers.make_loop(model, method, split, tmp_path / "run", steps=3, batch_size=4).run()
    rows = [m.trainable_tokens_delta for m in model.modules() if isinstance(m, NewTokens)]
    if not CAPS[name].whole_model:
        assert rows, "the new tokens' rows are trained by themselves"
        assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n.endswith("trainable_tokens_delta"))
    text = torch.cat([helpers.some_ids(2, 6), torch.tensor([list(ids), list(ids)[::-1]])], 1)
    expected = helpers.logits(model, text)
    recipe = parse_recipe(helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: {name}}}"), "r.yaml").recipe
    saved = helpers.save_result(tmp_path, model, method, recipe)
    if CAPS[name].whole_model:
        again = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention.register())
    else:
        again = hf_peft.apply_adapter(resized(kind, noise=2), hf_peft.read_adapter(saved), Context(seed=99))
    assert torch.equal(helpers.logits(again, text), expected)


@pytest.mark.parametrize(("name", "quantization"), EVERYWHERE)
def test_an_evaluation_before_the_save_changes_no_byte(name: str, quantization: str | None, tmp_path: Path) -> None:
    recipe = parse_recipe(helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: {name}}}"), "r.yaml").recipe
    folders = []
    for evaluated in (False, True):
        model, method = pair(name, dtype=torch.bfloat16, quantization=quantization)
        if evaluated:
            with torch.autocast("cpu", torch.bfloat16, enabled=trains_base_weights(model)):
                helpers.logits(model)
        folder = tmp_path / str(evaluated)
        folder.mkdir()
        folders.append(helpers.save_result(folder, model, method, recipe))
    assert helpers.folder_bytes(folders[0]) == helpers.folder_bytes(folders[1])


STOCK = [name for name in DENSE if (form := registry.get(name).peft) is not None and form.stock]


# Stock PEFT has these layers for nn.Linear only, not for GPT-2's Conv1D; ours are tested there against the formula.
LINEAR_ONLY = {"loha", "lokr"}
LOADED = [(name, kind) for name in STOCK for kind in ("llama", "llama-tied", "gpt2") if kind != "gpt2" or name not in LINEAR_ONLY]


@pytest.mark.parametrize(("name", "kind"), LOADED)
def test_stock_peft_loads_every_file_without_a_key_too_many_or_too_few(name: str, kind: str, tmp_path: Path) -> None:
    model, method = helpers.adapted(name, kind)
    helpers.make_loop(model, method, helpers.pattern_split(), tmp_path / "run", steps=10, batch_size=8).run()
    hf_peft.save_adapter(tmp_path / "adapter", model, method, base_model="some/base", revision=None)
    tensors = load_file(tmp_path / "adapter" / hf_peft.WEIGHTS)
    assert tensors
    form = method.peft
    assert form is not None
    # Tensors without elements share their places in the file, so their order says nothing.
    filled = [key for key, tensor in tensors.items() if tensor.numel()]
    assert filled == sorted(filled)
    assert all(tensor.numel() or form.empty for tensor in tensors.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        other = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path / "adapter")
    state = peft.get_peft_model_state_dict(other, save_embedding_layers=False)
    assert {key for key in tensors if "vera_A" not in key and "vera_B" not in key} <= state.keys()
    ids = helpers.some_ids()
    with torch.no_grad():
        other.eval()
        theirs = other(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    assert helpers.same(theirs, helpers.logits(model))
