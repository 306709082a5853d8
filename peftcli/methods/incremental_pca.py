"""Principal directions of vectors that come batch by batch (incremental PCA; Ross et al., 2008)."""

from __future__ import annotations

import torch
from torch import Tensor

from peftcli.methods.lora_init import thin_svd


class Directions:
    """The first directions, their weight, and whether they still turn.

    Args:
        count: of directions.
        tau: a direction is settled when a batch has turned it no further than to this cosine.

    Attributes:
        components: [count, width] unit rows, most important first, signs fixed; ``None`` before the first ``count`` vectors.
        values: [count] singular values. ``settled``: [count] bool, on the CPU.
    """

    def __init__(self, count: int, tau: float, generator: torch.Generator) -> None:
        self.count, self.tau, self.generator = count, tau, generator
        self.components: Tensor | None = None
        self.values = torch.zeros(count)
        self.settled = torch.zeros(count, dtype=torch.bool)
        self._waiting: list[Tensor] = []
        self._seen, self._mean, self._scatter = 0, torch.zeros(()), torch.zeros(())

    @property
    def ratios(self) -> Tensor:
        """[count] shares of the vectors' variance along each direction."""
        return (self.values**2 / self._scatter).float().cpu()

    def update(self, x: Tensor) -> None:
        """Take vectors [n, width] into account; they wait until there are ``count`` of them."""
        self._waiting.append(x.float())
        if sum(map(len, self._waiting)) < self.count:
            return
        x = torch.cat(self._waiting)
        self._waiting = []
        new, mean = len(x), x.mean(0, dtype=torch.float64)
        matrix = x - mean.to(x.dtype)
        scatter = matrix.double().square().sum()
        total = self._seen + new
        before = self.components
        if before is None:
            self._mean, self._scatter = mean, scatter
        else:
            apart = self._mean - mean
            shift = (self._seen / total * new) ** 0.5 * apart
            matrix = torch.cat([self.values.unsqueeze(1) * before, matrix, shift.to(x.dtype).unsqueeze(0)])
            self._scatter = self._scatter + scatter + shift.square().sum()
            self._mean = mean + self._seen / total * apart
        self._seen = total
        # As PEFT does: twice as many directions as are kept, four iterations.
        if min(matrix.shape) > 2 * self.count:
            _, values, right = thin_svd(matrix, 2 * self.count, 4, self.generator)
        else:
            _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = right[: self.count]
        largest = found.gather(1, found.abs().argmax(1, keepdim=True))
        self.components, self.values = found * torch.where(largest < 0, -1.0, 1.0), values[: self.count]
        if before is not None:
            self.settled = ((before * self.components).sum(1) >= self.tau).cpu()
