"""What the report says in sentences: the verdict on top, and of everything absent how to get it."""

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
from image_classifier.program import program
from image_classifier.text import counted

_NAMES = {
    "most_frequent": "always the most frequent class",
    "logistic": "logistic regression on the backbone's embeddings",
}
_NAMED = 3  # mistakes in the command that explains them
_HONEST = 0.02  # mean confidence and accuracy this near are called honest


@dataclass(frozen=True)
class Verdict:
    """The first lines of the report: how good, how sure, compared with what, what hurts; `beats` is None where there is nothing to beat."""

    sentences: tuple[str, ...]
    beats: bool | None


def verdict(facts: RunData, sure: float, confusions: list[Pair]) -> Verdict:
    """In a few sentences; `sure` is the mean confidence, `confusions` the most frequent mistakes."""
    accuracy, interval = float(facts.metrics["accuracy"]), facts.interval("accuracy")
    number = len(facts.table.targets)
    assert interval is not None  # of the accuracy there is always one
    bounds = f"95 % interval {per_cent(interval[0])} to {per_cent(interval[1])}"
    good = f"Right on {per_cent(accuracy)} of {counted(number, f'{facts.split} image')} ({bounds})."
    beats, compared = _compared(facts, accuracy, interval[0])
    return Verdict((good, compared, _honesty(sure, accuracy), *_hurts(facts, confusions)), beats)


def _compared(facts: RunData, accuracy: float, low: float) -> tuple[bool | None, str]:
    known: Mapping[str, Any] = facts.metrics.get("baselines") or {}
    if not known:
        return None, "No baseline was judged on these images, so nothing says whether this is much."
    name, best = max(known.items(), key=lambda item: item[1]["accuracy"])
    said, ahead = f"{_NAMES.get(name, name)} ({per_cent(best['accuracy'])})", accuracy - best["accuracy"]
    if low > best["accuracy"]:
        return True, f"That is {100 * ahead:.1f} points above the best baseline, {said}."
    words = "more than chance explains" if ahead > 0 else "at all"
    return False, f"It does not beat the best baseline, {said}, {words if ahead <= 0 else 'by ' + words}."


def _honesty(sure: float, accuracy: float) -> str:
    gap = sure - accuracy
    if abs(gap) <= _HONEST:
        return f"Its confidence is honest: {per_cent(sure)} on average."
    how, side = ("too sure", "above") if gap > 0 else ("not sure enough", "below")
    return f"It is {how}: its mean confidence is {per_cent(sure)}, {100 * abs(gap):.1f} points {side} its accuracy."


def _hurts(facts: RunData, confusions: list[Pair]) -> Iterator[str]:
    if not confusions:
        yield "There is no mistake."
        return
    pair, classes = confusions[0], facts.table.classes
    total = round(pair.count / pair.share)
    words = f"What hurts most: {pair.count} of {total} images of “{plain(classes[pair.truth])}” are taken for “{plain(classes[pair.predicted])}”"
    rows = [row for row in facts.metrics["per_class"] if row["support"]]
    weakest = min(rows, key=lambda row: (row["f1"], -row["support"]))
    yield f"{words}; the weakest class is “{plain(weakest['label'])}” (F1 {weakest['f1']:.2f})."


def per_cent(share: float) -> str:
    """A share as a person reads it; what is not everything is never called 100, what is not nothing never 0."""
    if share in (0, 1):
        return f"{100 * abs(share):.1f} %"
    shown = (f"{100 * share:.{digits}f}" for digits in (1, 3, 6, 14))
    return next((text for text in shown if float(text) not in (0, 100)), f"{100 * share:.1g}") + " %"


