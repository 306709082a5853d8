"""Where rows come from: a file, a folder of files, or a hub dataset."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from peftcli.data.faults import Faults, Skipped
from peftcli.data.readers import SUFFIXES, Reading, Row, kind_of, read_file
from peftcli.errors import DataError, nearest
from peftcli.recipe.schema import SourceSection

__all__ = ["FileSource", "HubSource", "Row", "Source", "SourceRows", "find", "open_source", "read_source"]

Role = Literal["train", "eval"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GZIP_RATIO = 4


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source and what was read for them.

    Attributes:
        rows: in the order of the files.
        files: (path as written in the recipe, sha256 of its bytes) of each file; a hub dataset has one entry
            ``id@revision`` with the sha256 of its rows as JSON.
        notes: what a user should know, such as files of a folder that were left out.
        skipped: faulty rows that were left out, where the caller asked for it.
    """

    rows: list[Row]
    files: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class FileSource:
    """Files that lie here.

    Attributes:
        files: (path, its name in origins and faults), in the order of reading.
        reading: how they are read. ``notes``: what a user should know.
        hashes: sha256 of the files that were asked for it.
    """

    files: Sequence[tuple[Path, str]]
    reading: Reading
    notes: list[str]
    hashes: dict[Path, str] = field(default_factory=dict)

    def sha256(self, path: Path) -> str:
        """Hexadecimal sha256 of one of the files."""
        if path not in self.hashes:
            self.hashes[path] = sha256_of(path)
        return self.hashes[path]

    def rows(self, faults: Faults, used: list[tuple[str, str]], only: Container[int] | None = None) -> Generator[Row, None, None]:
        """All rows; ``used`` gets (name, sha256) of each file as it is begun. ``only``: see :func:`read_file`."""
        for path, shown in self.files:
            used.append((shown, self.sha256(path)))
            yield from read_file(path, shown, faults, self.reading, only=only)

    @property
    def size(self) -> int:
        """Bytes of the files, unpacked ones estimated."""
        return sum(path.stat().st_size * (_GZIP_RATIO if path.name.endswith(".gz") else 1) for path, _ in self.files)


@dataclass(frozen=True)
class HubSource:
    """A split of a hub dataset.

    Attributes:
        label: ``id@revision``. ``shown``: its name in origins.
        table: the rows, as a mapping each: a dataset on disk, or one that comes as it is read.
        size: bytes on disk; ``None`` where the rows come as they are read.
        key: names the content, for a cache; ``None`` where it is not known beforehand.
    """

    label: str
    shown: str
    table: Any
    size: int | None
    key: str | None
    notes: list[str] = field(default_factory=list)

    def rows(self, faults: Faults, used: list[tuple[str, str]], only: Container[int] | None = None) -> Generator[Row, None, None]:
        """All rows; ``used`` gets (label, sha256 of the rows as JSON) once the last one asked for was read.

        Raises:
            DataError: the library gives up in the middle; that is no faulty row, which could be skipped.
        """
        digest, index = hashlib.sha256(), -1
        table = iter(self.table)
        try:
            while (values := self._next(table, index + 1)) is not None:
                index += 1
                digest.update(json.dumps(values, sort_keys=True, default=str).encode())
                if only is None or index in only:
                    yield Row(dict(values), f"{self.shown}[{index}]")
        finally:
            used.append((self.label, digest.hexdigest()))
        if index < 0:
            faults.add("the split has no rows", at=self.shown)

    def _next(self, table: Iterator[Any], index: int) -> Any:
        try:
            return next(table, None)
        except Exception as error:
            raise DataError(
                f"{self.shown}: the rows break off before number {index} ({_first_line(error)})",
                hint="try again where the hub cannot be reached; a file of broken rows can be downloaded and read by its path, "
                "with dataset.on_error: skip",
            ) from error


Source = FileSource | HubSource


