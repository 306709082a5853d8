"""LoKr: an update that is the Kronecker product of a small and a larger block, ``W + (alpha / r) kron(C, B A)``; the blocks'
sizes are divisors of the layer's (LyCORIS, https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import from_pattern, module_fields, module_options
from peftcli.methods.kinds import AdapterLayer, LayerMethod, features
from peftcli.methods.loha import DeltaLayer, LohaConfig, product_fields, product_options, uniform


class LokrConfig(LohaConfig):
    """Options of LoKr."""

    name: Literal["lokr"] = Field("lokr", description="`lokr`")  # type: ignore[assignment]
    rank: int = Field(
        8, ge=1, le=16384, description="Rank r of a block that is wider than 2 r; narrower blocks are trained whole, without factors."
    )
    decompose_both: bool = Field(False, description="Let the small block be a product of rank r too, where it is wider than 2 r.")
    decompose_factor: int = Field(
        -1, ge=-1, description="Size of the small block: the divisor of each side nearest below it; -1: nearest to the side's square root."
    )
    rank_dropout_scale: bool = Field(False, description="Make up for the rows that rank_dropout lets rest.")


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two factors of ``size``, the smaller one first: ``factor`` itself where it divides ``size`` (then in this order, as
    PEFT has it; LyCORIS puts the smaller one first there too), else the largest divisor that is at most ``factor`` and brings the
    two nearest to each other."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max((i for i in range(1, min(math.isqrt(size), limit) + 1) if size % i == 0), default=1)
    return small, size // small


class LokrLayer(DeltaLayer):
    """Parameters, float32: ``lokr_w1`` [k, m] or its factors ``lokr_w1_a``, ``lokr_w1_b``, and ``lokr_w2`` [out / k, in / m] or its
    factors. The small block (or its first factor) starts at zero, so the layer starts as the base (PEFT's choice)."""

    def __init__(self, base: nn.Module, rank: int, scaling: float, options: LokrConfig, generator: torch.Generator) -> None:
        super().__init__(base, scaling, options.rank_dropout, options.module_dropout, rescale=options.rank_dropout_scale)
        width_in, width_out = features(base)
        m, n = factorization(width_in, options.decompose_factor)
        k, p = factorization(width_out, options.decompose_factor)
        if options.decompose_both and rank < max(k, m) / 2:
            self.lokr_w1_a = nn.Parameter(torch.zeros(k, rank))
            self.lokr_w1_b = uniform(rank, m, generator)
        else:
            self.lokr_w1 = nn.Parameter(torch.zeros(k, m))
        if rank < max(p, n) / 2:
            self.lokr_w2_a = uniform(p, rank, generator)
            self.lokr_w2_b = uniform(rank, n, generator)
        else:
            self.lokr_w2 = uniform(p, n, generator)

    def blocks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two blocks, [k, m] and [out / k, in / m]; products are taken in the parameters' own precision."""
        own = self._parameters
        one: Tensor = self.lokr_w1 if "lokr_w1" in own else self.lokr_w1_a @ self.lokr_w1_b
        two: Tensor = self.lokr_w2 if "lokr_w2" in own else self.lokr_w2_a @ self.lokr_w2_b
        return one.to(dtype), two.to(dtype)

    def update(self, x: Tensor) -> Tensor:
        # kron(C, D) x is C X D' for x laid out as a matrix X: two small products, and the update is never formed.
        one, two = self.blocks(x.dtype)
        grid = x.unflatten(-1, (one.shape[1], two.shape[1]))
        change: Tensor = (one @ (grid @ two.t())).flatten(-2)
        return change * self.scaling

    def delta(self, dtype: torch.dtype) -> Tensor:
        return torch.kron(*self.blocks(dtype)) * self.scaling


class Lokr(LayerMethod[LokrConfig]):
    """Kronecker products beside frozen linear layers."""

    Config: ClassVar[type[MethodConfig]] = LokrConfig
    paper = "https://arxiv.org/abs/2309.14859"
    summary = "An update that is the Kronecker product of a small block and a (low-rank) larger one."
    solves = "Very few parameters for an update of full rank."
    costs = "The blocks repeat themselves across the matrix, in sizes that depend on the layer's divisors; slower to converge than LoRA."
    choose = "The smallest file that still changes every weight; raise the rank, or lower the factor, where it underfits."
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    # A narrow layer holds its blocks whole, whatever the rank says.
    peft = PeftFormat("LOKR", {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}, rank_is_size=False)

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        options = self.config
        rank = from_pattern(options.rank_pattern, name, options.rank)
        alpha = from_pattern(options.alpha_pattern, name, options.alpha)
        return LokrLayer(base, rank, alpha / rank, options, ctx.generator(name))

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options = self.config
        return {
            **module_fields(model, LokrLayer, options),
            **product_fields(options),
            "decompose_both": options.decompose_both,
            "decompose_factor": options.decompose_factor,
            "rank_dropout_scale": options.rank_dropout_scale,
            "use_effective_conv2d": False,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **module_options(fields),
            **product_options(fields),
            "decompose_both": fields.get("decompose_both", False),
            "decompose_factor": fields.get("decompose_factor", -1),
            "rank_dropout_scale": fields.get("rank_dropout_scale", False),
        }
