"""What every method promises, on encoder-decoders: T5 (tied embeddings) and its second version (gated, an output layer of its own).
The same claims as in ``test_contract`` and ``test_contract_breadth``, which try the models that have one stack of layers."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file
from test_contract import CAPS, DENSE, MERGEABLE, NAMES, QUANTIZED
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from peftcli.data.splits import PairSplit
from peftcli.errors import CheckpointError, UsageError
from peftcli.interchange import hf_peft
from peftcli.merge import logits_of, merge, parity
from peftcli.methods import registry
from peftcli.methods.base import Context, Method
from peftcli.methods.kinds import Select, trainable_state, trains_base_weights
from peftcli.model.load import checkpoint_activations, quantizable
from peftcli.quantization import is_quantized
from peftcli.recipe.load import parse_recipe
from peftcli.tasks.base import Layout
from peftcli.train import checkpoint as checkpoints
from peftcli.train.signals import Interrupted

KINDS = ["t5", "flan-t5"]
# T5 has no biases.
FIT = [name for name in NAMES if name != "bitfit"]
EVERYWHERE = [(name, quantization) for name in FIT for quantization in (None, "nf4") if name in (QUANTIZED if quantization else DENSE)]
EVERY_KIND = [(name, quantization, kind) for name, quantization in EVERYWHERE for kind in (KINDS if quantization is None else ["flan-t5"])]
RAGGED = [(7, 3), (4, 9), (12, 2), (3, 6), (9, 5)]


def pair(name: str, kind: str = "t5", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Method[Any]]:
    return helpers.adapted(name, kind, dtype, **options)


def gradients(model: Any, method: Method[Any], split: PairSplit, rows: list[list[int]], *, autocast: bool = False) -> dict[str, Tensor]:
    """The gradient of the mean loss over the targets' tokens, in batches of ``rows``."""
    model.train()
    model.zero_grad(set_to_none=True)
    module, count = helpers.SEQ2SEQ.module(model), sum(map(len, split.target_ids))
    for chosen in rows:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = method.loss(module, helpers.SEQ2SEQ.batch(split, chosen, Layout(False, 3)))
        (loss.total / count).backward()
    found = helpers.gradients(model)
    assert found.keys() == trainable_state(model).keys(), "every trainable tensor takes part"
    assert all(bool(g.any()) for g in found.values()), "a tensor without a gradient never moves"
    return found


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_finds_nothing_to_train_says_so(kind: str) -> None:
    with pytest.raises(UsageError, match="T5ForConditionalGeneration has no biases"):
        pair("bitfit", kind)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantization_leaves_alone_what_the_architecture_keeps_wide(quantization: str, kind: str) -> None:
    dense, model = helpers.tiny_model(kind), helpers.tiny_model(kind, quantization=quantization)
    narrow = {name for name, module in model.named_modules() if is_quantized(module)}
    assert narrow == set(quantizable(dense))
    assert {name.rpartition(".")[2] for name in narrow} == {"q", "k", "v", "o"} | ({"wi"} if kind == "t5" else {"wi_0", "wi_1"})
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if name.endswith(("wo.weight", "lm_head.weight")))
    assert float((helpers.logits(model) - helpers.logits(dense)).abs().max()) < 0.5 * float(helpers.logits(dense).abs().max())


@pytest.mark.parametrize(("name", "quantization", "kind"), EVERY_KIND)
def test_it_starts_as_the_base_and_only_what_is_meant_moves(name: str, quantization: str | None, kind: str, tmp_path: Path) -> None:
    model, method = pair(name, kind, quantization=quantization)
    base = helpers.tiny_model(kind, quantization=quantization)
    if CAPS[name].identity_at_init:
        assert torch.equal(helpers.logits(model), helpers.logits(base))
    before, own = {n: p.detach().clone() for n, p in model.named_parameters()}, set(dict(base.named_parameters()))
    assert {p.dtype for p in trainable_state(model).values()} == {torch.float32}
    if not isinstance(method, Select):
        assert not {key.replace("base.", "") for key in trainable_state(model)} & own, "an adapter must not train the base's own weights"
    helpers.make_loop(model, method, helpers.pattern_pairs(), tmp_path, steps=4, batch_size=8).run()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key


