from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.evaluation.leaks import leak_score
from image_classifier.predictions import PredictionTable


def table(correct: list[bool]) -> PredictionTable:
    targets = np.zeros(len(correct), dtype=np.int64)
    logits = np.array([[1.0, 0.0] if right else [0.0, 1.0] for right in correct], np.float32)
    return PredictionTable(("",) * len(correct), targets, logits, ("cat", "dog"))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_the_two_accuracies_make_up_the_whole(rows):
    correct, leaked = [row[0] for row in rows], np.array([row[1] for row in rows])
    score = leak_score(table(correct), leaked)
    if score is None:
        assert not leaked.any()
        return
    assert score.leaked + score.clean == len(rows)
    whole = score.leaked * score.accuracy_leaked + score.clean * (score.accuracy_clean or 0.0)
    assert whole == pytest.approx(sum(correct))


def test_a_part_that_leaked_wholly_has_no_honest_figure():
    score = leak_score(table([True, False]), np.array([True, True]))
    assert score is not None
    assert score.accuracy_clean is None
    assert list(score.lines("test")) == [
        "test accuracy_leaked 0.5000 on 2 images that have a duplicate, a near-duplicate or an image of their group "
        "in the train split"
    ]
