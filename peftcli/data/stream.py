"""Tokenizing a source as it is read: piece by piece, in several processes, into a store on disk that is kept for the next run."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import peftcli
from peftcli.data import store
from peftcli.data.audit import end_token, inspect_row
from peftcli.data.faults import Faults, Skipped
from peftcli.data.formats import Converter, convert_rows
from peftcli.data.neutral import Item, TextItem, is_rendered, keys
from peftcli.data.readers import LINE_FORMATS, Reading, Row, json_lines, opened, read_file
from peftcli.data.sampling import Keys, Places
from peftcli.data.sources import FileSource, Source
from peftcli.data.store import Block, Store, Writer
from peftcli.data.tokenize import Encoded, Encoder
from peftcli.data.truncation import fit_row
from peftcli.errors import DataError
from peftcli.recipe.schema import Truncation

_CHUNK_BYTES, _CHUNK_ROWS = 1 << 20, 1000
_MOST_PROCESSES = 8
_AHEAD = 2


@dataclass(frozen=True)
class Job:
    """What a process needs to tokenize rows of one source.

    Attributes:
        reading, converter: from lines to items. ``train_on``, ``max_length``, ``truncation``: of the ``dataset`` section.
    """

    tokenizer: Any
    reading: Reading
    converter: Converter
    train_on: Literal["completions", "all"]
    max_length: int
    truncation: Truncation


class _Chunk(NamedTuple):
    """Some rows of file number ``file``: lines of JSON from number ``first`` on, not yet taken apart, or rows."""

    file: int
    shown: str
    first: int
    lines: bytes | None
    rows: list[Row]


class _Done(NamedTuple):
    """A chunk, tokenized.

    Attributes:
        origin: how a row's place is written: before and behind its number; ``None`` behind where it has none.
        unread, unrendered, refused: rows that cannot be read, rendered, or that ``truncation`` refuses, each with a hint.
        columns: names of columns seen. ``rendered``: whether a chat template wrote a row.
    """

    file: int
    block: Block
    origin: tuple[str, str | None] | None
    unread: list[Skipped]
    unrendered: list[Skipped]
    refused: list[Skipped]
    hints: tuple[str | None, str | None, str | None]
    columns: list[str]
    rendered: bool


class _Tokenizing:
    """Turns chunks into blocks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.encoder = Encoder(job.tokenizer, job.train_on)

    def __call__(self, chunk: _Chunk) -> _Done:
        unread, unrendered, refused = Faults(skip=True), Faults(skip=True), Faults(skip=True)
        rows = chunk.rows
        if chunk.lines is not None:
            rows = list(json_lines(io.BytesIO(chunk.lines), chunk.shown, unread, self.job.reading, first=chunk.first, part=True))
        items, empty = convert_rows(rows, self.job.converter, unread)
        texts = [item for item in items if isinstance(item, TextItem)]
        encoded = iter(self.encoder.encode(texts, faults=unrendered))
        lost = {skipped.origin for skipped in unrendered.skipped}
        records, pieces = [], list[Encoded]()
        for item in texts:
            state, kept, without = store.FAULTY, list[Encoded](), 0
            if item.origin not in lost:
                job = self.job
                fitted = fit_row(
                    next(encoded), max_length=job.max_length, mode=job.truncation, bos=job.tokenizer.bos_token_id, faults=refused
                )
                state, kept, without = (store.TOO_LONG if fitted.too_long else store.KEPT), fitted.pieces, fitted.lost
            records.append((*keys(item), _number(item.origin, chunk.shown), chunk.file, state, len(kept), without))
            pieces.extend(kept)
        records.extend((0, 0, _number(origin, chunk.shown), chunk.file, store.EMPTY, 0, 0) for origin, _ in empty)
        block = Block(
            np.array(records, store.ROW),
            np.array([self._record(piece) for piece in pieces], store.PIECE),
            np.concatenate([piece.input_ids for piece in pieces]) if pieces else np.zeros(0, np.int32),
            np.concatenate([piece.supervised for piece in pieces]) if pieces else np.zeros(0, np.bool_),
        )
        return _Done(
            chunk.file,
            block,
            _written(rows[0].origin, chunk.shown) if rows else None,
            unread.skipped,
            unrendered.skipped,
            refused.skipped,
            (unread.hint, unrendered.hint, refused.hint),
            list(dict.fromkeys(name for row in rows for name in row.values)),
            any(map(is_rendered, items)),
        )

    def _record(self, piece: Encoded) -> tuple[int, int, int, int]:
        facts = inspect_row(piece, self.job.tokenizer, self.job.train_on)
        flags = (
            (store.HAS_START if piece.has_start else 0)
            | (store.HAS_END if piece.has_end else 0)
            | (store.TRUNCATED if piece.truncated else 0)
            | (store.ENDED if facts.ended else 0)
            | (store.BOS if facts.bos else 0)
        )
        end = end_token(piece)
        return len(piece.input_ids), int(piece.supervised.sum()), -1 if end is None else end, flags


