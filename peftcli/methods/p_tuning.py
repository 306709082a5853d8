"""P-tuning: virtual tokens that a small trained network makes, so that they depend on each other
(Liu et al., https://arxiv.org/abs/2103.10385).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.methods.base import Context, MethodConfig, PeftFormat
from peftcli.methods.prompts import VALUES, Prompted, PromptedInputs, PromptMethod, from_vocabulary, initialised, start_at


class PTuningConfig(MethodConfig):
    """Options of p-tuning."""

    name: Literal["p_tuning"] = Field("p_tuning", description="`p_tuning`")
    num_virtual_tokens: int = Field(20, ge=1, le=16384, description="How many virtual tokens stand in front of each row.")
    encoder: Literal["lstm", "mlp"] = Field(
        "mlp", description="The network that makes them: three linear layers, or a two-way LSTM and two linear layers (the paper's)."
    )
    hidden_size: int | None = Field(None, ge=1, le=65536, description="Its inner width; default: the width of the embeddings.")
    num_layers: int = Field(2, ge=1, le=64, description="Layers of the LSTM; the other encoder has three linear ones.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout between the layers of the LSTM.")


class PromptEncoder(nn.Module):
    """[n, width] virtual tokens from n trained embeddings; layers and names are PEFT's.

    Args:
        count, width: of the virtual tokens. The other arguments: see :class:`PTuningConfig`.
    """

    def __init__(self, count: int, width: int, kind: str, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        self.lstm_head: nn.LSTM | None = None
        if kind == "lstm":
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout if layers > 1 else 0.0, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(hidden * 2, hidden * 2), nn.ReLU(), nn.Linear(hidden * 2, width))
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
            )

    def forward(self) -> Tensor:
        """The virtual tokens."""
        x = self.embedding.weight[None]
        return cast(Tensor, self.mlp_head(self._inner(x)))[0]

    def start_at(self, values: Tensor) -> None:
        """Begin with ``values`` [n, width] as the virtual tokens."""
        *inner, last = self.eval().mlp_head
        with torch.no_grad():
            hidden = nn.Sequential(*inner)(self._inner(self.embedding.weight[None]))[0]
        start_at(cast(nn.Linear, last), hidden, values)
        self.train()

    def _inner(self, x: Tensor) -> Tensor:
        return x if self.lstm_head is None else cast(Tensor, self.lstm_head(x)[0])


class PTuning(PromptMethod[PTuningConfig]):
    """A soft prompt behind an encoder. The file holds what the encoder makes; checkpoints hold the encoder."""

    Config: ClassVar[type[MethodConfig]] = PTuningConfig
    paper = "https://arxiv.org/abs/2103.10385"
    summary = "Virtual tokens made by a small LSTM or MLP; the model itself stays untouched."
    solves = "Learns faster and steadier than bare virtual tokens; what is kept for a task is as small as theirs."
    costs = "The encoder's weights while training, eats context, weak on small models, cannot be folded into the weights."
    choose = "Classification and extraction with a base that must stay untouched, where plain prompt tuning is unsteady."
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    peft = PeftFormat("P_TUNING", prefix="")

    def wrap(self, model: nn.Module, ctx: Context) -> Prompted:
        options, width = self.config, cast(Any, model).get_input_embeddings().weight.shape[1]
        if ctx.from_file and not ctx.shapes_only:
            return PromptedInputs(model, torch.zeros(options.num_virtual_tokens, width))
        encoder = PromptEncoder(
            options.num_virtual_tokens, width, options.encoder, options.hidden_size or width, options.num_layers, options.dropout
        )
        if not ctx.shapes_only:
            initialised(encoder, ctx, "encoder")
            encoder.start_at(from_vocabulary(model, options.num_virtual_tokens, ctx.generator(VALUES)))
        return PromptedInputs(model, None, encoder)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options, shared = self.config, super().peft_config(model)
        return {
            **shared,
            "encoder_reparameterization_type": options.encoder.upper(),
            "encoder_hidden_size": options.hidden_size or shared["token_dim"],
            "encoder_num_layers": options.num_layers,
            "encoder_dropout": options.dropout,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super().from_peft(fields),
            "encoder": str(fields.get("encoder_reparameterization_type", "MLP")).lower(),
            "hidden_size": fields.get("encoder_hidden_size"),
            "num_layers": fields.get("encoder_num_layers", 2),
            "dropout": fields.get("encoder_dropout", 0.0),
        }
