"""Direct preference optimization (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290) and its kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.recipe import tasks as options
from peftcli.tasks.preference import Compared, Judgement, PairModule, PairTask


class DPO(PairModule):
    """The reward of an answer is ``beta`` times its log-probability beyond the reference's.

    ``robust``: Chowdhury et al., 2024 (https://arxiv.org/abs/2403.00409); ``ipo``: Azar et al., 2023
    (https://arxiv.org/abs/2310.12036), with log-probabilities averaged over an answer's tokens, as in TRL, which confirmed it with
    the authors; ``hinge``: Zhao et al., 2023 (https://arxiv.org/abs/2305.10425).
    """

    def __init__(self, model: nn.Module, section: options.DPOTask) -> None:
        super().__init__(model)
        self.section = section

    def judge(self, pairs: Compared) -> Judgement:
        ratios = pairs.log_probs - pairs.reference
        return Judgement(self.losses(ratios, pairs.lengths), self.section.beta * ratios)

    def losses(self, ratios: Tensor, lengths: Tensor) -> Tensor:
        """[n] from log-probabilities beyond the reference's and tokens, [n, 2] each."""
        beta, noise = self.section.beta, self.section.label_smoothing
        margin = beta * (ratios[:, 0] - ratios[:, 1])
        match self.section.loss_type:
            case "sigmoid":
                return -(1 - noise) * F.logsigmoid(margin) - noise * F.logsigmoid(-margin)
            case "robust":
                return (-(1 - noise) * F.logsigmoid(margin) + noise * F.logsigmoid(-margin)) / (1 - 2 * noise)
            case "hinge":
                return torch.relu(1 - margin)
            case "ipo":
                means = ratios / lengths
                return (means[:, 0] - means[:, 1] - 1 / (2 * beta)).square()


class DPOTask(PairTask[options.DPOTask]):
    """Direct preference optimization."""

    @property
    def has_reference(self) -> bool:
        return not self.section.reference_free

    def module(self, model: nn.Module) -> DPO:
        return DPO(model, self.section)
