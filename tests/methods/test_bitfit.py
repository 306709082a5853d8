"""BitFit: the biases move, in float32, whatever the base's storage."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file

from peftcli.errors import UsageError
from peftcli.interchange import hf_peft
from peftcli.merge import logits_of, merge
from peftcli.methods.base import Context
from peftcli.methods.bitfit import MovedBias
from peftcli.methods.kinds import trainable_state


def test_exactly_the_biases_move_and_their_gradients_are_full_fine_tunings() -> None:
    model, _ = helpers.adapted("bitfit", "gpt2", torch.float64)
    whole, _ = helpers.adapted("full", "gpt2", torch.float64)
    biases = [name for name, _ in whole.named_parameters() if name.endswith(".bias")]
    assert sorted(trainable_state(model)) == sorted(biases)
    assert len(biases) == 2 * 6 + 1
    split = helpers.make_split([7, 12, 5])
    losses = [helpers.loss_of(one, split) for one in (model, whole)]
    for loss in losses:
        loss.backward()
    # A frozen output layer's loss is computed in another order than a trained one's.
    assert torch.allclose(*losses, rtol=1e-12, atol=0)
    grads = helpers.gradients(whole)
    assert all(torch.allclose(grad, grads[name], rtol=1e-9, atol=1e-12) for name, grad in helpers.gradients(model).items())


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_model_without_biases_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=r"LlamaForCausalLM has no biases") as caught:
        helpers.adapted("bitfit", kind)
    assert "lora" in str(caught.value.hint)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_over_a_quantized_base_the_bias_stays_float32_after_a_bfloat16_forward(quantization: str, tmp_path: Path) -> None:
    """bitsandbytes casts a layer's own bias to the input's dtype, in place."""
    model, method = helpers.adapted("bitfit", "gpt2", torch.bfloat16, quantization=quantization)
    assert sum(isinstance(module, MovedBias) for module in model.modules()) == 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        helpers.loss_of(model, helpers.make_split([7, 12, 5])).backward()
    state = trainable_state(model)
    assert {p.dtype for p in state.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in state.values())
    # The file is the one that a dense base writes, key for key.
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    dense, dense_method = helpers.adapted("bitfit", "gpt2")
    assert set(load_file(tmp_path / hf_peft.WEIGHTS)) == {hf_peft.file_key(dense, dense_method, name) for name in trainable_state(dense)}


def test_a_file_fits_dense_and_quantized_bases(tmp_path: Path) -> None:
    dense, method = helpers.adapted("bitfit", "gpt2")
    helpers.stir(dense, scale=0.2)
    hf_peft.save_adapter(tmp_path, dense, method, base_model="some/base", revision=None)
    packed = hf_peft.apply_adapter(helpers.tiny_model("gpt2", quantization="nf4"), hf_peft.read_adapter(tmp_path), Context())
    expected, found = helpers.logits(dense), helpers.logits(packed)
    assert float((expected - found).abs().max()) < 0.2 * float(expected.abs().max()), "the same up to NF4's rounding"
    assert float((helpers.logits(helpers.tiny_model("gpt2")) - found).abs().max()) > float((expected - found).abs().max())


def test_only_biases_are_saved_and_the_file_is_the_same_to_the_byte(tmp_path: Path) -> None:
    for turn in ("one", "two"):
        model, method = helpers.adapted("bitfit", "gpt2")
        helpers.stir(model)
        hf_peft.save_adapter(tmp_path / turn, model, method, base_model="some/base", revision=None)
    assert helpers.folder_bytes(tmp_path / "one") == helpers.folder_bytes(tmp_path / "two")
    tensors = load_file(tmp_path / "one" / hf_peft.WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) < 0.03 * sum(p.numel() for p in model.parameters())
    assert all(key.startswith("base_model.model.transformer.") and key.endswith(".bias") for key in tensors)


def test_merged_weights_go_back_to_the_bases_dtype() -> None:
    model, _ = helpers.adapted("bitfit", "gpt2", torch.bfloat16)
    helpers.stir(model, scale=0.2)
    rows = [row.numpy() for row in helpers.some_ids(4, 20)]
    before = logits_of(helpers.CAUSAL_LM, model, rows, torch.device("cpu"))  # float32 biases meet bfloat16 weights
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    after = logits_of(helpers.CAUSAL_LM, merged, rows, torch.device("cpu"))
    assert float((before - after).abs().max()) < 0.05 * float(before.abs().max())


def test_new_tokens_are_trained_beside_the_biases(tmp_path: Path) -> None:
    method = helpers.make_method("bitfit")
    model = method.apply(helpers.tiny_model("gpt2"), Context(new_token_ids=(261, 262)))
    assert helpers.same(helpers.logits(model), helpers.logits(helpers.tiny_model("gpt2")))
    helpers.stir(model)
    hf_peft.save_adapter(tmp_path, model, method, base_model="some/base", revision=None)
    again = hf_peft.apply_adapter(helpers.tiny_model("gpt2"), hf_peft.read_adapter(tmp_path), Context())
    ids = torch.tensor([[5, 261, 262, 9]])
    assert torch.equal(helpers.logits(again, ids), helpers.logits(model, ids))


@pytest.mark.slow
def test_a_whole_run_writes_a_small_file_and_can_be_evaluated(tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    from peftcli.result import open_result

    report = helpers.run(helpers.recipe_for(tiny_folders["gpt2"], tiny_data, tmp_path / "out", method="bitfit"), "train.max_steps=4")
    assert report.checks.live_adapter is not None
    assert report.checks.live_adapter.passed
    card = (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "PeftModel" not in card
    assert "peftcli chat" in card
    result = open_result(tmp_path / "out")
    assert not torch.equal(helpers.logits(result.model), helpers.logits(helpers.tiny_model("gpt2")))
