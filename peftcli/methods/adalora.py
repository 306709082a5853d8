"""AdaLoRA: LoRA in the form of a singular value decomposition, ``W + (alpha / r) P diag(E) Q``, whose ranks are spent where
they matter (Zhang et al., https://arxiv.org/abs/2303.10512).

Every matrix starts with ``init_rank`` triplets. The run's budget falls, by a cubic curve over its length, to
``target_rank`` for each matrix on average; the least important triplets of all matrices lose their singular value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat, Tick
from peftcli.methods.fields import module_fields, module_options, refuse, whole_number
from peftcli.methods.kinds import AdapterLayer, LayerMethod, features
from peftcli.methods.lora_layers import beside
from peftcli.methods.rank_budget import RankBudget


class AdaLoraConfig(MethodConfig):
    """Options of AdaLoRA."""

    name: Literal["adalora"] = Field("adalora", description="`adalora`")
    init_rank: int = Field(12, ge=1, le=16384, description="Triplets that every matrix starts with.")
    target_rank: int = Field(8, ge=1, le=16384, description="Triplets that a matrix keeps at the end, on average.")
    min_rank: int = Field(
        0, ge=0, description="Triplets that every matrix keeps. With 0, the paper's rule, whole matrices may fall out of the adapter."
    )
    alpha: float = Field(32.0, gt=0.0, description="The update is scaled by alpha / init_rank.")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the input of the adapter.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get an adapter, as for lora.")
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the adapter.")
    initial_ratio: float = Field(0.1, ge=0.0, lt=1.0, description="Share of the steps before the budget begins to fall.")
    final_ratio: float = Field(
        0.5, ge=0.0, lt=1.0, description="Share of the steps after the ranks are settled; the paper's runs take about half."
    )
    interval: int = Field(10, ge=1, description="Steps from one allocation to the next while the budget falls.")
    beta1: float = Field(0.85, gt=0.0, lt=1.0, description="Smoothing of a weight's sensitivity.")
    beta2: float = Field(0.85, gt=0.0, lt=1.0, description="Smoothing of the sensitivity's uncertainty.")
    orthogonality: float = Field(0.5, ge=0.0, description="Weight of the penalty that keeps P and Q orthogonal.")
    kept: dict[str, list[bool]] = Field({}, description="Triplets that a finished adapter kept, by module; not for training.")

    @model_validator(mode="after")
    def _ranks(self) -> Self:
        if self.target_rank > self.init_rank:
            raise ValueError(f"target_rank {self.target_rank} is above init_rank {self.init_rank}; the budget only falls")
        if self.min_rank > self.target_rank:
            raise ValueError(f"min_rank {self.min_rank} is above target_rank {self.target_rank}")
        if self.initial_ratio + self.final_ratio >= 1.0:
            raise ValueError("initial_ratio and final_ratio leave no steps in which the budget can fall")
        if any(len(kept) != self.init_rank for kept in self.kept.values()):
            raise ValueError(f"kept must have init_rank = {self.init_rank} entries for each module")
        return self


class AdaLoraLayer(AdapterLayer):
    """``base(x) + scaling * P (E * (Q dropout(x)))``.

    Args:
        base: a linear layer, in -> out.
        rank: of the parameters ``lora_A`` (Q) [rank, in], ``lora_E`` [rank, 1] and ``lora_B`` (P) [out, rank], float32.
        generator: for Q and P, normal with deviation 0.02; E starts at zero, so the layer starts as the base.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base)
        width_in, width_out = features(base)
        self.lora_A = nn.Parameter(torch.empty(rank, width_in).normal_(std=0.02, generator=generator))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1))
        self.lora_B = nn.Parameter(torch.empty(width_out, rank).normal_(std=0.02, generator=generator))
        self.scaling = alpha / (rank + 1e-5)  # PEFT's guard against a rank of zero
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return beside(self.base, x, self.dropout(x), self.lora_A * self.lora_E, self.lora_B, self.scaling)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + (self.lora_B.to(weight) @ (self.lora_A * self.lora_E).to(weight)) * self.scaling, bias

    def penalty(self) -> Tensor:
        """How far P and Q are from orthogonal, a scalar: the sum of ``||Q Q' - I||`` and ``||P' P - I||`` (Frobenius)."""
        identity = torch.eye(len(self.lora_A), dtype=self.lora_A.dtype, device=self.lora_A.device)
        sides = self.lora_A @ self.lora_A.t() - identity, self.lora_B.t() @ self.lora_B - identity
        both: Tensor = torch.linalg.matrix_norm(sides[0]) + torch.linalg.matrix_norm(sides[1])
        return both


