"""Rows of text whose next tokens are learned: chats, completions, documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftcli.data.audit import TextAudit, audit_rows, end_token
from peftcli.data.kinds import ORIGINS_KEPT, RowKind
from peftcli.data.neutral import Item, TextItem
from peftcli.data.splits import GenerationExample, SplitCounts, TextSplit
from peftcli.data.templates import adds_bos, install
from peftcli.data.tokenize import Encoder
from peftcli.data.truncation import Fitted, fit
from peftcli.recipe.tasks import CausalLMTask


class TextRows(RowKind[Fitted]):
    """For causal language models."""

    formats = CausalLMTask.formats

    def begin(self, base_dir: Path) -> list[str]:
        return install(self.config.chat_template, self.tokenizer, base_dir) if self.config.chat_template else []

    def encode(self, items: Sequence[Item], *, max_length: int, held_out: bool, notes: list[str]) -> Fitted:
        what = "held-out" if held_out else "training"
        config, tokenizer = self.config, self.tokenizer
        encoder = Encoder(tokenizer, config.train_on)
        texts = [item for item in items if isinstance(item, TextItem)]
        fitted = fit(
            encoder.encode(texts, exact_prompts=held_out), max_length=max_length, mode=config.truncation, bos=tokenizer.bos_token_id
        )
        if fitted.split:
            notes.append(f"{what}: {fitted.split} documents are longer than {max_length} tokens and were split; nothing of them was lost")
        if fitted.unsupervised:
            notes.append(f"{what}: dropped {len(fitted.unsupervised)} rows without a supervised token within {max_length} tokens")
        if fitted.too_long:
            notes.append(f"{what}: dropped {len(fitted.too_long)} rows longer than {max_length} tokens")
        if fitted.truncated:
            notes.append(f"{what}: cut {fitted.truncated} rows to {max_length} tokens ({config.truncation})")
        bos = tokenizer.bos_token_id
        if (
            not held_out
            and config.train_on == "completions"
            and adds_bos(tokenizer)
            and not all(row.input_ids[0] == bos for row in fitted.rows if row.has_start)
        ):
            notes.append("the chat template writes no BOS, as at inference, although the tokenizer puts one before plain text")
        return fitted

    def audit(self, fitted: Fitted, empty: Sequence[str], notes: Sequence[str]) -> TextAudit:
        dropped = len(empty) + len(fitted.too_long) + len(fitted.unsupervised)
        return audit_rows(
            fitted.rows, self.tokenizer, train_on=self.config.train_on, truncated=fitted.truncated, dropped=dropped, notes=notes
        )

    def split(self, fitted: Fitted, empty: Sequence[str], *, held_out: bool) -> TextSplit:
        rows = fitted.rows
        dropped = [*empty, *fitted.too_long, *fitted.unsupervised]
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
            generation=[
                GenerationExample(row.prompt_ids.tolist(), row.request, row.reference, row.origin) for row in rows if len(row.prompt_ids)
            ]
            if held_out
            else [],
            stop_ids=tuple(sorted(ends | {self.tokenizer.eos_token_id})),
        )
