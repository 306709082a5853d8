"""The layers of DoRA (Liu et al., https://arxiv.org/abs/2402.09353): the updated weight keeps its directions and gets trained lengths."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.methods.kinds import features
from peftcli.methods.lora_layers import LoraEmbedding, LoraLayer, ShiftedLoraLayer, weight_of


class DoraLayer(LoraLayer):
    """``m * (W + scaling * B A) / ||W + scaling * B A||``, row by row.

    Parameter ``lora_magnitude_vector`` [out] is m, float32; it starts as the rows' lengths. The norm is a constant in the
    gradient (section 4.3 of the paper).
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base, rank, scaling, dropout, generator)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(features(base)[1]))

    def started(self) -> None:
        self.lora_magnitude_vector.data = self._lengths(weight_of(self.base)).float()

    @torch.no_grad()
    def _lengths(self, weight: Tensor) -> Tensor:
        """[out] lengths of the updated weight's rows, at least in float32."""
        base = weight if weight.dtype == torch.float64 else weight.float()
        narrow, wide = self.factors()
        lengths: Tensor = torch.linalg.vector_norm(base + self.scaling * (wide.to(base) @ narrow.to(base)), dim=1)
        return lengths

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        dropped = self.dropout(x)
        # Where dropout acts, it acts on the whole of the rescaled product.
        plain = result if dropped is x else cast(Tensor, self.base(dropped))
        bias = self.bias
        plain = plain if bias is None else plain - bias.to(plain.dtype)
        scale = self.lora_magnitude_vector / self._lengths(weight_of(self.base))
        narrow, wide = self.factors()
        change = F.linear(F.linear(dropped, narrow.to(x.dtype)), wide.to(x.dtype)) * self.scaling
        return result + (scale - 1.0).to(plain.dtype) * plain + scale.to(change.dtype) * change

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.lora_magnitude_vector.to(weight) / self._lengths(weight)
        return scale.unsqueeze(1) * super().fold(weight, None)[0], bias


class ShiftedDoraLayer(ShiftedLoraLayer, DoraLayer):
    """DoRA whose factors start away from zero (PiSSA, OLoRA): the update is ``scaling * (B A - B0 A0)``."""


class DoraEmbedding(LoraEmbedding):
    """DoRA of an embedding [vocabulary, width]. As in PEFT, a length belongs to each column, over the whole vocabulary.

    Parameter ``lora_magnitude_vector`` [width], float32; it starts as the columns' lengths.
    """

    def __init__(self, base: nn.Embedding, rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__(base, rank, scaling, generator)
        self.lora_magnitude_vector = nn.Parameter(self._lengths(base.weight.detach()).float())

    @torch.no_grad()
    def _lengths(self, weight: Tensor) -> Tensor:
        """[width] lengths of the updated embedding's columns, at least in float32."""
        base = weight if weight.dtype == torch.float64 else weight.float()
        lengths: Tensor = torch.linalg.vector_norm(super().fold(base, None)[0], dim=0)
        return lengths

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.base(ids)
        scale = self.lora_magnitude_vector / self._lengths(self.weight.detach())
        return (scale * result + scale * self.change(ids)).to(result.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().fold(weight, None)[0] * (self.lora_magnitude_vector.to(weight) / self._lengths(weight)), bias
