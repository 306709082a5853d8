"""Next-token losses: in evaluation the output layer runs over slices, and what it gives is what all logits at once give."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.batching import Batch, collate
from peftcli.tasks.causal_lm import _SLICE, CausalLM


class Recording(nn.Linear):
    """An output layer that notes how many positions it is given."""

    seen: list[int]

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden.numel() // hidden.shape[-1])
        return super().forward(hidden)


def batch_of(lengths: list[int], *, packed: bool = True) -> Batch:
    split = helpers.make_split(lengths)
    return collate(split.input_ids, split.supervised, packed=packed, pad_id=3)


def recorded(model: Any) -> list[int]:
    """Make a model's output layer a recording one, and return its notes."""
    head = model.get_output_embeddings()
    head.__class__ = Recording
    head.seen = []
    return head.seen


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_an_evaluation_never_holds_all_logits(kind: str, packed: bool) -> None:
    model = helpers.tiny_model(kind).double()
    batch = batch_of([90, 60, 75, 120], packed=packed)
    with torch.no_grad():
        logits = CausalLM(model).logits(batch)
        assert len(logits) > 2 * _SLICE
        seen = recorded(model)
        losses, hits = CausalLM(model).token_losses(batch)
    assert sum(seen) == len(logits) and max(seen) == _SLICE
    torch.testing.assert_close(losses, F.cross_entropy(logits, batch.targets, reduction="none"), rtol=1e-12, atol=1e-12)
    assert torch.equal(hits, logits.gather(1, batch.targets[:, None])[:, 0] == logits.amax(1))


def test_an_output_layer_that_somebody_looks_at_runs_once() -> None:
    model = helpers.tiny_model("llama").double()
    batch = batch_of([90, 60])
    looks: list[int] = []
    with torch.no_grad():
        expected, _ = CausalLM(model).token_losses(batch)
        model.get_output_embeddings().register_forward_pre_hook(lambda *_: looks.append(1))
        losses, _ = CausalLM(model).token_losses(batch)
    assert looks == [1]
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_losses_with_gradient_are_those_without() -> None:
    """Preferences are learned from the same numbers that an evaluation gives."""
    model = helpers.tiny_model("llama").double()
    batch = batch_of([90, 60])
    with torch.no_grad():
        without, _ = CausalLM(model).token_losses(batch)
    with_gradient, _ = CausalLM(model).token_losses(batch)
    torch.testing.assert_close(with_gradient.detach(), without, rtol=1e-12, atol=1e-12)
