"""LoRA: a frozen weight plus a trained product of two thin matrices, ``W + (alpha / r) B A``
(Hu et al., https://arxiv.org/abs/2106.09685), and its variants as options: rsLoRA scales by ``alpha / sqrt(r)``
(https://arxiv.org/abs/2312.03732), DoRA trains the rows' lengths as well (https://arxiv.org/abs/2402.09353), LoRA+ lets B learn
faster than A (https://arxiv.org/abs/2402.12354), PiSSA and OLoRA start from the weight's own directions
(https://arxiv.org/abs/2404.02948, https://arxiv.org/abs/2406.01775), EVA from those of the data (https://arxiv.org/abs/2410.07170).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.dora_layers import DoraEmbedding, DoraLayer, ShiftedDoraLayer
from peftcli.methods.eva import RANKS, look_at_data
from peftcli.methods.fields import check_patterns, from_pattern, module_fields, whole_number
from peftcli.methods.kinds import AdapterLayer, LayerMethod, adapter_layers, unfreeze
from peftcli.methods.lora_init import set_start
from peftcli.methods.lora_layers import LoraEmbedding, LoraLayer, LowRankLayer, ShiftedLoraLayer
from peftcli.methods.lora_options import LoraConfig
from peftcli.methods.lora_reading import options_from_peft
from peftcli.methods.siblings import join_siblings


class Lora(LayerMethod[LoraConfig]):
    """Low-rank adapters beside frozen linear layers."""

    Config: ClassVar[type[MethodConfig]] = LoraConfig
    paper = "https://arxiv.org/abs/2106.09685"
    summary = "A low-rank update beside each frozen linear layer; merges without a trace."
    solves = "Trains less than 1 % of the weights; small files, swappable, mergeable (no latency), overfits less."
    costs = "One fixed rank everywhere; below full fine-tuning on hard, large tasks; needs a capable base."
    choose = (
        "The default. Rank 4 to 8 where the data is close to pre-training, 16 for most tasks, 64 for a new domain; all linear "
        "layers for quality, query and value only for the smallest file."
    )
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    peft = PeftFormat(
        "LORA", {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}
    )
    # The layer where the options ask for no other.
    plain: ClassVar[type[LoraLayer]] = LoraLayer

    @classmethod
    def check_recipe(cls, recipe: Any) -> list[tuple[str, str]]:
        if recipe.method.init_lora_weights == "loftq" and recipe.base_model.quantization is None:
            return [("method.init_lora_weights", "loftq makes up for what quantization lost; set base_model.quantization, or take default")]
        return super().check_recipe(recipe)

    def needs_dense_weights(self) -> bool:
        return self.config.init_lora_weights == "loftq"

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config)
        # EVA's findings by layer: ranks, 0 for layers without an adapter, and the initial A.
        self.ranks: dict[str, int] = {}
        self.starts: dict[str, Tensor] = {}

    def target_names(self, model: nn.Module) -> list[str]:
        names, wanted = super().target_names(model), self.config.layers_to_transform
        names = [name for name in names if self.ranks.get(name) != 0]
        if not wanted:
            return names
        numbers = {name: next((int(part) for part in reversed(name.split(".")) if part.isdigit()), None) for name in names}
        absent = sorted(set(wanted) - {number for number in numbers.values() if number is not None})
        if absent:
            there = sorted({number for number in numbers.values() if number is not None})
            raise UsageError(f"method.layers_to_transform: no target lies in block {absent[0]}; blocks with targets: {there}")
        return [name for name in names if numbers[name] in wanted]

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not ctx.from_file:
            check_patterns(self.config, self.target_names(model))
            if self.config.init_lora_weights == "eva":
                before = {name: self._rank_and_alpha(name) for name in self.target_names(model)}
                found = look_at_data(model, before, self.config, ctx)
                self.ranks, self.starts, self.config = found.ranks, found.starts, found.options
        model = super().apply(model, ctx)
        self.starts = {}
        self.layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LoraLayer)}
        join_siblings(model)
        if self.config.bias != "none":
            self._train_biases(model, ctx)
        return model

    def _rank_and_alpha(self, name: str) -> tuple[int, float]:
        options = self.config
        return from_pattern(options.rank_pattern, name, options.rank), from_pattern(options.alpha_pattern, name, options.alpha)

    def _train_biases(self, model: nn.Module, ctx: Context) -> None:
        if ctx.frozen_quantized:
            raise UsageError(
                "method.bias: quantized layers compute with biases in their own dtype, in which small steps are lost",
                hint="remove method.bias, or base_model.quantization.",
            )
        ours = [f"{name}.base.bias" for name in self.layers]
        names = [n for n, _ in model.named_parameters() if n.endswith("bias") and (self.config.bias == "all" or n in ours)]
        if not names:
            raise UsageError(f"method.bias: the {'model has' if self.config.bias == 'all' else 'adapted layers have'} no biases")
        for name in names:
            unfreeze(model.get_parameter(name))

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        options = self.config
        rank, alpha = self._rank_and_alpha(name)
        scaling = alpha / math.sqrt(rank) if options.use_rslora else alpha / rank
        generator = ctx.generator(name)
        if isinstance(base, nn.Embedding) and options.adapt_embeddings:
            return (DoraEmbedding if options.use_dora else LoraEmbedding)(base, rank, scaling, generator)
        if options.init_lora_weights.startswith(("pissa", "olora")):
            kind: type[LoraLayer] = ShiftedDoraLayer if options.use_dora else ShiftedLoraLayer
        else:
            kind = DoraLayer if options.use_dora else self.plain
        layer = kind(base, rank, scaling, options.dropout, generator)
        if name in self.starts:
            layer.lora_A.data = self.starts[name]
        else:
            set_start(layer, options.init_lora_weights, name, ctx, generator)
        layer.started()
        return layer

    def param_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        groups, ratio = super().param_groups(model, learning_rate, weight_decay), self.config.loraplus_lr_ratio
        if ratio is None:
            return groups
        wide = {id(layer.lora_B) for layer in self.layers.values()}
        halves = [
            {**group, "params": [p for p in group["params"] if (id(p) in wide) is fast], "lr": group["lr"] * (ratio if fast else 1.0)}
            for group in groups
            for fast in (False, True)
        ]
        return [group for group in halves if group["params"]]

    def state(self) -> dict[str, Tensor]:
        ranks = {RANKS: torch.tensor(list(self.ranks.values()))} if self.ranks else {}
        layers = self.layers.items()
        return ranks | {f"{name}.{key}": tensor.cpu() for name, layer in layers for key, tensor in layer.named_buffers(recurse=False)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for key, tensor in state.items():
            if key == RANKS:
                continue  # seen when the layers were made
            name, _, buffer = key.rpartition(".")
            layer = self.layers[name]
            layer.register_buffer(buffer, tensor.to(layer.lora_A.device, copy=True), persistent=False)

    def to_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return _each_pair(model, tensors, LoraLayer.to_file.__name__)

    def from_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return _each_pair(model, tensors, LoraLayer.from_file.__name__)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options = self.config
        layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LowRankLayer)}
        # Layers that started away from zero are written with twice the rank; the scaling stays what it is.
        times = max((len(layer.factors()[0]) // layer.rank for layer in layers.values() if isinstance(layer, LoraLayer)), default=1)
        alphas = math.sqrt(times) if options.use_rslora else times
        return {
            "trainable_token_indices": None,
            **module_fields(model, LowRankLayer, options),
            "r": options.rank * times,
            "lora_alpha": whole_number(options.alpha * alphas),
            "lora_dropout": options.dropout,
            "use_rslora": options.use_rslora,
            "rank_pattern": {key: value * times for key, value in sorted(options.rank_pattern.items())},
            "alpha_pattern": {key: whole_number(value * alphas) for key, value in sorted(options.alpha_pattern.items())},
            "fan_in_fan_out": any(type(layer.base).__name__ == "Conv1D" for layer in layers.values()),
            "bias": options.bias,
            "init_lora_weights": True,
            "use_dora": options.use_dora,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return options_from_peft(fields)


def _each_pair(model: nn.Module, tensors: dict[str, Tensor], direction: str) -> dict[str, Tensor]:
    result = dict(tensors)
    for name, layer in adapter_layers(model).items():
        keys = f"{name}.lora_A", f"{name}.lora_B"
        if isinstance(layer, LoraLayer) and all(key in tensors for key in keys):
            result |= zip(keys, getattr(layer, direction)(*(tensors[key] for key in keys)), strict=True)
    return result


__all__ = ["Lora", "LoraConfig"]
