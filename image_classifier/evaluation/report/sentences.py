"""Sentences of the report: the verdict at the top, the limits, and how to get what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.evaluation.reliability.abstention import Decision
from image_classifier.evaluation.report.confusions import Pair
from image_classifier.evaluation.report.run_data import RunData
from image_classifier.html.text import plain
from image_classifier.manifest import SPLITS
from image_classifier.modeling.weight_origin import WeightOrigin, weights_in_words
from image_classifier.program import program
from image_classifier.text import counted

_BASELINES = {
    "most_frequent": "always the most frequent class",
    "logistic": "logistic regression on the backbone's embeddings",
}
_NUM_EXPLAINED = 3  # mistakes in the command that explains them
_SMALL_GAP = 0.02  # mean confidence within this distance of the accuracy is called realistic


@dataclass(frozen=True)
class Verdict:
    """The first sentences of the report; `beats_baseline` is None without a baseline."""

    sentences: tuple[str, ...]
    beats_baseline: bool | None


def verdict(run: RunData, mean_confidence: float, confusions: list[Pair]) -> Verdict:
    """Return how good the model is, compared with what, how realistic its confidence is, and its worst mistakes.

    `confusions` are the most frequent mistakes, largest first.
    """
    accuracy = float(run.metrics["accuracy"])
    interval = run.interval("accuracy")
    assert interval is not None  # the accuracy always has one
    bounds = f"95 % interval {per_cent(interval[0])} to {per_cent(interval[1])}"
    images = counted(len(run.table.targets), f"{run.split} image")
    right = f"Right on {per_cent(accuracy)} of {images} ({bounds})."
    beats, compared = _compared(run, accuracy, interval[0])
    mistakes = _worst_mistakes(run, confusions)
    sentences = [
        right,
        *(val_in_words(run.info.provenance) if run.info and run.split == "val" else ()),
        compared,
        _confidence(mean_confidence, accuracy),
        mistakes,
    ]
    return Verdict(tuple(sentences), beats)


def val_in_words(provenance: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the scores on val mean where val images were trained on too: `provenance` of bundle.json."""
    if folds := provenance.get("out_of_fold"):
        yield (
            f"These predictions are out of fold: each training image is predicted by the one of {int(folds)} networks "
            f"that was not trained on it; the model is the mean of all {int(folds)}."
        )
    if folds := provenance.get("refit_folds"):
        yield (
            "The model was fitted to the training and the val images together; each val image is predicted by a model "
            f"that was fitted without it ({int(folds)} folds)."
        )
    if epochs := provenance.get("refit_epochs"):
        yield (
            f"The model was then trained for {counted(int(epochs), 'more epoch')} on the training and the val images "
            "together; these scores on val are those it had before."
        )


def _compared(run: RunData, accuracy: float, low: float) -> tuple[bool | None, str]:
    known: Mapping[str, Any] = run.metrics.get("baselines") or {}
    if not known:
        return None, "There is no baseline for these images to compare with."
    name, best = max(known.items(), key=lambda item: item[1]["accuracy"])
    baseline = f"the best baseline, {_BASELINES.get(name, name)} ({per_cent(best['accuracy'])})"
    ahead = accuracy - best["accuracy"]
    if low > best["accuracy"]:
        return True, f"That is {100 * ahead:.1f} points better than {baseline}."
    if ahead > 0:
        return False, f"It is not clearly better than {baseline}: the difference may be chance."
    return False, f"It is not better than {baseline}."


def _confidence(mean_confidence: float, accuracy: float) -> str:
    gap = mean_confidence - accuracy
    if abs(gap) <= _SMALL_GAP:
        return f"Its confidence is realistic: {per_cent(mean_confidence)} on average."
    how, side = ("overconfident", "above") if gap > 0 else ("underconfident", "below")
    points = f"{100 * abs(gap):.1f} points {side} its accuracy"
    return f"It is {how}: its mean confidence is {per_cent(mean_confidence)}, {points}."


def _worst_mistakes(run: RunData, confusions: list[Pair]) -> str:
    if not confusions:
        return "It makes no mistake on these images."
    pair = confusions[0]
    truth, predicted = (plain(run.table.classes[code]) for code in (pair.truth, pair.predicted))
    total = round(pair.count / pair.share)
    rows = [row for row in run.metrics["per_class"] if row["support"]]
    weakest = min(rows, key=lambda row: (row["f1"], -row["support"]))
    return (
        f"Most frequent mistake: {pair.count} of {total} images of “{truth}” {'is' if pair.count == 1 else 'are'} "
        f"classified as “{predicted}”; the weakest class is “{plain(weakest['label'])}” (F1 {weakest['f1']:.2f})."
    )


