"""Adapters: small bottlenecks with a residual inside every layer of a frozen model.

``houlsby`` (https://arxiv.org/abs/1902.00751) puts one behind attention and one behind the feed-forward block, before the layer's own
residual is added; ``pfeiffer`` (https://arxiv.org/abs/2005.00247) one at the end of the layer; ``parallel``
(https://arxiv.org/abs/2110.04366) one beside the feed-forward block. ``peftcli.methods.bottleneck`` says exactly where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from peftcli.methods import targets
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.bottleneck import BottleneckLayer, listen, places, width_of
from peftcli.methods.fields import adapted_names, token_fields
from peftcli.methods.kinds import AdapterLayer, LayerMethod, adapter_layers, whole_modules


@dataclass(frozen=True)
class Choice:
    """What the options are in a paper where the user leaves them out."""

    reduction_factor: float
    non_linearity: str
    scaling: float


CHOICES = {
    "houlsby": Choice(reduction_factor=16, non_linearity="silu", scaling=1.0),
    "pfeiffer": Choice(reduction_factor=16, non_linearity="relu", scaling=1.0),
    "parallel": Choice(reduction_factor=2, non_linearity="relu", scaling=4.0),
}


class AdapterConfig(MethodConfig):
    """Options of adapters; what is left out is the paper's choice for the variant."""

    name: Literal["adapter"] = Field("adapter", description="`adapter`")
    variant: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby",
        description="`houlsby`: behind attention and feed-forward; `pfeiffer`: at the end of the layer; `parallel`: beside feed-forward.",
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


class Adapter(LayerMethod[AdapterConfig]):
    """Bottlenecks behind, or beside, the blocks of a frozen model."""

    Config: ClassVar[type[MethodConfig]] = AdapterConfig
    paper = "https://arxiv.org/abs/1902.00751"
    summary = "Small bottlenecks with a residual inside every layer: Houlsby, Pfeiffer or parallel."
    solves = "A few percent of the weights, one small file for each task, near full fine-tuning."
    costs = "The extra layers stay at inference (latency): with a non-linearity between, they cannot be merged."
    choose = (
        "One base that serves many tasks whose files are swapped, and latency does not matter; the classic choice for BERT-like encoders."
    )
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

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        model = super().apply(model, ctx)
        for name, layer in adapter_layers(model).items():
            if isinstance(layer, BottleneckLayer):
                listen(model, name, layer)
        return model

    def target_names(self, model: nn.Module) -> list[str]:
        options = self.config
        named = options.target_modules
        if named is not None and (options.variant == "houlsby" or isinstance(named, str)):
            return targets.match(model, named, options.exclude_modules)
        found = set(places(model, options.variant) if named is None else whole_modules(model, named, "target_modules"))
        found -= set(whole_modules(model, options.exclude_modules, "exclude_modules"))
        return [name for name, _ in model.named_modules() if name in found]

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        options, choice = self.config, CHOICES[self.config.variant]
        width = width_of(name, base, options.variant)
        return BottleneckLayer(
            base,
            variant=options.variant,
            width=width,
            narrow=options.bottleneck_size or max(1, int(width / (options.reduction_factor or choice.reduction_factor))),
            activation=options.non_linearity or choice.non_linearity,
            scaling=options.scaling or choice.scaling,
            dropout=options.dropout,
            near_identity=options.init_weights == "near_identity",
            generator=ctx.generator(name),
        )

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options = self.config.model_dump(exclude={"name", "target_modules", "exclude_modules"})
        names = sorted(adapted_names(model, BottleneckLayer))
        return {**options, "target_modules": names, "modules_to_save": self.config.modules_to_save or None, **token_fields(model)}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        known = {key: fields[key] for key in AdapterConfig.model_fields if key != "name" and key in fields}
        return {**known, "modules_to_save": fields.get("modules_to_save") or [], "exclude_modules": []}
