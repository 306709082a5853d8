"""P-tuning against stock PEFT, with both encoders; what the file does not hold is in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import peft
import prompt_cases as cases
import pytest
import torch

from peftcli.errors import CheckpointError
from peftcli.interchange import hf_peft
from peftcli.methods.kinds import trainable_state
from peftcli.train import checkpoint as checkpoints

NAME = "p_tuning"
ENCODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mlp": ({"hidden_size": 24}, {"encoder_hidden_size": 24}),
    "lstm": (
        {"encoder": "lstm", "hidden_size": 24},
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24},
    ),
    "deep lstm": (
        {"encoder": "lstm", "hidden_size": 8, "num_layers": 3},
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 3},
    ),
}


def case(encoder: str) -> tuple[dict[str, Any], Any]:
    ours, theirs = ENCODERS[encoder]
    return {"num_virtual_tokens": 5, **ours}, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_outputs_and_gradients_equal_stock_peft(kind: str, encoder: str, dtype: torch.dtype) -> None:
    options, config = case(encoder)
    cases.check_against_stock(kind, dtype, NAME, options, config, 5)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_files_go_both_ways(kind: str, encoder: str, tmp_path: Path) -> None:
    options, config = case(encoder)
    cases.check_files(kind, NAME, options, config, 5, tmp_path)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_padded_and_alone_are_the_same(kind: str, encoder: str) -> None:
    cases.check_layouts(kind, NAME, case(encoder)[0])
    cases.check_no_leak(kind, NAME, case(encoder)[0])
    cases.check_generation(kind, NAME, case(encoder)[0])
    cases.check_checkpointing(kind, NAME, case(encoder)[0])


@pytest.mark.parametrize("options", [{}, {"encoder": "lstm", "dropout": 0.3}])
def test_resume_is_exact_and_has_the_encoder(options: dict[str, Any], tmp_path: Path) -> None:
    cases.check_resume(NAME, options, tmp_path)
    found, _ = checkpoints.newest(tmp_path / "False" / "checkpoints")
    assert found is not None
    model, _ = helpers.adapted(NAME, **options)
    assert set(found.trainable) == set(trainable_state(model))
    assert any(name.startswith("encoder.mlp_head") for name in found.trainable)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_a_whole_run(encoder: str, tmp_path: Path, tiny_folders: dict[str, Path], tiny_data: Path) -> None:
    report = cases.check_whole_run(f"{{name: p_tuning, encoder: {encoder}, dropout: 0.2}}", tmp_path, tiny_folders["llama-tied"], tiny_data)
    model, _ = helpers.adapted(NAME, "llama-tied", encoder=encoder)
    assert report.model.trainable_parameters == sum(p.numel() for p in trainable_state(model).values())


def test_the_file_is_the_model_without_dropout(tmp_path: Path) -> None:
    model, method = helpers.adapted(NAME, encoder="lstm", dropout=0.5)
    model.train()
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        hf_peft.save_adapter(path, model, method, base_model="some/base", revision=None)
    assert len({(path / hf_peft.WEIGHTS).read_bytes() for path in paths}) == 1
    assert model.encoder.training
    noisy = [model(input_ids=helpers.some_ids()).logits for _ in range(2)]
    assert not torch.equal(noisy[0], noisy[1])
    again = hf_peft.apply_adapter(helpers.tiny_model(), hf_peft.read_adapter(paths[0]))
    assert torch.equal(helpers.logits(again), helpers.logits(model))


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_autocast_sees_the_values_that_the_file_holds(encoder: str) -> None:
    """A classifier's head moves in float32 over a bfloat16 model: training computes in autocast, saving does not."""
    model, _ = helpers.adapted(NAME, encoder=encoder)
    helpers.stir(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = model.virtual()
    assert torch.equal(seen, model.result())


def test_what_a_file_gave_is_used_but_cannot_be_trained_behind_an_encoder(tmp_path: Path) -> None:
    trained, method = helpers.adapted(NAME)
    helpers.stir(trained)
    hf_peft.save_adapter(tmp_path, trained, method, base_model="some/base", revision=None)
    read = hf_peft.read_adapter(tmp_path)
    fresh, _ = helpers.adapted(NAME)
    hf_peft.load_tensors(fresh, method, read.tensors, tmp_path)
    assert torch.equal(helpers.logits(fresh), helpers.logits(trained))
    fresh.train()
    with pytest.raises(CheckpointError, match="not the encoder"):
        fresh(input_ids=helpers.some_ids())
    # The way that the message names: the values themselves go on as a soft prompt.
    prompt, other = helpers.adapted("prompt_tuning")
    hf_peft.load_tensors(prompt, other, read.tensors, tmp_path)
    assert torch.equal(helpers.logits(prompt), helpers.logits(trained))
    assert set(trainable_state(prompt)) == {"prompt_embeddings"}


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_training_starts_from_tokens_that_the_model_knows(encoder: str) -> None:
    model, method = helpers.adapted(NAME, encoder=encoder, dropout=0.5)
    words, other = helpers.adapted("prompt_tuning")
    assert model.encoder.training == model.training
    ours, theirs = method.to_file(model, {})["prompt_embeddings"], other.to_file(words, {})["prompt_embeddings"]
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    # An encoder that is narrower than there are tokens comes as close as it can: closer than zeros.
    narrow, method = helpers.adapted(NAME, encoder=encoder, hidden_size=4)
    assert float((method.to_file(narrow, {})["prompt_embeddings"] - theirs).norm()) < float(theirs.norm())
