"""Odds ratio preference optimization (Hong et al., 2024, https://arxiv.org/abs/2403.07691)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.recipe import tasks as options
from peftcli.tasks.preference import Compared, Judgement, PairModule, PairTask


class ORPO(PairModule):
    """The better answer's mean token loss, and ``beta`` times that of the odds ratio; the reward is ``beta`` times an answer's mean
    log-probability."""

    def __init__(self, model: nn.Module, section: options.ORPOTask) -> None:
        super().__init__(model)
        self.section = section

    def judge(self, pairs: Compared) -> Judgement:
        means = pairs.log_probs / pairs.lengths
        odds = means - log_1_minus_exp(means)
        ratio = F.logsigmoid(odds[:, 0] - odds[:, 1])
        return Judgement(pairs.loss[:, 0] - self.section.beta * ratio, self.section.beta * means)


def log_1_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler, 2012). A probability of one is taken to be just below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    # The branch that is not taken gets a harmless argument, or its gradient would be infinite times zero.
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -0.5))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


class ORPOTask(PairTask[options.ORPOTask]):
    """Odds ratio preference optimization."""

    @property
    def learns_prompts(self) -> bool:
        return True

    def module(self, model: nn.Module) -> ORPO:
        return ORPO(model, self.section)
