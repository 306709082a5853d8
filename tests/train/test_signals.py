"""Signals and several processes: none is lost, and none is taken for a second one."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from peftcli.train.signals import StopRequest


class Processes:
    """Stands in for the accelerator of one of two processes."""

    num_processes = 2
    device = torch.device("cpu")


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def exchange(monkeypatch: pytest.MonkeyPatch, other: int, during: int = 0) -> None:
    """The next exchange finds ``other`` in the second process; ``during`` arrives here meanwhile."""

    def all_reduce(flag: torch.Tensor, op: Any) -> None:
        if during:
            os.kill(os.getpid(), during)
        flag.fill_(max(int(flag), other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)


def test_a_signal_during_the_exchange_is_not_lost(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        exchange(monkeypatch, 0, during=signal.SIGINT)
        assert not stop.requested(Processes()), "the other process does not know of it yet, so both go on"  # type: ignore[arg-type]
        exchange(monkeypatch, 0)
        assert stop.requested(Processes())  # type: ignore[arg-type]
        assert stop.signal == signal.SIGINT
    assert exits == []


def test_the_launchers_copy_of_a_signal_is_no_second_one(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        exchange(monkeypatch, signal.SIGTERM)
        assert stop.requested(Processes())  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits == [], "the checkpoint is being written; only a second signal to this process leaves at once"
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits == [128 + signal.SIGTERM]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