def _number(origin: str, shown: str) -> int:
    rest = origin[len(shown) :].strip(":[]")
    return int(rest) if rest else 0


def _written(origin: str, shown: str) -> tuple[str, str | None]:
    mark = origin[len(shown) : len(shown) + 1]
    return f"{shown}{mark}", {":": "", "[": "]"}.get(mark)


class StoredRows:
    """The rows of one source in a store, before any of them is chosen.

    Attributes:
        store, source, converter: where they are and how they are read again.
        weight: of the source. ``again``: whether the store was there already.
        usable: numbers of the rows that can be chosen: all but those with an empty answer.
        left_out: places of the rows that cannot.
    """

    def __init__(self, stored: Store, source: Source, converter: Converter, weight: float, again: bool) -> None:
        self.store, self.source, self.converter, self.weight, self.again = stored, source, converter, weight, again
        state = stored.rows["state"]
        self.usable: Places = np.flatnonzero(state != store.EMPTY)
        self.empty = [stored.origin(int(row)) for row in np.flatnonzero(state == store.EMPTY)]
        self.left_out = [*self.empty, *(origin for origin, _ in stored.facts["unread"])]

    @property
    def keys(self) -> Keys:
        """Of the usable rows: see :func:`peftcli.data.neutral.keys`."""
        return np.asarray(self.store.rows["key"][self.usable])

    @property
    def inputs(self) -> Keys:
        """Keys of what the usable rows ask."""
        return np.asarray(self.store.rows["input"][self.usable])

    def items(self, places: Places) -> list[Item]:
        """Usable rows by their places among these, in the source's order, read again."""
        rows = np.sort(self.usable[places])
        wanted = {self.store.origin(int(row)) for row in rows}
        if not wanted:
            return []
        numbers = frozenset(self.store.rows["number"][rows].tolist())
        again = self.source.rows(Faults(skip=True), [], numbers)
        return convert_rows((row for row in again if row.origin in wanted), self.converter)[0]


def store_rows(source: Source, job: Job, *, stop: int | None, faults: Faults, processes: int | None, weight: float) -> StoredRows:
    """Tokenize a source into a store, or find the store of the same content.

    Args:
        stop: take only the first rows.
        faults: where faulty rows go.
        processes: ``None``: one for each core that is at hand, at most 8.

    Raises:
        DataError: faulty rows; nothing can be written; a process died.
    """
    files = source.files if isinstance(source, FileSource) else []
    known = [source.sha256(path) for path, _ in files] if isinstance(source, FileSource) else source.key
    # Rows that come as they are read have no name for their content; their store is found by no other run.
    key = _key(job, known if known is not None else os.urandom(16).hex(), stop, faults.skip, [shown for _, shown in files])
    count = processes or min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def build(writer: Writer) -> dict[str, Any]:
        read: list[tuple[str, str]] = []
        origins: dict[int, tuple[str, str | None]] = {}
        columns: dict[str, None] = {}
        unread: list[Skipped] = []
        unrendered: list[Skipped] = []
        unopened = Faults(skip=True)
        refused = Faults()
        rendered = False

        def note(found: list[Skipped], kept: list[Skipped], hint: str | None) -> None:
            kept.extend(found)
            for origin, reason in found:
                faults.add(reason, at=origin, hint=hint)

        for done in _ordered(job, _chunks(source, unopened, read, stop), count):
            # What this process itself met while it read comes first, as it does where rows are kept in memory.
            note(unopened.skipped, unread, unopened.hint)
            unopened.skipped.clear()
            note(done.unread, unread, done.hints[0])
            note(done.unrendered, unrendered, done.hints[1])
            for origin, reason in done.refused:
                refused.add(reason, at=origin, hint=done.hints[2])
            if done.origin is not None:
                origins.setdefault(done.file, done.origin)
            columns.update(dict.fromkeys(done.columns))
            rendered |= done.rendered
            writer.append(done.block)
        note(unopened.skipped, unread, unopened.hint)
        faults.raise_if_any()
        refused.raise_if_any()
        return {
            "files": read,
            "origins": [origins.get(number, ("", None)) for number in range(max(origins, default=-1) + 1)],
            "columns": list(columns),
            "unread": unread,
            "unrendered": unrendered,
            "rendered": rendered,
        }

    stored, again = store.open_or_build(key, build)
    if known is None:
        weakref.finalize(stored, shutil.rmtree, stored.folder, ignore_errors=True)
    if again:
        for origin, reason in (*stored.facts["unread"], *stored.facts["unrendered"]):
            faults.add(reason, at=origin)
    return StoredRows(stored, source, job.converter, weight, again)