@pytest.mark.parametrize(("name", "quantization"), [*((n, None) for n in DENSE if n in FIT), *(("lora", kind) for kind in ("nf4", "int8"))])
def test_a_small_task_is_learned(name: str, quantization: str | None, tmp_path: Path) -> None:
    model, method = pair(name, "flan-t5", quantization=quantization)
    losses: list[float] = []
    rate = 100 * float(method.recommended.get("train.learning_rate", 2e-4))  # type: ignore[arg-type]
    loop = helpers.make_loop(
        model, method, helpers.pattern_pairs(), tmp_path, steps=30, batch_size=8, logging_steps=1, learning_rate=min(max(rate, 2e-2), 0.1)
    )
    loop.display.step = lambda record: losses.append(record["loss"])  # type: ignore[method-assign]
    loop.run()
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(("name", "quantization", "kind"), EVERY_KIND)
def test_saved_and_loaded_gives_the_same_logits(name: str, quantization: str | None, kind: str, tmp_path: Path) -> None:
    model, method = pair(name, kind, quantization=quantization)
    helpers.stir(model)
    expected = helpers.logits(model)
    text = helpers.recipe_for(tmp_path, tmp_path, tmp_path, method=f"{{name: {name}}}") + "task: seq2seq\n"
    recipe = parse_recipe(text, "r.yaml", ["base_model.quantization=nf4"] if quantization else []).recipe
    saved = helpers.save_result(tmp_path, model, method, recipe)
    if method.caps.whole_model:
        again = AutoModelForSeq2SeqLM.from_pretrained(saved)
    else:
        read = hf_peft.read_adapter(saved)
        assert read.fields["task_type"] == "SEQ_2_SEQ_LM"
        again = hf_peft.apply_adapter(helpers.tiny_model(kind, quantization=quantization), read, Context(seed=99))
    assert torch.equal(helpers.logits(again), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in MERGEABLE if name in FIT])
def test_merged_equals_unmerged(name: str, kind: str, tmp_path: Path) -> None:
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model, _ = pair(name, kind, dtype)
        helpers.stir(model)
        before = helpers.logits(model)
        assert float((before - helpers.logits(helpers.tiny_model(kind, dtype))).abs().max()) > 1e-2, "the adapter must matter"
        merged = merge(model)
        assert {p.dtype for p in merged.parameters()} == {dtype}
        assert {type(m).__name__ for m in merged.modules()} == {type(m).__name__ for m in helpers.tiny_model(kind).modules()}
        assert float((helpers.logits(merged) - before).abs().max()) <= limit
    # Whether T5 scales what its decoder puts out hangs on a mark of tied weights in the config: the folder must keep it.
    merged.save_pretrained(tmp_path)
    assert torch.equal(helpers.logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)), helpers.logits(merged))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", [name for name in QUANTIZED if name in FIT and CAPS[name].mergeable])
def test_merged_into_the_dequantized_base(name: str, quantization: str) -> None:
    model, _ = pair(name, "flan-t5", quantization=quantization)
    helpers.stir(model, scale=0.02)
    rows, device = [row.numpy() for row in helpers.some_ids(8, 40)], torch.device("cpu")
    before = logits_of(helpers.SEQ2SEQ, model, rows, device)  # an evaluation must not spoil the stored weights
    merged = merge(model)
    found = parity(before, logits_of(helpers.SEQ2SEQ, merged, rows, device), exact=False)
    assert found.positions == 8 * 40
    assert found.kl <= 5e-3
    assert found.top1 >= (0.99 if quantization == "nf4" else 0.9)  # int8 rounds activations too: near ties of a random model flip
    assert not any(is_quantized(module) for module in merged.modules())


