"""The options of LoRA and its variants."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from peftcli.methods.base import MethodConfig
from peftcli.methods.fields import expressions

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
        pattern=r"^(default|gaussian|orthogonal|eva|loftq|olora|pissa|pissa_niter_[1-9]\d?)$",
        description="Initial values: `default` (A uniform, B zero), `gaussian`, `orthogonal` (both away from zero, their product "
        "zero), `pissa` (the weight's principal directions; `pissa_niter_16` finds them approximately, in a fraction of the time), "
        "`olora` (its QR decomposition), `loftq` (what a quantized base has lost) or `eva` (the principal directions of each "
        "layer's inputs in the first training batches; ranks move to the layers whose inputs have more of them). The base always "
        "stays as it is: `pissa` and `olora` over a quantized base start from the quantized weight, whose error they do not lower.",
    )
    eva_rho: float = Field(2.0, ge=1.0, description="EVA: a layer gets at most this many times its rank; 1 leaves the ranks as they are.")
    eva_tau: float = Field(
        0.99, gt=0.0, lt=1.0, description="EVA: the search ends when a batch turns no direction further than to this cosine."
    )
    eva_use_label_mask: bool = Field(True, description="EVA: look only at the positions that carry loss; else at all tokens.")
    eva_whiten: bool = Field(False, description="EVA: divide each direction by the square root of its singular value.")
    eva_adjust_scaling_factors: bool = Field(True, description="EVA: alpha follows a layer's rank, so that its scale stays.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases that are trained too: of all layers, or of the adapted.")
    rank_pattern: Annotated[dict[str, PositiveInt], AfterValidator(expressions)] = Field(
        {}, description="Another rank for modules whose name ends with the key; a key may be a regular expression for that end."
    )
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0.0)]], AfterValidator(expressions)] = Field(
        {}, description="Another alpha, likewise."
    )
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the adapter, such as `lm_head`.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        fields = type(self).model_fields
        idle = [key for key, field in fields.items() if key.startswith("eva_") and getattr(self, key) != field.default]
        if idle and self.init_lora_weights != "eva":
            raise ValueError(f"{idle[0]} needs init_lora_weights: eva, not {self.init_lora_weights}")
        return self
