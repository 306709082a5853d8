"""Bottlenecks with a residual, and where each paper puts them in the layers of a known family.

Placement follows the ``adapters`` library (AdapterHub), which the authors of the Pfeiffer variant write: the same weights compute the
same in both, and files can be exchanged. In a layer whose normalization stands behind each block (BERT) or in front (LLaMA, GPT-2, T5)
the same rule means different modules:

- ``houlsby``: on the last linear layer of attention and of the feed-forward block, ``y + f(y)``.
- ``pfeiffer``: reads the feed-forward block's output after the residual is added and, where the norm stands behind, after the norm;
  the result is added in front of that norm.
- ``parallel``: reads the residual stream in front of the feed-forward block (and of its norm) and is added to the block's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.methods import targets
from peftcli.methods.kinds import AdapterLayer, features

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
Variant = Literal["houlsby", "pfeiffer", "parallel"]


@dataclass(frozen=True)
class Family:
    """Ends of the names of a family's modules.

    Attributes:
        attention, forward: last linear layer of attention, and of the feed-forward block.
        pfeiffer, parallel: the module that the variant's adapter holds; ``None``: not known for this family.
        norm: stands in front of the module just named; its input is the residual stream. ``None``: the module sees that itself.
    """

    attention: str
    forward: str
    pfeiffer: str | None
    parallel: str | None
    norm: str | None = None


FAMILIES = (
    Family("self_attn.o_proj", "mlp.down_proj", "mlp", "mlp", "post_attention_layernorm"),
    Family("attn.c_proj", "mlp.c_proj", "mlp", "mlp", "ln_2"),
    Family("attention.output.dense", "output.dense", "output.LayerNorm", "output"),
    Family("SelfAttention.o", "DenseReluDense.wo", "DenseReluDense/..", "DenseReluDense/.."),
    Family("attention.dense", "mlp.dense_4h_to_h", "mlp", "mlp", "post_attention_layernorm"),
    Family("self_attn.out_proj", "fc2", None, None),
)


def places(model: nn.Module, variant: Variant) -> list[str]:
    """Names of the modules that the variant's adapters hold in ``model``, by the names that its modules have.

    Raises:
        UsageError: the model is of no known family, or the variant has no known place in it.
    """
    names = [name for name, _ in model.named_modules()]

    def ending(end: str) -> list[str]:
        end, _, up = end.partition("/")
        found = [name for name in names if f".{name}".endswith(f".{end}")]
        return list(dict.fromkeys(name.removesuffix(end).rstrip(".") for name in found)) if up else found

    for family in FAMILIES:
        if not (ending(family.attention) and ending(family.forward)):
            continue
        if variant == "houlsby":
            return list(dict.fromkeys([*ending(family.attention), *ending(family.forward)]))
        end = family.pfeiffer if variant == "pfeiffer" else family.parallel
        if end is None:
            raise UsageError(
                f"method.variant: where {variant} sits in {type(model).__name__} is not known", hint="take houlsby, or name target_modules."
            )
        # In BERT attention ends in modules of the same names.
        return [name for name in ending(end) if ".attention." not in f".{name}."]
    raise UsageError(
        f"method.target_modules: {type(model).__name__} has layers of no known names, so adapters cannot be placed by the paper's rule",
        hint="name the modules behind which they sit: target_modules.",
    )


class Tap(AdapterLayer):
    """A norm that remembers its input until the adapter beside the next block takes it."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        result: Tensor = self.base(x)
        return result

    def take(self) -> Tensor:
        """The input of the forward pass that runs; nothing is kept alive after it."""
        assert self.seen is not None
        seen, self.seen = self.seen, None
        return seen


