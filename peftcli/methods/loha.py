"""LoHa: an update that is the Hadamard (elementwise) product of two low-rank products, ``W + (alpha / r) (B1 A1) * (B2 A2)``.
Its rank reaches r squared (FedPara, https://arxiv.org/abs/2108.06098; LyCORIS, https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftcli.kernels import fast
from peftcli.kernels.frozen import working_dtype
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import from_pattern, module_fields, module_options, whole_number
from peftcli.methods.kinds import AdapterLayer, LayerMethod, features
from peftcli.methods.lora_layers import beside


class LohaConfig(MethodConfig):
    """Options of LoHa."""

    name: Literal["loha"] = Field("loha", description="`loha`")
    rank: int = Field(8, ge=1, le=16384, description="Rank r of each of the two products; the update's rank reaches r squared.")
    alpha: float = Field(8.0, gt=0.0, description="The update is scaled by alpha / rank.")
    rank_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of the update's output rows that rest in a training step.")
    module_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of the adapters that rest in a training step.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: `all-linear` (all but the output layer), a list of names, "
        "or a regular expression for the whole dotted name.",
    )
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="Another rank for modules whose name ends with, or matches, the key."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] = Field({}, description="Another alpha, likewise.")
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the adapter, such as `lm_head`.")


def uniform(rows: int, columns: int, generator: torch.Generator) -> nn.Parameter:
    """A float32 matrix with the initial values of a linear layer of ``columns`` inputs (Kaiming uniform, a = sqrt 5)."""
    bound = 1.0 / math.sqrt(columns)
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound, generator=generator))


class DeltaLayer(AdapterLayer):
    """``base(x) + delta x`` for an update [out, in] that is never stored.

    Args:
        base: a linear layer.
        scaling: of the update.
        rank_dropout, module_dropout: shares of rows, or of whole updates, that rest in a training step.
        rescale: make up for the rows that rest.
    """

    def __init__(self, base: nn.Module, scaling: float, rank_dropout: float, module_dropout: float, *, rescale: bool) -> None:
        super().__init__(base)
        self.scaling, self.rescale = scaling, rescale
        self.rank_dropout, self.module_dropout = rank_dropout, module_dropout

    def update(self, x: Tensor) -> Tensor:
        """``delta x``, [..., in] -> [..., out], in the dtype of ``x``."""
        raise NotImplementedError

    def delta(self, dtype: torch.dtype) -> Tensor:
        """The update itself, [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        change = self.update(x)
        if self.training:
            # A zero factor and not a branch: every process takes part in every gradient, and nothing waits for the device.
            if self.module_dropout > 0.0:
                change = change * (torch.rand(1, device=x.device) > self.module_dropout).to(change.dtype)
            if self.rank_dropout > 0.0:
                kept = (torch.rand(change.shape[-1], device=x.device) > self.rank_dropout).to(change.dtype)
                change = change * (kept / kept.mean().clamp(min=1.0 / len(kept)) if self.rescale else kept)
        return result + change.to(result.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(weight.dtype), bias


class _Hadamard(torch.autograd.Function):
    """``x ((B1 A1) * (B2 A2))' scale``. Only ``x`` and the factors are kept: the matrices [out, in] are computed again in the
    backward pass, so that memory grows as with LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, b1, a1, b2, a2)
        ctx.scale = scale
        return F.linear(x, ((b1 @ a1) * (b2 @ a2) * scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, b1, a1, b2, a2 = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        one, two = b1 @ a1, b2 @ a2
        grad_x = grad @ (one * two * ctx.scale).to(x.dtype) if ctx.needs_input_grad[0] else None
        change = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(b1.dtype) * ctx.scale
        to_one, to_two = change * two, change * one
        return grad_x, to_one @ a1.t(), b1.t() @ to_one, to_two @ a2.t(), b2.t() @ to_two, None


class LohaLayer(DeltaLayer):
    """Parameters, float32: ``hada_w1_a``, ``hada_w2_a`` [out, rank] and ``hada_w1_b``, ``hada_w2_b`` [rank, in]; the last one
    starts at zero, so the layer starts as the base (PEFT's choice; the paper's is He initialisation)."""

    def __init__(self, base: nn.Module, rank: int, scaling: float, options: LohaConfig, generator: torch.Generator) -> None:
        super().__init__(base, scaling, options.rank_dropout, options.module_dropout, rescale=True)
        width_in, width_out = features(base)
        self.hada_w1_a = uniform(width_out, rank, generator)
        self.hada_w1_b = uniform(rank, width_in, generator)
        self.hada_w2_a = uniform(width_out, rank, generator)
        self.hada_w2_b = nn.Parameter(torch.zeros(rank, width_in))

    def forward(self, x: Tensor) -> Tensor:
        # In float32 PEFT's order of operations is kept. Dropout works on the update's output, which is not formed apart below.
        rests = self.training and (self.rank_dropout > 0.0 or self.module_dropout > 0.0)
        half = working_dtype(x) in (torch.bfloat16, torch.float16)
        if half and not rests and self._pays and fast.take("the Hadamard product as one low-rank product"):
            return beside(self.base, x, x, *self._products(), self.scaling)
        return super().forward(x)

    @property
    def _pays(self) -> bool:
        """Whether two products of rank r squared are less work than one with the update at its full size."""
        (rank, width_in), width_out = self.hada_w1_b.shape, len(self.hada_w1_a)
        return bool(rank * rank * (width_in + width_out) < width_in * width_out)

    def _products(self) -> tuple[Tensor, Tensor]:
        """[rank * rank, in] and [out, rank * rank], whose product is (B1 A1) * (B2 A2): face-splitting products of the factors."""
        narrow = (self.hada_w1_b[:, None] * self.hada_w2_b[None]).flatten(0, 1)
        return narrow, (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)

    def update(self, x: Tensor) -> Tensor:
        change: Tensor = _Hadamard.apply(x, self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b, self.scaling)  # type: ignore[no-untyped-call]
        return change

    def delta(self, dtype: torch.dtype) -> Tensor:
        one = self.hada_w1_a.to(dtype) @ self.hada_w1_b.to(dtype)
        return one * (self.hada_w2_a.to(dtype) @ self.hada_w2_b.to(dtype)) * self.scaling


class Loha(LayerMethod[LohaConfig]):
    """Hadamard products of low-rank products beside frozen linear layers."""

    Config: ClassVar[type[MethodConfig]] = LohaConfig
    paper = "https://arxiv.org/abs/2108.06098"
    summary = "An update that is the elementwise product of two low-rank products."
    solves = "Lifts the ceiling of a low rank: with twice LoRA's numbers at the same r, the update's rank reaches r squared."
    costs = "More compute: the update of each layer is formed at its full size in every step."
    choose = "A low rank of LoRA is the limit and more parameters are not wanted; styles of image models are its home."
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    peft = PeftFormat("LOHA", {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"})

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        options = self.config
        rank = from_pattern(options.rank_pattern, name, options.rank)
        alpha = from_pattern(options.alpha_pattern, name, options.alpha)
        return LohaLayer(base, rank, alpha / rank, options, ctx.generator(name))

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        return {**module_fields(model, LohaLayer, self.config), **product_fields(self.config), "use_effective_conv2d": False}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**module_options(fields), **product_options(fields)}


def product_fields(options: Any) -> dict[str, Any]:
    """The fields that PEFT's LOHA and LOKR share."""
    return {
        "r": options.rank,
        "alpha": whole_number(options.alpha),
        "rank_dropout": options.rank_dropout,
        "module_dropout": options.module_dropout,
        "init_weights": True,
        "rank_pattern": dict(sorted(options.rank_pattern.items())),
        "alpha_pattern": {key: whole_number(value) for key, value in sorted(options.alpha_pattern.items())},
    }


def product_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`product_fields`."""
    return {
        "rank": fields.get("r", 8),
        "alpha": fields.get("alpha", 8),
        "rank_dropout": fields.get("rank_dropout", 0.0),
        "module_dropout": fields.get("module_dropout", 0.0),
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }
