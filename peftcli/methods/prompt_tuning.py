"""Prompt tuning: n trained embeddings in front of each row, nothing else (Lester et al., https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.methods.base import Context, MethodConfig, PeftFormat
from peftcli.methods.prompts import VALUES, Prompted, PromptedInputs, PromptMethod, embeddings, from_vocabulary

_TO_PEFT = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}


class PromptTuningConfig(MethodConfig):
    """Options of prompt tuning."""

    name: Literal["prompt_tuning"] = Field("prompt_tuning", description="`prompt_tuning`")
    num_virtual_tokens: int = Field(20, ge=1, le=16384, description="How many trained embeddings stand in front of each row.")
    init: Literal["random", "vocabulary", "text"] = Field(
        "vocabulary",
        description="Initial values: normal random numbers, embeddings of tokens drawn from the vocabulary, or those of `init_text`.",
    )
    init_text: str | None = Field(None, description="Text whose embeddings come first; repeated or cut to the number of virtual tokens.")


class PromptTuning(PromptMethod[PromptTuningConfig]):
    """A soft prompt."""

    Config: ClassVar[type[MethodConfig]] = PromptTuningConfig
    paper = "https://arxiv.org/abs/2104.08691"
    summary = "A few trained embeddings in front of each row; the model itself stays untouched."
    solves = "A few thousand numbers for a task, and one untouched model that serves many tasks in the same batch."
    costs = "Converges slowly and wants a high learning rate, weak on small models, eats context, cannot be folded into the weights."
    choose = (
        "Bases of billions of parameters that serve many tasks in one batch; on small ones take lora. Initialise from the text of the task."
    )
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-2}
    peft = PeftFormat("PROMPT_TUNING", prefix="")

    @classmethod
    def check_recipe(cls, recipe: Any) -> list[tuple[str, str]]:
        options = recipe.method
        faults = super().check_recipe(recipe)
        if options.init == "text" and not options.init_text:
            faults.append(("method.init_text", "init: text needs a text to take the initial values from"))
        if options.init != "text" and options.init_text is not None:
            faults.append(("method.init_text", f"is not used with init: {options.init}; write init: text or take it out"))
        return faults

    def wrap(self, model: nn.Module, ctx: Context) -> Prompted:
        return PromptedInputs(model, self._values(model, ctx))

    def _values(self, model: Any, ctx: Context) -> Tensor:
        options, generator = self.config, ctx.generator(VALUES)
        count, width = options.num_virtual_tokens, model.get_input_embeddings().weight.shape[1]
        if options.init == "random" or ctx.from_file:
            return torch.empty(count, width).normal_(generator=generator)
        if options.init == "vocabulary":
            return from_vocabulary(model, count, generator)
        text = ctx.encode(options.init_text or "") if ctx.encode is not None else []
        if not text:
            raise UsageError("method.init_text: no token to take initial values from", hint="give a text, or choose init: vocabulary.")
        return embeddings(model, torch.tensor((text * (count // len(text) + 1))[:count]))

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        text = self.config.init_text if self.config.init == "text" else None
        return {
            **super().peft_config(model),
            "prompt_tuning_init": _TO_PEFT[self.config.init],
            "prompt_tuning_init_text": text,
            "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        # What PEFT calls by other names changed initial values only, and those are in the file.
        init = next((ours for ours, theirs in _TO_PEFT.items() if theirs == fields.get("prompt_tuning_init")), "random")
        text = fields.get("prompt_tuning_init_text")
        return {**super().from_peft(fields), "init": init, "init_text": text if init == "text" else None}
