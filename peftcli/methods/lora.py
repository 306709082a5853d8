"""LoRA: a frozen weight plus a trained product of two thin matrices, ``W + (alpha / r) B A``
(Hu et al., https://arxiv.org/abs/2106.09685); rsLoRA scales by ``alpha / sqrt(r)`` (https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftcli.errors import CheckpointError
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.kinds import AdapterLayer, LayerMethod, NewTokens, adapter_layers, features

PositiveInt = Annotated[int, Field(ge=1)]


class LoraConfig(MethodConfig):
    name: Literal["lora"] = Field("lora", description="`lora`")
    rank: int = Field(16, ge=1, le=16384, description="Width r of the two thin matrices.")
    alpha: float = Field(32.0, gt=0.0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the input of the adapter.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get an adapter: `all-linear` (all but the output layer), a list of names, or a regular expression for the whole dotted name.")
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead: steadier at high ranks.")
    rank_pattern: dict[str, PositiveInt] = Field({}, description="Another rank for modules whose name ends with, or matches, the key.")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] = Field({}, description="Another alpha, likewise.")
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the adapter, such as `lm_head`.")


class LoraLayer(AdapterLayer):
    """``base(x) + scaling * B(A(dropout(x)))``.

    Args:
        base: a linear layer, in -> out.
        rank, scaling, dropout: of this layer.
        generator: for the initial values.

    Parameters ``lora_A`` [rank, in] and ``lora_B`` [out, rank] are float32. B starts at zero, so the layer starts as the
    base; A starts as torch initialises a linear layer (Kaiming uniform, a = sqrt 5), which is PEFT's choice too.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base)
        width_in, width_out = features(base)
        bound = 1.0 / math.sqrt(width_in)
        self.lora_A = nn.Parameter(torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(width_out, rank))
        self.rank = rank
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        narrow, wide = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if x.dtype in (torch.float32, torch.float64) or result.dtype != x.dtype:
            # PEFT's order of operations: in float32 the two agree to the last bit.
            return result + F.linear(F.linear(self.dropout(x), narrow), wide) * self.scaling
        # Half precision: scale the thin tensor, and one product that adds onto the base's output.
        low = F.linear(self.dropout(x), narrow) * self.scaling
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), wide.t()).view(result.shape)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.lora_B.to(weight) @ self.lora_A.to(weight)) * self.scaling, bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


def _from_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of the dotted name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


class Lora(LayerMethod[LoraConfig]):
    """Low-rank adapters beside frozen linear layers."""

    Config = LoraConfig
    paper = "https://arxiv.org/abs/2106.09685"
    summary = "A low-rank update beside each frozen linear layer; merges without a trace."
    solves = "Trains less than 1 % of the weights; small files, swappable, mergeable (no latency), overfits less."
    costs = "One fixed rank everywhere; below full fine-tuning on hard, large tasks; needs a capable base."
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    peft = PeftFormat("LORA", {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "trainable_tokens_delta": "token_adapter.trainable_tokens_delta"})

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        options = self.config
        rank = _from_pattern(options.rank_pattern, name, options.rank)
        alpha = _from_pattern(options.alpha_pattern, name, options.alpha)
        scaling = alpha / math.sqrt(rank) if options.use_rslora else alpha / rank
        return LoraLayer(base, rank, scaling, options.dropout, ctx.generator(name))

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options = self.config
        layers = adapter_layers(model)
        tokens = {name: [int(i) for i in layer.ids] for name, layer in layers.items() if isinstance(layer, NewTokens) and _owns(model, name, layer)}
        adapted = [name for name, layer in layers.items() if isinstance(layer, LoraLayer)]
        return {
            "r": options.rank,
            "lora_alpha": _whole(options.alpha),
            "lora_dropout": options.dropout,
            "target_modules": _short_names(model, adapted),
            "exclude_modules": None,
            "use_rslora": options.use_rslora,
            "rank_pattern": dict(sorted(options.rank_pattern.items())),
            "alpha_pattern": {key: _whole(value) for key, value in sorted(options.alpha_pattern.items())},
            "modules_to_save": options.modules_to_save or None,
            "trainable_token_indices": tokens or None,
            "fan_in_fan_out": any(type(layers[name].base).__name__ == "Conv1D" for name in adapted),
            "bias": "none",
            "init_lora_weights": True,
            "use_dora": False,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        unsupported = {
            "use_dora": (False, None),
            "bias": ("none", None),
            "lora_bias": (False, None),
            "megatron_config": (None,),
            "layer_replication": (None, []),
            "target_parameters": (None, []),
            "alora_invocation_tokens": (None, []),
            "use_qalora": (False, None),
            "arrow_config": (None,),
        }
        asked = [f"{key}={fields[key]!r}" for key, fine in unsupported.items() if key in fields and fields[key] not in fine]
        if asked:
            raise CheckpointError(f"the adapter uses {', '.join(asked)}, which this version does not compute")
        targets = fields.get("target_modules")
        layers = fields.get("layers_to_transform")
        if isinstance(targets, list) and layers is not None:
            wanted = [layers] if isinstance(layers, int) else layers
            ends = "|".join(re.escape(name) for name in sorted(targets))
            targets = rf"(.*\.)?({'|'.join(str(i) for i in wanted)})\.(.*\.)?({ends})"
        return {
            "rank": fields.get("r", 8),
            "alpha": fields.get("lora_alpha", 8),
            "dropout": fields.get("lora_dropout", 0.0),
            "target_modules": sorted(targets) if isinstance(targets, list) else targets,
            "exclude_modules": sorted(fields.get("exclude_modules") or []),
            "use_rslora": fields.get("use_rslora", False),
            "rank_pattern": fields.get("rank_pattern") or {},
            "alpha_pattern": fields.get("alpha_pattern") or {},
            "modules_to_save": fields.get("modules_to_save") or [],
        }


def _whole(value: float) -> int | float:
    """Whole numbers as PEFT writes them: 32, not 32.0."""
    return int(value) if float(value).is_integer() else value


def _owns(model: nn.Module, name: str, layer: NewTokens) -> bool:
    """Whether ``layer`` is the one whose rows are saved (a tied output layer shares the embedding's)."""
    return any(f"{name}.trainable_tokens_delta" == n for n, _ in model.named_parameters())


def _short_names(model: nn.Module, adapted: list[str]) -> list[str]:
    """The shortest list of name endings that means exactly the adapted modules, sorted (PEFT writes a set, whose order
    changes between runs)."""
    leaves = sorted({name.rpartition(".")[2] for name in adapted})
    chosen = set(adapted)
    names = [name.replace(".base", "") if name.endswith(".base") else name for name, _ in model.named_modules()]
    meant = {name for name in names if any(name == leaf or name.endswith(f".{leaf}") for leaf in leaves)}
    return leaves if meant == chosen else sorted(adapted)
