"""Suspects: the ranking equals brute force, planted errors come first, and the order of images does not matter."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.errors import DataError
from image_classifier.evaluation.label_issues.out_of_fold import OutOfFoldPredictions, out_of_fold
from image_classifier.evaluation.label_issues.proposals import (
    COLUMNS,
    accepted,
    decision,
    lines,
    merged,
    worst_predictions,
    write_csv,
)
from image_classifier.evaluation.label_issues.ranking import (
    CONFIDENT,
    DUPLICATES,
    LOSS,
    confident_errors,
    find_suspects,
    highest_losses,
)
from image_classifier.predictions import PredictionTable

CLASSES = ("ant", "bee", "cat", "dog")


def answers(targets: np.ndarray, probabilities: np.ndarray, split: str = "") -> OutOfFoldPredictions:
    paths = [f"{row:04d}.png" for row in range(len(targets))]
    return OutOfFoldPredictions(paths, targets, probabilities, CLASSES[: probabilities.shape[1]], [split] * len(paths))


def planted(seed: int, count: int = 400, accuracy: float = 0.97) -> tuple[OutOfFoldPredictions, set[str]]:
    """Predictions of a model that is mostly right about the true classes, and the images with another label."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 4, count)
    leaning = np.where(random.random(count) < accuracy, truth, random.integers(0, 4, count))
    probabilities = random.dirichlet(np.ones(4), count) * 0.5
    probabilities[np.arange(count), leaning] += 0.5
    wrong = random.choice(count, count // 20, replace=False)
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + random.integers(1, 4, len(wrong))) % 4
    return answers(labels, probabilities), {f"{row:04d}.png" for row in wrong.tolist()}


@st.composite
def some_answers(draw: st.DrawFn) -> OutOfFoldPredictions:
    count, seed = draw(st.integers(4, 60)), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    return answers(random.integers(0, draw(st.integers(1, 4)), count), random.dirichlet(np.full(4, 0.4), count))


