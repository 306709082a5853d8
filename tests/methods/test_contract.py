"""What every method promises, probed for every name in the registry: a method that breaks a claim of its own fails here."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcli.errors import RecipeError, UsageError
from peftcli.interchange import hf_peft
from peftcli.merge import logits_of, merge, parity
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import Select, trainable_state
from peftcli.recipe.load import parse_recipe
from peftcli.train import checkpoint as checkpoints
from peftcli.train.signals import Interrupted

NAMES = registry.names()
CAPS = {name: registry.get(name).caps for name in NAMES}
KINDS = ["llama", "llama-tied", "gpt2"]
# The base that each method runs over where there is a choice: 4 bits where it cannot do without.
DENSE = [name for name in NAMES if name != "qlora"]
QUANTIZED = [name for name in NAMES if CAPS[name].quantized_base]
MERGEABLE = [name for name in DENSE if CAPS[name].mergeable]
EVERYWHERE = [*((name, None) for name in DENSE), *((name, "nf4") for name in QUANTIZED)]


def fits(name: str, kind: str) -> bool:
    """Whether the method has something to train in this kind of model (bitfit: biases)."""
    try:
        helpers.adapted(name, kind)
    except UsageError:
        return False
    return True


FITS = {name: [kind for kind in KINDS if fits(name, kind)] for name in NAMES}
HOME = {name: kinds[0] for name, kinds in FITS.items()}
EVERY_KIND = [(name, quantization, kind) for name, quantization in EVERYWHERE for kind in FITS[name]]


def pair(
    name: str, kind: str | None = None, dtype: torch.dtype = torch.float32, quantization: str | None = None, **options: Any
) -> tuple[Any, Method[Any]]:
    model, method = helpers.adapted(name, kind or HOME[name], dtype, quantization=quantization, **options)
    return model, method


def steps(model: Any, method: Method[Any], folder: Path, count: int = 4, **settings: Any) -> list[float]:
    """Train on the pattern task; returns the logged losses."""
    losses: list[float] = []
    loop = helpers.make_loop(model, method, helpers.pattern_split(), folder, steps=count, batch_size=8, logging_steps=1, **settings)
    loop.display.step = lambda record: losses.append(record["loss"])  # type: ignore[method-assign]
    loop.run()
    return losses


@pytest.mark.parametrize(("name", "quantization", "kind"), [case for case in EVERY_KIND if CAPS[case[0]].identity_at_init])
def test_before_the_first_step_the_model_is_the_base(name: str, quantization: str | None, kind: str) -> None:
    base = helpers.logits(helpers.tiny_model(kind, quantization=quantization))
    assert torch.equal(helpers.logits(pair(name, kind, quantization=quantization)[0]), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "quantization"), EVERYWHERE)
def test_trainable_parameters_are_float32_and_the_base_is_frozen(name: str, quantization: str | None, dtype: torch.dtype) -> None:
    model, method = pair(name, dtype=dtype, quantization=quantization)
    state = trainable_state(model)
    assert state
    assert {p.dtype for p in state.values()} == {torch.float32}
    plain = set(dict(helpers.tiny_model(HOME[name], dtype, quantization).named_parameters()))
    moving = {key.replace("base.", "") for key in state}
    if not isinstance(method, Select):
        assert not moving & plain, "an adapter must not train the base's own weights"


@pytest.mark.parametrize(("name", "quantization", "kind"), EVERY_KIND)
def test_every_trainable_parameter_moves_and_nothing_else_does(name: str, quantization: str | None, kind: str, tmp_path: Path) -> None:
    model, method = pair(name, kind, quantization=quantization)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, method, tmp_path)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key


@pytest.mark.parametrize(("name", "quantization"), EVERYWHERE)
def test_initial_values_are_a_function_of_the_seed_and_the_names(name: str, quantization: str | None) -> None:
    first = trainable_state(pair(name, quantization=quantization)[0])
    torch.manual_seed(999)
    second = trainable_state(pair(name, quantization=quantization)[0])
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "quantization", "kind"), EVERY_KIND)
def test_saved_and_loaded_gives_the_same_logits(
    name: str, quantization: str | None, kind: str, tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    model, method = pair(name, kind, quantization=quantization)
    helpers.stir(model)
    expected = helpers.logits(model)
    recipe = parse_recipe(helpers.recipe_for(tiny_folders[kind], tmp_path, tmp_path, method=f"{{name: {name}}}"), "r.yaml", ["base_model.quantization=nf4"] if quantization else []).recipe  # fmt: skip
    saved = helpers.save_result(tmp_path, model, method, recipe)
    if method.caps.whole_model:
        from transformers import AutoModelForCausalLM

        from peftcli.kernels import attention

        again = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention.register())
    else:
        again = hf_peft.apply_adapter(helpers.tiny_model(kind, quantization=quantization), hf_peft.read_adapter(saved), Context(seed=99))
        assert {t.dtype for t in load_file(saved / hf_peft.WEIGHTS).values()} == {torch.float32}
    assert torch.equal(helpers.logits(again), expected)
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in MERGEABLE for kind in FITS[name]])
def test_merged_equals_unmerged(name: str, dtype: torch.dtype, limit: float, kind: str) -> None:
    model, _ = pair(name, kind, dtype)
    helpers.stir(model)
    before = helpers.logits(model)
    assert float((before - helpers.logits(helpers.tiny_model(kind, dtype))).abs().max()) > 1e-2, "the adapter must matter"
    merged = merge(model)
    # An output layer that was tied and has been trained by itself is one more.
    more = set(dict(merged.named_parameters())) ^ set(dict(helpers.tiny_model(kind).named_parameters()))
    assert more <= (set() if merged.config.tie_word_embeddings else {"lm_head.weight"})
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert float((helpers.logits(merged) - before).abs().max()) <= limit


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", [name for name in QUANTIZED if CAPS[name].mergeable])
def test_merged_into_the_dequantized_base(name: str, quantization: str) -> None:
    model, _ = pair(name, quantization=quantization)
    helpers.stir(model, scale=0.02)
    rows = [row.numpy() for row in helpers.some_ids(8, 40)]
    device = torch.device("cpu")
    before = logits_of(helpers.CAUSAL_LM, model, rows, device)  # an evaluation must not spoil the stored weights
    merged = merge(model)
    found = parity(before, logits_of(helpers.CAUSAL_LM, merged, rows, device), exact=False)
    assert found.positions == 8 * 39
    assert found.kl <= 5e-3
    if quantization != "int8":  # int8 rounds activations too, which no merged weight can repeat: near ties of a random model flip
        assert found.top1 >= 0.99
    assert not any("bitsandbytes" in type(module).__module__ for module in merged.modules())


@pytest.mark.parametrize(
    ("name", "quantization"), [(name, kind) for kind in ("fp4", "int8") for name in QUANTIZED if (name, kind) != ("qlora", "int8")]
)
def test_every_quantized_base_is_trained_over_saved_and_loaded(name: str, quantization: str, tmp_path: Path) -> None:
    model, method = pair(name, quantization=quantization)
    before = {key: value.clone() for key, value in trainable_state(model).items()}
    steps(model, method, tmp_path)
    assert all(not torch.equal(before[key], value) for key, value in trainable_state(model).items())
    hf_peft.save_adapter(tmp_path / "saved", model, method, base_model="some/base", revision=None)
    base = helpers.tiny_model(HOME[name], quantization=quantization)
    again = hf_peft.apply_adapter(base, hf_peft.read_adapter(tmp_path / "saved"), Context(frozen_quantized=True))
    assert torch.equal(helpers.logits(again), helpers.logits(model))


@pytest.mark.parametrize("name", NAMES)
def test_methods_that_train_base_weights_refuse_quantization(name: str, tmp_path: Path) -> None:
    text = helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: {name}}}")
    if CAPS[name].quantized_base:
        assert parse_recipe(text, "r.yaml", ["base_model.quantization=nf4"]).recipe.base_model.quantization == "nf4"
        return
    with pytest.raises(RecipeError, match=r"base_model\.quantization.*nf4"):
        parse_recipe(text, "r.yaml", ["base_model.quantization=nf4"])


def test_qlora_insists_on_a_4_bit_base_and_recommends_nf4(tmp_path: Path) -> None:
    text = helpers.recipe_for(tmp_path, tmp_path, tmp_path, method="{name: qlora}")
    assert parse_recipe(text, "r.yaml").recipe.base_model.quantization == "nf4"
    for other in ("int8", "null"):
        with pytest.raises(RecipeError, match="4-bit"):
            parse_recipe(text, "r.yaml", [f"base_model.quantization={other}"])


@pytest.mark.parametrize(("name", "quantization"), EVERYWHERE)
def test_resumed_equals_uninterrupted_to_the_byte(name: str, quantization: str | None, tmp_path: Path) -> None:
    states: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    settings: dict[str, Any] = {"batch_size": 5, "save_steps": 5, "learning_rate": 1e-2}
    split = helpers.make_split([7, 9, 4, 12, 6, 8, 5, 10, 11, 7, 6, 9, 3])  # 3 steps for each epoch, the last one partial
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        torch.manual_seed(1)
        model, method = pair(name, quantization=quantization)
        loop = helpers.make_loop(model, method, split, folder, steps=8, **settings)
        if interrupted:
            # In epoch 1; the run must not be made shorter for it, because methods may follow its length.
            loop.display.advance = lambda step: signal.raise_signal(signal.SIGTERM) if step == 5 else None  # type: ignore[method-assign]
            with loop.stop, pytest.raises(Interrupted):
                loop.run()
            torch.manual_seed(77)
            model, method = pair(name, quantization=quantization)
            loop = helpers.make_loop(model, method, split, folder, steps=8, **settings)
            found, notes = checkpoints.newest(folder / "checkpoints")
            assert found is not None
            assert found.progress.step == 5
            assert not notes
            assert loop.run(found).step == 8
        else:
            loop.run()
        states.append((trainable_state(model), checkpoints.optimizer_tensors(loop.optimizer)[0]))
    for one, two in zip(*states, strict=True):
        assert one.keys() == two.keys()
        assert one
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("name", "quantization"), EVERYWHERE)
def test_a_small_task_is_learned(name: str, quantization: str | None, tmp_path: Path) -> None:
    model, method = pair(name, quantization=quantization)
    # At the rate that suits each: a few biases or scales want a higher one than matrices.
    rate = 100 * float(method.recommended.get("train.learning_rate", 2e-4))  # type: ignore[arg-type]
    losses = steps(model, method, tmp_path, 40, learning_rate=min(max(rate, 2e-2), 0.1))
    assert losses[-1] < 0.75 * losses[0]


def test_a_method_from_outside_needs_one_line(
    tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register("toy", "toy_method:Toy")
    text = helpers.recipe_for(tiny_folders["llama"], tiny_data, tmp_path / "out", method="{name: toy, pattern: layernorm}")
    report = helpers.run(text, "train.max_steps=4")
    assert report.method.name == "toy"
    assert report.model.trainable_parameters == 2 * 2 * 64
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
