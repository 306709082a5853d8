"""Compiled arithmetic: for the CPU ``rows.c`` and ``attention.c``, built with the machine's own C compiler when they are first wanted, and
kept; for a GPU ``triton_rows.py``, where Triton is installed.

Nothing is compiled at installation and nothing depends on it: without a compiler, or with one that fails, :func:`library` is ``None`` and
PyTorch's operators do the work. The build takes about two seconds and goes to the user's cache folder under a name that is a hash of
all that it depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("rows.c", "attention.c"))
_VARIANTS = {torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT32"}
# The machine's own instructions; no exceptions and no errno, which keep loops from being vectorized. NaN and infinity keep their meaning.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c11", "-shared", "-fPIC")
_PATIENCE = 120.0  # seconds


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for tensors of ``dtype``, or ``None`` where there are none."""
    variant = _VARIANTS.get(dtype)
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if variant is None or compiler is None or platform.system() != "Linux":
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return ctypes.CDLL(str(_built(compiler, variant)))
    return None


@functools.cache
def build() -> str | None:
    """What the compiled arithmetic of this machine is: a hash of its source, its compiler and the instructions it was built for. ``None``
    where there is none. Results depend on it to the last bit."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    return None if compiler is None or library(torch.float32) is None else _key(compiler)


@functools.cache
def _key(compiler: str) -> str:
    texts = [source.read_text(encoding="utf-8") for source in _SOURCES]
    depends = [*texts, _output(compiler, "--version"), " ".join(_FLAGS), _instructions()]
    return hashlib.sha256("\0".join(depends).encode()).hexdigest()[:24]


def _built(compiler: str, variant: str) -> Path:
    """The shared library of one variant, made where there is none yet."""
    name = f"rows-{variant.lower()}-{_key(compiler)}.so"
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            place = folder / name
            if not place.exists():
                # Two processes may build at once: each its own file, and the last rename wins with the same bytes.
                with tempfile.TemporaryDirectory(dir=folder) as aside:
                    _output(compiler, *_FLAGS, f"-D{variant}", *map(str, _SOURCES), "-o", str(Path(aside) / name))
                    (Path(aside) / name).replace(place)
            return place
    raise OSError("no folder to build in")


def _folders() -> list[Path]:
    """Where a build may be kept: the user's cache, else a private temporary folder that lasts as long as this process."""
    folders = []
    with contextlib.suppress(RuntimeError):
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcli" / "kernels")
    return [*folders, Path(_temporary().name)]


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="peftcli-kernels-")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE)  # noqa: S603
    return done.stdout


def _instructions() -> str:
    """What ``-march=native`` stands for on this machine: a home folder may be shared by machines that differ."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions take these tensors: on one kind of device, of one dtype that there is a build for."""
    first = tensors[0]
    if first.dtype not in _VARIANTS or any((x.device.type, x.dtype) != (first.device.type, first.dtype) for x in tensors):
        return False
    return triton_runs() if first.device.type == "cuda" else first.device.type == "cpu" and library(first.dtype) is not None


@functools.cache
def has(name: str, dtype: torch.dtype) -> bool:
    """Whether the CPU's build for ``dtype`` has the function ``name``: some need instructions that not every machine has."""
    return library(dtype) is not None and hasattr(library(dtype), name)


@functools.cache
def triton_runs() -> bool:
    """Whether Triton can compile for a GPU here."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def call(name: str, like: Tensor, *arguments: Tensor | float | None) -> None:
    """Run the function ``name`` of the build for ``like.dtype``. Tensors must be contiguous where the function says so.

    Under fake tensors (memory estimates) nothing is run: the caller has made the results.
    """
    if isinstance(like, FakeTensor):
        return
    if like.device.type == "cuda":
        importlib.import_module("peftcli.kernels.triton_rows").FUNCTIONS[name](*arguments)
        return
    function = _function(like.dtype, name)
    values: list[Any] = []
    for value in arguments:
        if value is None or isinstance(value, Tensor):
            values.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        else:
            values.append(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value))
    function(*values, ctypes.c_int(torch.get_num_threads()))


def ask(name: str, dtype: torch.dtype, *numbers: int) -> int:
    """What the function ``name`` of the CPU's build for ``dtype`` answers to ``numbers``."""
    function: Any = getattr(library(dtype), name)
    function.restype = ctypes.c_long
    return int(function(*map(ctypes.c_long, numbers)))


@functools.cache
def _function(dtype: torch.dtype, name: str) -> Callable[..., None]:
    function: Any = getattr(library(dtype), name)
    function.restype = None
    return function  # type: ignore[no-any-return]