@given(some_answers(), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_ranking_is_that_of_brute_force(found: OutOfFoldPredictions, share: float) -> None:
    suspects = find_suspects(found, share=share)
    own = {path: float(found.probabilities[row, found.targets[row]]) for row, path in enumerate(found.paths)}
    count = int(np.ceil(share * len(own)))
    lowest = sorted(own, key=lambda path: (own[path], path))[:count]
    assert {suspect.path for suspect in suspects if LOSS in suspect.reasons} == set(lowest)
    assert [suspect.path for suspect in suspects] == sorted(
        (suspect.path for suspect in suspects), key=lambda path: (own[path], path)
    )
    flagged = {found.paths[row] for row in np.flatnonzero(confident_errors(found)).tolist()}
    assert {suspect.path for suspect in suspects} == flagged | set(lowest)
    for suspect in suspects:
        likeliest = CLASSES[int(found.probabilities[found.paths.index(suspect.path)].argmax())]
        assert suspect.score == suspect.probability == own[suspect.path]
        assert suspect.suggested == ("" if likeliest == suspect.label else likeliest)


def by_cleanlab(found: OutOfFoldPredictions) -> np.ndarray:
    """The errors that cleanlab finds; of equals the first, as the order of its sort depends on the processor."""
    from cleanlab.filter import find_label_issues

    present, targets = np.unique(found.targets, return_inverse=True)
    if len(present) < 2:
        return np.zeros(len(targets), dtype=bool)
    probabilities = np.maximum(found.probabilities[:, present], 1e-12)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    with warnings.catch_warnings(), mock.patch.object(np, "argsort", partial(np.argsort, kind="stable")):
        warnings.filterwarnings("ignore", "May not flag all label issues in class")  # a class of one image
        return np.asarray(
            find_label_issues(targets, probabilities, filter_by="prune_by_noise_rate", n_jobs=1), dtype=bool
        )


def hostile_answers(seed: int) -> OutOfFoldPredictions:
    """Few or many classes, of which labels name some or one; predictions that are sure, rounded, equal or wrong."""
    random = np.random.default_rng(seed)
    count, number = random.choice([1, 7, 40, 300]), random.choice([2, 3, 5, 30])
    named = random.choice(number, random.choice([1, 2, number, number]), replace=False)
    targets = named[(random.random(count) ** random.choice([1, 4]) * len(named)).astype(int)]  # evenly, or not
    probabilities = random.dirichlet(np.full(number, random.choice([0.05, 0.4, 5.0])), count)
    probabilities[np.arange(count), targets] += random.choice([0.0, 0.2, 0.5, 3.0])
    probabilities = probabilities.round(random.choice([0, 1, 2, 16]))
    match random.choice(["as they are"] * 6 + ["one-hot", "uniform", "copies", "nearly equal"]):
        case "one-hot":
            probabilities = np.eye(number)[probabilities.argmax(axis=1)]
        case "uniform":
            probabilities = np.ones((count, number))
        case "copies":
            probabilities = probabilities[random.integers(0, count, count) // 4]
        case "nearly equal":
            probabilities = 1 + random.integers(-3, 3, (count, number)) * 1e-6
    probabilities /= np.maximum(probabilities.sum(axis=1, keepdims=True), 1e-12)
    names = [f"{row:04d}.png" for row in range(count)]
    return OutOfFoldPredictions(
        names, targets, probabilities, [f"class {code}" for code in range(number)], [""] * count
    )


@pytest.mark.slow
@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_confident_learning_finds_what_cleanlab_finds(seed: int) -> None:
    found = hostile_answers(seed)
    assert np.array_equal(confident_errors(found), by_cleanlab(found))


@given(some_answers())
def test_confident_learning_names_nobody_whose_label_is_likelier_than_its_class_is_on_average(
    found: OutOfFoldPredictions,
) -> None:
    """Confident joint (Northcutt et al., 2021) by brute force: without an off-diagonal count there is no error."""
    present = np.unique(found.targets)
    if len(present) < 2:
        assert not confident_errors(found).any()
        return
    shares = found.probabilities[:, present] / found.probabilities[:, present].sum(axis=1, keepdims=True)
    targets = np.searchsorted(present, found.targets)
    thresholds = np.array([shares[targets == code, code].mean() for code in range(len(present))])
    confident = [
        max(above, key=lambda code: shares[row, code])
        if (above := np.flatnonzero(shares[row] >= thresholds - 1e-6).tolist())
        else None
        for row in range(len(targets))
    ]
    if all(code is None or code == targets[row] for row, code in enumerate(confident)):
        assert not confident_errors(found).any()


@pytest.mark.parametrize("seed", range(5))
def test_planted_errors_are_among_twice_as_many(seed: int) -> None:
    found, wrong = planted(seed)
    suspects = find_suspects(found)
    assert len({suspect.path for suspect in suspects[: 2 * len(wrong)]} & wrong) >= 0.9 * len(wrong)
    named = {suspect.path for suspect in suspects if CONFIDENT in suspect.reasons}
    assert len(named & wrong) >= 0.6 * len(wrong)


def test_the_order_of_images_does_not_matter() -> None:
    found, _ = planted(0)
    order = np.random.default_rng(1).permutation(len(found.paths))
    mixed = OutOfFoldPredictions(
        [found.paths[row] for row in order], found.targets[order], found.probabilities[order], CLASSES, found.splits
    )
    twins = [[(f"000{row}.png", CLASSES[found.targets[row]]) for row in (1, 2, 3, 4)]]
    assert find_suspects(found, twins) == find_suspects(mixed, twins)


def test_twins_under_two_labels_lower_the_score_of_the_less_probable() -> None:
    probabilities = np.array([[0.8, 0.1, 0.05, 0.05], [0.6, 0.3, 0.05, 0.05], *np.eye(4), *np.eye(4)])
    found = answers(np.array([0, 1, 0, 1, 2, 3, 0, 1, 2, 3]), probabilities)
    suspects = {
        suspect.path: suspect for suspect in find_suspects(found, [[("0000.png", "ant"), ("0001.png", "bee")]], share=0)
    }
    right, wrong = suspects["0000.png"], suspects["0001.png"]
    assert DUPLICATES in right.reasons and DUPLICATES in wrong.reasons
    assert right.score == pytest.approx(0.7 / 0.9) and right.suggested == ""
    assert wrong.score == pytest.approx(0.2 / 0.9) and wrong.suggested == "ant"
    assert (
        wrong.note == "like 0000.png, labelled ant"
        and decision(wrong) == ("relabel", "ant")
        and decision(right) is None
    )
    settled = replace(found, targets=np.zeros_like(found.targets))
    assert not any(
        DUPLICATES in suspect.reasons
        for suspect in find_suspects(settled, [[("0000.png", "ant"), ("0001.png", "ant")]], share=0)
    )
    alone = {
        suspect.path: suspect
        for suspect in find_suspects(found, [[("0001.png", "bee"), ("test/7.png", "ant")]], share=0)
    }
    assert alone["0001.png"].score == pytest.approx(0.3) and alone["0001.png"].note == "like test/7.png, labelled ant"
    assert "test/7.png" not in alone


def test_answers_that_are_no_numbers_are_refused_and_one_class_has_no_suspects() -> None:
    found, _ = planted(0)
    with pytest.raises(DataError, match="not finite"):
        find_suspects(replace(found, probabilities=np.full_like(found.probabilities, np.nan)))
    assert find_suspects(replace(found, targets=np.zeros_like(found.targets)), share=0) == []
    assert not highest_losses(found, 0).any() and highest_losses(found, 1).all()


def test_folds_answer_each_image_exactly_once(tmp_path: Path) -> None:
    labels = {f"{name}.png": place % 2 for place, name in enumerate("abcdef")}
    for number, names in enumerate(("ab", "dc", "ef")):
        paths = tuple(f"{name}.png" for name in names)
        logits = np.array([[ord(name), 99.5] for name in names], dtype=np.float32)
        PredictionTable(paths, np.zeros(2, np.int64), logits, ("ant", "bee")).write(tmp_path / f"fold-{number}")
    folds = [tmp_path / f"fold-{number}" for number in range(3)]
    found = out_of_fold(folds, labels, {"a.png": "train"}, ("ant", "bee"))
    assert (
        list(found.paths) == list(labels) and found.targets.tolist() == [0, 1] * 3 and found.splits[:2] == ["train", ""]
    )
    assert found.probabilities.argmax(axis=1).tolist() == [1, 1, 1, 0, 0, 0]
    for places, words in (
        ([*folds, folds[0]], "'a.png' is in two folds"),
        (folds[:2], "only in the data set or only in a fold"),
        ([*folds, tmp_path], "is missing or damaged"),
    ):
        with pytest.raises(DataError, match=words):
            out_of_fold(places, labels, {}, ("ant", "bee"))
    with pytest.raises(DataError, match="other classes"):
        out_of_fold(folds, labels, {}, CLASSES)
    np.save(folds[0] / "logits.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match="logits of the shape"):
        out_of_fold(folds, labels, {}, ("ant", "bee"))


def test_accepting_takes_the_worst_and_never_a_test_image() -> None:
    found, wrong = planted(3)
    suspects = find_suspects(found)
    assert not accepted(suspects, False) and not accepted(suspects, 0)
    assert list(accepted(suspects, 5)) == [suspect.path for suspect in suspects if suspect.suggested][:5]
    named = {suspect.path for suspect in suspects if CONFIDENT in suspect.reasons and suspect.suggested}
    assert set(accepted(suspects, True)) == named and named & wrong
    for suspect in suspects:
        action = accepted(suspects, True).get(suspect.path)
        if action:
            assert action == (
                ("relabel", suspect.suggested) if suspect.suggested_probability >= 0.5 else ("exclude", "")
            )
    assert not accepted([replace(suspect, split="test") for suspect in suspects], True)


def test_a_bundles_worst_predictions_join_the_list_and_the_table_holds_all(tmp_path: Path) -> None:
    found, _ = planted(4)
    worst = worst_predictions(replace(found, splits=["val"] * len(found.paths)), 0.05, "mine")
    suspects = find_suspects(found, share=0)
    both = merged(suspects, worst)
    assert len(worst) == 20 and {suspect.path for suspect in both} == {suspect.path for suspect in (*suspects, *worst)}
    twice = next(suspect for suspect in both if len(suspect.reasons) == 2)
    assert twice.reasons == (CONFIDENT, "highest loss of mine on val")
    write_csv(both, tmp_path / "suspects.csv")
    with (tmp_path / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and [int(row["rank"]) for row in rows] == list(range(1, len(both) + 1))
    assert [float(row["score"]) for row in rows] == sorted(float(row["score"]) for row in rows)
    printed = list(lines(both, len(found.paths)))
    assert printed[-1].startswith(f"suspects {len(both)} of 400 images: ") and len(printed) == 12
    assert list(lines([], 3)) == ["suspects 0 of 3 images"]
