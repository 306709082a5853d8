"""VeRA: one frozen pair of random matrices for all layers, and two trained vectors for each,
``W + diag(b) B diag(d) A`` (Kopiczko et al., https://arxiv.org/abs/2310.11454).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftcli.kernels.elementwise import scaled
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import module_fields, module_options, refuse
from peftcli.methods.kinds import AdapterLayer, LayerMethod, features, trainable_state


class VeraConfig(MethodConfig):
    """Options of VeRA."""

    name: Literal["vera"] = Field("vera", description="`vera`")
    rank: int = Field(256, ge=1, le=16384, description="Width r of the two shared matrices; a layer trains r + out numbers.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the input of the adapter.")
    d_initial: float = Field(0.1, gt=0.0, description="Initial value of the vector d.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get an adapter, as for lora.")
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the adapter.")


@dataclass
class Projections:
    """The shared matrices A [rank, widest in] and B [widest out, rank], float32 and frozen. A layer uses their corner."""

    a: Tensor
    b: Tensor
    _corners: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def corner(self, width_in: int, width_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [rank, width_in] and B [width_out, rank] in ``dtype``, made once for all layers of these widths."""
        return self._corner("a", self.a, self.a[:, :width_in], dtype), self._corner("b", self.b, self.b[:width_out], dtype)

    def _corner(self, name: str, whole: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
        # Reading a file changes the numbers in place, which their version tells.
        key = (name, *part.shape, dtype, whole.device, whole._version)
        if key not in self._corners:
            self._corners[key] = part.to(dtype).contiguous()
        return self._corners[key]


class VeraLayer(AdapterLayer):
    """``base(x) + b * (B (d * (A dropout(x))))``.

    Parameters ``vera_lambda_b`` [out] starts at zero, so the layer starts as the base, and ``vera_lambda_d`` [rank] at
    ``d_initial``.
    """

    def __init__(self, base: nn.Module, shared: Projections, d_initial: float, dropout: float) -> None:
        super().__init__(base)
        self.width_in, width_out = features(base)
        self.shared = shared
        self.vera_lambda_b = nn.Parameter(torch.zeros(width_out))
        self.vera_lambda_d = nn.Parameter(torch.full((len(shared.a),), d_initial))
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        narrow, wide = self.shared.corner(self.width_in, len(self.vera_lambda_b), dtype)
        low = scaled(F.linear(self.dropout(x), narrow), self.vera_lambda_d)
        return result + scaled(F.linear(low, wide), self.vera_lambda_b).to(result.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        narrow, wide = (x.to(weight) for x in (self.shared.a[:, : self.width_in], self.shared.b[: len(self.vera_lambda_b)]))
        return weight + self.vera_lambda_b.to(weight).unsqueeze(1) * (wide * self.vera_lambda_d.to(weight)) @ narrow, bias


class Vera(LayerMethod[VeraConfig]):
    """Two trained vectors beside each frozen linear layer."""

    Config: ClassVar[type[MethodConfig]] = VeraConfig
    paper = "https://arxiv.org/abs/2310.11454"
    summary = "Two trained vectors for each layer around one frozen pair of random matrices that all share."
    solves = "Ten times fewer trained numbers than LoRA at the same width; many adapters fit in memory."
    costs = "More compute than LoRA, because the random matrices must be wide; wants a high learning rate."
    choose = "Very many adapters at a time (one for each user, say), where the size of a file counts most."
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 4e-3}
    peft = PeftFormat(
        "VERA",
        {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"},
        whole={"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"},
    )

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        bases = [model.get_submodule(name) for name in self.target_names(model)]
        sizes = [features(base) for base in bases]
        rank, widest_in, widest_out = self.config.rank, max(size[0] for size in sizes), max(size[1] for size in sizes)
        device = next(bases[0].parameters()).device
        self.shared = Projections(_uniform(rank, widest_in, ctx, "vera_A").to(device), _uniform(widest_out, rank, ctx, "vera_B").to(device))
        return super().apply(model, ctx)

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        return VeraLayer(base, self.shared, self.config.d_initial, self.config.dropout)

    def state(self) -> dict[str, Tensor]:
        return {"vera_A": self.shared.a.cpu().clone(), "vera_B": self.shared.b.cpu().clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.shared.a.copy_(state["vera_A"])
        self.shared.b.copy_(state["vera_B"])

    def to_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, **self.state()}

    def file_targets(self, model: nn.Module) -> dict[str, Tensor]:
        return {**trainable_state(model), "vera_A": self.shared.a, "vera_B": self.shared.b}

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options = self.config
        layers = [layer for layer in model.modules() if isinstance(layer, VeraLayer)]
        return {
            **module_fields(model, VeraLayer, options),
            "r": options.rank,
            "vera_dropout": options.dropout,
            "d_initial": options.d_initial,
            "save_projection": True,
            "projection_prng_key": 0,
            "fan_in_fan_out": any(type(layer.base).__name__ == "Conv1D" for layer in layers),
            "bias": "none",
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        # Without the projections, only PEFT's own random numbers would do.
        refuse(fields, {"bias": ("none", None), "save_projection": (True,)})
        return {
            "rank": fields.get("r", 256),
            "dropout": fields.get("vera_dropout", 0.0),
            "d_initial": fields.get("d_initial", 0.1),
            **module_options(fields),
        }


def _uniform(rows: int, columns: int, ctx: Context, name: str) -> Tensor:
    """Kaiming uniform with the gain of a ReLU, as in the paper's code and PEFT's."""
    bound = math.sqrt(6.0 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=ctx.generator(name))
