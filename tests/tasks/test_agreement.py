"""F1 and Matthews' correlation from summed counts are scikit-learn's, for every draw of the bootstrap too."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from peftcli.tasks.agreement import matthews, tallies
from peftcli.tasks.intervals import of_rows, of_sums
from peftcli.tasks.sequence_classification import class_scores, label_scores


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("quality", [0.0, 0.7, 1.0])
def test_classes(classes: int, quality: float) -> None:
    random = np.random.Generator(np.random.PCG64(classes))
    true = random.integers(0, classes, 90)
    found = np.where(random.random(90) < quality, true, random.integers(0, classes, 90))
    scores = class_scores(found, true, classes=classes)
    average = "binary" if classes == 2 else "macro"
    assert scores["f1"].value == pytest.approx(f1_score(true, found, average=average), rel=1e-12)
    assert scores["matthews"].value == pytest.approx(matthews_corrcoef(true, found), rel=1e-9, abs=1e-12)
    assert scores["accuracy"].value == float((found == true).mean())


def test_a_class_that_never_occurs_and_a_side_with_one_class() -> None:
    true, found = np.asarray([0, 0, 1, 1]), np.asarray([0, 1, 1, 1])
    assert class_scores(found, true, classes=3)["f1"].value == pytest.approx(
        f1_score(true, found, average="macro", labels=[0, 1, 2], zero_division=0.0)
    )
    assert class_scores(np.zeros(4, dtype=int), true, classes=2)["matthews"].value == 0.0
    assert class_scores(np.zeros(4, dtype=int), true, classes=2)["f1"].value == 0.0


def test_several_labels() -> None:
    random = np.random.Generator(np.random.PCG64(1))
    true, found = random.random((60, 5)) < 0.3, random.random((60, 5)) < 0.4
    scores = label_scores(found, true)
    assert scores["f1"].value == pytest.approx(f1_score(true, found, average="macro"), rel=1e-12)
    assert scores["f1_micro"].value == pytest.approx(f1_score(true, found, average="micro"), rel=1e-12)
    assert scores["accuracy"].value == float((true == found).all(-1).mean())


def test_every_draw_is_that_of_the_library() -> None:
    random = np.random.Generator(np.random.PCG64(2))
    true, found = random.integers(0, 3, 25), random.integers(0, 3, 25)
    known = np.arange(3)
    fast = of_sums(tallies(found[:, None] == known, true[:, None] == known), matthews)
    slow = of_rows(lambda rows: float(matthews_corrcoef(true[rows], found[rows])), 25)
    assert fast.interval == pytest.approx(slow.interval, abs=1e-9)
