"""Stop on SIGINT and SIGTERM without losing work: the first asks for a checkpoint, the second stops at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator


class Interrupted(BaseException):
    """A signal ended the run after a checkpoint was written.

    Attributes:
        exit_code: 128 + the signal's number, as shells count: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted by signal {number}; checkpoint written: {checkpoint}")
        self.exit_code = 128 + number
        self.checkpoint = checkpoint


class StopRequest:
    """Catches SIGINT and SIGTERM while a run is on.

    Attributes:
        signal: the number that all processes agreed to stop for, 0 while there is none.
    """

    def __init__(self) -> None:
        self.signal = 0
        # What this process itself was sent. Kept apart: the others' signal may become known here before the launcher's own
        # copy of it arrives, which then is the first one, not a second.
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            # A checkpoint in the making has no name yet: leaving now cannot tear one.
            os._exit(128 + number)
        self._received = number

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        asked = self._received
        if accelerator.num_processes > 1:
            flag = torch.tensor(asked, device=accelerator.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            # A signal that came during the exchange stays for the next one: the others do not know of it yet.
            asked = int(flag.item())
        self.signal = asked
        return asked != 0
