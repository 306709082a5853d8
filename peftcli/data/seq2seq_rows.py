"""Pairs of texts for encoder-decoders: the source is read whole, the target is learned token by token.

Both are tokenized by themselves, with the special tokens that the tokenizer puts around a source and around a target (``text_target``).
The target's EOS is learned, whatever the padding token is; a tokenizer that writes none gets one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftcli.data.audit import Audit
from peftcli.data.faults import Faults
from peftcli.data.kinds import ORIGINS_KEPT, RowKind
from peftcli.data.neutral import Completion, Conversation, Item
from peftcli.data.splits import GenerationExample, PairSplit, SplitCounts, to_answer
from peftcli.data.tokenize import Ids
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection
from peftcli.recipe.tasks import Seq2SeqTask
from peftcli.report.text import percent

_BATCH = 1000
_LONGEST_EXAMPLE = 2000


@dataclass(frozen=True, kw_only=True)
class PairAudit(Audit):
    """Counts where a text is learned from another.

    Attributes:
        supervised_tokens, source_tokens: tokens that carry loss, and the others; their sum is ``tokens``.
        supervised_share: supervised_tokens / tokens, 0 to 1.
        sources_cut, targets_cut: rows whose source, or target, lost tokens; both count once in ``truncated``.
        eos_supervised: rows whose target ends with EOS: all whose end was not cut off.
    """

    supervised_tokens: int
    source_tokens: int
    supervised_share: float
    sources_cut: int
    targets_cut: int
    eos_supervised: int

    @property
    def learned(self) -> str:
        return f"{self.supervised_tokens:,} of {self.tokens:,} tokens carry loss, those of the targets ({percent(self.supervised_share)})"


@dataclass
class Pairs:
    """Rows that fit, and the numbers of those that were cut. ``too_long``, ``faulty``: places of those left out."""

    items: list[Completion] = field(default_factory=list)
    sources: list[Ids] = field(default_factory=list)
    targets: list[Ids] = field(default_factory=list)
    sources_cut: list[int] = field(default_factory=list)
    targets_cut: list[int] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    faulty: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> list[str]:
        return [*self.too_long, *self.faulty]

    @property
    def truncated(self) -> int:
        return len({*self.sources_cut, *self.targets_cut})


class Seq2SeqRows(RowKind[Pairs]):
    """For encoder-decoders.

    Attributes:
        max_target: longest target in tokens; ``None``: as the source.
    """

    formats = Seq2SeqTask.formats
    plain = True

    def __init__(self, config: DatasetSection, tokenizer: Any, max_target: int | None) -> None:
        super().__init__(config, tokenizer)
        self.max_target = max_target
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so no target could ever end",
                hint="set eos_token in the model's tokenizer_config.json",
            )

    def begin(self, base_dir: Path) -> list[str]:
        if self.config.truncation == "split":
            raise DataError(
                "dataset.truncation: a pair of texts cannot be split: the parts of one would not answer those of the other",
                hint="choose keep_start, keep_end, drop or error",
            )
        idle = self.config.train_on != "completions"
        return ["dataset.train_on has no influence on pairs of texts: a source is read and never learned"] if idle else []

    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> Pairs:
        what, mode, found, faults = "held-out" if held_out else "training", self.config.truncation, Pairs(), Faults()
        limit = self.max_target or max_length
        rows = self._pairs(items, found)
        for first in range(0, len(rows), _BATCH):
            batch = rows[first : first + _BATCH]
            sources = self._tokenize([row.prompt for row in batch])
            targets = self._targets([row.completion for row in batch])
            for row, source, target in zip(batch, sources, targets, strict=True):
                long = [
                    f"the {name} has {len(ids)} tokens, {option} is {most}"
                    for name, ids, option, most in (
                        ("source", source, "dataset.max_length", max_length),
                        ("target", target, "task.max_target_length" if self.max_target else "dataset.max_length", limit),
                    )
                    if len(ids) > most
                ]
                if long and mode == "error":
                    faults.add(
                        f"{row.origin}: {'; '.join(long)}", hint="raise it, or choose dataset.truncation: keep_start, keep_end or drop"
                    )
                    continue
                if long and mode == "drop":
                    found.too_long.append(row.origin)
                    continue
                if len(source) > max_length:
                    found.sources_cut.append(len(found.items))
                if len(target) > limit:
                    found.targets_cut.append(len(found.items))
                found.items.append(row)
                found.sources.append(np.asarray(self._cut(row.prompt, max_length) if len(source) > max_length else source, dtype=np.int32))
                found.targets.append(np.asarray(target[:limit], dtype=np.int32))
        faults.raise_if_any()
        if not found.items:
            raise DataError(f"none of {len(rows)} rows fits into dataset.max_length {max_length}", hint="raise it, or cut rows: keep_start")
        if found.too_long:
            notes.append(f"{what}: dropped {len(found.too_long)} rows longer than {max_length} tokens, or {limit} of the target")
        if found.sources_cut:
            notes.append(f"{what}: cut {len(found.sources_cut)} sources to {max_length} tokens ({mode})")
        if found.targets_cut:
            notes.append(f"{what}: cut {len(found.targets_cut)} targets to {limit} tokens, without their end")
        return found

    def audit(self, fitted: Pairs, empty: Sequence[str], notes: Sequence[str]) -> PairAudit:
        supervised, read = sum(map(len, fitted.targets)), sum(map(len, fitted.sources))
        eos, cut = self.tokenizer.eos_token_id, set(fitted.targets_cut)
        whole = [ids for row, ids in enumerate(fitted.targets) if row not in cut]
        ended = sum(bool((ids[-2:] == eos).any()) for ids in whole)
        if ended < len(whole):
            raise DataError(f"label audit: the end of the target carries no loss in {len(whole) - ended} of {len(whole)} complete rows")
        shown = next((row for row in range(len(fitted.items)) if row not in cut), 0)
        example = pair_text(fitted.sources[shown], fitted.targets[shown], self.tokenizer)
        return PairAudit(
            rows=len(fitted.items),
            tokens=supervised + read,
            truncated=fitted.truncated,
            dropped=len(empty) + len(fitted.dropped),
            notes=tuple(notes),
            example=tuple((_shortened(text), learned) for text, learned in example),
            example_origin=fitted.items[shown].origin,
            supervised_tokens=supervised,
            source_tokens=read,
            supervised_share=supervised / (supervised + read),
            sources_cut=len(fitted.sources_cut),
            targets_cut=len(fitted.targets_cut),
            eos_supervised=ended,
        )

    def split(self, fitted: Pairs, empty: Sequence[str], *, held_out: bool) -> PairSplit:
        dropped = [*empty, *fitted.dropped]
        lengths = [len(source) + len(target) for source, target in zip(fitted.sources, fitted.targets, strict=True)]
        examples = (
            GenerationExample(source.tolist(), item.request, (item.completion,), item.origin)
            for item, source in zip(fitted.items, fitted.sources, strict=True)
        )
        return PairSplit(
            origins=[item.origin for item in fitted.items],
            counts=SplitCounts(len(lengths), sum(lengths), sum(map(len, fitted.targets)), fitted.truncated, len(dropped), max(lengths)),
            dropped_origins=dropped[:ORIGINS_KEPT],
            input_ids=fitted.sources,
            target_ids=fitted.targets,
            generation=to_answer(examples) if held_out else [],
            stop_ids=(self.tokenizer.eos_token_id,),
        )

    def _pairs(self, items: Sequence[Item], found: Pairs) -> list[Completion]:
        """The rows that are a text and its answer. Others are faults, or go as ``on_error`` says.

        Raises:
            DataError: up to ten rows that are more, with their places; no row is left.
        """
        faults, pairs = self.faults(), list[Completion]()
        for item in items:
            pair = _as_pair(item)
            if pair is not None:
                pairs.append(pair)
                continue
            faults.add(
                "an encoder-decoder learns one answer to one text, and this is more of a conversation",
                at=item.origin,
                hint="keep one question and its answer of each, or train a chat model: task: causal_lm",
            )
            found.faulty.append(item.origin)
        faults.raise_if_any()
        self.check_any(len(pairs), len(items))
        return pairs

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        return ids

    def _targets(self, texts: list[str]) -> list[list[int]]:
        eos = self.tokenizer.eos_token_id
        encoded: list[list[int]] = self.tokenizer(text_target=texts, verbose=False)["input_ids"]
        # Some tokenizers write the language behind EOS.
        return [ids if eos in ids[-2:] else [*ids, eos] for ids in encoded]

    def _cut(self, text: str, length: int) -> list[int]:
        """The source's start or end, with the special tokens around it."""
        side = self.tokenizer.truncation_side
        self.tokenizer.truncation_side = "left" if self.config.truncation == "keep_end" else "right"
        try:
            ids: list[int] = self.tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
        finally:
            self.tokenizer.truncation_side = side
        return ids


def _as_pair(item: Item) -> Completion | None:
    """A row as source and target; of a conversation one question (below a system prompt, where there is one) and its answer."""
    if isinstance(item, Completion):
        return item
    if not isinstance(item, Conversation) or item.tools or any(message.tool_calls or message.reasoning for message in item.messages):
        return None
    *asked, answer = item.messages
    roles = [message.role for message in asked]
    if roles not in (["user"], ["system", "user"], ["developer", "user"]) or answer.role != "assistant":
        return None
    return Completion("\n\n".join(message.content for message in asked), answer.content, item.origin, asked[-1].content)


def pair_text(source: Ids, target: Ids, tokenizer: Any) -> list[tuple[str, bool]]:
    """A pair of token ids as text, in runs of (text, whether it is learned)."""
    one, other = (tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in (source, target))
    return [(f"{one} → ", False), (other, True)]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_EXAMPLE else f"{text[: _LONGEST_EXAMPLE // 2]} [...] {text[-_LONGEST_EXAMPLE // 2 :]}"