def _first_line(error: Exception) -> str:
    """An error of the library or of those that it uses, in a few words."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:160]}".removesuffix(": ")


def find(path: str, base_dir: Path) -> Path | None:
    """A file or folder by its path, looked up in the working directory and then in ``base_dir``; ``None`` if in neither."""
    wanted = Path(path).expanduser()
    return next((candidate for candidate in (wanted, base_dir / wanted) if candidate.exists()), None)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_source(source: SourceSection, *, base_dir: Path, role: Role, streaming: bool = False) -> Source:
    """Find a source, without reading it.

    Args:
        source: the recipe's source.
        base_dir: the recipe's folder; a relative path that is not below the working directory is looked up there.
        role: which split of a hub dataset is meant when the recipe names none.
        streaming: do not download a hub dataset as a whole first.

    Raises:
        DataError: a path that is not there, options that do not fit it, a hub dataset that cannot be loaded.
    """
    found = find(source.path, base_dir)
    if found is None:
        if _looks_local(source):
            raise _missing(source.path, base_dir)
        return _hub(source, base_dir, role, streaming)
    reading, notes = _reading(source), list[str]()
    files = [(found, source.path)] if found.is_file() else _folder(found, source.path, notes)
    return FileSource(files, reading, notes)


def read_source(opened: Source, stop: int | None = None, *, skip: bool = False) -> SourceRows:
    """The rows of a source.

    Args:
        stop: read only so many.
        skip: leave faulty rows out instead of raising.

    Raises:
        DataError: a file that is missing, empty or faulty, with ``file:line`` of up to ten faults; a hub dataset that
            cannot be loaded.
    """
    faults = Faults(skip=skip)
    used: list[tuple[str, str]] = []
    with closing(opened.rows(faults, used)) as rows:
        taken = list(islice(rows, stop))
    faults.raise_if_any()
    return SourceRows(taken, used, opened.notes, faults.skipped)


def stop_at(source: SourceSection, limit: int | None) -> int | None:
    """How many rows of a source are read: the smaller of its own limit and ``limit``; ``None`` for all."""
    return min((value for value in (source.limit, limit) if value is not None), default=None)


def _reading(source: SourceSection) -> Reading:
    """The source's options, checked.

    Raises:
        DataError: an unknown encoding, a pattern that is no regular expression or has no named group.
    """
    where = f"dataset source {source.path}"
    try:
        encoding = codecs.lookup(source.encoding).name
        lines = "\n".encode(encoding) == b"\n"
    except (LookupError, UnicodeError):
        raise DataError(f"{where}: encoding {source.encoding!r} is not known", hint="for example utf-8, latin-1, cp1252, gb18030") from None
    if not lines:
        raise DataError(
            f"{where}: encoding {source.encoding!r} cannot be read line by line", hint="convert the file: iconv -t UTF-8 FILE > NEW_FILE"
        )
    pattern = None
    if source.pattern is not None:
        try:
            pattern = re.compile(source.pattern)
        except re.error as error:
            raise DataError(f"{where}: pattern {source.pattern!r} is no regular expression ({error})") from None
        if not pattern.groupindex:
            raise DataError(
                f"{where}: pattern {source.pattern!r} names no column", hint="named groups are the columns: '(?P<label>\\w+) (?P<text>.*)'"
            )
    if pattern is not None and (source.header or source.delimiter):
        raise DataError(f"{where}: a pattern takes lines apart by itself; leave header and delimiter out")
    header = tuple(source.header) if source.header else None
    if header and (len(set(header)) < len(header) or not all(header)):
        raise DataError(f"{where}: header must name each column once, found {', '.join(map(repr, header))}")
    return Reading(header, source.delimiter, encoding, pattern)


def _folder(folder: Path, shown: str, notes: list[str]) -> list[tuple[Path, str]]:
    """The data files below a folder, sorted by path; text files count only where there is nothing else."""
    inside = sorted(
        path for path in folder.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    known = [path for path in inside if kind_of(path) is not None]
    chosen = [path for path in known if kind_of(path) != ".txt"] or known
    if not chosen:
        raise DataError(f"{shown}: the folder holds no data file; known are {', '.join(SUFFIXES)}, each also as .gz")
    left = [str(path.relative_to(folder)) for path in inside if path not in set(chosen)]
    if left:
        notes.append(f"{shown}: left out {len(left)} of {len(inside)} files of the folder that hold no rows: {', '.join(left[:5])}")
    return [(path, f"{shown.rstrip('/')}/{path.relative_to(folder).as_posix()}") for path in chosen]


def _looks_local(source: SourceSection) -> bool:
    path, described = source.path, source.header or source.delimiter or source.pattern
    return bool(described) or kind_of(Path(path)) is not None or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path)


def _missing(path: str, base_dir: Path) -> DataError:
    wanted = Path(path).expanduser()
    places = [Path.cwd() / wanted] if wanted.is_absolute() or base_dir.resolve() == Path.cwd() else [Path.cwd() / wanted, base_dir / wanted]
    near = None
    for place in places:
        if place.parent.is_dir():
            near = near or nearest(wanted.name, [entry.name for entry in place.parent.iterdir()])
    where = " or ".join(str(place.parent) for place in places)
    return DataError(
        f"{path}: there is no such file or folder in {where}" + (f"; did you mean {near!r}?" if near else ""),
        hint="a relative path is looked up in the working directory, then in the recipe's folder",
    )


def _hub(source: SourceSection, base_dir: Path, role: Role, streaming: bool) -> HubSource:
    import datasets  # type: ignore[import-untyped, unused-ignore]

    wanted = [source.split] if source.split else (["train"] if role == "train" else ["test", "validation"])
    settings: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        loaded: Any = datasets.load_dataset(source.path, source.name, revision=source.revision, **settings)
    except Exception as error:
        # The library raises its own, fsspec's, httpx's and pyarrow's errors here.
        raise DataError(
            f"{source.path}: no such file or folder, and no hub dataset of this name could be had ({_first_line(error)})",
            hint=_missing(source.path, base_dir).message + "; or the hub cannot be reached from here",
        ) from error
    split = next((name for name in wanted if name in loaded), None)
    if split is None:
        raise DataError(
            f"{source.path}: no split {' or '.join(map(repr, wanted))}; it has {', '.join(map(repr, loaded))}",
            hint="name one: dataset.train[].split",
        )
    table = loaded[split]
    label = f"{source.path}@{source.revision or 'main'}"
    pinned = f"{source.path}:{source.name}:{split}@{source.revision}" if _COMMIT.fullmatch(source.revision or "") else None
    if streaming:
        return HubSource(label, f"{source.path}/{split}", table, None, pinned)
    return HubSource(label, f"{source.path}/{split}", table, int(table.data.nbytes), str(table._fingerprint))