def per_cent(share: float) -> str:
    """Return a share in per cent; only 1 is shown as 100 %, only 0 as 0 %.

    >>> per_cent(0.915), per_cent(0.9999), per_cent(1)
    ('91.5 %', '99.990 %', '100.0 %')
    """
    if share in (0, 1):
        return f"{100 * abs(share):.1f} %"
    shown = (f"{100 * share:.{digits}f}" for digits in (1, 3, 6, 14))
    return next((text for text in shown if float(text) not in (0, 100)), f"{100 * share:.1g}") + " %"


def limits_in_words(decision: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the limits of a bundle.json in words; {} without a decision."""
    if not decision:
        return {}
    limits = Decision.from_dict(decision)
    settings = limits.settings
    unsure = "no limit is set"
    unlike = "not checked"
    if settings.risk is not None and settings.risk < 1:
        wrong = f"at most {per_cent(settings.risk)} of these are wrong, with {per_cent(settings.risk_confidence or 0)}"
        answered = f"{per_cent(limits.answered)} of the val images get a label, and {wrong} confidence"
        unsure = limits.note or f"refused if the confidence is below {limits.threshold:.3f}; {answered}"
    if limits.ood_limit is not None:
        rate = f"{per_cent(settings.ood_rate or 0)} of the val images are"
        unlike = f"refused if the out-of-distribution score is above {limits.ood_limit:.3f} ({rate})"
    coverage = f"they include the true class for {per_cent(settings.coverage or 0)} of the images"
    sets = f"all classes with a probability of {limits.set_level:.3f} or more; {coverage}"
    return {"not sure enough": unsure, "unlike the training images": unlike, "prediction sets": sets}


def measured_in_words(run: RunData) -> dict[str, str]:
    """Return the effect of the limits on the split, with the keys of `limits_in_words`; {} where not measured."""
    if not run.measured:
        return {}
    measured = run.measured["measured"]
    wrong = "" if measured["risk"] is None else f", {per_cent(measured['risk'])} of these are wrong"
    unsure = f"{per_cent(measured['unsure'])} are not sure enough"
    words = {"not sure enough": f"{per_cent(measured['answered'])} get a label{wrong}; {unsure}"}
    if run.measured["ood"].get("threshold") is not None:
        words["unlike the training images"] = f"{per_cent(measured['unknown'])} are refused"
    empty = f", {per_cent(measured['empty_sets'])} of the sets are empty" if measured["empty_sets"] else ""
    coverage = f"{per_cent(measured['set_coverage'])} include the true class"
    words["prediction sets"] = f"{coverage}; {measured['set_size']:.2f} classes on average{empty}"
    return words


def initial_weights_in_words(run: RunData) -> tuple[str, ...]:
    """Return what the training started from, its licence and what that restricts; () where it is not recorded."""
    origin = WeightOrigin.from_dict(run.info.provenance.get("initial_weights")) if run.info else None
    return weights_in_words(origin) if origin else ()


def missing(run: RunData, explained: bool) -> list[tuple[str, str]]:
    """Return what this report could show but does not: title, and how to get it."""
    paths = run.paths
    is_own_split = run.split in SPLITS
    option = "" if run.split == "test" else f" --split {run.split}"
    target = shlex.quote(run.name) + option if is_own_split else shlex.quote(str(paths.predictions))
    then = f"then write the report again: {program()} report {target}"
    test = run.test_command
    plots = paths.predictions.parent if is_own_split else paths.predictions
    mistakes = run.table.surest_mistakes(_NUM_EXPLAINED)
    images = shlex.join(str((paths.root or Path()) / run.table.paths[row]) for row in mistakes)
    infer = f"{program()} infer --checkpoint_name {shlex.quote(run.name)} --images {images} --explain"
    audit = f"{program()} audit with the data.* of the training"
    rows = [
        (
            not run.curves,
            "Learning curves",
            f"no metrics.csv in {paths.run}: give the folder of the runs with runs_dir=PATH",
        ),
        (
            is_own_split and not run.audit,
            "Data audit",
            f"no audit.json of these images in {paths.audits}: {audit}, {then}",
        ),
        (
            is_own_split and not run.split_counts,
            "Split",
            "no manifest.csv: it is in the bundle, and there is no bundle with this name",
        ),
        (
            is_own_split and run.info is None,
            "Origin",
            f"no bundle {run.name!r}: command, versions and hashes are in its bundle.json",
        ),
        (
            not run.metrics.get("intervals"),
            "Intervals of every metric",
            f"metrics.json holds none: {test}",
        ),
        (
            not explained,
            "Explanations",
            f"no figures of these mistakes in {paths.explanations}: {infer}, {then}",
        ),
        (
            bool(run.info and run.info.decision) and not run.measured,
            f"Effect of the limits on {run.split}",
            f"no calibration.json with these limits in {paths.predictions}: {test}, {then}",
        ),
        (not run.robustness, "Robustness", f"no robustness.json in {plots}: {test} --robustness, {then}"),
        (not run.latency, "Latency", f"no latency.json in {plots}: {test} --latency, {then}"),
    ]
    return [(title, how) for is_missing, title, how in rows if is_missing]
