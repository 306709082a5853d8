"""IA3: learned scales on keys, values and the inputs of the second feed-forward layer
(Liu et al., https://arxiv.org/abs/2205.05638).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.errors import UsageError
from peftcli.kernels.elementwise import scaled
from peftcli.methods import targets
from peftcli.methods.base import Caps, Context, MethodConfig, PeftFormat
from peftcli.methods.fields import adapted_names, module_fields, module_options
from peftcli.methods.kinds import AdapterLayer, LayerMethod, features

# (targets, those of them that are feed-forward) of a family, told by the names of its layers. PEFT has the same for LLaMA,
# GPT-2 (whose keys and values come out of one layer, queries with them), BERT and T5.
FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    (("k_proj", "v_proj", "fc2"), ("fc2",)),
    (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    (("key", "value", "output.dense"), ("output.dense",)),
    (("k", "v", "wo"), ("wo",)),
    (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
)


class Ia3Config(MethodConfig):
    """Options of IA3."""

    name: Literal["ia3"] = Field("ia3", description="`ia3`")
    target_modules: str | list[str] | None = Field(
        None,
        description="Modules that get scales: `all-linear`, a list of names, or a regular expression for the whole dotted name; "
        "left out: keys, values and the second feed-forward layer, as in the paper.",
    )
    feedforward_modules: str | list[str] | None = Field(
        None,
        description="Those of the targets whose inputs are scaled, not their outputs: a list of names or a regular expression; "
        "left out: the second feed-forward layer.",
    )
    exclude_modules: list[str] = Field([], description="Names taken out of the targets.")
    modules_to_save: list[str] = Field([], description="Modules that are trained and saved whole beside the scales, such as `lm_head`.")


class Ia3Layer(AdapterLayer):
    """``base(x) * scale``, or ``base(x * scale)`` for feed-forward layers. ``ia3_l`` is [out, 1], or [1, in], float32, and starts
    at one, so the layer starts as the base."""

    def __init__(self, base: nn.Module, *, feedforward: bool) -> None:
        super().__init__(base)
        width_in, width_out = features(base)
        self.ia3_l = nn.Parameter(torch.ones((1, width_in) if feedforward else (width_out, 1)))
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        scale = self.ia3_l.flatten()
        if self.feedforward:
            of_scaled: Tensor = self.base(scaled(x, scale))
            return of_scaled
        result: Tensor = self.base(x)
        return scaled(result, scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.ia3_l.to(weight)
        return weight * scale, bias * scale.flatten() if bias is not None and not self.feedforward else bias


class Ia3(LayerMethod[Ia3Config]):
    """Scales on what frozen linear layers put out or take in."""

    Config: ClassVar[type[MethodConfig]] = Ia3Config
    paper = "https://arxiv.org/abs/2205.05638"
    summary = "Learned scales on keys, values and feed-forward inputs."
    solves = "The fewest numbers of all: about 0.01 % of the weights, mergeable, many tasks in one batch."
    costs = "The least capacity; wants a high learning rate (the paper's 3e-3) and a base that nearly knows the task."
    choose = "A few dozen rows and a capable, instruction-tuned base; or thousands of tasks whose files must be tiny."
    caps = Caps(mergeable=True, quantized_base=True, identity_at_init=True)
    recommended: ClassVar[dict[str, object]] = {"train.learning_rate": 3e-3}
    peft = PeftFormat("IA3", {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"})

    def _named(self, model: nn.Module) -> tuple[str | Sequence[str], str | Sequence[str]]:
        """The targets and the feed-forward ones among them, the family's where the options leave them out."""
        named, forward = self.config.target_modules, self.config.feedforward_modules
        names = [name for name, module in model.named_modules() if targets.is_linear(module)]
        for family, inputs in FAMILIES:
            if all(any(f".{name}".endswith(f".{end}") for name in names) for end in family):
                return (list(family) if named is None else named), (inputs if forward is None else forward)
        if named is None:
            raise UsageError(
                f"method.target_modules: {type(model).__name__} has layers of no known names, so ia3 cannot tell keys and values",
                hint="name them: target_modules, and in feedforward_modules those whose inputs are to be scaled.",
            )
        return named, forward or ()

    def target_names(self, model: nn.Module) -> list[str]:
        named, forward = self._named(model)
        names = targets.match(model, named, self.config.exclude_modules)
        if isinstance(self.config.feedforward_modules, list):
            outside = [end for end in forward if not any(_is_one_of(name, [end]) for name in names)]
            if outside:
                raise UsageError(
                    f"method.feedforward_modules: {', '.join(outside)} is not among the targets; they are {', '.join(names[:8])}"
                )
        self._inputs = {name for name in names if _is_one_of(name, forward)}
        return names

    def make_layer(self, name: str, base: nn.Module, ctx: Context) -> AdapterLayer:
        return Ia3Layer(base, feedforward=name in self._inputs)

    def param_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Scales do not decay: they would be drawn to zero, and their rest is at one."""
        scales = [p for name, p in sorted(model.named_parameters()) if p.requires_grad and name.endswith(".ia3_l")]
        own = {id(p) for p in scales}
        groups = super().param_groups(model, learning_rate, weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        groups.append({"params": scales, "lr": learning_rate, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        names = adapted_names(model, Ia3Layer)
        inputs = sorted(name for name in names if name in self._inputs)
        fields = module_fields(model, Ia3Layer, self.config)
        # PEFT looks at ends of any length, and wants each of these names among the targets.
        short = sorted({end for end in fields["target_modules"] for name in inputs if f".{name}".endswith(f".{end}")})
        if {name for name in names if name.endswith(tuple(short))} != set(inputs):
            fields["target_modules"], short = sorted(names), inputs
        conv1d = any(type(model.get_submodule(f"{name}.base")).__name__ == "Conv1D" for name in names)
        return {**fields, "feedforward_modules": short, "fan_in_fan_out": conv1d, "init_ia3_weights": True}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        forward = fields.get("feedforward_modules")
        # A name in PEFT's list fits the end of a module's name at any letter.
        ends = rf".*({'|'.join(re.escape(end) for end in sorted(forward))})" if isinstance(forward, list) and forward else forward
        return {**module_options(fields), "feedforward_modules": ends if ends is not None else []}


def _is_one_of(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted)