class BottleneckLayer(AdapterLayer):
    """``f(x) = scaling up(act(down(x)))`` around ``base``; how, depends on the variant and on what ``base`` is.

    - behind: ``y + f(s + y)`` with ``y = base(x)`` and ``s`` the stream from :class:`Tap` (pfeiffer), or without it (houlsby; pfeiffer
      on a block that ends in its residual).
    - norm: ``base(x + f(base(x)))`` (pfeiffer on the norm that ends a layer).
    - beside: ``base(x) + f(s)``, or ``f(x)`` where there is no tap (parallel).
    - residual: ``base(h, x + f(x))`` (parallel on BERT's output block, which adds its second input and norms).

    Parameters, float32: ``adapter_down`` [narrow, width], ``adapter_down_bias``, ``adapter_up`` [width, narrow] and
    ``adapter_up_bias``. It stays at inference: the non-linearity cannot be folded into the base.

    Args:
        narrow: width of the bottleneck from that of the layer.
        near_identity: the Houlsby paper's noise; else ``up`` starts at zero.
    """

    tap: tuple[Tap] | None = None  # in a tuple: a neighbour, not a part

    def __init__(
        self, base: nn.Module, *, variant: Variant, width: int, narrow: int, activation: str, scaling: float, dropout: float,
        near_identity: bool, generator: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__(base)
        self.place = place(base, variant)
        self.scaling, self.activation = scaling, ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        down, up = torch.empty(narrow, width), torch.zeros(width, narrow)
        if near_identity:  # a normal distribution cut at two deviations
            for matrix in (down, up):
                nn.init.trunc_normal_(matrix, std=1e-2, a=-2e-2, b=2e-2, generator=generator)
        else:
            down.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.adapter_down, self.adapter_up = nn.Parameter(down), nn.Parameter(up)
        self.adapter_down_bias, self.adapter_up_bias = nn.Parameter(torch.zeros(narrow)), nn.Parameter(torch.zeros(width))

    def change(self, x: Tensor) -> Tensor:
        """``f(x)``, in the shape and dtype of ``x``."""
        low = F.linear(self.dropout(x), self.adapter_down.to(x.dtype), self.adapter_down_bias.to(x.dtype))
        high = F.linear(self.activation(low), self.adapter_up.to(x.dtype), self.adapter_up_bias.to(x.dtype))
        return high * self.scaling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = cast(Tensor, args[0])
        if self.place == "norm":
            return self.base(x + self.change(self.base(x)).to(x.dtype))
        if self.place == "residual":
            stream = cast(Tensor, args[1])
            return self.base(x, stream + self.change(stream).to(stream.dtype), *args[2:], **kwargs)
        result = self.base(*args, **kwargs)
        first: Tensor = result[0] if isinstance(result, tuple) else result
        if self.place == "behind":
            x = first if self.tap is None else first + self.tap[0].take()
        elif self.tap is not None:
            x = self.tap[0].take()
        first = first + self.change(x).to(first.dtype)
        return (first, *result[1:]) if isinstance(result, tuple) else first


def place(base: nn.Module, variant: Variant) -> Literal["behind", "norm", "beside", "residual"]:
    """How an adapter of the variant works on ``base``."""
    if variant == "parallel":
        return "residual" if isinstance(getattr(base, "LayerNorm", None), nn.Module) else "beside"
    return "norm" if isinstance(base, nn.LayerNorm) else "behind"


def width_of(name: str, base: nn.Module, variant: Variant) -> int:
    """Width of what the adapter on ``base``, the module called ``name``, reads and adds.

    Raises:
        UsageError: ``base`` does not tell.
    """
    if isinstance(base, nn.LayerNorm):
        return base.normalized_shape[0]
    linears = [module for module in base.modules() if targets.is_linear(module)]
    if not linears:
        raise UsageError(f"method.target_modules: {name} holds no linear layer, so an adapter cannot know its width")
    return features(linears[0])[0] if place(base, variant) == "beside" else features(linears[-1])[1]


def listen(model: nn.Module, name: str, layer: BottleneckLayer) -> None:
    """Let the adapter called ``name`` read the residual stream in front of the norm that precedes its block, where there is one."""
    parent, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    for family in FAMILIES:
        norm = f"{parent}.{family.norm}"
        if family.parallel == leaf and norm in modules:
            tap = Tap(modules[norm])
            targets.replace(model, norm, tap)
            layer.tap = (tap,)
            return
