"""The task around a model: from a batch to the summed loss. This is the module that Accelerate prepares."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.data.batching import Batch, collate
from peftcli.kernels.attention import Documents, PackingUnsupportedError
from peftcli.kernels.cross_entropy import sum_cross_entropy
from peftcli.methods.base import Loss


class CausalLM(nn.Module):
    """Next-token prediction with a transformers model.

    The output layer is called as a module (adapters on it take part), and only on positions that carry loss.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, batch: Batch) -> Loss:
        total, correct = sum_cross_entropy(self.logits(batch), batch.targets)
        return Loss(total, correct, {})

    def logits(self, batch: Batch) -> Tensor:
        """[supervised, vocabulary] logits at ``batch.positions``."""
        model: Any = self.model
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if batch.documents is not None:
            # A mask of four dimensions is passed through as it is: no square mask of the whole row is built, and the
            # packed attention, which knows the documents, looks at none.
            inputs |= {
                "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
                "documents": batch.documents,
            }
            if self._keeps:
                logits: Tensor = model(**inputs, logits_to_keep=batch.positions).logits
                return logits[0]
        else:
            inputs["attention_mask"] = batch.attention_mask
        whole: Tensor = model(**inputs).logits
        return whole.flatten(0, 1).index_select(0, batch.positions)


def supports_packing(model: Any, vocabulary: int, longest: int | None = None) -> bool:
    """Whether rows laid end to end stay apart in this model, found by trying: the second row's logits must be those that
    it has alone, and the first row must not matter to them at all.

    Args:
        longest: tokens of the longest row; rows longer than a sliding attention window cannot be packed.
    """
    import numpy as np

    config = getattr(model, "config", None)
    window = getattr(config.get_text_config(), "sliding_window", None) if config is not None else None
    if window and (longest is None or longest > window):
        return False

    task = CausalLM(model)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tail = np.asarray([5, 3, 4, 2], dtype=np.int32) % vocabulary
            answers = []
            for head in ([1, 2, 3], [3, 1, 2]):
                rows = [np.asarray(head, dtype=np.int32) % vocabulary, tail]
                masks = [np.zeros(3, dtype=np.bool_), np.ones(4, dtype=np.bool_)]
                answers.append(task.logits(collate(rows, masks, packed=True, device=device)))
            alone = task.logits(collate([tail], [np.ones(4, dtype=np.bool_)], packed=False, device=device))
    except (TypeError, ValueError, RuntimeError, NotImplementedError, PackingUnsupportedError):
        return False
    finally:
        model.train(training)
    scale = float(alone.abs().max()) + 1e-6
    close = float((answers[0].float() - alone.float()).abs().max()) <= 0.05 * scale
    return bool(torch.equal(answers[0], answers[1])) and close


__all__ = ["CausalLM", "Documents", "supports_packing"]
