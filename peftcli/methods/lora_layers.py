"""The layers of LoRA and its variants. Each computes ``base(x)`` plus a product of two thin matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.kernels import fast
from peftcli.kernels.dropout import Dropout
from peftcli.kernels.frozen import product_of, working_dtype
from peftcli.kernels.low_rank import low_rank_linear
from peftcli.methods.kinds import AdapterLayer, features
from peftcli.quantization import dense_weight, is_quantized

if TYPE_CHECKING:
    from peftcli.methods.siblings import Siblings


def weight_of(base: nn.Module) -> Tensor:
    """The dense weight [out, in] that a linear layer computes with: its own where it is dense, else a float32 copy."""
    if is_quantized(base):
        return dense_weight(base)
    weight = cast(Tensor, base.weight).detach()
    return weight.t() if type(base).__name__ == "Conv1D" else weight


class LowRankLayer(AdapterLayer):
    """What all of LoRA's layers are: a base and an update of rank ``rank``, scaled by ``scaling``."""

    def __init__(self, base: nn.Module, rank: int, scaling: float) -> None:
        super().__init__(base)
        self.rank, self.scaling = rank, scaling

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


class LoraLayer(LowRankLayer):
    """``base(x) + scaling * B(A(dropout(x)))``.

    Args:
        base: a linear layer, in -> out.
        rank, scaling, dropout: of this layer.
        generator: for the initial values.

    Parameters ``lora_A`` [rank, in] and ``lora_B`` [out, rank] are float32. B starts at zero, so the layer starts as the
    base; A starts as torch initialises a linear layer (Kaiming uniform, a = sqrt 5), which is PEFT's choice too.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base, rank, scaling)
        width_in, width_out = features(base)
        bound = 1.0 / math.sqrt(width_in)
        self.lora_A = nn.Parameter(torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(width_out, rank))
        self.dropout = Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.siblings: Siblings | None = None

    def started(self) -> None:
        """Called when the initial values of the factors are set."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two thin matrices whose product is the update."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        together = None if self.siblings is None else self.siblings.output(self, x)
        return beside(self.base, x, self.dropout(x), *self.factors(), self.scaling) if together is None else together

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        narrow, wide = self.factors()
        return weight + (wide.to(weight) @ narrow.to(weight)) * self.scaling, bias

    def to_file(self, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        """What a file holds for parameters of these values: factors of the update to the *original* weight."""
        return narrow, wide

    def from_file(self, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`to_file`; tensors of other shapes are returned as they are."""
        return narrow, wide


def beside(base: nn.Module, x: Tensor, dropped: Tensor, narrow: Tensor, wide: Tensor, scaling: float) -> Tensor:
    """``base(x) + scaling * (dropped @ narrow.T) @ wide.T`` in the dtype of ``x``; [..., in] -> [..., out].

    Args:
        dropped: ``x`` after dropout, or ``x`` itself. ``narrow``: [rank, in]. ``wide``: [out, rank].
    """
    # In float32 PEFT's order of operations is kept, with which the results agree to the last bit.
    dtype = working_dtype(x)
    rows = x.to(dtype)
    product = product_of(base, rows)
    if product is not None and fast.take("low-rank update fused with its frozen layer"):
        seen = None if dropped is x else dropped.to(dtype)
        return low_rank_linear(rows, seen, product, cast(nn.Linear, base).bias, narrow, wide, scaling)
    result: Tensor = base(x)
    return add_low_rank(result, dropped, narrow, wide, scaling)


def add_low_rank(result: Tensor, x: Tensor, narrow: Tensor, wide: Tensor, scaling: float) -> Tensor:
    """``result + scaling * (x @ narrow.T) @ wide.T`` in the dtype of ``x``; [..., in] -> [..., out]."""
    narrow, wide = narrow.to(x.dtype), wide.to(x.dtype)
    if x.dtype in (torch.float32, torch.float64) or result.dtype != x.dtype:
        # PEFT's order of operations, in place where one dtype allows it: in float32 the two agree to the last bit.
        update = F.linear(F.linear(x, narrow), wide)
        return update.mul_(scaling).add_(result) if result.dtype == update.dtype else result + update * scaling
    # Half precision: scale the thin tensor, and one product that adds onto the base's output.
    low = F.linear(x, narrow) * scaling
    return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), wide.t()).view(result.shape)


class ShiftedLoraLayer(LoraLayer):
    """LoRA whose factors start away from zero: ``base(x) + scaling * (B A - B0 A0) x``.

    The published methods of this form (PiSSA, OLoRA) take ``scaling * B0 A0`` out of the base. Holding the start beside the
    factors computes the same, with the same gradients, over an untouched base: it may be quantized, and the file is an
    ordinary LoRA of twice the rank, which is what PEFT converts such adapters to.

    Buffers ``start_A`` and ``start_B`` have the shapes of ``lora_A`` and ``lora_B``.
    """

    start_A: Tensor  # noqa: N815 - like lora_A
    start_B: Tensor  # noqa: N815

    def begin(self, narrow: Tensor, wide: Tensor) -> None:
        """Start with these factors."""
        self.register_buffer("start_A", narrow.clone(), persistent=False)
        self.register_buffer("start_B", wide.clone(), persistent=False)
        self.lora_A.data, self.lora_B.data = narrow.clone(), wide.clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def to_file(self, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([narrow, self.start_A.to(narrow)]), torch.cat([wide, -self.start_B.to(wide)], dim=1)

    def from_file(self, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        start = narrow[self.rank :], wide[:, self.rank :]
        ours = self.start_A.to(narrow), -self.start_B.to(wide)
        # Halves that began elsewhere are no values of these parameters; their shape tells.
        if all(one.shape == two.shape and torch.equal(one, two) for one, two in zip(start, ours, strict=True)):
            return narrow[: self.rank], wide[:, : self.rank]
        return narrow, wide


class LoraEmbedding(LowRankLayer):
    """``base(ids) + scaling * B(A[:, ids])`` for an embedding [vocabulary, width].

    Parameters ``lora_embedding_A`` [rank, vocabulary] starts at zero, ``lora_embedding_B`` [width, rank] as a standard normal.
    """

    def __init__(self, base: nn.Embedding, rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__(base, rank, scaling)
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings))
        self.lora_embedding_B = nn.Parameter(torch.empty(base.embedding_dim, rank).normal_(generator=generator))

    def change(self, ids: Tensor) -> Tensor:
        """[..., width] what the adapter adds to the rows of ``ids``, float32."""
        low = F.embedding(ids, self.lora_embedding_A.t())
        change = F.linear(low, self.lora_embedding_B) * self.scaling
        scale = getattr(self.base, "embed_scale", None)
        return change if scale is None else change * scale.to(change.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.base(ids)
        return result + self.change(ids).to(result.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.lora_embedding_B.to(weight) @ self.lora_embedding_A.to(weight)).t() * self.scaling, bias
