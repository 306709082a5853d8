"""Adapters: small bottlenecks with a residual, ``h + s up(act(down(h)))``, inside every layer of a frozen model.

``houlsby`` (https://arxiv.org/abs/1902.00751) puts one behind attention and one behind the feed-forward block; ``pfeiffer``
(https://arxiv.org/abs/2005.00247) one behind the feed-forward block, both before the layer's own residual is added;
``parallel`` (https://arxiv.org/abs/2110.04366) puts one beside the feed-forward block, on what goes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.methods import targets
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import adapted_names, token_fields
from peftcli.methods.kinds import AdapterLayer, LayerMethod, features, whole_modules

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Variant:
    """A paper's choices: where adapters sit, and what the options are where the user leaves them out."""

    attention: bool
    parallel: bool
    reduction_factor: float
    non_linearity: str
    scaling: float


VARIANTS = {
    "houlsby": Variant(attention=True, parallel=False, reduction_factor=16, non_linearity="silu", scaling=1.0),
    "pfeiffer": Variant(attention=False, parallel=False, reduction_factor=16, non_linearity="relu", scaling=1.0),
    "parallel": Variant(attention=False, parallel=True, reduction_factor=2, non_linearity="relu", scaling=4.0),
}
# (last layer of attention, last layer of the feed-forward block, the block itself or "") by the names of a family's layers.
PLACES = (
    ("self_attn.o_proj", "mlp.down_proj", "mlp"),
    ("attn.c_proj", "mlp.c_proj", "mlp"),
    ("attention.output.dense", "output.dense", ""),
    ("SelfAttention.o", "DenseReluDense.wo", "DenseReluDense"),
    ("attention.dense", "mlp.dense_4h_to_h", "mlp"),
    ("self_attn.out_proj", "fc2", ""),
)


class AdapterConfig(MethodConfig):
    """Options of adapters; what is left out is the paper's choice for the variant."""

    name: Literal["adapter"] = Field("adapter", description="`adapter`")
    variant: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby",
        description="`houlsby`: behind attention and feed-forward; `pfeiffer`: behind feed-forward; `parallel`: beside feed-forward.",
    )
    reduction_factor: float | None = Field(
        None, ge=0.1, description="Width of the layer over that of the bottleneck; left out: 16, for parallel 2."
    )
    bottleneck_size: int | None = Field(None, ge=1, le=65536, description="Width of the bottleneck itself, instead of reduction_factor.")
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] | None = Field(
        None, description="Between down and up; left out: silu for houlsby, relu for the others."
    )
    scaling: float | None = Field(None, gt=0.0, description="Factor of what the adapter adds; left out: 1, for parallel 4.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the input of the adapter.")
    init_weights: Literal["zero", "near_identity"] = Field(
        "zero", description="`zero`: up starts at zero, so the model starts as the base; `near_identity`: the Houlsby paper's 1e-2 noise."
    )
    target_modules: str | list[str] | None = Field(
        None, description="Modules behind (or, for parallel, beside) which an adapter sits; left out: the variant's, by the model's family."
    )
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the adapters, such as `lm_head`.")

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.reduction_factor is not None and self.bottleneck_size is not None:
            raise ValueError("reduction_factor and bottleneck_size both say how wide the bottleneck is; choose one")
        return self


