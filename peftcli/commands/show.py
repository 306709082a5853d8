"""Small ways of printing that commands share."""

from __future__ import annotations

import json
import sys
from typing import Any

from peftcli.recipe.redact import redact

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(redact(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def share(value: float) -> str:
    """0.125 -> ``12.5 %``."""
    return f"{100 * value:.1f} %"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} {_UNITS[-1]}"
