"""BitFit: biases only (Ben Zaken et al., https://arxiv.org/abs/2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.methods import targets
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import token_fields
from peftcli.methods.kinds import AdapterLayer, Select
from peftcli.quantization import is_quantized


class BitFitConfig(MethodConfig):
    """BitFit has no options."""

    name: Literal["bitfit"] = Field("bitfit", description="`bitfit`")


class MovedBias(AdapterLayer):
    """A quantized linear layer with its bias beside it: bitsandbytes casts a bias of its own to the dtype of the input, in
    place, and small updates would be lost. ``moved`` [out] is float32 and starts as the base's bias."""

    def __init__(self, base: nn.Module, bias: Tensor) -> None:
        super().__init__(base)
        base.register_parameter("bias", None)
        self.moved = nn.Parameter(bias.detach().to(torch.float32).clone())

    @property
    def bias(self) -> Tensor:
        return self.moved

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        return (result + self.moved).to(result.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.moved.to(weight)


class BitFit(Select[BitFitConfig]):
    """The base's biases move, those of the norms included."""

    Config: ClassVar[type[MethodConfig]] = BitFitConfig
    paper = "https://arxiv.org/abs/2106.10199"
    summary = "Only the biases move."
    solves = "About 0.1 % of the weights, no new layers, nothing to add at inference; near full fine-tuning on small data."
    costs = "Little capacity for hard or large tasks; models without biases (LLaMA and most since) leave nothing to train."
    choose = (
        "Small data and a base with biases (BERT, GPT-2): within a point of full fine-tuning there, for the smallest change of the weights."
    )
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    peft = PeftFormat("PEFTCLI_BITFIT", {"moved": "bias", "trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}, stock=False)

    def trainable(self, name: str) -> bool:
        return name.rpartition(".")[2] == "bias"

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not any(self.trainable(name) for name, _ in model.named_parameters()):
            raise UsageError(
                f"method.name: {type(model).__name__} has no biases, so bitfit has nothing to train",
                hint="ia3 is as small and needs none; lora is the usual choice.",
            )
        model = super().apply(model, ctx)
        for name, module in list(model.named_modules()):
            if is_quantized(module) and module.bias is not None:
                targets.replace(model, name, MovedBias(module, module.bias).train(module.training))
        return model

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        return token_fields(model)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {}
