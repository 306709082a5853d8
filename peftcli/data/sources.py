"""Where rows come from: a file, a folder of files, or a hub dataset."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from peftcli.data.faults import Faults
from peftcli.data.readers import SUFFIXES, Row, kind_of, read_file
from peftcli.errors import DataError, nearest
from peftcli.recipe.schema import SourceSection

__all__ = ["Row", "SourceRows", "find", "read_source"]

Role = Literal["train", "eval"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source and what was read for them.

    Attributes:
        rows: in the order of the files.
        files: (path as written in the recipe, sha256 of its bytes) of each file; a hub dataset has one entry
            ``id@revision`` with the sha256 of its rows as JSON.
        notes: what a user should know, such as files of a folder that were left out.
    """

    rows: list[Row]
    files: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)


def find(path: str, base_dir: Path) -> Path | None:
    """A file or folder by its path, looked up in the working directory and then in ``base_dir``; ``None`` if in neither."""
    wanted = Path(path).expanduser()
    return next((candidate for candidate in (wanted, base_dir / wanted) if candidate.exists()), None)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_source(source: SourceSection, *, base_dir: Path, role: Role, limit: int | None = None) -> SourceRows:
    """Every row of a source, up to the smaller of its own limit and ``limit``.

    Args:
        source: the recipe's source.
        base_dir: the recipe's folder; a relative path that is not below the working directory is looked up there.
        role: which split of a hub dataset is meant when the recipe names none.
        limit: stop after this many rows.

    Raises:
        DataError: a file that is missing, empty or faulty, with ``file:line`` of up to ten faults; a hub dataset that
            cannot be loaded.
    """
    limits = [value for value in (source.limit, limit) if value is not None]
    stop = min(limits) if limits else None
    found = find(source.path, base_dir)
    if found is None:
        if _looks_local(source.path):
            raise _missing(source.path, base_dir)
        return _hub(source, base_dir, role, stop)
    notes: list[str] = []
    files = [(found, source.path)] if found.is_file() else _folder(found, source.path, notes)
    faults = Faults()
    used: list[tuple[str, str]] = []

    def rows() -> Iterator[Row]:
        for path, shown in files:
            used.append((shown, sha256_of(path)))
            yield from read_file(path, shown, faults)

    taken = list(islice(rows(), stop))
    faults.raise_if_any()
    return SourceRows(taken, used, notes)


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


def _looks_local(path: str) -> bool:
    return kind_of(Path(path)) is not None or path.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(path)


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


def _hub(source: SourceSection, base_dir: Path, role: Role, stop: int | None) -> SourceRows:
    import datasets  # type: ignore[import-untyped, unused-ignore]

    wanted = [source.split] if source.split else (["train"] if role == "train" else ["test", "validation"])
    try:
        loaded: Any = datasets.load_dataset(source.path, source.name, revision=source.revision)
    except Exception as error:
        # The library raises its own, fsspec's, httpx's and pyarrow's errors here.
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{source.path}: no such file or folder, and no hub dataset of this name could be had ({type(error).__name__}: {first[:160]})",
            hint=_missing(source.path, base_dir).message + "; or the hub cannot be reached from here",
        ) from error
    split = next((name for name in wanted if name in loaded), None)
    if split is None:
        raise DataError(
            f"{source.path}: no split {' or '.join(map(repr, wanted))}; it has {', '.join(map(repr, loaded))}",
            hint="name one: dataset.train[].split",
        )
    table = loaded[split]
    if stop is not None:
        table = table.select(range(min(stop, len(table))))
    if not len(table):
        raise DataError(f"{source.path}: split {split!r} has no rows")
    label = f"{source.path}@{source.revision or 'main'}"
    rows = [Row(dict(values), f"{source.path}/{split}[{index}]") for index, values in enumerate(table)]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=str).encode())
    return SourceRows(rows, [(label, digest.hexdigest())])
