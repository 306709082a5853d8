"""From the recipe's ``dataset`` section to tokenized rows: read, convert, hold out, weigh, tokenize, fit, audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.data.audit import Audit, audit_rows, end_token
from peftcli.data.formats import Converter, check_format, check_mapping, convert_rows, detect
from peftcli.data.neutral import Conversation, Item, digest
from peftcli.data.sampling import choose, weigh
from peftcli.data.sources import Role, read_source
from peftcli.data.splits import GenerationExample, Split, SplitCounts
from peftcli.data.templates import adds_bos, has_template, install
from peftcli.data.tokenize import Encoder
from peftcli.data.truncation import Fitted, fit
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection, SourceSection

__all__ = ["GenerationExample", "Prepared", "Split", "SplitCounts", "prepare", "prepare_eval"]

_ORIGINS_KEPT = 1000

_HELD_OUT = "held-out"


@dataclass(frozen=True)
class Prepared:
    """All data of a run. ``files`` are (path as the recipe has it, sha256) of every data file read."""

    train: Split
    eval: Split | None
    audit: Audit
    files: list[tuple[str, str]]


@dataclass(frozen=True)
class _Loaded:
    """Converted rows of one source: items, places of rows with an empty answer, files and notes."""

    items: list[Item]
    empty: list[str]
    weight: float


class _Loader:
    """Reads sources of a section and collects what they have in common: files and notes."""

    def __init__(self, config: DatasetSection, tokenizer: Any, base_dir: Path) -> None:
        self.config, self.tokenizer, self.base_dir = config, tokenizer, base_dir
        self.files: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def load(self, source: SourceSection, role: Role, limit: int | None) -> _Loaded:
        read = read_source(source, base_dir=self.base_dir, role=role, limit=limit)
        self.files.extend(entry for entry in read.files if entry not in self.files)
        self.notes.extend(read.notes)
        mapping = self.config.columns if source.columns is None else source.columns
        columns = list(dict.fromkeys(name for row in read.rows for name in row.values))
        check_mapping(mapping, columns, source.path)
        named = source.format or self.config.format
        format = detect(columns, mapping, source.path) if named == "auto" else named
        check_format(mapping, format)
        items, empty = convert_rows(read.rows, Converter(format, mapping, chat=has_template(self.tokenizer), system=self.config.system))
        if empty:
            first = ", ".join(origin for origin, _ in empty[:3]) + (", ..." if len(empty) > 3 else "")
            self.notes.append(f"{source.path}: dropped {len(empty)} rows whose answer is empty ({first})")
        unused = [f"dataset.{name}" for name in ("chat_template", "system") if getattr(self.config, name)]
        if unused and not any(isinstance(item, Conversation) for item in items) and format != "alpaca":
            self.notes.append(f"{source.path}: the rows are raw text ({format}), so {' and '.join(unused)} has no influence on them")
        return _Loaded(items, [origin for origin, _ in empty], source.weight)

    def encode(self, items: Sequence[Item], max_length: int, what: str) -> Fitted:
        if not items:
            raise DataError(
                f"there are no {what} rows left to use", hint="look at dataset.limit, dataset.eval_fraction and the notes on empty answers"
            )
        encoder = Encoder(self.tokenizer, self.config.train_on)
        fitted = fit(
            encoder.encode(items, exact_prompts=what == _HELD_OUT),
            max_length=max_length,
            mode=self.config.truncation,
            bos=self.tokenizer.bos_token_id,
        )
        if fitted.split:
            self.notes.append(
                f"{what}: {fitted.split} documents are longer than {max_length} tokens and were split; nothing of them was lost"
            )
        if fitted.unsupervised:
            self.notes.append(f"{what}: dropped {len(fitted.unsupervised)} rows without a supervised token within {max_length} tokens")
        if fitted.too_long:
            self.notes.append(f"{what}: dropped {len(fitted.too_long)} rows longer than {max_length} tokens")
        if fitted.truncated:
            self.notes.append(f"{what}: cut {fitted.truncated} rows to {max_length} tokens ({self.config.truncation})")
        return fitted

    def max_length(self, max_positions: int | None) -> int:
        if max_positions is None or self.config.max_length <= max_positions:
            return self.config.max_length
        self.notes.append(
            f"dataset.max_length {self.config.max_length} is more than the model's {max_positions} positions, which hold instead"
        )
        return max_positions


def prepare(config: DatasetSection, tokenizer: Any, *, base_dir: Path, seed: int, max_positions: int | None = None) -> Prepared:
    """Read, tokenize and audit the training and the held-out rows. A pure function of the files, the section and the seed.

    Args:
        config: the recipe's ``dataset`` section.
        tokenizer: a fast transformers tokenizer; a named ``chat_template`` is set on it, to be saved with the result.
        base_dir: the recipe's folder.
        seed: decides which rows are held out by ``eval_fraction`` and which a fractional weight takes.
        max_positions: the longest row that the model can take, in tokens.

    Raises:
        DataError: a fault in the data, or the label audit refuses.
    """
    notes = install(config.chat_template, tokenizer, base_dir) if config.chat_template else []
    loader = _Loader(config, tokenizer, base_dir)
    loader.notes.extend(notes)
    max_length = loader.max_length(max_positions)
    train, held_out, dropped, eval_dropped = _rows(config, loader, seed)
    fitted = loader.encode(train, max_length, "training")
    eval_fitted = loader.encode(held_out, max_length, _HELD_OUT) if held_out is not None else None
    if held_out is not None:
        known = {digest(item) for item in train}
        both = sum(digest(item) in known for item in held_out)
        if both:
            loader.notes.append(f"{both} of {len(held_out)} held-out rows stand in the training rows as well, word for word")
    if (
        config.train_on == "completions"
        and adds_bos(tokenizer)
        and not all(row.input_ids[0] == tokenizer.bos_token_id for row in fitted.rows if row.has_start)
    ):
        loader.notes.append("the chat template writes no BOS, as at inference, although the tokenizer puts one before plain text")
    audited = [(fitted, dropped)] if eval_fitted is None else [(eval_fitted, eval_dropped), (fitted, dropped)]
    for split, left in audited:
        audit = audit_rows(
            split.rows,
            tokenizer,
            train_on=config.train_on,
            truncated=split.truncated,
            dropped=len(left) + len(split.too_long) + len(split.unsupervised),
            notes=loader.notes,
        )
    return Prepared(
        train=_split(fitted, dropped, tokenizer, generation=False),
        eval=None if eval_fitted is None else _split(eval_fitted, eval_dropped, tokenizer, generation=True),
        audit=audit,
        files=loader.files,
    )


def prepare_eval(config: DatasetSection, tokenizer: Any, *, base_dir: Path, seed: int, max_positions: int | None = None) -> Split:
    """The held-out rows alone, audited: ``eval``, else the rows that ``eval_fraction`` holds out of ``train``.

    The tokenizer is taken as it was saved with the run, chat template included; ``config.chat_template`` is not looked at.

    Raises:
        DataError: a fault in the data, the section has no held-out rows, or the label audit refuses.
    """
    loader = _Loader(config, tokenizer, base_dir)
    if config.eval:
        held_out, dropped = _gather(config.eval, loader, "eval", config.eval_limit)
    elif config.eval_fraction:
        _, chosen, _, dropped = _rows(config, loader, seed)
        held_out = chosen or []
    else:
        raise DataError("there are no held-out rows to evaluate", hint="name them with dataset.eval, or --data FILE")
    fitted = loader.encode(held_out, loader.max_length(max_positions), _HELD_OUT)
    left = len(dropped) + len(fitted.too_long) + len(fitted.unsupervised)
    audit_rows(fitted.rows, tokenizer, train_on=config.train_on, truncated=fitted.truncated, dropped=left)
    return _split(fitted, dropped, tokenizer, generation=True)


def _rows(config: DatasetSection, loader: _Loader, seed: int) -> tuple[list[Item], list[Item] | None, list[str], list[str]]:
    """Training items, held-out items, and the places of the rows with an empty answer of each."""
    if config.eval or not config.eval_fraction:
        # Reading may stop early where no later row can be among the first ``limit``.
        stop = config.limit if all(source.weight >= 1 for source in config.train) else None
        loaded = [loader.load(source, "train", stop) for source in config.train]
        held_out, eval_dropped = _gather(config.eval, loader, "eval", config.eval_limit) if config.eval else (None, [])
    else:
        loaded, held_out = _hold_out([loader.load(source, "train", None) for source in config.train], config.eval_fraction, seed)
        held_out, eval_dropped = held_out[: config.eval_limit], []
    train: list[Item] = []
    for index, source in enumerate(loaded):
        train.extend(source.items[place] for place in weigh(len(source.items), source.weight, seed, index))
    return train[: config.limit], held_out, [origin for source in loaded for origin in source.empty], eval_dropped


def _gather(sources: Sequence[SourceSection], loader: _Loader, role: Role, limit: int | None) -> tuple[list[Item], list[str]]:
    loaded = [loader.load(source, role, limit) for source in sources]
    if any(source.weight != 1 for source in loaded):
        loader.notes.append("weights of held-out sources have no effect: each row counts once")
    return [item for source in loaded for item in source.items][:limit], [origin for source in loaded for origin in source.empty]


def _hold_out(loaded: list[_Loaded], fraction: float, seed: int) -> tuple[list[_Loaded], list[Item]]:
    """Take out a fraction of the rows, at least one; exact duplicates stay on the same side."""
    keys = [[digest(item) for item in source.items] for source in loaded]
    distinct = list(dict.fromkeys(key for source in keys for key in source))
    if len(distinct) < 2:
        raise DataError(
            f"dataset.eval_fraction: {len(distinct)} distinct rows cannot be divided", hint="give a file of held-out rows: dataset.eval"
        )
    chosen = choose(distinct, fraction, seed)
    kept: list[_Loaded] = []
    held_out: list[Item] = []
    for source, source_keys in zip(loaded, keys, strict=True):
        pairs = list(zip(source.items, source_keys, strict=True))
        held_out.extend(item for item, key in pairs if key in chosen)
        kept.append(_Loaded([item for item, key in pairs if key not in chosen], source.empty, source.weight))
    return kept, held_out


def _split(fitted: Fitted, empty: list[str], tokenizer: Any, *, generation: bool) -> Split:
    rows = fitted.rows
    dropped = [*empty, *fitted.too_long, *fitted.unsupervised]
    ends = {end for row in rows if (end := end_token(row)) is not None}
    return Split(
        input_ids=[row.input_ids for row in rows],
        supervised=[row.supervised for row in rows],
        origins=[row.origin for row in rows],
        counts=SplitCounts(
            rows=len(rows),
            tokens=sum(len(row.input_ids) for row in rows),
            supervised_tokens=sum(int(row.supervised.sum()) for row in rows),
            truncated=fitted.truncated,
            dropped=len(dropped),
            longest=max(len(row.input_ids) for row in rows),
        ),
        dropped_origins=dropped[:_ORIGINS_KEPT],
        generation=[
            GenerationExample(row.prompt_ids.tolist(), row.request, row.reference, row.origin) for row in rows if len(row.prompt_ids)
        ]
        if generation
        else [],
        stop_ids=tuple(sorted(ends | {tokenizer.eos_token_id})),
    )
