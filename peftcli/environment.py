"""The machine and the libraries: what a run's bytes depend on, and how it is made repeatable."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import sys
from importlib import metadata

import numpy as np
import torch

import peftcli
from peftcli.kernels import native
from peftcli.report.schema import Environment

_PACKAGES = ("accelerate", "bitsandbytes", "safetensors", "tokenizers", "datasets", "peft")


def make_repeatable(seed: int, *, deterministic: bool, process: int = 0) -> None:
    """Seed every generator, and ask torch for deterministic kernels only.

    Args:
        process: added to torch's seed, so that processes draw different dropout masks.
    """
    random.seed(seed + process)
    np.random.seed((seed + process) % 2**32)
    torch.manual_seed(seed + process)
    if deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The same switch as use_deterministic_algorithms, without torch's compiler, whose import takes a second.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # Filling fresh memory guards against operators that read what they did not write; results do not depend on it, time does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def describe(device: torch.device, *, deterministic: bool) -> Environment:
    """The environment as the report states it."""
    versions = {name: _version(name) for name in _PACKAGES}
    cuda = device.type == "cuda"
    name, capability = (torch.cuda.get_device_name(device) if cuda else _cpu_name()), torch.backends.cpu.get_cpu_capability()
    facts = {
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "device": device.type,
        "device_name": name,
        "cpu_capability": capability,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "machine": platform.machine(),
        "kernels": native.build(),
        **versions,
    }
    fingerprint = hashlib.sha256(json.dumps({**facts, "deterministic": deterministic}, sort_keys=True).encode()).hexdigest()
    return Environment(
        peftcli=peftcli.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=torch.__version__,
        transformers=_version("transformers") or "",
        cuda=torch.version.cuda,
        device=device.type,
        device_name=name,
        cpu_capability=capability,
        kernels=native.build(),
        threads=torch.get_num_threads(),
        deterministic=deterministic,
        fingerprint=fingerprint,
        **versions,
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or sys.platform
