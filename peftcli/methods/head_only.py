"""Head only (linear probe): the output layer moves over frozen features
(Alain and Bengio, https://arxiv.org/abs/1610.01644)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from peftcli.errors import UsageError
from peftcli.methods import targets
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import token_fields
from peftcli.methods.kinds import Select, untie


class HeadOnlyConfig(MethodConfig):
    """The linear probe has no options."""

    name: Literal["head_only"] = Field("head_only", description="`head_only`")


class HeadOnly(Select[HeadOnlyConfig]):
    """The output layer of a language model, or the fresh head of a classifier."""

    Config: ClassVar[type[MethodConfig]] = HeadOnlyConfig
    paper = "https://arxiv.org/abs/1610.01644"
    summary = "Only the output layer moves, over frozen features."
    solves = "Nearly free: no gradient passes through the model, so memory is that of inference."
    costs = "Weak where the task is far from pre-training; a language model's output layer is large, and is untied where it was tied."
    choose = "A baseline, or very little data with a classifier: if this is enough, nothing larger is needed."
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    peft = PeftFormat("PEFTCLI_HEAD_ONLY", {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}, stock=False)

    def trainable(self, name: str) -> bool:
        return name.startswith(self._heads)

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        heads = targets.output_layers(model)
        if not heads:
            raise UsageError(f"method.name: {type(model).__name__} has no output layer that head_only could train")
        self._heads = tuple(f"{head}." for head in heads)
        for head in heads:
            if hasattr(model.get_submodule(head), "weight"):
                untie(model, model.get_submodule(head))
        return super().apply(model, ctx)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        return token_fields(model)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {}
