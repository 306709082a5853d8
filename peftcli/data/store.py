"""Tokenized rows on disk: a folder of flat arrays, named by its content, written once and read a row at a time.

``ids.bin`` and ``supervised.bin`` hold the tokens of all pieces end to end, ``pieces.bin`` and ``rows.bin`` a record for
each piece and row, ``manifest.json`` the sizes and checksums of the others. A folder appears under its name only once it
is whole; one that does not match its checksums is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from peftcli.data.faults import Skipped
from peftcli.data.tokenize import Ids, Mask
from peftcli.errors import DataError

# key, input: hashes of the whole content and of what is asked (0: nothing is). number: line or index in file number ``file``.
# pieces: how many are kept; lost: how many had no supervised token.
ROW = np.dtype([("key", "<u8"), ("input", "<u8"), ("number", "<i8"), ("file", "<u2"), ("state", "u1"), ("pieces", "<i4"), ("lost", "<i4")])
# end: the token that ends an answer, -1 where the piece's end was cut off.
PIECE = np.dtype([("tokens", "<i4"), ("supervised", "<i4"), ("end", "<i4"), ("flags", "u1")])
KEPT, EMPTY, TOO_LONG, FAULTY = range(4)
HAS_START, HAS_END, TRUNCATED, ENDED, BOS = 1, 2, 4, 8, 16

_FORMAT = 1
_MANIFEST = "manifest.json"
_ABANDONED = 24 * 3600.0
_BLOCK = 1 << 22
Records = npt.NDArray[Any]


@dataclass(frozen=True)
class Block:
    """Some rows of a source, tokenized.

    Attributes:
        rows, pieces: records of the dtypes ``ROW`` and ``PIECE``.
        ids, supervised: of the kept pieces, end to end.
    """

    rows: Records
    pieces: Records
    ids: Ids
    supervised: Mask


class Writer:
    """Appends blocks to a folder's files, and keeps their checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {name: (folder / f"{name}.bin").open("wb") for name in ("rows", "pieces", "ids", "supervised")}
        self.sums = dict.fromkeys(self.files, 0)

    def append(self, block: Block) -> None:
        """Write one block behind the others."""
        for name, stream in self.files.items():
            data = np.ascontiguousarray(getattr(block, name)).tobytes()
            self.sums[name] = zlib.crc32(data, self.sums[name])
            stream.write(data)

    def abandon(self) -> None:
        """Close the files without finishing the folder."""
        for stream in self.files.values():
            stream.close()

    def close(self, facts: dict[str, Any]) -> None:
        """Finish the folder; ``facts`` are kept in the manifest."""
        sizes = {}
        for name, file in self.files.items():
            sizes[name] = file.tell()
            file.flush()
            os.fsync(file.fileno())
            file.close()
        body = json.dumps({"format": _FORMAT, "sizes": sizes, "sums": self.sums, "facts": facts}, ensure_ascii=True)
        with (self.folder / _MANIFEST).open("w", encoding="ascii") as stream:
            stream.write(f"{zlib.crc32(body.encode())}\n{body}\n")
            stream.flush()
            os.fsync(stream.fileno())


class Store:
    """A finished folder of tokenized rows.

    Raises:
        ValueError: something is missing or does not match its checksum.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        total, body = (folder / _MANIFEST).read_text("ascii").split("\n", 1)
        if zlib.crc32(body.rstrip("\n").encode()) != int(total):
            raise ValueError(_MANIFEST)
        manifest = json.loads(body)
        for name, size in manifest["sizes"].items():
            if (folder / f"{name}.bin").stat().st_size != size or _sum(folder / f"{name}.bin") != manifest["sums"][name]:
                raise ValueError(name)
        self.facts: dict[str, Any] = manifest["facts"]
        self.rows = self._map("rows", ROW)
        self.pieces = self._map("pieces", PIECE)
        self._ids, self._supervised = self._map("ids", np.dtype("<i4")), self._map("supervised", np.dtype("?"))
        self._ends = np.cumsum(self.pieces["tokens"], dtype=np.int64)

    def _map(self, name: str, dtype: np.dtype[Any]) -> Records:
        path = self.folder / f"{name}.bin"
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def ids(self, piece: int) -> Ids:
        """Token ids of a piece, a copy."""
        end = int(self._ends[piece])
        return np.array(self._ids[end - int(self.pieces["tokens"][piece]) : end])

    def supervised(self, piece: int) -> Mask:
        """Which of a piece's tokens carry loss, a copy."""
        end = int(self._ends[piece])
        return np.array(self._supervised[end - int(self.pieces["tokens"][piece]) : end])

    def origin(self, row: int) -> str:
        """The place of a row."""
        record = self.rows[row]
        before, behind = self.facts["origins"][int(record["file"])]
        return f"{before}{int(record['number'])}{behind}" if behind is not None else str(before)

    @property
    def skipped(self) -> list[Skipped]:
        """Faulty rows that were left out."""
        return [Skipped(*pair) for pair in self.facts["skipped"]]


def _sum(path: Path) -> int:
    total = 0
    with path.open("rb") as stream:
        while data := stream.read(_BLOCK):
            total = zlib.crc32(data, total)
    return total


def cache_folder() -> Path:
    """Where tokenized rows are kept: ``$XDG_CACHE_HOME/peftcli/tokens``, by default below ``~/.cache``. It may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcli" / "tokens"


def open_or_build(key: str, build: Callable[[Writer], dict[str, Any]]) -> tuple[Store, bool]:
    """The store named ``key``, and whether it was there already. One process builds, others wait for it.

    Args:
        build: writes the blocks and gives the facts of the manifest.

    Raises:
        DataError: the cache folder cannot be written.
    """
    home = cache_folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{key}.lock"):
            folder = home / key
            try:
                return Store(folder), True
            except (OSError, ValueError, KeyError, TypeError):
                shutil.rmtree(folder, ignore_errors=True)
            _sweep(home)
            made = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
            writer = Writer(made)
            try:
                writer.close(build(writer))
                made.rename(folder)
            except BaseException:
                writer.abandon()
                shutil.rmtree(made, ignore_errors=True)
                raise
            return Store(folder), False
    except OSError as error:
        raise DataError(
            f"the cache of tokenized rows in {home} cannot be written ({error.strerror or error})",
            hint="choose another place with XDG_CACHE_HOME, or keep the rows in memory: dataset.streaming: false",
        ) from error


def _sweep(home: Path) -> None:
    """Remove what a killed process left behind."""
    for entry in home.glob(".new-*"):
        if time.time() - entry.stat().st_mtime > _ABANDONED:
            shutil.rmtree(entry, ignore_errors=True)
