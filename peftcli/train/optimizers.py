"""Optimizers by name, from well-kept libraries, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from peftcli import quantization
from peftcli.errors import TrainingError
from peftcli.recipe.schema import TrainSection

_BITSANDBYTES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")


def build_optimizer(groups: list[dict[str, Any]], settings: TrainSection, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, over parameter groups that carry their own ``lr`` and ``weight_decay``.

    Raises:
        TrainingError: the optimizer needs a GPU.
    """
    name = settings.optimizer
    if not groups:
        raise TrainingError("nothing to train: no parameter is trainable", hint="check the method's target modules.")
    betas, epsilon = (settings.adam_beta1, settings.adam_beta2), settings.adam_epsilon
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=device.type in ("cpu", "cuda"))
    if name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=settings.learning_rate)
    if name in _BITSANDBYTES:
        if device.type != "cuda":
            raise TrainingError(
                f"train.optimizer: {name} runs on CUDA GPUs only; this run is on the {device.type}", hint="use adamw, adafactor or sgd."
            )
        optimizer: torch.optim.Optimizer = quantization.optimizer_class(name)(groups, betas=betas, eps=epsilon)
        return optimizer
    raise AssertionError(name)


def at_own_rate(groups: list[dict[str, Any]], parameters: Iterable[torch.nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Parameter groups in which ``parameters`` learn at a peak rate of their own, in groups after the others."""
    own = {id(parameter) for parameter in parameters}
    others = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
    apart = [{**group, "params": [p for p in group["params"] if id(p) in own], "lr": rate} for group in groups]
    return [group for group in (*others, *apart) if group["params"]]


def warmup_steps(settings: TrainSection, total_steps: int) -> int:
    """How many steps the learning rate rises."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return math.ceil(settings.warmup_ratio * total_steps)


def learning_rate_factor(step: int, total_steps: int, settings: TrainSection) -> float:
    """The factor on the peak learning rate for optimizer step ``step`` (1-based): linear warm-up that reaches the peak with
    its last step, then cosine or linear towards zero at the end, or constant."""
    warm = warmup_steps(settings, total_steps)
    if step <= warm:
        return step / warm
    if settings.scheduler == "constant":
        return 1.0
    progress = (step - 1 - warm) / max(1, total_steps - warm)
    if settings.scheduler == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
