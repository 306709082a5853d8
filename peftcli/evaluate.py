"""Measure a model on held-out rows: loss, perplexity, token accuracy, and what it writes.

Sums are taken in float64 over single rows, so the numbers do not depend on the batch size or the number of processes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, reduce

from peftcli.data.batching import Batch, collate
from peftcli.data.prepare import GenerationExample, Split
from peftcli.errors import DataError
from peftcli.model.task import CausalLM


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on one split.

    Attributes:
        loss: mean over supervised tokens, nats. ``perplexity``: its exponential.
        token_accuracy: share of supervised tokens that were the most likely one.
        intervals: 95 % intervals by metric: Wilson's for shares, normal over rows for the loss.
        answers: what the model wrote, in the order of the split's generation examples; empty where it was not asked to.
        exact_match: share of answers that equal the reference once surrounding blanks are removed.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    supervised_tokens: int
    rows: int
    seconds: float
    intervals: dict[str, tuple[float, float]]
    answers: list[str] = field(default_factory=list)
    exact_match: float | None = None

    def plain(self) -> dict[str, float]:
        """The numbers that a training run logs."""
        return {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.token_accuracy}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a task module on one split, always in the same way.

    Attributes:
        split: held-out rows. ``batch_size``: rows at once; no influence on the results.
        packed: lay rows end to end; ``pad_id``: for padded batches and generation.
            mixed: compute in autocast (trained float32 weights, bfloat16 products).
    """

    processes: PartialState | Accelerator
    split: Split
    tokenizer: Any
    packed: bool
    batch_size: int
    mixed: bool = False

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.mixed:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def scores(
        self,
        task: CausalLM,
        *,
        generate: bool = False,
        max_new_tokens: int = 128,
        limit: int | None = None,
        rows: int | None = None,
        alone: bool = False,
    ) -> Scores:
        """Metrics of ``task`` on the split (its first ``rows``); the module's training mode is put back afterwards.

        Args:
            generate: let the model answer too, at most ``max_new_tokens`` tokens for each of the first ``limit`` examples.
            alone: this process measures every row itself, without the others.
        """
        started = time.perf_counter()
        training = task.training
        task.eval()
        try:
            with torch.no_grad(), self._autocast():
                losses, right, counts = self._row_sums(task, rows, alone)
                answers = self._answers(task, max_new_tokens, limit) if generate else []
        finally:
            task.train(training)
        tokens = int(counts.sum())
        if not tokens:
            raise DataError("the held-out rows hold no token that could be predicted from another")
        loss = float(losses.sum() / tokens)
        correct = int(right.sum())
        intervals = {"loss": _ratio_interval(losses, counts), "token_accuracy": wilson(correct, tokens)}
        intervals["perplexity"] = (_exp(intervals["loss"][0]), _exp(intervals["loss"][1]))
        match: float | None = None
        if generate:
            hits = sum(is_match(a, e.reference) for a, e in zip(answers, self.split.generation, strict=False))
            match = hits / max(1, len(answers))
            intervals["exact_match"] = wilson(hits, len(answers))
        return Scores(loss, _exp(loss), correct / tokens, tokens, len(losses), time.perf_counter() - started, intervals, answers, match)

    def _row_sums(self, task: CausalLM, rows: int | None, alone: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[rows] float64 loss, int64 correct and int64 supervised tokens of every row; each process measures its share."""
        split, processes = self.split, self.processes
        total = len(split.input_ids) if rows is None else min(rows, len(split.input_ids))
        losses, right = torch.zeros(total, dtype=torch.float64), torch.zeros(total, dtype=torch.long)
        counts = torch.tensor([int(split.supervised[row][1:].sum()) for row in range(total)])
        # Similar lengths meet, so padded layouts waste little; the result does not depend on who meets whom.
        order = sorted(range(total), key=lambda row: (-len(split.input_ids[row]), row))
        batches = [order[start : start + self.batch_size] for start in range(0, total, self.batch_size)]
        first, every = (0, 1) if alone else (processes.process_index, processes.num_processes)
        for chosen in batches[first::every]:
            batch = collate(
                [split.input_ids[row] for row in chosen],
                [split.supervised[row] for row in chosen],
                packed=self.packed,
                pad_id=self.tokenizer.pad_token_id,
                device=processes.device,
            )
            loss, hit = _token_losses(task, batch)
            owner = torch.repeat_interleave(torch.tensor(chosen), counts[chosen])
            losses.index_add_(0, owner, loss.double().cpu())
            right.index_add_(0, owner, hit.long().cpu())
        if every > 1:
            device = processes.device
            losses = reduce(losses.to(device), reduction="sum").cpu()
            right = reduce(right.to(device), reduction="sum").cpu()
        return losses, right, counts

    def _answers(self, task: CausalLM, max_new_tokens: int, limit: int | None) -> list[str]:
        examples = self.split.generation[:limit]
        mine = list(range(self.processes.process_index, len(examples), self.processes.num_processes))
        texts = generate(
            task.model, self.tokenizer, [examples[i].prompt_ids for i in mine], max_new_tokens, self.batch_size, self.split.stop_ids
        )
        if self.processes.num_processes == 1:
            return texts
        pairs = gather_object(list(zip(mine, texts, strict=True)))
        return [text for _, text in sorted(pairs)]


def _token_losses(task: CausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """[supervised] cross-entropy in float32 and whether the target was a most likely token, a slice at a time."""
    logits = task.logits(batch)
    losses, hits = [], []
    for start in range(0, logits.shape[0], 128):
        rows, target = logits[start : start + 128], batch.targets[start : start + 128]
        wide = rows if rows.dtype == torch.float64 else rows.float()
        losses.append(F.cross_entropy(wide, target, reduction="none"))
        hits.append(wide.gather(1, target[:, None]).squeeze(1) == wide.amax(1))
    return torch.cat(losses), torch.cat(hits)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, stop_ids: Sequence[int]
) -> list[str]:
    """Greedy answers, decoded without special tokens. Prompts are padded on the left; similar lengths go together."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=list(stop_ids) or None)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    texts: dict[int, str] = {}
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
                mask[row, longest - len(prompts[i]) :] = 1
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
            for row, i in enumerate(chosen):
                texts[i] = tokenizer.decode(out[row, longest:], skip_special_tokens=True).strip()
    return [texts[i] for i in range(len(prompts))]


def is_match(answer: str, reference: str) -> bool:
    """Exact match: equal once surrounding blanks are removed."""
    return answer.strip() == reference.strip()


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, p = 1.959963984540054, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def _ratio_interval(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """95 % interval of sum(sums) / sum(counts), rows being the independent units (delta method)."""
    n = len(sums)
    ratio = float(sums.sum() / counts.sum())
    if n < 2:
        return ratio, ratio
    residual = sums - ratio * counts
    error = math.sqrt(float((residual**2).sum()) * n / (n - 1)) / float(counts.sum())
    return ratio - 1.959963984540054 * error, ratio + 1.959963984540054 * error


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


__all__ = ["Evaluator", "GenerationExample", "Scores", "generate", "is_match", "wilson"]
