"""The options of LoRA and its variants."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from peftcli.methods.base import MethodConfig

PositiveInt = Annotated[int, Field(ge=1)]


class LoraConfig(MethodConfig):
    """Options of LoRA."""

    name: Literal["lora"] = Field("lora", description="`lora`")
    rank: int = Field(16, ge=1, le=16384, description="Width r of the two thin matrices.")
    alpha: float = Field(32.0, gt=0.0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the input of the adapter.")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules that get an adapter: `all-linear` (all but the output layer), a list of names, "
        "or a regular expression for the whole dotted name.",
    )
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    layers_to_transform: list[Annotated[int, Field(ge=0)]] = Field([], description="Only the targets in the blocks of these numbers.")
    adapt_embeddings: bool = Field(False, description="Allow target_modules to name embeddings; their adapter is r numbers for each token.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead: steadier at high ranks.")
    use_dora: bool = Field(False, description="DoRA: train the length of every row of the weight too; slower, better at low ranks.")
    loraplus_lr_ratio: float | None = Field(None, gt=0.0, description="LoRA+: B learns this many times faster than A; the paper takes 16.")
    init_lora_weights: str = Field(
        "default",
        pattern=r"^(default|gaussian|loftq|olora|pissa|pissa_niter_[1-9]\d?)$",
        description="Initial values: `default` (A uniform, B zero), `gaussian`, `pissa` (the weight's principal directions; "
        "`pissa_niter_16` finds them approximately, in a fraction of the time), `olora` (its QR decomposition) or `loftq` "
        "(what a quantized base has lost).",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases that are trained too: of all layers, or of the adapted.")
    rank_pattern: dict[str, PositiveInt] = Field({}, description="Another rank for modules whose name ends with, or matches, the key.")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] = Field({}, description="Another alpha, likewise.")
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the adapter, such as `lm_head`.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.use_dora and self.init_lora_weights not in ("default", "gaussian"):
            raise ValueError(f"use_dora and init_lora_weights {self.init_lora_weights} cannot be combined; choose one of the two")
        return self
