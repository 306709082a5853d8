"""From the recipe's ``dataset`` section to tokenized rows: read, convert, hold out, weigh, tokenize, fit, audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.data.audit import Audit
from peftcli.data.formats import Converter, check_format, check_mapping, convert_rows, detect
from peftcli.data.kinds import RowKind
from peftcli.data.neutral import Item, digest, is_rendered
from peftcli.data.sampling import choose, weigh
from peftcli.data.sources import Role, read_source
from peftcli.data.splits import GenerationExample, Split, SplitCounts
from peftcli.data.templates import has_template
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection, SourceSection

__all__ = ["GenerationExample", "Prepared", "Split", "SplitCounts", "prepare", "prepare_eval"]


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

    def __init__(self, kind: RowKind[Any], base_dir: Path) -> None:
        self.config, self.tokenizer, self.formats, self.base_dir = kind.config, kind.tokenizer, kind.formats, base_dir
        self.plain = kind.plain
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
        format = detect(columns, mapping, source.path, self.formats) if named == "auto" else named
        check_format(mapping, format)
        chat = has_template(self.tokenizer) and not self.plain
        items, empty = convert_rows(read.rows, Converter(format, mapping, chat=chat, system=self.config.system, plain=self.plain))
        if empty:
            first = ", ".join(origin for origin, _ in empty[:3]) + (", ..." if len(empty) > 3 else "")
            self.notes.append(f"{source.path}: dropped {len(empty)} rows whose answer is empty ({first})")
        # Without a template an alpaca row's system prompt stands in its text.
        idle = ("chat_template",) if self.plain and format == "alpaca" else ("chat_template", "system")
        unused = [f"dataset.{name}" for name in idle if getattr(self.config, name)]
        if unused and not any(map(is_rendered, items)) and (format != "alpaca" or self.plain):
            self.notes.append(f"{source.path}: the rows are raw text ({format}), so {' and '.join(unused)} has no influence on them")
        return _Loaded(items, [origin for origin, _ in empty], source.weight)

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
    loader = _Loader(kind, base_dir)
    loader.notes.extend(notes)
    max_length = loader.max_length(max_positions)
    train, held_out, dropped, eval_dropped = _rows(kind.config, loader, seed)
    _some(train, "training")
    kind.learn(train)
    fitted = kind.encode(train, max_length=max_length, held_out=False, notes=loader.notes)
    evaluation: Split | None = None
    if held_out is not None:
        eval_fitted = kind.encode(_some(held_out, "held-out"), max_length=max_length, held_out=True, notes=loader.notes)
        known = {digest(item) for item in train}
        both = sum(digest(item) in known for item in held_out)
        if both:
            loader.notes.append(f"{both} of {len(held_out)} held-out rows stand in the training rows as well, word for word")
        kind.audit(eval_fitted, eval_dropped, ())
        evaluation = kind.split(eval_fitted, eval_dropped, held_out=True)
    audit = kind.audit(fitted, dropped, loader.notes)
    return Prepared(kind.split(fitted, dropped, held_out=False), evaluation, audit, loader.files)


def prepare_eval(kind: RowKind[Any], *, base_dir: Path, seed: int, max_positions: int | None = None) -> Split:
    """The held-out rows alone, audited: ``eval``, else the rows that ``eval_fraction`` holds out of ``train``.

    The tokenizer is taken as it was saved with the run, chat template included; ``config.chat_template`` is not looked at.

    Raises:
        DataError: a fault in the data, the section has no held-out rows, or the label audit refuses.
    """
    config = kind.config
    loader = _Loader(kind, base_dir)
    if config.eval:
        held_out, dropped = _gather(config.eval, loader, "eval", config.eval_limit)
    elif config.eval_fraction:
        _, chosen, _, dropped = _rows(config, loader, seed)
        held_out = chosen or []
    else:
        raise DataError("there are no held-out rows to evaluate", hint="name them with dataset.eval, or --data FILE")
    fitted = kind.encode(_some(held_out, "held-out"), max_length=loader.max_length(max_positions), held_out=True, notes=loader.notes)
    kind.audit(fitted, dropped, ())
    return kind.split(fitted, dropped, held_out=True)


def _some(items: list[Item], what: str) -> list[Item]:
    if not items:
        raise DataError(
            f"there are no {what} rows left to use", hint="look at dataset.limit, dataset.eval_fraction and the notes on empty answers"
        )
    return items


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