def _key(job: Job, *parts: Any) -> str:
    """A name for everything that the store's content depends on, the code included."""
    tokenizer, converter, reading = job.tokenizer, job.converter, job.reading
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    facts = [
        parts,
        [peftcli.__version__, code.hexdigest(), *(metadata.version(name) for name in ("tokenizers", "transformers"))],
        [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template],
        [job.train_on, job.max_length, job.truncation, vars(converter)],
        [reading.header, reading.delimiter, reading.encoding, reading.pattern.pattern if reading.pattern else None],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _chunks(source: Source, faults: Faults, used: list[tuple[str, str]], stop: int | None) -> Iterator[_Chunk]:
    """The source in chunks of one file each, up to ``stop`` rows; ``used`` gets (name, hash) of what was read."""
    if not isinstance(source, FileSource):
        with closing(source.rows(faults, used)) as rows:
            yield from (_Chunk(0, source.shown, 0, None, group) for group in _groups(islice(rows, stop)))
        return
    left = stop
    for number, (path, shown) in enumerate(source.files):
        if left == 0:
            return
        used.append((shown, source.sha256(path)))
        if left is None and source.reading.kind(path) in LINE_FORMATS:
            yield from _line_chunks(path, shown, number, faults)
            continue
        for group in _groups(islice(read_file(path, shown, faults, source.reading), left)):
            yield _Chunk(number, shown, 0, None, group)
            left = None if left is None else left - len(group)


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while group := list(islice(rows, _CHUNK_ROWS)):
        yield group


def _line_chunks(path: Path, shown: str, number: int, faults: Faults) -> Iterator[_Chunk]:
    """Whole lines, of about a megabyte together."""
    first, seen, before = 1, False, faults.count
    with opened(path, shown, faults) as stream:
        while stream is not None and (lines := stream.readlines(_CHUNK_BYTES)):
            data = b"".join(lines)
            seen = seen or bool(data.strip())
            yield _Chunk(number, shown, first, data, [])
            first += len(lines)
        if stream is not None and not seen and faults.count == before:
            faults.add("the file has no rows", at=shown)


# In a worker process: its one instance.
_workers: list[_Tokenizing] = []


def _begin(job: Job) -> None:
    """In a new process: be ready for chunks, leave Ctrl-C to the parent, and end with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _workers.append(_Tokenizing(job))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: _Chunk) -> _Done:
    return _workers[0](chunk)


def _ordered(job: Job, chunks: Iterator[_Chunk], processes: int) -> Iterator[_Done]:
    """The chunks in their order, tokenized; only a few are under way at any time."""
    ahead = list(islice(chunks, 2))
    chunks = chain(ahead, chunks)
    if processes == 1 or len(ahead) < 2:
        yield from map(_Tokenizing(job), chunks)
        return
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(job,))
    waiting: deque[Future[_Done]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenizes rows ended without a word, as one does that was killed for its memory",
            hint="fewer of them take less: dataset.num_proc: 1",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