class AdaLora(LayerMethod[AdaLoraConfig]):
    """Low-rank adapters that share one falling budget of ranks."""

    Config: ClassVar[type[MethodConfig]] = AdaLoraConfig
    paper = "https://arxiv.org/abs/2303.10512"
    summary = "LoRA as P diag(E) Q, with a rank budget that moves to the matrices where it matters."
    solves = "One fixed rank everywhere: spends the same number of ranks where they matter most."
    costs = "More hyper-parameters, a state three times the adapter's size while training, and needs the length of the run."
    choose = "A fixed budget of parameters, and a run long enough (some thousand steps) for ranks to move where they matter."
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 1e-3}
    peft = PeftFormat("ADALORA", {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}, empty=True)

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        self.layers: dict[str, AdaLoraLayer] = {}
        model = super().apply(model, ctx)
        self.budget = RankBudget(self.config, self.layers)
        self.penalty = torch.zeros(())
        return model

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        options = self.config
        self.layers[name] = AdaLoraLayer(base, options.init_rank, options.alpha, options.dropout, ctx.generator(name))
        return self.layers[name]

    def before_step(self, model: nn.Module, tick: Tick) -> None:
        self.penalize()
        self.budget.measure(tick)

    def penalize(self) -> None:
        """Add the gradient of the penalty, once for each step and alike in every process; the loss does not hold it, so that losses compare
        with other methods'."""
        self.penalty = torch.stack([layer.penalty() for layer in self.layers.values()]).sum() / (2 * len(self.layers))
        factors = [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]
        for factor, pull in zip(factors, torch.autograd.grad(self.config.orthogonality * self.penalty, factors), strict=True):
            factor.grad = pull if factor.grad is None else factor.grad + pull

    def after_step(self, model: nn.Module, tick: Tick) -> None:
        self.budget.allocate(tick)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        return {"average_rank": self.budget.average_rank(), "orthogonality": float(self.penalty.detach())}

    def notes(self) -> list[str]:
        if self.budget.kept or not self.budget.step:
            return []
        ranks = f"each matrix has {self.config.init_rank}, the target is {self.config.target_rank} on average"
        return [f"adalora: the weights are those of step {self.budget.step}, before the ranks were settled: {ranks}"]

    def state(self) -> dict[str, Tensor]:
        return self.budget.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.budget.load_state(state)

    def to_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.budget.cut(tensors)

    def from_file(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.budget.widen(tensors)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        options = self.config
        initial, final, total = self.budget.schedule()
        kept = self.budget.kept
        return {
            "trainable_token_indices": None,
            **module_fields(model, AdaLoraLayer, options),
            "fan_in_fan_out": any(type(layer.base).__name__ == "Conv1D" for layer in self.layers.values()),
            "bias": "none",
            "init_r": options.init_rank,
            "target_r": options.target_rank,
            "lora_alpha": whole_number(options.alpha),
            "lora_dropout": options.dropout,
            "tinit": initial,
            "tfinal": final,
            "total_step": total,
            "deltaT": options.interval,
            "beta1": options.beta1,
            "beta2": options.beta2,
            "orth_reg_weight": options.orthogonality,
            "rank_pattern": {f"{name}.lora_E": mask.tolist() for name, mask in sorted(kept.items())} or None,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        refuse(fields, {"bias": ("none", None), "layer_replication": (None, [])})
        total = max(int(fields.get("total_step") or 1), 1)
        return {
            "init_rank": fields.get("init_r", 12),
            "target_rank": min(fields.get("target_r", 8), fields.get("init_r", 12)),
            "min_rank": 0,
            "alpha": fields.get("lora_alpha", 8),
            "dropout": fields.get("lora_dropout", 0.0),
            **module_options(fields),
            "initial_ratio": fields.get("tinit", 0) / total,
            "final_ratio": fields.get("tfinal", 0) / total,
            "interval": fields.get("deltaT", 1),
            "beta1": fields.get("beta1", 0.85),
            "beta2": fields.get("beta2", 0.85),
            "orthogonality": fields.get("orth_reg_weight", 0.5),
            "kept": {name.removesuffix(".lora_E"): mask for name, mask in (fields.get("rank_pattern") or {}).items()},
        }
