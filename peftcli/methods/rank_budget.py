"""AdaLoRA's allocator: which of the ranks of all matrices together are kept (https://arxiv.org/abs/2303.10512, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from peftcli.errors import CheckpointError
from peftcli.methods.base import Tick

if TYPE_CHECKING:
    from peftcli.methods.adalora import AdaLoraConfig, AdaLoraLayer

_FACTORS = ("lora_A", "lora_B", "lora_E")


class RankBudget:
    """Keeps count of how important each triplet is, and takes the singular values of the least important ones away.

    Args:
        options: ranks, schedule and smoothing.
        layers: the adapted matrices by name.

    Attributes:
        kept: once the ranks are settled, which triplets each matrix keeps, [init_rank] bool; empty before.
    """

    def __init__(self, options: AdaLoraConfig, layers: Mapping[str, AdaLoraLayer]) -> None:
        self.options, self.layers = options, dict(sorted(layers.items()))
        unknown = sorted(set(options.kept) - set(layers))
        if unknown:
            raise CheckpointError(f"rank_pattern names {unknown[0]}, which is not adapted")
        self.kept: dict[str, Tensor] = {}
        if options.kept:
            every = [True] * options.init_rank
            self.kept = {name: torch.tensor(options.kept.get(name, every)) for name in self.layers}
        self.step = self.steps = 0
        # By parameter: smoothed sensitivity |w dL/dw| and its smoothed uncertainty.
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def schedule(self) -> tuple[int, int, int]:
        """(steps before the budget falls, steps after the ranks are settled, all steps); one step before any was seen."""
        initial, final = (math.floor(ratio * self.steps) for ratio in (self.options.initial_ratio, self.options.final_ratio))
        return (initial, final, self.steps) if self.steps - initial - final > 0 else (0, 0, max(1, self.steps))

    def size(self, step: int) -> int:
        """How many triplets all matrices may have together after ``step``."""
        initial, final, total = self.schedule()
        first, last = (rank * len(self.layers) for rank in (self.options.init_rank, self.options.target_rank))
        if step <= initial:
            return first
        left = max(0.0, 1.0 - (step - initial) / (total - final - initial))
        return int((first - last) * left**3 + last)

    def measure(self, tick: Tick) -> None:
        """Take the gradients of this step into account; called while they are there."""
        self.step, self.steps = tick.step, tick.total_steps
        if self._settled(tick.step):
            return
        beta1, beta2 = self.options.beta1, self.options.beta2
        for name, layer in self.layers.items():
            for factor in _FACTORS:
                key, parameter = f"{name}.{factor}", cast(Tensor, getattr(layer, factor))
                if parameter.grad is None:
                    continue
                now = (parameter.detach() * parameter.grad).abs()
                mean = self.sensitivity.setdefault(key, torch.zeros_like(now))
                spread = self.uncertainty.setdefault(key, torch.zeros_like(now))
                mean.mul_(beta1).add_(now, alpha=1.0 - beta1)
                spread.mul_(beta2).add_((now - mean).abs_(), alpha=1.0 - beta2)

    @torch.no_grad()
    def allocate(self, tick: Tick) -> None:
        """Called after the optimizer's step: cut to the budget where it is due, and hold the cut once the ranks are settled."""
        initial, final, total = self.schedule()
        last = total - final
        due = initial < tick.step < last and tick.step % self.options.interval == 0
        if due or (tick.step >= last and not self.kept):
            masks = self._most_important(self.size(tick.step))
            if tick.step >= last:
                self.kept = masks
                self.sensitivity, self.uncertainty = {}, {}
        elif self.kept:
            masks = self.kept
        else:
            return
        for name, layer in self.layers.items():
            layer.lora_E.masked_fill_(~masks[name].to(layer.lora_E.device).unsqueeze(1), 0.0)

    def _settled(self, step: int) -> bool:
        _, final, total = self.schedule()
        return step > total - final or bool(self.kept)

    def _most_important(self, budget: int) -> dict[str, Tensor]:
        scores = []
        for name in self.layers:
            a, b, e = (self.sensitivity[f"{name}.{factor}"] * self.uncertainty[f"{name}.{factor}"] for factor in _FACTORS)
            score = (e.view(-1) + a.mean(1) + b.mean(0)).cpu()
            score[score.topk(self.options.min_rank).indices] = torch.inf
            scores.append(score)
        # The order of equal scores is fixed, so exactly `budget` are kept.
        order = torch.cat(scores).argsort(descending=True, stable=True)
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[order[:budget]] = True
        return dict(zip(self.layers, keep.split([len(score) for score in scores]), strict=True))

    def average_rank(self) -> float:
        """The budget after the newest step, for each matrix."""
        return self.size(self.step) / len(self.layers)

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` by parameter name, with the kept triplets only."""
        result = dict(tensors)
        for name, mask in self.kept.items():
            for factor in _FACTORS:
                key = f"{name}.{factor}"
                result[key] = tensors[key][:, mask] if factor == "lora_B" else tensors[key][mask]
        return result

    def widen(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`cut`: triplets that were not kept are zero."""
        result = dict(tensors)
        for name, layer in self.layers.items():
            for factor in _FACTORS:
                key, parameter = f"{name}.{factor}", cast(Tensor, getattr(layer, factor))
                if key not in tensors or tensors[key].shape == parameter.shape:
                    continue
                side = 1 if factor == "lora_B" else 0
                mask = self.kept.get(name)
                if mask is None or tensors[key].ndim != 2 or tensors[key].shape[side] != int(mask.sum()):
                    raise CheckpointError(f"{key} has the shape {tuple(tensors[key].shape)}, which rank_pattern does not say")
                wide = torch.zeros(parameter.shape, dtype=tensors[key].dtype)
                if side:
                    wide[:, mask] = tensors[key]
                else:
                    wide[mask] = tensors[key]
                result[key] = wide
        return result

    def state(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        parts = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "kept": self.kept}
        flat = {f"{part}.{key}": value.cpu() for part, values in parts.items() for key, value in values.items()}
        return {"step": torch.tensor(self.step), "steps": torch.tensor(self.steps), **flat}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""

        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {key.removeprefix(start): value.clone() for key, value in state.items() if key.startswith(start)}

        self.step, self.steps, self.kept = int(state["step"]), int(state["steps"]), part("kept")
        device = {f"{name}.{factor}": layer.lora_A.device for name, layer in self.layers.items() for factor in _FACTORS}
        self.sensitivity = {key: value.to(device[key]) for key, value in part("sensitivity").items()}
        self.uncertainty = {key: value.to(device[key]) for key, value in part("uncertainty").items()}
