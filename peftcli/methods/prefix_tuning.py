"""Prefix tuning: n trained keys and values in front of each row in every layer (Li and Liang,
https://arxiv.org/abs/2101.00190). Without the projection it is P-Tuning v2 (Liu et al., https://arxiv.org/abs/2110.07602).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.methods.base import Context, MethodConfig, PeftFormat
from peftcli.methods.decoder_prefix import PromptedDecoder, check_fields, for_peft, used_by_peft
from peftcli.methods.prompts import VALUES, Prompted, PromptedLayers, PromptMethod, encodes, initialised, start_at, text_config


class PrefixTuningConfig(MethodConfig):
    """Options of prefix tuning."""

    name: Literal["prefix_tuning"] = Field("prefix_tuning", description="`prefix_tuning`")
    num_virtual_tokens: int = Field(20, ge=1, le=16384, description="How many keys and values stand in front of each row.")
    projection: bool = Field(
        False,
        description="Make them from n small embeddings by two linear layers while training, which steadies it (Li and Liang); "
        "`false`: train them as they are (P-Tuning v2).",
    )
    hidden_size: int | None = Field(None, ge=1, le=65536, description="Inner width of the projection; default: that of a layer's keys.")
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary",
        description="Initial keys and values: those of tokens drawn from the vocabulary (Li and Liang's activations of real words), or "
        "normal random numbers, as in models that are no causal decoder.",
    )
    init_std: float = Field(
        0.1,
        ge=0.0,
        le=10.0,
        description="Spread of random initial keys and values without the projection. PEFT's 1 drowns what a trained model attends to.",
    )


class PrefixEncoder(nn.Module):
    """[n, 2 layers x width] keys and values from n trained embeddings; layers and names are PEFT's."""

    def __init__(self, count: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * width))

    def forward(self) -> Tensor:
        """The keys and values."""
        return cast(Tensor, self.transform(self.embedding.weight))


def _shape(model: nn.Module) -> tuple[int, int, int]:
    """(layers, key-value heads, width of a layer's keys); of the decoder, where there is an encoder too."""
    config = text_config(model)
    layers = getattr(config, "num_decoder_layers", config.num_hidden_layers) if encodes(model) else config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    return layers, heads, heads * head


def _of_vocabulary(model: Any, count: int, generator: torch.Generator) -> Tensor | None:
    """[n, 2 layers x width] float32 keys and values that the model gives to n tokens drawn from its vocabulary; ``None``: it keeps none."""
    if encodes(model):
        return None
    embedding = model.get_input_embeddings().weight
    ids = torch.randint(0, embedding.shape[0], (1, count), generator=generator).to(embedding.device)
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if cache is None:
        return None
    parts = [tensor[0].transpose(0, 1).flatten(1) for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return torch.cat(parts, dim=1).to("cpu", torch.float32)


class PrefixTuning(PromptMethod[PrefixTuningConfig]):
    """Trained keys and values."""

    Config: ClassVar[type[MethodConfig]] = PrefixTuningConfig
    paper = "https://arxiv.org/abs/2101.00190"
    summary = "Trained keys and values in front of each row in every layer; the model itself stays untouched."
    solves = "Reaches every layer, so it is stronger than virtual tokens at the input and good for generation; about 0.1 % of the weights."
    costs = "Every token attends to the prefix too, sensitive to its initial values, cannot be folded into the weights."
    choose = "Generation from a base that must stay untouched, with some context to spare; 10 to 200 virtual tokens."
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-2}
    peft = PeftFormat("PREFIX_TUNING", prefix="")

    def wrap(self, model: nn.Module, ctx: Context) -> Prompted:
        options, (layers, heads, width) = self.config, _shape(model)
        count, kind = options.num_virtual_tokens, PromptedDecoder if encodes(model) else PromptedLayers
        if ctx.from_file and not (ctx.shapes_only and options.projection):
            return kind(model, torch.zeros(count, 2 * layers * width), None, layers, heads)
        generator = ctx.generator(VALUES)
        known = _of_vocabulary(model, count, generator) if options.init == "vocabulary" and not ctx.shapes_only else None
        if not options.projection:
            values = torch.empty(count, 2 * layers * width).normal_(0.0, options.init_std, generator=generator) if known is None else known
            return kind(model, values, None, layers, heads)
        encoder = PrefixEncoder(count, width, options.hidden_size or width, layers)
        if not ctx.shapes_only:
            initialised(encoder, ctx, "encoder")
        if known is not None:
            with torch.no_grad():
                hidden = encoder.transform[:-1](encoder.embedding.weight)
            start_at(cast(nn.Linear, encoder.transform[-1]), hidden, known)
        return kind(model, None, encoder, layers, heads)

    def to_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().to_file(model, tensors)
        return {**found, VALUES: for_peft(found[VALUES], _shape(model)[0])} if encodes(model) else found

    def from_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if VALUES not in tensors or not encodes(model):
            return tensors
        layers, _, width = _shape(model)
        return {**tensors, VALUES: used_by_peft(tensors[VALUES], layers, width)}

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        layers, heads, width = _shape(model)
        two = {"num_transformer_submodules": 2} if encodes(model) else {}
        return {
            **super().peft_config(model),
            **two,
            "num_layers": 2 * layers if two else layers,
            "num_attention_heads": heads,
            "token_dim": width,
            "prefix_projection": self.config.projection,
            "encoder_hidden_size": self.config.hidden_size or width,
            "init_weights": None,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        check_fields(fields)
        return {
            **super().from_peft(fields),
            "projection": fields.get("prefix_projection", False),
            "hidden_size": fields.get("encoder_hidden_size"),
        }
