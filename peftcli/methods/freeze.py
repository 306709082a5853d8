"""Freeze: a chosen part of the base moves, such as the last layers
(Lee et al., What Would Elsa Do?, https://arxiv.org/abs/1911.03090)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from peftcli.errors import UsageError, nearest
from peftcli.methods import targets
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import token_fields
from peftcli.methods.kinds import Select

_DEFAULT_LAYERS = 2


class FreezeConfig(MethodConfig):
    """Options of freezing: what moves is the sum of what they name."""

    name: Literal["freeze"] = Field("freeze", description="`freeze`")
    last_layers: int | None = Field(None, ge=1, description=f"The last layers move; {_DEFAULT_LAYERS} where no option chooses a part.")
    first_layers: int | None = Field(None, ge=1, description="The first layers move.")
    patterns: list[str] = Field(
        [], description="Weights move whose dotted name has a place that the regular expression fits, such as `norm`."
    )
    embeddings: bool = Field(False, description="The input embeddings move (and with them an output layer that is tied to them).")


class Freeze(Select[FreezeConfig]):
    """Some of the base's weights move; the file holds those."""

    Config: ClassVar[type[MethodConfig]] = FreezeConfig
    paper = "https://arxiv.org/abs/1911.03090"
    summary = "A chosen part of the base moves: the last or first layers, or weights by name."
    solves = "A share of full fine-tuning's memory, with its capacity in the part that moves; forgets less."
    costs = "Weak where the task is far from pre-training; which part should move has to be found out."
    choose = "A whole model as the result in less memory than full takes; the last layers for a new style, the first ones for a new script."
    caps = Caps(mergeable=True, quantized_base=False, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 5e-5}
    peft = PeftFormat("PEFTCLI_FREEZE", {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}, stock=False)

    def trainable(self, name: str) -> bool:
        return name.startswith(self._begin) or any(pattern.search(name) for pattern in self._patterns)

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        options = self.config
        begin: list[str] = []
        chosen = options.first_layers or options.patterns or options.embeddings
        last = options.last_layers or (0 if chosen else _DEFAULT_LAYERS)
        for key, number in (("last_layers", last), ("first_layers", options.first_layers or 0)):
            stacks = targets.stacks(model) if number else []
            if number and not stacks:
                raise UsageError(f"method.{key}: {type(model).__name__} has no list of layers", hint="choose by name: method.patterns.")
            for stack in stacks:
                # The default may be more than a small model has; a number that the user wrote may not.
                if number > len(stack) and (key == "first_layers" or options.last_layers):
                    raise UsageError(f"method.{key}: {number} is more than the {len(stack)} layers of {stack[0].rpartition('.')[0]}")
                begin += stack[-number:] if key == "last_layers" else stack[:number]
        if options.embeddings:
            embedding = model.get_input_embeddings()  # type: ignore[operator]
            begin += [name for name, module in model.named_modules() if module is embedding]
        self._begin = tuple(f"{name}." for name in begin)
        self._patterns = [_compiled(pattern, model) for pattern in options.patterns]
        return super().apply(model, ctx)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        return {**self.config.model_dump(exclude={"name"}), **token_fields(model)}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {key: fields[key] for key in FreezeConfig.model_fields if key != "name" and key in fields}


def _compiled(pattern: str, model: nn.Module) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"method.patterns: {pattern!r} is no regular expression: {error}") from None
    names = [name for name, _ in model.named_parameters()]
    if not any(compiled.search(name) for name in names):
        parts = {part for name in names for part in name.split(".") if not part.isdigit()}
        near = nearest(pattern, parts)
        raise UsageError(
            f"method.patterns: no weight's name has a place that {pattern!r} fits; parts of names: {', '.join(sorted(parts))}",
            hint=f"did you mean {near!r}?" if near else None,
        )
    return compiled