def limits_in_words(decision: Mapping[str, Any] | None) -> dict[str, str]:
    """The limits of an answer as bundle.json has them, in words; {} where it holds none."""
    if not decision:
        return {}
    limits = Decision.from_dict(decision)
    asked = limits.settings
    unsure, unlike = "no limit is set", "is not looked for"
    if asked.risk is not None and asked.risk < 1:
        kept = f"{per_cent(limits.answered)} of val get a label, at most {per_cent(asked.risk)} of them wrong"
        unsure = (
            limits.note
            or f"a confidence below {limits.threshold:.3f}: {kept}, with {per_cent(asked.risk_confidence or 0)} confidence"
        )
    if limits.ood_limit is not None:
        unlike = f"a score above {limits.ood_limit:.3f}; {per_cent(asked.ood_rate or 0)} of val is refused so"
    sets = f"classes from a probability of {limits.set_level:.3f} up hold the true one of {per_cent(asked.coverage or 0)} of the images"
    return {"not sure enough": unsure, "unlike the training images": unlike, "prediction sets": sets}


def measured_in_words(facts: RunData) -> dict[str, str]:
    """What the limits did on the judged part, under the names of `limits_in_words`; {} where nothing tells."""
    if not facts.measured:
        return {}
    found = facts.measured["measured"]
    wrong = "" if found["risk"] is None else f", {per_cent(found['risk'])} of these wrong"
    words = {
        "not sure enough": f"{per_cent(found['answered'])} get a label{wrong}; {per_cent(found['unsure'])} are too unsure"
    }
    if facts.measured["ood"].get("threshold") is not None:
        words["unlike the training images"] = f"{per_cent(found['unknown'])} are refused as unlike"
    empty = f", {per_cent(found['empty_sets'])} of the sets are empty" if found["empty_sets"] else ""
    words["prediction sets"] = (
        f"{per_cent(found['set_coverage'])} hold the true class; {found['set_size']:.2f} classes on average{empty}"
    )
    return words


def absent(facts: RunData, explained: bool) -> list[tuple[str, str]]:
    """What the report could hold and does not: title, and how to get it."""
    name, own, test = facts.name, facts.split in SPLITS, facts.test_command
    part = (
        shlex.quote(name) + ("" if facts.split == "test" else f" --split {facts.split}")
        if own
        else shlex.quote(str(facts.places.part))
    )
    again = f"then write the report anew: {program()} report {part}"
    plots = facts.places.part.parent if own else facts.places.part
    worst = [str((facts.places.root or Path()) / facts.table.paths[row]) for row in facts.table.surest_mistakes(_NAMED)]
    infer = f"{program()} infer --checkpoint_name {shlex.quote(name)} --images {shlex.join(worst)} --explain"
    rows = [
        (
            not facts.curves,
            "Learning curves",
            f"no metrics.csv in {facts.places.run}: give the folder of the runs with runs_dir=PATH",
        ),
        (
            own and not facts.audit,
            "Data audit",
            f"no audit.json of these images in {facts.places.audits}: {program()} audit with the same data.*, {again}",
        ),
        (
            own and not facts.parts,
            "Split",
            "no manifest.csv: it lies in the bundle, and there is no bundle of this name",
        ),
        (
            own and facts.info is None,
            "Origin",
            f"no bundle {name!r}: command, versions and hashes stand in its bundle.json",
        ),
        (
            not facts.metrics.get("intervals"),
            "Intervals of every metric",
            f"metrics.json holds none: {test}",
        ),
        (
            not explained,
            "Explanations",
            f"no figures of these mistakes in {facts.places.explanations}: {infer}, {again}",
        ),
        (
            bool(facts.info and facts.info.decision) and not facts.measured,
            f"What the limits do on {facts.split}",
            f"no calibration.json of these limits in {facts.places.part}: {test}, {again}",
        ),
        (not facts.robustness, "Robustness", f"no robustness.json in {plots}: {test} --robustness, {again}"),
        (not facts.latency, "Latency", f"no latency.json in {plots}: {test} --latency, {again}"),
    ]
    return [(title, how) for missing, title, how in rows if missing]