@pytest.mark.parametrize(("name", "quantization"), EVERYWHERE)
def test_resumed_equals_uninterrupted_to_the_byte(name: str, quantization: str | None, tmp_path: Path) -> None:
    states: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    settings: dict[str, Any] = {"batch_size": 3, "save_steps": 3, "learning_rate": 1e-2}
    split = helpers.make_pairs(RAGGED)  # 2 steps for each epoch, the last one partial
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        torch.manual_seed(1)
        model, method = pair(name, quantization=quantization)
        loop = helpers.make_loop(model, method, split, folder, steps=5, **settings)
        if interrupted:
            loop.display.advance = lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None  # type: ignore[method-assign]
            with loop.stop, pytest.raises(Interrupted):
                loop.run()
            torch.manual_seed(77)
            model, method = pair(name, quantization=quantization)
            loop = helpers.make_loop(model, method, split, folder, steps=5, **settings)
            found, _ = checkpoints.newest(folder / "checkpoints")
            assert found is not None
            assert loop.run(found).step == 5
        else:
            loop.run()
        states.append((trainable_state(model), checkpoints.optimizer_tensors(loop.optimizer)[0]))
    for one, two in zip(*states, strict=True):
        assert one.keys() == two.keys()
        assert one
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in DENSE if name in FIT])
def test_batches_and_checkpointing_change_no_gradient(name: str, kind: str) -> None:
    """All rows at once, some, or one by one, of different lengths on both sides; layers computed again in the backward pass."""
    split = helpers.make_pairs(RAGGED)
    model, method = pair(name, kind, torch.float64)
    helpers.stir(model)
    alone = gradients(model, method, split, [[i] for i in range(5)])
    whole = gradients(model, method, split, [[0, 1, 2, 3, 4]])
    assert worst(whole, alone) <= 1e-10
    assert worst(gradients(model, method, split, [[0, 1], [2, 3, 4]]), alone) <= 1e-10
    checkpoint_activations(model)
    assert worst(gradients(model, method, split, [[0, 1, 2, 3, 4]]), whole) <= 1e-12


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "prefix_tuning", "ia3"])
def test_gradient_checkpointing_over_quantized_layers(name: str) -> None:
    split = helpers.make_pairs(RAGGED)
    model, method = pair(name, quantization="nf4")
    helpers.stir(model)
    plain = gradients(model, method, split, [[0, 1, 2, 3, 4]])
    checkpoint_activations(model)
    again = gradients(model, method, split, [[0, 1, 2, 3, 4]])
    assert worst(again, plain) <= 1e-6 * max(1.0, max(float(g.abs().max()) for g in plain.values()))


@pytest.mark.parametrize("name", FIT)
def test_over_a_bfloat16_base_the_gradient_keeps_its_direction(name: str) -> None:
    split = helpers.make_pairs(RAGGED)
    found = []
    for dtype in (torch.float32, torch.float32 if CAPS[name].whole_model else torch.bfloat16):
        model, method = pair(name, "flan-t5", dtype)
        helpers.stir(model)
        mixed = bool(found) and trains_base_weights(model)
        found.append(gradients(model, method, split, [[0, 1, 2, 3, 4]], autocast=mixed))
    assert {g.dtype for g in found[1].values()} == {torch.float32}
    one, two = (torch.cat([grads[key].flatten() for key in sorted(grads)]) for grads in found)
    assert not torch.equal(one, two)
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.98
    assert float(two.norm() / one.norm()) == pytest.approx(1.0, abs=0.1)


STOCK = [name for name in FIT if name in DENSE and (form := registry.get(name).peft) is not None and form.stock]


def of_peft(model: Any) -> Tensor:
    ids = helpers.some_ids()
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids[:, :7]).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOCK)
def test_stock_peft_loads_every_file(name: str, kind: str, tmp_path: Path) -> None:
    model, method = pair(name, kind)
    helpers.make_loop(model, method, helpers.pattern_pairs(), tmp_path / "run", steps=10, batch_size=8).run()
    hf_peft.save_adapter(tmp_path / "adapter", model, method, base_model="some/base", revision=None, task_type="SEQ_2_SEQ_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        other = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path / "adapter")
    assert type(other).__name__ == "PeftModelForSeq2SeqLM"
    tensors, state = load_file(tmp_path / "adapter" / hf_peft.WEIGHTS), peft.get_peft_model_state_dict(other, save_embedding_layers=False)
    shared = {key for key in tensors if "vera_A" not in key and "vera_B" not in key}
    assert shared <= state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in shared)
    assert helpers.same(of_peft(other), helpers.logits(model))


THEIRS: dict[str, Any] = {
    "lora": peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, init_lora_weights=False),
    "loha": peft.LoHaConfig(task_type="SEQ_2_SEQ_LM", r=4, init_weights=False, target_modules=["q", "v"]),
    "lokr": peft.LoKrConfig(task_type="SEQ_2_SEQ_LM", r=4, init_weights=False, target_modules=["q", "v"]),
    "adalora": peft.AdaLoraConfig(task_type="SEQ_2_SEQ_LM", init_r=6, target_r=4, total_step=10, init_lora_weights=False),
    "ia3": peft.IA3Config(task_type="SEQ_2_SEQ_LM", init_ia3_weights=False),
    "prompt_tuning": peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    "p_tuning": peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    "prefix_tuning": peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", THEIRS)
