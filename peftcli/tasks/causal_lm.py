"""Next-token prediction: chats, completions, documents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.audit import marked
from peftcli.data.batching import Batch, collate
from peftcli.data.splits import Split, TextSplit
from peftcli.data.text_rows import TextRows
from peftcli.kernels import fast
from peftcli.kernels.attention import PackingUnsupportedError
from peftcli.kernels.cross_entropy import sum_cross_entropy
from peftcli.kernels.linear_cross_entropy import linear_cross_entropy, linear_token_losses
from peftcli.methods.base import Loss
from peftcli.recipe import tasks as options
from peftcli.recipe.schema import DatasetSection
from peftcli.tasks.base import Layout, Measured, Metric, Task, TaskModule
from peftcli.tasks.intervals import of_sums, ratio, wilson
from peftcli.tasks.trials import on_first_layers

# float32 logits of this many positions at once, in evaluation.
_SLICE = 128


class CausalLM(TaskModule):
    """Next-token prediction with a transformers model.

    The output layer is called as a module (adapters on it take part), and only on positions that carry loss.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

        # Whether the model returns what its output layer computes, untouched; found with the first batch.
        self._untouched = True

    def forward(self, batch: Batch) -> Loss:
        head = self._plain_head() if torch.is_grad_enabled() else None
        hidden = None if head is None else self._hidden(batch, head)
        if head is not None and hidden is not None and _fuses(hidden, head):
            return Loss(*linear_cross_entropy(hidden, head.weight, head.bias, batch.targets), {})
        total, correct = sum_cross_entropy(self.logits(batch), batch.targets)
        return Loss(total, correct, {})

    def _open_head(self) -> nn.Module | None:
        """The output layer, where its input can be caught: nobody looks at it, and the model returns what it computes."""
        find = getattr(self.model, "get_output_embeddings", None)
        head: nn.Module | None = find() if find is not None and self._untouched else None
        return None if head is None or head._forward_hooks or head._forward_pre_hooks else head

    def _plain_head(self) -> nn.Linear | None:
        """The output layer, where it is nothing but a product."""
        head = self._open_head() if fast.on() else None
        return head if type(head) is nn.Linear else None

    def _hidden(self, batch: Batch, head: nn.Module) -> Tensor | None:
        """[supervised, width] what goes into the output layer at ``batch.positions``; ``None`` where its output is not yet the logits
        (softcapping, a scale)."""
        caught: list[Tensor] = []

        def through(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return hidden

        vars(head)["forward"] = through  # in front of the class's own, for this call
        try:
            out = self._run(batch)
        finally:
            del vars(head)["forward"]
        self._untouched = len(caught) == 1 and out is caught[0]
        return self._at_positions(out, batch) if self._untouched else None

    def logits(self, batch: Batch) -> Tensor:
        """[supervised, vocabulary] logits at ``batch.positions``."""
        return self._at_positions(self._run(batch), batch)

    def _at_positions(self, out: Tensor, batch: Batch) -> Tensor:
        if batch.documents is not None and self._keeps:
            return out[0]
        return out.flatten(0, 1).index_select(0, batch.positions)

    def _run(self, batch: Batch) -> Tensor:
        """The logits as the model returns them: [1, supervised, vocabulary] where it can choose positions, else of all of them."""
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
                inputs["logits_to_keep"] = batch.positions
        else:
            inputs["attention_mask"] = batch.attention_mask
        logits: Tensor = model(**inputs).logits
        return logits

    def measure(self, batch: Batch) -> Measured:
        losses, hits = self.token_losses(batch)
        units = torch.tensor(batch.counts, dtype=torch.long)
        owner = torch.repeat_interleave(torch.arange(len(units)), units)
        loss = torch.zeros(len(units), dtype=torch.float64).index_add_(0, owner, losses.double().cpu())
        correct = torch.zeros_like(units).index_add_(0, owner, hits.long().cpu())
        return {"loss": loss, "units": units, "correct": correct}

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[supervised] cross-entropy in float32 and whether the target was a most likely token, a slice at a time. Without gradient, or
        where it is frozen, the output layer too is run slice by slice, so that the logits of all positions never exist together."""
        moving, plain = torch.is_grad_enabled(), self._plain_head()
        if plain is not None and moving and any(x.requires_grad for x in plain.parameters()):
            plain = None
        head = plain if moving else self._open_head()
        rows = None if head is None else self._hidden(batch, head)
        if plain is not None and rows is not None and _fuses(rows, plain):
            return linear_token_losses(rows, plain.weight, plain.bias, batch.targets)
        if rows is None:
            head, rows = None, self.logits(batch)
        losses, hits = [], []
        for start in range(0, rows.shape[0], _SLICE):
            some, target = rows[start : start + _SLICE], batch.targets[start : start + _SLICE]
            some = some if head is None else head(some)
            wide = some if some.dtype == torch.float64 else some.float()
            losses.append(F.cross_entropy(wide, target, reduction="none"))
            hits.append(wide.gather(1, target[:, None]).squeeze(1) == wide.amax(1))
        if not losses:
            return rows.new_zeros(0), batch.targets.bool()
        return torch.cat(losses), torch.cat(hits)


def _fuses(hidden: Tensor, head: nn.Linear) -> bool:
    """Whether the output layer and the loss over it are computed in one."""
    mixed = torch.is_autocast_enabled(head.weight.device.type)
    return (mixed or hidden.dtype == head.weight.dtype) and fast.take("linear cross-entropy without logits")


class CausalLMTask(Task[options.CausalLMTask]):
    """A language model learns to continue text."""

    auto_model = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"

    def rows(self, config: DatasetSection, tokenizer: Any) -> TextRows:
        return TextRows(config, tokenizer)

    def module(self, model: nn.Module) -> CausalLM:
        return CausalLM(model)

    def packs(self, model: nn.Module, vocabulary: int, longest: int) -> bool:
        return supports_packing(model, vocabulary, longest)

    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> Batch:
        assert isinstance(split, TextSplit)
        return collate(
            [split.input_ids[row] for row in rows],
            [split.supervised[row] for row in rows],
            packed=layout.packed,
            pad_id=layout.pad_id,
            device=layout.device,
            silent=silent,
            share=layout.share,
        )

    def shares(self, model: nn.Module, vocabulary: int) -> bool:
        return supports_sharing(model, vocabulary)

    def masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        supervised = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
        supervised[batch.positions] = True
        tokens = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        return tokens.bool(), supervised.view_as(batch.input_ids)

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        assert isinstance(split, TextSplit)
        return marked(split.input_ids[row], split.supervised[row], tokenizer)

    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        return token_scores(measured)

    def probe(self, model: nn.Module, ids: Tensor) -> Tensor:
        return next_token_logits(model, ids)


def next_token_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """[length - 1, vocabulary] logits of every token of one row of ids [1, length] but the first."""
    row = ids[0].cpu().numpy().astype(np.int32)
    return CausalLM(model).logits(collate([row], [np.ones(len(row), dtype=np.bool_)], packed=False, device=ids.device))


def token_scores(measured: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Perplexity and token accuracy from ``loss``, ``units`` and ``correct`` [rows] each."""
    tokens, correct = int(measured["units"].sum()), int(measured["correct"].sum())
    low, high = ratio(measured["loss"], measured["units"])
    parts = torch.stack([measured["loss"], measured["correct"].double(), measured["units"].double()], -1).numpy()
    perplexity = of_sums(parts, lambda sums: np.exp(np.minimum(sums[:, 0] / sums[:, 2], 700.0)))
    accuracy = of_sums(parts, lambda sums: sums[:, 1] / sums[:, 2])
    return {
        "perplexity": perplexity._replace(interval=(_exp(low), _exp(high))),
        "token_accuracy": accuracy._replace(interval=wilson(correct, tokens)),
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def supports_packing(model: Any, vocabulary: int, longest: int | None = None) -> bool:
    """Whether rows laid end to end stay apart in this model, found by trying: the second row's logits must be those that
    it has alone, and the first row must not matter to them at all.

    Args:
        longest: tokens of the longest row; rows longer than a sliding attention window cannot be packed.
    """
    config = getattr(model, "config", None)
    window = getattr(config.get_text_config(), "sliding_window", None) if config is not None else None
    if window and (longest is None or longest > window):
        return False

    return on_first_layers(model, lambda: _packs(model, vocabulary))


def _packs(model: Any, vocabulary: int) -> bool:
    task = CausalLM(model)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        # Fast paths round differently from one layout to the other; on a few tokens without sense some models make anything of that.
        with torch.no_grad(), fast.plain():
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


def supports_sharing(model: Any, vocabulary: int) -> bool:
    """Whether packed rows may hold a beginning that they share once in training on the CPU, found by trying: every row must see the
    beginning and none another row, and no random number may be drawn, since dropout would treat the beginning the same way in every row.

    Values are not compared with those of rows that lie apart: on a few tokens without sense some models in half precision make anything
    of a rounding. The attention beneath has its plain reference.
    """
    return on_first_layers(model, lambda: _shares(model, vocabulary))


def _shares(model: Any, vocabulary: int) -> bool:
    task = CausalLM(model)
    training = model.training

    def answers(beginning: list[int], first: list[int]) -> tuple[Tensor, Tensor]:
        rows = [np.asarray([*beginning, *own], dtype=np.int32) % vocabulary for own in (first, [2, 8])]
        batch = collate(rows, [np.arange(len(row)) > len(beginning) for row in rows], packed=True, share=True)
        logits = task.logits(batch)
        return logits[: batch.counts[0]], logits[batch.counts[0] :]

    model.train()
    try:
        # On the plain paths, as the trial of packing: what is taken here is not what the run takes, and would be noted as such.
        with torch.no_grad(), torch.random.fork_rng([]), fast.plain():
            before = torch.get_rng_state()
            one, other = answers([7, 1, 6, 2], [5, 3, 4])
            one_beside, unmoved = answers([7, 1, 6, 2], [1, 3, 4])
            behind = answers([7, 0, 6, 2], [5, 3, 4])
            draws = not torch.equal(before, torch.get_rng_state())
    except (TypeError, ValueError, RuntimeError, NotImplementedError, PackingUnsupportedError):
        return False
    finally:
        model.train(training)
    sees = not any(torch.equal(a, b) for a, b in zip((one, other), behind, strict=True))
    return not draws and torch.equal(other, unmoved) and not torch.equal(one, one_beside) and sees
