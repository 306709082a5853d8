"""What a step says about itself: its loss, its gradient's norm, further parts of the loss.

Reading a number of a GPU waits for all work that is queued there. So nobody reads a step's figures before the next step's work is queued:
by then they have long arrived. The optimizer is told on the device to take no step on what is not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Told:
    """The figures of one step.

    Attributes:
        loss, norm: this process's summed loss and the gradient's norm.
        total: the loss summed over all processes, and ``parts`` of it.
    """

    loss: float
    norm: float
    total: float
    parts: dict[str, float]


class Figures:
    """The figures of step ``step`` on their way to the host.

    Args:
        rows: of the step, for messages. ``units``: of all processes that carry loss.
        loss, norm, total: scalars on the device, see :class:`Told`; ``parts``: [names].
    """

    def __init__(
        self,
        step: int,
        rows: Sequence[int],
        units: int,
        loss: Tensor,
        norm: Tensor,
        total: Tensor,
        names: Sequence[str],
        parts: Tensor | None,
    ) -> None:
        self.step, self.rows, self.units, self._names = step, rows, units, tuple(names)
        values = torch.stack([loss.double(), norm.double().to(loss.device), total.double()])
        values = values if parts is None else torch.cat([values, parts.double()])
        self.broken = ~(torch.isfinite(values[0]) & torch.isfinite(values[1]))
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        self._values = values.to("cpu", non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def told(self) -> Told:
        """The figures, waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm, total, *parts = self._values.tolist()
        return Told(loss, norm, total, dict(zip(self._names, parts, strict=True)))


def defers(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the figures of a step may be read after it: the optimizer runs on a GPU and takes ``found_inf``, as the fused AdamW does."""
    return device.type == "cuda" and isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))
