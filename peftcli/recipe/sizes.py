"""Sizes of memory as people write them."""

from __future__ import annotations

import re

# What a recipe may say.
SIZE = r"^\s*[0-9]+([.][0-9]+)?\s*([MmGgTt][Ii]?[Bb])\s*$"
_UNITS = {"mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> int:
    """Bytes of ``24GB`` (24e9), ``512 MiB`` and the like.

    Raises:
        ValueError: it is no size above zero.
    """
    found = re.fullmatch(SIZE, text)
    value = 0.0 if found is None else float(text.strip()[: -len(found[2])]) * _UNITS[found[2].lower()]
    if value < 1:
        raise ValueError(f"{text!r} is no size")
    return int(value)
