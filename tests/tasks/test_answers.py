"""Measures of generated answers: numbers as GSM8K has them, ROUGE, BLEU and chrF as their libraries say."""

from __future__ import annotations

import csv
import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from peftcli.errors import DataError
from peftcli.tasks.answers import answer_scores, judged, last_number, numbers_match

DATA = os.environ.get("PEFTCLI_DATA_DIR")
needs_data = pytest.mark.skipif(DATA is None, reason="PEFTCLI_DATA_DIR is not set")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### -1,234.50 and 3 more", Fraction(-2469, 2)),
        ("The answer is $1,234,567.", 1234567),
        ("It costs -$5", -5),
        ("a loss of \u22127 %", -7),
        ("5-3", 3),
        ("f(2)-3", 3),
        ("一共42元。", 42),
        ("答案是１２。", 12),
        ("3,4", 4),
        ("x = .5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("1 1/2 cups", Fraction(3, 2)),
        (r"hence $\boxed{\frac{3}{4}}$, not 5", Fraction(3, 4)),
        ("2.5e3", 2500),
        ("1/0", 0),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_up_with(text: str, number: Fraction | int | None) -> None:
    assert last_number(text) == number


def test_equal_numbers_match_however_they_are_written() -> None:
    assert numbers_match("That makes $1,200.00", "#### 1200")
    assert numbers_match("0.75", "#### 3/4")
    assert not numbers_match("1200 or 1300", "#### 1200")
    assert not numbers_match("I do not know", "#### 1200")
    assert not numbers_match("no", "neither")


@needs_data
def test_numbers_of_gsm8k() -> None:
    """Every reference is read as its publisher means it, matches what people write, and nothing else."""
    assert DATA is not None
    rows = [json.loads(line) for line in (Path(DATA) / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    references = [row["answer"] for row in rows]
    numbers = [int(text.rpartition("####")[2].strip().replace(",", "")) for text in references]
    assert len(numbers) == 700 and [last_number(text) for text in references] == numbers
    expected = [[text] for text in references]
    for form in ("The answer is ${:,}.", "{}.00", "so we get {:,} in total", "#### {}", r"$\boxed{{{:,}}}$", "共{}个"):
        found = answer_scores(["numeric_match"], [form.format(number) for number in numbers], expected)["numeric_match"]
        assert found.value == 1.0, form
        wrong = answer_scores(["numeric_match"], [form.format(number + 1) for number in numbers], expected)["numeric_match"]
        assert wrong.value == 0.0, form


@needs_data
def test_corpus_figures_are_those_of_the_libraries() -> None:
    """E2E descriptions against other descriptions of the same restaurant."""
    assert DATA is not None
    with (Path(DATA) / "e2e" / "devset.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:200]
    by_meaning: dict[str, list[str]] = {}
    for row in rows:
        by_meaning.setdefault(row["mr"], []).append(row["ref"])
    pairs = [(texts[0], text) for texts in by_meaning.values() for text in texts[1:]]
    answers, references = [one for one, _ in pairs], [other for _, other in pairs]
    found = answer_scores(["rouge", "bleu", "chrf", "exact_match"], answers, [[text] for text in references])
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    plain = [(one, other) for one, other in pairs if (one + other).isascii()]
    assert len(plain) > 100
    own = answer_scores(["rouge"], [one for one, _ in plain], [[other] for _, other in plain])
    for name, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        mean = sum(scorer.score(other, one)[theirs].fmeasure for one, other in plain) / len(plain)
        assert own[name].value == pytest.approx(mean, rel=1e-12)
    for metric in found.values():
        assert metric.interval is not None and metric.interval[0] <= metric.value <= metric.interval[1]
    assert 0.2 < found["rouge_l"].value < 0.8 and 10 < found["bleu"].value < 60


@needs_data
def test_several_references_are_those_of_the_libraries() -> None:
    """Each E2E restaurant's first description against all others of it, some of which have more than the rest."""
    assert DATA is not None
    by_meaning: dict[str, list[str]] = {}
    with (Path(DATA) / "e2e" / "devset.csv").open(encoding="utf-8") as file:
        for row in list(csv.DictReader(file))[:300]:
            by_meaning.setdefault(row["mr"], []).append(row["ref"])
    told = [texts for texts in by_meaning.values() if len(texts) > 1 and "".join(texts).isascii()]
    answers, references = [texts[0] for texts in told], [texts[1:] for texts in told]
    assert len({len(texts) for texts in references}) > 3
    found = answer_scores(["rouge", "bleu", "chrf"], answers, references)
    most = max(map(len, references))
    streams = [[texts[place] if place < len(texts) else None for texts in references] for place in range(most)]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score)
    scorer = RougeScorer(["rougeL"])
    best = [max(scorer.score(text, answer)["rougeL"].fmeasure for text in texts) for answer, texts in zip(answers, references, strict=True)]
    assert found["rouge_l"].value == pytest.approx(sum(best) / len(best), rel=1e-12)
    first = answer_scores(["bleu", "rouge"], answers, [texts[:1] for texts in references])
    assert found["bleu"].value > first["bleu"].value + 5 and found["rouge_l"].value > first["rouge_l"].value
    own = answer_scores(["exact_match"], answers, [[*others, text] for text, others in zip(answers, references, strict=True)])
    assert own["exact_match"].value == 1.0


def test_languages_without_blanks_are_measured_too() -> None:
    found = answer_scores(["rouge", "bleu"], ["这家餐厅很便宜"], [["这家餐厅不便宜"]])
    assert found["rouge_1"].value == pytest.approx(6 / 7)
    assert found["rouge_2"].value == pytest.approx(4 / 6)
    assert found["bleu"].value > 30
    assert answer_scores(["rouge"], ["naïve café"], [["Naïve CAFÉ!"]])["rouge_l"].value == 1.0


def test_numbers_where_there_are_none_are_refused() -> None:
    with pytest.raises(DataError, match=r"2 of 3 expected answers hold none, such as 'blue'"):
        answer_scores(["numeric_match"], ["1", "2", "3"], [["#### 1"], ["blue", "green"], ["red"]])


def test_an_example_is_judged_by_what_was_asked() -> None:
    assert judged(["exact_match"], " yes ", ["no", "yes"]) is True
    assert judged(["exact_match"], " yes ", ["no", "yes, sir"]) is False
    assert judged(["exact_match", "numeric_match"], "it is 4", ["#### 5", "#### 4"]) is True
    assert judged(["bleu"], "yes", ["yes"]) is None


def test_answers_of_nothing() -> None:
    assert answer_scores(["exact_match", "bleu"], [], []) == {}
    found = answer_scores(["rouge", "bleu", "chrf"], ["", ""], [["a b c d e"], ["f"]])
    assert all(metric.value == 0.0 for metric in found.values())
