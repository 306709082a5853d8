"""From the recipe's ``dataset`` section to tokenized rows: read, convert, hold out, weigh, tokenize, fit, audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from peftcli.data.audit import Audit
from peftcli.data.faults import Faults, Skipped
from peftcli.data.formats import Converter, check_format, check_mapping, convert_rows, detect
from peftcli.data.kinds import RowKind
from peftcli.data.neutral import Item, is_rendered, keys
from peftcli.data.readers import Reading
from peftcli.data.sampling import Keys, Places, hold_out, repeats, weigh
from peftcli.data.sources import FileSource, Role, Source, SourceRows, open_source, read_source, stop_at
from peftcli.data.splits import GenerationExample, Split, SplitCounts
from peftcli.data.stream import Job, StoredRows, store_rows
from peftcli.data.templates import has_template
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection, SourceSection

__all__ = ["GenerationExample", "Prepared", "Split", "SplitCounts", "prepare", "prepare_eval"]


@dataclass(frozen=True)
class Prepared:
    """All data of a run.

    Attributes:
        files: (path as the recipe has it, sha256) of every data file read.
        skipped: faulty rows that were left out, where ``dataset.on_error`` says so.
    """

    train: Split
    eval: Split | None
    audit: Audit
    files: list[tuple[str, str]]
    skipped: list[Skipped]


# Above this size rows are read as a stream unless the recipe says otherwise; a row in memory takes several times its bytes.
_STREAM_FROM = 64_000_000
_LOOKED_AT = 1000


class _Loaded:
    """Converted rows of one source, in memory; :class:`StoredRows` are the same on disk.

    Attributes:
        left_out: places of rows with an empty answer, and of faulty ones. ``weight``: of the source.
        keys, inputs: see :func:`peftcli.data.neutral.keys`.
    """

    def __init__(self, rows: list[Item], left_out: list[str], weight: float) -> None:
        self.rows, self.left_out, self.weight = rows, left_out, weight
        both = np.array([keys(item) for item in rows], np.uint64).reshape(-1, 2)
        self.keys, self.inputs = both[:, 0], both[:, 1]

    def items(self, places: Places) -> list[Item]:
        return [self.rows[place] for place in places]


_Pool = _Loaded | StoredRows


class _Loader:
    """Reads sources of a section and collects what they have in common: files and notes."""

    def __init__(self, kind: RowKind[Any], base_dir: Path, max_positions: int | None) -> None:
        self.kind, self.config, self.tokenizer, self.base_dir = kind, kind.config, kind.tokenizer, base_dir
        self.files: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.limit = self.max_length(max_positions)

    def load(self, source: SourceSection, role: Role, limit: int | None, opened: Source | None = None) -> _Loaded:
        """Rows in memory. ``opened``: the source, where it was found before."""
        before = len(self.kind.skipped)
        opened = opened or open_source(source, base_dir=self.base_dir, role=role, streaming=bool(self.config.streaming))
        read = self._read(source, opened, stop_at(source, limit))
        self.kind.skipped.extend(read.skipped)
        self.notes.extend(read.notes)
        converter = self._converter(source, list(dict.fromkeys(name for row in read.rows for name in row.values)))
        items, empty = convert_rows(read.rows, converter, self.kind.faults())
        self._tell(source, converter, read.files, [origin for origin, _ in empty], any(map(is_rendered, items)))
        faulty = [skipped.origin for skipped in self.kind.skipped[before:]]
        return _Loaded(items, [*(origin for origin, _ in empty), *faulty], source.weight)

    def store(self, source: SourceSection, opened: Source, limit: int | None) -> StoredRows:
        """Rows on disk."""
        config, faults = self.config, self.kind.faults()
        self.notes.extend(opened.notes)
        stop = stop_at(source, limit)
        with closing(opened.rows(Faults(skip=True), [])) as rows:
            first = list(islice(rows, min(_LOOKED_AT, stop or _LOOKED_AT)))
        if not first:
            self._read(source, opened, None)
        converter = self._converter(source, list(dict.fromkeys(name for row in first for name in row.values)), whole=False)
        reading = opened.reading if isinstance(opened, FileSource) else Reading()
        job = Job(self.tokenizer, reading, converter, config.train_on, self.limit, config.truncation)
        stored = store_rows(opened, job, stop=stop, faults=faults, processes=config.num_proc, weight=source.weight)
        facts = stored.store.facts
        check_mapping(converter.mapping, facts["columns"], source.path)
        self._tell(source, converter, [(path, digest) for path, digest in facts["files"]], stored.empty, facts["rendered"])
        if stored.again:
            self.notes.append(f"{source.path}: the tokens were taken from the cache ({stored.store.folder.name})")
        return stored

    def _read(self, source: SourceSection, opened: Source, stop: int | None) -> SourceRows:
        read = read_source(opened, stop, skip=self.config.on_error == "skip")
        if not read.rows and read.skipped:
            origin, reason = read.skipped[0]
            raise DataError(f"{source.path}: no row of it can be read; the first of {len(read.skipped)} faults is {origin}: {reason}")
        return read

    def large(self, opened: Sequence[Source]) -> bool:
        """Whether the training rows are to be read as a stream."""
        if not self.kind.streams:
            return False
        if self.config.streaming is not None:
            return self.config.streaming
        return sum(source.size or 0 for source in opened) >= _STREAM_FROM

    def _converter(self, source: SourceSection, columns: list[str], *, whole: bool = True) -> Converter:
        """How the rows of a source are read. ``columns``: those of all rows, or, unless ``whole``, of the first ones."""
        mapping = self.config.columns if source.columns is None else source.columns
        if whole:
            check_mapping(mapping, columns, source.path)
        named = source.format or self.config.format
        format = detect(columns, mapping, source.path, self.kind.formats) if named == "auto" else named
        check_format(mapping, format)
        chat = has_template(self.tokenizer) and not self.kind.plain
        return Converter(format, mapping, chat=chat, system=self.config.system, plain=self.kind.plain)

    def _tell(self, source: SourceSection, converter: Converter, files: list[tuple[str, str]], empty: list[str], rendered: bool) -> None:
        self.files.extend(entry for entry in files if entry not in self.files)
        if empty:
            first = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            self.notes.append(f"{source.path}: dropped {len(empty)} rows whose answer is empty ({first})")
        # Without a template a system prompt stands in the text of the rows that can have one.
        plain, format = self.kind.plain, converter.format
        idle = ("chat_template",) if plain and (rendered or format == "alpaca") else ("chat_template", "system")
        unused = [f"dataset.{name}" for name in idle if getattr(self.config, name)]
        if unused and (plain or not (rendered or format == "alpaca")):
            self.notes.append(f"{source.path}: the rows are raw text ({format}), so {' and '.join(unused)} has no influence on them")

    def max_length(self, max_positions: int | None) -> int:
        if max_positions is None or self.config.max_length <= max_positions:
            return self.config.max_length
        self.notes.append(
            f"dataset.max_length {self.config.max_length} is more than the model's {max_positions} positions, which hold instead"
        )
        return max_positions


def prepare(kind: RowKind[Any], *, base_dir: Path, seed: int, max_positions: int | None = None) -> Prepared:
    """Read, tokenize and audit the training and the held-out rows. A pure function of the files, the section and the seed.

    Args:
        kind: what rows become, with the recipe's ``dataset`` section and the tokenizer; a named ``chat_template`` is set on
            the tokenizer, to be saved with the result.
        base_dir: the recipe's folder.
        seed: decides which rows are held out by ``eval_fraction`` and which a fractional weight takes.
        max_positions: the longest row that the model can take, in tokens.

    Raises:
        DataError: a fault in the data, or the label audit refuses.
    """
    notes = kind.begin(base_dir)
    loader = _Loader(kind, base_dir, max_positions)
    loader.notes[:0] = notes
    rows = _divide(kind.config, loader, seed)
    if not sum(map(len, rows.chosen)):
        raise _none_left("training", kind)
    train, make_audit = _training(kind, rows, loader)
    evaluation: Split | None = None
    leaked = (0, 0)
    if rows.held_out is not None:
        eval_fitted = _encode_held_out(kind, rows.held_out, loader)
        leaked = _leaks(rows, rows.held_out, loader.notes)
        kind.audit(eval_fitted, rows.eval_left_out, ())
        evaluation = kind.split(eval_fitted, rows.eval_left_out, held_out=True)
    if kind.skipped:
        # A held-out row that lies in a store was met there before.
        kind.skipped[:] = dict.fromkeys(kind.skipped)
        origin, reason = kind.skipped[0]
        loader.notes.append(f"skipped {len(kind.skipped)} faulty rows (dataset.on_error: skip), the first one {origin}: {reason}")
    counts = {"skipped": len(kind.skipped), "duplicates": rows.duplicates, "leaked_rows": leaked[0], "leaked_inputs": leaked[1]}
    audit = replace(make_audit(), **counts)  # type: ignore[arg-type]
    return Prepared(train, evaluation, audit, loader.files, kind.skipped)


def _training(kind: RowKind[Any], rows: _Divided, loader: _Loader) -> tuple[Split, Callable[[], Audit]]:
    """The training split, and its audit, to be made once the notes are complete."""
    stored = [pool for pool in rows.pools if isinstance(pool, StoredRows)]
    if stored:
        return kind.stored(stored, rows.chosen, max_length=loader.limit, notes=loader.notes)
    items = [item for pool, places in zip(rows.pools, rows.chosen, strict=True) for item in pool.items(places)]
    kind.learn(items)
    fitted = kind.encode(items, max_length=loader.limit, held_out=False, notes=loader.notes)
    return kind.split(fitted, rows.left_out, held_out=False), lambda: kind.audit(fitted, rows.left_out, loader.notes)


def _leaks(rows: _Divided, held_out: Sequence[Item], notes: list[str]) -> tuple[int, int]:
    """How many held-out rows the training rows hold as well: whole, and with any answer."""
    held = np.array([keys(item) for item in held_out], np.uint64)
    whole = np.isin(held[:, 0], rows.of_chosen("keys"))
    asked = (np.isin(held[:, 1], rows.of_chosen("inputs")) & (held[:, 1] != 0)) | whole
    both, more = int(whole.sum()), int((asked & ~whole).sum())
    if both:
        notes.append(f"{both} of {len(held_out)} held-out rows stand in the training rows as well, word for word")
    if more:
        notes.append(f"{more} of {len(held_out)} held-out rows ask what a training row asks, word for word, with another answer")
    return both, both + more


def prepare_eval(kind: RowKind[Any], *, base_dir: Path, seed: int, max_positions: int | None = None) -> Split:
    """The held-out rows alone, audited: ``eval``, else the rows that ``eval_fraction`` holds out of ``train``.

    The tokenizer is taken as it was saved with the run, chat template included; ``config.chat_template`` is not looked at.

    Raises:
        DataError: a fault in the data, the section has no held-out rows, or the label audit refuses.
    """
    config = kind.config
    loader = _Loader(kind, base_dir, max_positions)
    if config.eval:
        held_out, left_out = _gather(config.eval, loader, "eval", config.eval_limit)
    elif config.eval_fraction:
        rows = _divide(config, loader, seed)
        held_out, left_out = rows.held_out or [], rows.eval_left_out
    else:
        raise DataError("there are no held-out rows to evaluate", hint="name them with dataset.eval, or --data FILE")
    fitted = _encode_held_out(kind, held_out, loader)
    kind.audit(fitted, left_out, ())
    return kind.split(fitted, left_out, held_out=True)


def _encode_held_out(kind: RowKind[Any], items: list[Item], loader: _Loader) -> Any:
    if not items:
        raise _none_left("held-out", kind)
    return kind.encode(items, max_length=loader.limit, held_out=True, notes=loader.notes)


def _none_left(what: str, kind: RowKind[Any]) -> DataError:
    if kind.skipped:
        origin, reason = kind.skipped[0]
        return DataError(
            f"there are no {what} rows left to use; {len(kind.skipped)} faulty ones were skipped, the first one {origin}: {reason}",
            hint="see the faults with dataset.on_error: fail",
        )
    return DataError(
        f"there are no {what} rows left to use", hint="look at dataset.limit, dataset.eval_fraction and the notes on empty answers"
    )


@dataclass(frozen=True)
class _Divided:
    """Which rows are trained and which are held out.

    Attributes:
        pools: the training sources. ``chosen``: places of the rows to train in each, in order, repeated ones as often.
        held_out: ``None`` where the recipe names none.
        left_out, eval_left_out: places of rows that could be neither.
        duplicates: how many training rows repeat an earlier one, before weights and the limit.
    """

    pools: Sequence[_Pool]
    chosen: list[Places]
    held_out: list[Item] | None
    left_out: list[str]
    eval_left_out: list[str]
    duplicates: int

    def of_chosen(self, name: str) -> Keys:
        """The ``keys`` or ``inputs`` of the chosen rows."""
        return np.concatenate([getattr(pool, name)[places] for pool, places in zip(self.pools, self.chosen, strict=True)])


def _divide(config: DatasetSection, loader: _Loader, seed: int) -> _Divided:
    # Reading may stop early where no later row can be among the first ``limit``.
    early = (config.eval or not config.eval_fraction) and not config.deduplicate and all(source.weight >= 1 for source in config.train)
    stop = config.limit if early else None
    pools = _pools(config, loader, stop)
    kept = [np.arange(len(pool.keys)) for pool in pools]
    left_out = [origin for pool in pools for origin in pool.left_out]
    held_out, eval_left_out = _gather(config.eval, loader, "eval", config.eval_limit) if config.eval else (None, [])
    if config.eval_fraction and not config.eval:
        masks = hold_out([pool.keys for pool in pools], config.eval_fraction, seed)
        if masks is None:
            raise DataError(
                f"dataset.eval_fraction: {min(1, sum(map(len, kept)))} distinct rows cannot be divided",
                hint="give a file of held-out rows: dataset.eval",
            )
        kept = [np.flatnonzero(~mask) for mask in masks]
        held_out = []
        for pool, mask in zip(pools, masks, strict=True):
            left = None if config.eval_limit is None else config.eval_limit - len(held_out)
            held_out.extend(pool.items(np.flatnonzero(mask)[:left]))
    again = repeats([pool.keys[places] for pool, places in zip(pools, kept, strict=True)])
    duplicates = sum(int(mask.sum()) for mask in again)
    if duplicates and config.deduplicate:
        kept = [places[~mask] for places, mask in zip(kept, again, strict=True)]
        loader.notes.append(f"left out {duplicates} training rows that repeat an earlier one exactly (dataset.deduplicate)")
    elif duplicates:
        loader.notes.append(f"{duplicates} training rows repeat an earlier one exactly; dataset.deduplicate: true leaves them out")
    chosen = []
    left = config.limit
    for number, (pool, places) in enumerate(zip(pools, kept, strict=True)):
        taken = places[weigh(len(places), pool.weight, seed, number)] if len(places) else places
        chosen.append(taken[:left])
        left = None if left is None else left - len(chosen[-1])
    return _Divided(pools, chosen, held_out, left_out, eval_left_out, duplicates)


def _pools(config: DatasetSection, loader: _Loader, stop: int | None) -> Sequence[_Pool]:
    opened = [open_source(source, base_dir=loader.base_dir, role="train", streaming=bool(config.streaming)) for source in config.train]
    if not loader.large(opened):
        return [loader.load(source, "train", stop, found) for source, found in zip(config.train, opened, strict=True)]
    return [loader.store(source, found, stop) for source, found in zip(config.train, opened, strict=True)]


def _gather(sources: Sequence[SourceSection], loader: _Loader, role: Role, limit: int | None) -> tuple[list[Item], list[str]]:
    loaded = [loader.load(source, role, limit) for source in sources]
    if any(source.weight != 1 for source in loaded):
        loader.notes.append("weights of held-out sources have no effect: each row counts once")
    return [item for source in loaded for item in source.rows][:limit], [origin for source in loaded for origin in source.left_out]
