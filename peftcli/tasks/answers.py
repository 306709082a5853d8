"""Metrics of generated answers against the data's own: equal text, equal number, ROUGE, BLEU and chrF.

Where the data have several answers to one request, equal to any of them is right, ROUGE takes the highest of each figure, and BLEU
and chrF are those of several references.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import zip_longest
from typing import Any

import numpy as np

from peftcli.errors import DataError
from peftcli.tasks.intervals import Floats, Metric, of_sums, share

References = Sequence[Sequence[str]]
# Han, kana and Hangul: scripts whose words no blank separates, or whose letters the usual tokenizers of ROUGE drop.
_EAST_ASIAN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
_WORDS = re.compile(rf"{_EAST_ASIAN.pattern}|[^\W_]")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_CURRENCY = re.compile(r"[$€£¥₹₩]\s?")
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# A hyphen is a sign only where nothing stands before it that could be subtracted from.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![A-Za-z0-9_)\].])-)?(?:(?:(?P<whole>{_PLAIN})[ ])?(?P<top>{_PLAIN})/(?P<bottom>\d*[1-9]\d*)(?![\d/])"
    rf"|(?P<decimal>(?:{_PLAIN}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?!\w))?))"
)


def is_match(answer: str, reference: str) -> bool:
    """Exact match: equal once surrounding blanks are removed."""
    return answer.strip() == reference.strip()


def last_number(text: str) -> Fraction | None:
    """The number that a text ends up with: the first after the last ``####`` (as in GSM8K) or in the last ``\\boxed{``, else the
    last of the text; ``None`` where there is none. Separators of thousands, currency signs and percent signs do not count."""
    text = _FRACTION.sub(r"\1/\2", unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
    text = _CURRENCY.sub("", text)
    for mark in ("####", "\\boxed{"):
        _, found, rest = text.rpartition(mark)
        if found and (first := _NUMBER.search(rest)):
            return _value(first)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(found: re.Match[str]) -> Fraction:
    def plain(name: str) -> Fraction:
        return Fraction((found[name] or "0").replace(",", ""))

    value = plain("decimal") if found["decimal"] else plain("whole") + plain("top") / plain("bottom")
    return -value if found["sign"] else value


def numbers_match(answer: str, reference: str) -> bool:
    """Whether both texts end up with the same number."""
    number = last_number(answer)
    return number is not None and number == last_number(reference)


def judged(metrics: Sequence[str], answer: str, references: Sequence[str]) -> bool | None:
    """Whether one answer is right by what was asked for; ``None`` where the metrics have degrees only."""
    if "numeric_match" in metrics:
        return any(numbers_match(answer, reference) for reference in references)
    return any(is_match(answer, reference) for reference in references) if "exact_match" in metrics else None


def answer_scores(metrics: Sequence[str], answers: Sequence[str], references: References) -> dict[str, Metric]:
    """The figures of ``metrics`` (the recipe's ``eval.metrics``) over all answers.

    Args:
        references: for each answer those that are right, at least one.

    Raises:
        DataError: ``numeric_match`` is asked for, and none of an answer's references holds a number.
    """
    found: dict[str, Metric] = {}
    for name in metrics if answers else ():
        found |= _MEASURES[name](answers, references)
    return found


def _exact(answers: Sequence[str], references: References) -> dict[str, Metric]:
    return {"exact_match": share([bool(judged(["exact_match"], *pair)) for pair in zip(answers, references, strict=True)])}


def _numeric(answers: Sequence[str], references: References) -> dict[str, Metric]:
    without = [texts[0] for texts in references if all(last_number(text) is None for text in texts)]
    if without:
        raise DataError(
            f"eval.metrics: numeric_match compares numbers, and {len(without)} of {len(references)} expected answers hold none, "
            f"such as {without[0][:80]!r}",
            hint="take numeric_match out of eval.metrics, or evaluate on rows whose answers are numbers",
        )
    return {"numeric_match": share([bool(judged(["numeric_match"], *pair)) for pair in zip(answers, references, strict=True)])}


class _Words:
    """ROUGE's tokens: runs of letters and digits in lower case, of any script; East Asian characters one by one."""

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        end = -1
        for found in _WORDS.finditer(unicodedata.normalize("NFKC", text).lower()):
            letter = found[0]
            if found.start() == end and not _EAST_ASIAN.match(letter) and not _EAST_ASIAN.match(tokens[-1]):
                tokens[-1] += letter
            else:
                tokens.append(letter)
            end = found.end()
        return tokens


def _rouge(answers: Sequence[str], references: References) -> dict[str, Metric]:
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()), tokenizer=_Words())
    scores = [scorer.score_multi(texts, answer) for answer, texts in zip(answers, references, strict=True)]
    return {
        ours: of_sums([(score[theirs].fmeasure, 1.0) for score in scores], lambda sums: sums[:, 0] / sums[:, 1])
        for ours, theirs in names.items()
    }


def _bleu(answers: Sequence[str], references: References) -> dict[str, Metric]:
    from sacrebleu.metrics.bleu import BLEU

    asian = any(_EAST_ASIAN.search(text) for texts in references for text in texts)
    return {"bleu": _of_corpus(BLEU(tokenize="zh" if asian else "13a"), answers, references)}


def _chrf(answers: Sequence[str], references: References) -> dict[str, Metric]:
    from sacrebleu.metrics.chrf import CHRF

    return {"chrf": _of_corpus(CHRF(), answers, references)}


def _of_corpus(metric: Any, answers: Sequence[str], references: References) -> Metric:
    """A figure of sacreBLEU, which is one of counts that are summed over rows."""
    counts = np.asarray(metric._extract_corpus_statistics(list(answers), list(zip_longest(*references))), dtype=np.float64)

    def score(sums: Floats) -> Floats:
        return np.asarray([metric._compute_score_from_stats(row).score for row in sums.round().astype(int).tolist()])

    return of_sums(counts, score)


_MEASURES: dict[str, Callable[[Sequence[str], References], dict[str, Metric]]] = {
    "exact_match": _exact,
    "numeric_match": _numeric,
    "rouge": _rouge,
    "bleu": _bleu,
    "chrf": _chrf,
}
