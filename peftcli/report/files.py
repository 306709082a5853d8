"""Files that are either the old one or the new one, never half of it; and their hashes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from peftcli.errors import CheckpointError


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` aside in the same folder, flush it to the disk and put it in the place of ``path``.

    Raises:
        CheckpointError: the file cannot be written; what stood there before is untouched.
    """
    aside: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".part")
        # Lone surrogates (damaged text in a data file) have no UTF-8; a report must still come out.
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
        aside = None
        # Makes the rename itself durable, where the system lets folders be opened.
        with suppress(PermissionError, IsADirectoryError):
            sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}", hint="free some space or choose another output_dir"
        ) from error
    finally:
        if aside is not None:
            with suppress(OSError):
                os.unlink(aside)


def _umask() -> int:
    """The process's file mode mask; reading it means setting it for a moment."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush a file's or folder's bytes to the disk.

    Raises:
        OSError: the disk refuses it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, paths: Iterable[Path | str]) -> dict[str, str]:
    """Hash every file of ``paths``; a folder stands for all files below it.

    Args:
        folder: the run's folder, which the keys are relative to.
        paths: relative to ``folder``, or absolute below it.

    Returns:
        Relative path with ``/`` to SHA-256, sorted by path.

    Raises:
        CheckpointError: a path is missing, unreadable or outside ``folder``.
    """
    root = folder.resolve()
    hashes: dict[str, str] = {}
    for path in paths:
        full = (root / path).resolve()
        if not full.is_relative_to(root):
            raise CheckpointError(f"{path} lies outside the run's folder {folder}")
        found = sorted(item for item in full.rglob("*") if item.is_file()) if full.is_dir() else [full]
        for item in found:
            try:
                hashes[item.relative_to(root).as_posix()] = hash_file(item)
            except OSError as error:
                raise CheckpointError(f"cannot read {item} to hash it: {error.strerror or error}") from error
    return dict(sorted(hashes.items()))
