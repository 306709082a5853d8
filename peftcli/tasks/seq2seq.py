"""Text to text with encoder-decoders: translation, summaries, answers, descriptions of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.batching import pad
from peftcli.data.seq2seq_rows import Seq2SeqRows, pair_text
from peftcli.data.splits import PairSplit, Split
from peftcli.kernels.cross_entropy import sum_cross_entropy
from peftcli.kernels.transfer import ahead
from peftcli.methods.base import Loss
from peftcli.recipe import tasks as options
from peftcli.recipe.schema import DatasetSection
from peftcli.tasks.base import Layout, Measured, Metric, Task, TaskModule
from peftcli.tasks.causal_lm import token_scores

# What transformers' losses leave out, and what its decoders read as padding.
_IGNORED = -100


@dataclass(frozen=True)
class PairBatch:
    """Pairs as tensors, both padded on the right.

    Attributes:
        input_ids, attention_mask: of the sources, [rows, longest source].
        labels: the targets, [rows, longest target], with -100 as padding; what the decoder reads is made from them.
        positions: [supervised] indices into the flattened ``labels`` that carry loss; empty in a silent batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    positions: Tensor


class EncoderDecoder(TaskModule):
    """The next token of the target, given the source and the target so far. No padding is seen: the decoder's stands behind every
    token, the encoder's is masked; so a row's loss does not depend on the others."""

    def forward(self, batch: PairBatch) -> Loss:
        total, correct = sum_cross_entropy(self.logits(batch), self._targets(batch))
        return Loss(total, correct, {})

    def logits(self, batch: PairBatch) -> Tensor:
        """[supervised, vocabulary] logits at ``batch.positions``."""
        model: Any = self.model
        found: Tensor = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch.labels),
            use_cache=False,
        ).logits
        return found.flatten(0, 1).index_select(0, batch.positions)

    def measure(self, batch: PairBatch) -> Measured:
        logits, targets = self.logits(batch), self._targets(batch)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(wide, targets, reduction="none")
        hits = wide.gather(1, targets[:, None]).squeeze(1) == wide.amax(1)
        rows, width = batch.labels.shape
        owner = (batch.positions // width).cpu()
        units = torch.bincount(owner, minlength=rows)
        loss = torch.zeros(rows, dtype=torch.float64).index_add_(0, owner, losses.double().cpu())
        return {"loss": loss, "units": units, "correct": torch.zeros_like(units).index_add_(0, owner, hits.long().cpu())}

    @staticmethod
    def _targets(batch: PairBatch) -> Tensor:
        return batch.labels.flatten().index_select(0, batch.positions)


class Seq2Seq(Task[options.Seq2SeqTask]):
    """An encoder-decoder learns to turn a text into another."""

    auto_model = "AutoModelForSeq2SeqLM"
    peft_type = "SEQ_2_SEQ_LM"

    def rows(self, config: DatasetSection, tokenizer: Any) -> Seq2SeqRows:
        return Seq2SeqRows(config, tokenizer, self.section.max_target_length)

    def module(self, model: nn.Module) -> EncoderDecoder:
        return EncoderDecoder(model)

    def batch(self, split: Split, rows: Sequence[int], layout: Layout, *, silent: bool = False) -> PairBatch:
        assert isinstance(split, PairSplit)
        ids, mask = pad([split.input_ids[row] for row in rows], layout.pad_id)
        labels, learned = pad([split.target_ids[row] for row in rows], _IGNORED)
        positions = torch.zeros(0, dtype=torch.long) if silent else learned.flatten().nonzero().flatten()
        return PairBatch(*(ahead(tensor, layout.device) for tensor in (ids, mask, labels, positions)))

    def masks(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return batch.attention_mask.bool(), batch.attention_mask.bool()

    def show(self, split: Split, row: int, tokenizer: Any) -> list[tuple[str, bool]]:
        assert isinstance(split, PairSplit)
        return pair_text(split.input_ids[row], split.target_ids[row], tokenizer)

    def scores(self, measured: Mapping[str, Tensor], split: Split) -> dict[str, Metric]:
        return token_scores(measured)

    def probe(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Logits at every token of the row, which is both read and written."""
        positions = torch.arange(ids.numel(), device=ids.device)
        return EncoderDecoder(model).logits(PairBatch(ids, torch.ones_like(ids), ids, positions))
