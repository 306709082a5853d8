"""Delta-LoRA: LoRA that moves the frozen weight too, by the change of the product of its factors
(Zi et al., https://arxiv.org/abs/2309.02411).

After K steps every step adds ``lambda (alpha / r) (B' A' - B A)`` to the weight. With a constant lambda and no dropout these
updates telescope: the weight is ``W0 + lambda (alpha / r) (B A - BK AK)``, with AK and BK the factors before the first of them.
So one snapshot of the factors stands for the moved weight: the base stays untouched, may be quantized, and the result is an
ordinary LoRA of twice the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcli.methods.base import Context, Tick
from peftcli.methods.kinds import AdapterLayer
from peftcli.methods.lora import Lora, LoraConfig
from peftcli.methods.lora_layers import LoraLayer, add_low_rank


class DeltaLoraConfig(LoraConfig):
    """LoRA's options and two more."""

    name: Literal["delta_lora"] = Field("delta_lora", description="`delta_lora`")  # type: ignore[assignment]
    delta_ratio: float = Field(0.5, gt=0.0, description="Lambda: how far the weight follows the product of the factors.")
    start_ratio: float = Field(0.1, ge=0.0, lt=1.0, description="Share of the steps before the weight begins to move (K steps).")

    @model_validator(mode="after")
    def _telescopes(self) -> Self:
        if self.dropout > 0.0:
            raise ValueError("delta_lora takes no dropout: the weight would follow a product that no forward pass computed; remove dropout")
        if self.use_dora or self.init_lora_weights not in ("default", "gaussian"):
            raise ValueError("delta_lora starts as plain LoRA does; remove use_dora and init_lora_weights, or choose lora")
        return self


class DeltaLoraLayer(LoraLayer):
    """``(W + lambda s (B A - BK AK)) x + s B A x``; the first term is a constant in the gradients of A and B.

    Buffers ``start_A`` and ``start_B`` (AK, BK) come into being with the weight's first update.
    """

    start_A: Tensor | None  # noqa: N815 - like lora_A
    start_B: Tensor | None  # noqa: N815

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base, rank, scaling, dropout, generator)
        self.ratio = 0.0
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def take_snapshot(self) -> None:
        """The weight begins to move: remember the factors as they are."""
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.to_file(self.lora_A, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.start_A is None or not torch.is_grad_enabled():
            return super().forward(x)
        # The same product in two parts, because A and B get the gradient of the second one alone.
        result: Tensor = self.base(x)
        moved = self.lora_A.detach(), self.lora_B.detach() * self.ratio
        narrow, wide = torch.cat([moved[0], self.start_A]), torch.cat([moved[1], self._taken()], dim=1)
        return add_low_rank(add_low_rank(result, x, narrow, wide, self.scaling), x, self.lora_A, self.lora_B, self.scaling)

    def _taken(self) -> Tensor:
        assert self.start_B is not None
        return self.start_B * -self.ratio

    def to_file(self, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        if self.start_A is None:
            return narrow, wide
        return torch.cat([narrow, self.start_A.to(narrow)]), torch.cat([wide * (1.0 + self.ratio), self._taken().to(wide)], dim=1)

    def from_file(self, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        if self.start_A is None:
            return narrow, wide
        # The factor 1 + lambda cannot be divided out to the last bit; where the file is what our own values give, those
        # are what it holds.
        ours = self.lora_A.detach().to(narrow), self.lora_B.detach().to(wide)
        if all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(self.to_file(*ours), (narrow, wide), strict=True)):
            return ours[0].clone(), ours[1].clone()
        return narrow, wide


class DeltaLora(Lora):
    """LoRA whose frozen weight follows the factors."""

    Config = DeltaLoraConfig
    plain = DeltaLoraLayer
    paper = "https://arxiv.org/abs/2309.02411"
    summary = "LoRA that also moves the frozen weight, by the change of its factors' product."
    solves = "Uses the frozen weights as well, without gradients or optimizer state for them."
    costs = "No dropout; the final change has twice the rank, and steps compute it."
    choose = "LoRA at a small rank falls short and the memory of a larger one is missing."

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        layer = super().make_layer(name, base, ctx)
        if isinstance(layer, DeltaLoraLayer):
            layer.ratio = self.config.delta_ratio  # type: ignore[attr-defined]
        return layer

    def before_step(self, model: nn.Module, tick: Tick) -> None:
        first = math.floor(self.config.start_ratio * tick.total_steps) + 1  # type: ignore[attr-defined]
        for layer in self.layers.values():
            if tick.step == first and isinstance(layer, DeltaLoraLayer):
                layer.take_snapshot()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for layer in self.layers.values():
            if isinstance(layer, DeltaLoraLayer):
                layer.start_A = layer.start_B = None
        super().load_state(state)