def test_files_of_stock_peft_are_read(name: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = peft.get_peft_model(helpers.tiny_model(kind), THEIRS[name])
    other.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path)
    expected = of_peft(loaded)
    assert float((expected - helpers.logits(helpers.tiny_model(kind))).abs().max()) > 1e-3, "the adapter must matter"
    read = hf_peft.read_adapter(tmp_path)
    again = hf_peft.apply_adapter(helpers.tiny_model(kind), read, Context(seed=1))
    assert helpers.same(helpers.logits(again), expected)
    # Where PEFT finds its targets by itself, ours are the same.
    if name == "ia3":
        assert set(read.fields["target_modules"]) == {"k", "v", "wo"}
        mine, method = pair("ia3", kind)
        assert set(method.peft_config(mine)["target_modules"]) == {"k", "v", "wo"}
        assert method.peft_config(mine)["feedforward_modules"] == ["wo"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "options"), [("prompt_tuning", {}), ("p_tuning", {}), ("prefix_tuning", {}), ("prefix_tuning", {"projection": True})])  # fmt: skip
def test_prompts_write_what_stock_peft_writes(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model, method = pair(name, kind, num_virtual_tokens=4, **options)
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None, task_type="SEQ_2_SEQ_LM")
    other = peft.PeftModel.from_pretrained(helpers.tiny_model(kind), tmp_path)
    ids = helpers.some_ids()
    asked: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.eval().generate(**asked), other.generate(**asked))


def test_every_layer_of_a_decoder_has_a_prefix_of_its_own(tmp_path: Path) -> None:
    """In PEFT's own files two layers share one and the rest is never used; ours hold each where PEFT looks for it."""
    model, method = pair("prefix_tuning", num_virtual_tokens=4)
    hf_peft.save_adapter(tmp_path, model, method, base_model="b", revision=None, task_type="SEQ_2_SEQ_LM")
    stored = load_file(tmp_path / hf_peft.WEIGHTS)["prompt_embeddings"]
    assert stored.shape == (4, 2 * model.prompt_embeddings.shape[1])
    cache = peft.PeftModel.from_pretrained(helpers.tiny_model("t5"), tmp_path).get_prompt(1).self_attention_cache
    prefix = model.prefix()
    for layer in range(2):
        assert torch.equal(cache.layers[layer].keys[0], prefix.keys[layer])
        assert torch.equal(cache.layers[layer].values[0], prefix.values[layer])
    assert not torch.equal(prefix.keys[0], prefix.keys[1])
    text = (tmp_path / hf_peft.CONFIG).read_text().replace('"num_transformer_submodules": 2', '"num_transformer_submodules": 1')
    (tmp_path / hf_peft.CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="num_transformer_submodules=1"):
        hf_peft.read_adapter(tmp_path)


def test_an_encoder_decoder_that_judges_texts_takes_no_prefix() -> None:
    from transformers import T5ForSequenceClassification

    with pytest.raises(UsageError, match="T5ForSequenceClassification judges texts"):
        helpers.make_method("prefix_tuning").apply(T5ForSequenceClassification(helpers.tiny_config("t5")), Context())


def test_new_tokens_are_trained_whole_or_refused(tmp_path: Path) -> None:
    ids = (helpers.VOCABULARY - 2, helpers.VOCABULARY - 1)
    with pytest.raises(UsageError, match=r"base_model\.new_tokens: the encoder and the decoder each have the embeddings"):
        helpers.make_method("lora").apply(helpers.tiny_model("t5"), Context(new_token_ids=ids))
    model = helpers.make_method("full").apply(helpers.tiny_model("t5"), Context(new_token_ids=ids))
    before, split = model.shared.weight.detach().clone(), helpers.make_pairs(RAGGED)
    split.input_ids[0][0], split.target_ids[1][0] = ids
    helpers.make_loop(model, helpers.make_method("full"), split, tmp_path, steps=2, batch_size=5).run()
    assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.lm_head.weight is model.shared.weight
    assert all(not torch.equal(model.shared.weight[i], before[i]) for i in ids)


def test_a_decoder_with_another_attention_takes_no_prefix() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=264, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, pad_token_id=3,
    )  # fmt: skip
    with pytest.raises(UsageError, match="takes no prefix; that of T5 does"):
        helpers.make_method("prefix_tuning").apply(BartForConditionalGeneration(config), Context())
