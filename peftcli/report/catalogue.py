"""Every figure that a run may report of held-out rows: how it is called, what it means, which way is better.

The order is that of the tables: the most telling first.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A metric in words. ``share``: from 0 to 1, shown in percent. ``top``: the best value of one that grows."""

    label: str
    meaning: str
    higher_is_better: bool = True
    share: bool = False
    top: float = 1.0


FIGURES: dict[str, Figure] = {
    "exact_match": Figure("Exact match", "share of generated answers that equal the reference", share=True),
    "numeric_match": Figure("Numeric match", "share of generated answers that end up with the reference's number", share=True),
    "rouge_l": Figure("ROUGE-L", "longest common subsequence of words of answer and reference: mean F1 over rows", share=True),
    "rouge_1": Figure("ROUGE-1", "words that answer and reference share: mean F1 over rows", share=True),
    "rouge_2": Figure("ROUGE-2", "pairs of words that answer and reference share: mean F1 over rows", share=True),
    "bleu": Figure("BLEU", "sacreBLEU of all answers, 0 to 100", top=100.0),
    "chrf": Figure("chrF", "chrF2 of all answers by sacreBLEU: characters shared with the reference, 0 to 100", top=100.0),
    "entity_f1": Figure("Entity F1", "harmonic mean of precision and recall of whole entities, type and both ends right", share=True),
    "entity_precision": Figure("Entity precision", "share of the entities found that are right", share=True),
    "entity_recall": Figure("Entity recall", "share of the true entities that were found", share=True),
    "reward_accuracy": Figure(
        "Reward accuracy", "share of pairs in which the better answer has the higher reward, ties by half; 50 % is chance", share=True
    ),
    "reward_margin": Figure("Reward margin", "mean reward of better answers minus that of worse ones"),
    "chosen_reward": Figure("Chosen reward", "mean reward of better answers"),
    "rejected_reward": Figure("Rejected reward", "mean reward of worse answers", higher_is_better=False),
    "chosen_log_prob": Figure("Chosen log-probability", "mean over better answers, summed over their tokens"),
    "rejected_log_prob": Figure("Rejected log-probability", "mean over worse answers, summed over their tokens", higher_is_better=False),
    "kl": Figure("KL estimate", "mean of log(p / p of the reference) over answers to other prompts", higher_is_better=False),
    "accuracy": Figure("Accuracy", "share of rows judged right", share=True),
    "f1": Figure("F1", "harmonic mean of precision and recall: of class 1 where there are two, else the mean over classes"),
    "f1_micro": Figure("Micro F1", "F1 over all labels of all rows together"),
    "matthews": Figure("Matthews", "Matthews correlation of found and true class, -1 to 1"),
    "pearson": Figure("Pearson", "linear correlation with the true number, -1 to 1"),
    "spearman": Figure("Spearman", "rank correlation with the true number, -1 to 1"),
    "mean_absolute_error": Figure("Mean absolute error", "mean distance from the true number", higher_is_better=False),
    "token_accuracy": Figure("Token accuracy", "share of supervised tokens predicted right", share=True),
    "loss": Figure("Loss", "mean over what carries loss, in nats", higher_is_better=False),
    "perplexity": Figure("Perplexity", "exp(loss)", higher_is_better=False),
}
# What tells of generated answers, and so of as many rows as were generated.
GENERATED = ("exact_match", "numeric_match", "rouge_l", "rouge_1", "rouge_2", "bleu", "chrf")


def figure(name: str) -> Figure:
    """The metric's words; a name that is not in the list stands for itself, higher being better."""
    return FIGURES.get(name) or Figure(name.replace("_", " ").capitalize(), "")
