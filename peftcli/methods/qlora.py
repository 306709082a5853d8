"""QLoRA: LoRA over a frozen 4-bit base (Dettmers et al., https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peftcli.methods.lora import Lora, LoraConfig


class QLoraConfig(LoraConfig):
    """LoRA's options."""

    name: Literal["qlora"] = Field("qlora", description="`qlora`")  # type: ignore[assignment]


class QLora(Lora):
    """LoRA that insists on a 4-bit base."""

    Config = QLoraConfig
    paper = "https://arxiv.org/abs/2305.14314"
    summary = "LoRA over a frozen 4-bit NF4 base with double quantization."
    solves = "A quarter of the base's memory: 7B below 24 GB, 65B on 48 GB."
    costs = "A small quantization loss and slower steps."
    choose = "The dense base does not fit into memory, or only with a batch too small; otherwise lora, whose steps are faster."
    recommended = {"base_model.quantization": "nf4", "base_model.double_quantization": True}

    @classmethod
    def check_recipe(cls, recipe: Any) -> list[tuple[str, str]]:
        if recipe.base_model.quantization not in ("nf4", "fp4"):
            return [("base_model.quantization", "qlora needs a 4-bit base: nf4 (the paper's) or fp4; over other bases choose lora")]
        return []
