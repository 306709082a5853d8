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

# What transformers calls the head of a classifier.
_CLASSIFIERS = ("score", "classifier", "classification_head")


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
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    peft = PeftFormat("PEFTCLI_HEAD_ONLY", {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}, stock=False)

    def trainable(self, name: str) -> bool:
        return name.startswith(f"{self._head}.")

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        head = targets.output_layer_name(model)
        if head is None:
            head = next((name for name, _ in model.named_children() if name in _CLASSIFIERS), None)
            if head is None:
                raise UsageError(f"method.name: {type(model).__name__} has no output layer that head_only could train")
            _start_afresh(model, head, ctx)
        self._head = head
        untie(model, model.get_submodule(head))
        return super().apply(model, ctx)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        return token_fields(model)

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _start_afresh(model: nn.Module, head: str, ctx: Context) -> None:
    """A classifier's head is no part of the base: its values are the seed's, weights normal (0.02), biases zero."""
    deviation = getattr(getattr(model, "config", None), "initializer_range", 0.02)
    for name, parameter in model.get_submodule(head).named_parameters(prefix=head):
        values = parameter.data.new_zeros(parameter.shape, dtype=parameter.dtype, device="cpu").float()
        parameter.data.copy_(values.normal_(std=deviation, generator=ctx.generator(name)) if parameter.ndim > 1 else values)
