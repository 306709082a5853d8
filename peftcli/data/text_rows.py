"""Rows of text whose next tokens are learned: chats, completions, documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from peftcli.data.audit import TextAudit, TextCounts, audit_counts, audit_rows, end_token
from peftcli.data.kinds import ORIGINS_KEPT, RowKind
from peftcli.data.neutral import Item, TextItem
from peftcli.data.sampling import Places
from peftcli.data.splits import GenerationExample, SplitCounts, TextSplit, to_answer
from peftcli.data.stored_text import StoredText
from peftcli.data.stream import StoredRows
from peftcli.data.templates import adds_bos, install
from peftcli.data.tokenize import Encoder
from peftcli.data.truncation import Fitted, fit, nothing_left
from peftcli.recipe.tasks import CausalLMTask


class TextRows(RowKind[Fitted]):
    """For causal language models."""

    formats = CausalLMTask.formats
    streams = True

    def begin(self, base_dir: Path) -> list[str]:
        return install(self.config.chat_template, self.tokenizer, base_dir) if self.config.chat_template else []

    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> Fitted:
        config, tokenizer = self.config, self.tokenizer
        encoder = Encoder(tokenizer, config.train_on)
        texts = [item for item in items if isinstance(item, TextItem)]
        faults, before = self.faults(), len(self.skipped)
        encoded = encoder.encode(texts, exact_prompts=held_out, faults=faults)
        self.check_any(len(encoded), len(texts))
        fitted = fit(encoded, max_length=max_length, mode=config.truncation, bos=tokenizer.bos_token_id)
        fitted.faulty.extend(origin for origin, _ in self.skipped[before:])
        counts = fitted.split, len(fitted.unsupervised), len(fitted.too_long), fitted.truncated
        notes.extend(self._changes("held-out" if held_out else "training", max_length, *counts))
        if not held_out:
            bos = tokenizer.bos_token_id
            notes.extend(self._no_bos(all(row.input_ids[0] == bos for row in fitted.rows if row.has_start)))
        return fitted

    def _changes(self, what: str, max_length: int, split: int, unsupervised: int, too_long: int, truncated: int) -> Iterator[str]:
        if split:
            yield f"{what}: {split} documents are longer than {max_length} tokens and were split; nothing of them was lost"
        if unsupervised:
            yield f"{what}: dropped {unsupervised} rows without a supervised token within {max_length} tokens"
        if too_long:
            yield f"{what}: dropped {too_long} rows longer than {max_length} tokens"
        if truncated:
            yield f"{what}: cut {truncated} rows to {max_length} tokens ({self.config.truncation})"

    def _no_bos(self, everywhere: bool) -> Iterator[str]:
        if self.config.train_on == "completions" and not everywhere and adds_bos(self.tokenizer):
            yield "the chat template writes no BOS, as at inference, although the tokenizer puts one before plain text"

    def audit(self, fitted: Fitted, empty: Sequence[str], notes: Sequence[str]) -> TextAudit:
        dropped = len(empty) + len(fitted.too_long) + len(fitted.unsupervised) + len(fitted.faulty)
        return audit_rows(
            fitted.rows, self.tokenizer, train_on=self.config.train_on, truncated=fitted.truncated, dropped=dropped, notes=notes
        )

    def split(self, fitted: Fitted, empty: Sequence[str], *, held_out: bool) -> TextSplit:
        rows = fitted.rows
        dropped = [*empty, *fitted.too_long, *fitted.unsupervised, *fitted.faulty]
        ends = {end for row in rows if (end := end_token(row)) is not None}
        return TextSplit(
            origins=[row.origin for row in rows],
            counts=SplitCounts(
                rows=len(rows),
                tokens=sum(len(row.input_ids) for row in rows),
                supervised_tokens=sum(int(row.supervised.sum()) for row in rows),
                truncated=fitted.truncated,
                dropped=len(dropped),
                longest=max(len(row.input_ids) for row in rows),
            ),
            dropped_origins=dropped[:ORIGINS_KEPT],
            input_ids=[row.input_ids for row in rows],
            supervised=[row.supervised for row in rows],
            generation=to_answer(
                GenerationExample(row.prompt_ids.tolist(), row.request, (row.reference,), row.origin) for row in rows if len(row.prompt_ids)
            )
            if held_out
            else [],
            stop_ids=tuple(sorted(ends | {self.tokenizer.eos_token_id})),
        )

    def stored(
        self, pools: Sequence[StoredRows], chosen: Sequence[Places], *, max_length: int, notes: list[str]
    ) -> tuple[StoredText, Callable[[], TextAudit]]:
        parts = [pool.usable[places] for pool, places in zip(pools, chosen, strict=True)]
        split = StoredText.of(
            [pool.store for pool in pools], parts, [o for pool in pools for o in pool.left_out], self.tokenizer.eos_token_id
        )
        found = split.found
        self.check_any(len(split.origins) + found.too_long + found.unsupervised, found.rows)
        if not len(split.origins):
            raise nothing_left(found.rows, max_length, found.too_long, found.unsupervised)
        notes.extend(self._changes("training", max_length, found.split, found.unsupervised, found.too_long, split.counts.truncated))
        notes.extend(self._no_bos(found.opened == found.bos))

        def audit() -> TextAudit:
            counts = split.counts
            return audit_counts(
                TextCounts(counts.rows, counts.tokens, counts.supervised_tokens, found.bos, found.complete, found.ended),
                split.example,
                self.tokenizer,
                train_on=self.config.train_on,
                truncated=counts.truncated,
                dropped=counts.dropped,
                notes=notes,
            )

        return split, audit
