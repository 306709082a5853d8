"""Python's search for reference cycles, put off while a program starts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["paused"]


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No search while this lasts. Importing torch and transformers makes a million objects that all stay; searching again and again among
    them takes a fifth of the time until the first step."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            # All at once among the old objects, where the next search of the young ones does not look.
            gc.freeze()
            gc.unfreeze()
        gc.enable()
