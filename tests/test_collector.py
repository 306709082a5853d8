"""The search for reference cycles, put off while a program starts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from peftcli import collector


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Whatever a test does, the search is on behind it."""
    assert gc.isenabled()
    yield
    gc.enable()


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_searched_until_the_end_and_nothing_is_lost() -> None:
    searches: list[str] = []

    def note(phase: str, _info: dict[str, int]) -> None:
        searches.append(phase)

    gc.callbacks.append(note)
    try:
        with collector.paused():
            left = weakref.ref(Node())
            kept = [[] for _ in range(20 * gc.get_threshold()[0])]  # type: ignore[var-annotated]
            assert not searches
        assert gc.isenabled()
        assert kept
        assert left() is not None
        gc.collect()
        assert left() is None, "a cycle made meanwhile is found later"
    finally:
        gc.callbacks.remove(note)


def test_the_search_goes_on_after_an_error() -> None:
    with pytest.raises(ValueError, match="no"), collector.paused():
        raise ValueError("no")
    assert gc.isenabled()


def test_who_has_turned_it_off_finds_it_off() -> None:
    gc.disable()
    with collector.paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_what_others_have_put_aside_stays_there() -> None:
    gc.freeze()
    try:
        aside = gc.get_freeze_count()
        with collector.paused():
            pass
        assert gc.get_freeze_count() >= aside - 1000
    finally:
        gc.unfreeze()


def test_pauses_lie_inside_each_other() -> None:
    with collector.paused():
        with collector.paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