class BottleneckLayer(AdapterLayer):
    """``y + s up(act(down(y)))`` with ``y = base(x)``, or, parallel, ``base(x) + s up(act(down(x)))``.

    Parameters, float32: ``adapter_down`` [bottleneck, width], ``adapter_down_bias``, ``adapter_up`` [width, bottleneck] and
    ``adapter_up_bias``. It stays at inference: the non-linearity cannot be folded into the base.
    """

    def __init__(self, base: nn.Module, width: int, options: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__(base)
        variant = VARIANTS[options.variant]
        narrow = options.bottleneck_size or max(1, int(width / (options.reduction_factor or variant.reduction_factor)))
        self.parallel, self.scaling = variant.parallel, options.scaling or variant.scaling
        self.activation = _ACTIVATIONS[options.non_linearity or variant.non_linearity]
        self.dropout = nn.Dropout(options.dropout) if options.dropout > 0.0 else nn.Identity()
        down, up = torch.empty(narrow, width), torch.zeros(width, narrow)
        if options.init_weights == "zero":
            down.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        else:  # a normal distribution cut at two deviations
            for matrix in (down, up):
                nn.init.trunc_normal_(matrix, std=1e-2, a=-2e-2, b=2e-2, generator=generator)
        self.adapter_down, self.adapter_up = nn.Parameter(down), nn.Parameter(up)
        self.adapter_down_bias, self.adapter_up_bias = nn.Parameter(torch.zeros(narrow)), nn.Parameter(torch.zeros(width))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base(*args, **kwargs)
        x = cast(Tensor, args[0]) if self.parallel else result
        low = F.linear(self.dropout(x), self.adapter_down.to(x.dtype), self.adapter_down_bias.to(x.dtype))
        change = F.linear(self.activation(low), self.adapter_up.to(x.dtype), self.adapter_up_bias.to(x.dtype))
        return result + (change * self.scaling).to(result.dtype)


class Adapter(LayerMethod[AdapterConfig]):
    """Bottlenecks behind, or beside, the blocks of a frozen model."""

    Config: ClassVar[type[MethodConfig]] = AdapterConfig
    paper = "https://arxiv.org/abs/1902.00751"
    summary = "Small bottlenecks with a residual inside every layer: Houlsby, Pfeiffer or parallel."
    solves = "A few percent of the weights, one small file for each task, near full fine-tuning."
    costs = "The extra layers stay at inference (latency): with a non-linearity between, they cannot be merged."
    caps = Caps(mergeable=False, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    peft = PeftFormat(
        "PEFTCLI_ADAPTER",
        {
            "adapter_down": "adapter_down.weight",
            "adapter_down_bias": "adapter_down.bias",
            "adapter_up": "adapter_up.weight",
            "adapter_up_bias": "adapter_up.bias",
            "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
        },
        stock=False,
    )

    def target_names(self, model: nn.Module) -> list[str]:
        options, variant = self.config, VARIANTS[self.config.variant]
        if options.target_modules is not None and not (variant.parallel and isinstance(options.target_modules, list)):
            return targets.match(model, options.target_modules, options.exclude_modules)
        named = options.target_modules or _places(model, options.variant)
        found = set(whole_modules(model, named, "target_modules"))
        # "output.dense" is the feed-forward block's in BERT only where attention is not in front of it.
        if not variant.attention:
            found = {name for name in found if not name.endswith("attention.output.dense")}
        found -= set(whole_modules(model, options.exclude_modules, "exclude_modules"))
        return [name for name, _ in model.named_modules() if name in found]

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        linears = [module for module in base.modules() if targets.is_linear(module)]
        if not linears:
            raise UsageError(f"method.target_modules: {name} holds no linear layer, so an adapter cannot know its width")
        width = features(linears[0])[0] if VARIANTS[self.config.variant].parallel else features(linears[-1])[1]
        return BottleneckLayer(base, width, self.config, ctx.generator(name))

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options = self.config.model_dump(exclude={"name", "target_modules", "exclude_modules"})
        names = sorted(adapted_names(model, BottleneckLayer))
        return {**options, "target_modules": names, "modules_to_save": self.config.modules_to_save or None, **token_fields(model)}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        known = {key: fields[key] for key in AdapterConfig.model_fields if key != "name" and key in fields}
        return {**known, "modules_to_save": fields.get("modules_to_save") or [], "exclude_modules": []}


def _places(model: nn.Module, variant: str) -> list[str]:
    """Ends of the names of the modules that the variant's adapters belong to, by the names that the model has."""
    choice = VARIANTS[variant]
    names = [f".{name}" for name, _ in model.named_modules()]
    for attention, forward, block in PLACES:
        if all(any(name.endswith(f".{end}") for name in names) for end in (attention, forward)):
            if choice.parallel and not block:
                raise UsageError(
                    f"method.variant: the feed-forward block of {type(model).__name__} is no module of its own; nothing runs beside it",
                    hint="take houlsby or pfeiffer.",
                )
            return [block] if choice.parallel else [attention, forward] if choice.attention else [forward]
    raise UsageError(
        f"method.target_modules: {type(model).__name__} has layers of no known names, so adapters cannot be placed by the paper's rule",
        hint="name the modules behind which they sit: target_modules.",
    )
