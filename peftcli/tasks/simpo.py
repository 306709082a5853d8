"""Simple preference optimization (Meng et al., 2024, https://arxiv.org/abs/2405.14734)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from peftcli.recipe import tasks as options
from peftcli.tasks.preference import Compared, Judgement, PairModule, PairTask


class SimPO(PairModule):
    """The reward is ``beta`` times an answer's mean log-probability, and the better one's is to be ``gamma`` higher."""

    def __init__(self, model: nn.Module, section: options.SimPOTask) -> None:
        super().__init__(model)
        self.section = section

    def judge(self, pairs: Compared) -> Judgement:
        rewards = self.section.beta * pairs.log_probs / pairs.lengths
        return Judgement(-F.logsigmoid(rewards[:, 0] - rewards[:, 1] - self.section.gamma), rewards)


class SimPOTask(PairTask[options.SimPOTask]):
    """Simple preference optimization."""

    def module(self, model: nn.Module) -> SimPO:
        return SimPO(model, self.section)
