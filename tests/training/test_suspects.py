"""`suspects`: each fold is trained once, goes on where it was stopped, and is trained anew for other images; planted
errors are found and mended.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from image_classifier.dataset.split import SplitSettings, assign_splits
from image_classifier.errors import ConfigError, TrainingError
from image_classifier.evaluation.label_issues.out_of_fold import out_of_fold
from image_classifier.manifest import Manifest
from image_classifier.training.cross_validation.by_training import FoldRun, fold_runs, predict_by_training
from image_classifier.training.suspects import SuspectSettings
from tests.conftest import ROOT, Command
from tests.dataset.manifests import manifest_of

# Stands in for `train`: notes how it was called, leaves a checkpoint, a note and predictions as a run does.
TRAIN = """
import csv, json, pathlib, sys
import numpy as np
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
place = {key: pathlib.Path(given[key].strip("'")) for key in ("runs_dir", "plots_dir")}
run = place["runs_dir"] / given["name"].strip("'")
with open("calls.txt", "a") as file:
    print(given["name"].strip("'"), given.get("resume", "anew"), file=file)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "checkpoints" / "last.ckpt").touch()
BODY
manifest = [row for row in csv.DictReader(open("folds.csv")) if row["fold"] == given["data.fold"]]
answers = place["plots_dir"] / run.name / "val"
answers.mkdir(parents=True, exist_ok=True)
with open(answers / "predictions.csv", "w") as file:
    print("path,label,predicted_class", *(row["path"] + ",cat,cat" for row in manifest), sep="\\n", file=file)
np.save(answers / "logits.npy", np.zeros((len(manifest), 2), np.float32))
(answers / "predictions.json").write_text(json.dumps({"classes": ["cat", "dog"], "temperature": 1.0}))
(run / "run.json").write_text(json.dumps({"finished": True}))
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folds(seed: int = 0, count: int = 3) -> list[Manifest]:
    whole = manifest_of({"cat": [1] * 12, "dog": [1] * 12})
    dealt = [assign_splits(whole, SplitSettings(seed=seed), None, fold, count) for fold in range(count)]
    with Path("folds.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("fold", "path"))
        writer.writerows(
            (number, fold.paths[row]) for number, fold in enumerate(dealt) for row in fold.indices("val").tolist()
        )
    return dealt


def runs(dealt: list[Manifest], body: str = "", *words: str) -> list[FoldRun]:
    program = (sys.executable, "-c", TRAIN.replace("BODY", body))
    return fold_runs("study", Path("runs/study"), dealt, ("model=convnet", *words), program)


def calls() -> list[str]:
    lines = Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []
    Path("calls.txt").unlink(missing_ok=True)
    return lines


def test_each_fold_is_trained_once_and_all_images_are_answered() -> None:
    dealt = folds()
    places = predict_by_training(runs(dealt))
    assert calls() == [f"study-fold-{number} anew" for number in range(3)]
    labels = dict(zip(dealt[0].paths, dealt[0].targets.tolist(), strict=True))
    assert list(out_of_fold(places, labels, {}, dealt[0].classes).paths) == list(dealt[0].paths)
    predict_by_training(runs(dealt))
    assert calls() == []
    shutil.rmtree(places[1])
    predict_by_training(runs(dealt))
    assert calls() == ["study-fold-1 anew"]


@pytest.mark.slow
def test_other_images_or_settings_are_trained_anew() -> None:
    predict_by_training(runs(folds()))
    calls()
    predict_by_training(runs(folds(), "", "seed=1"))
    assert len(calls()) == 3
    predict_by_training(runs(folds(seed=1), "", "seed=1"))
    assert len(calls()) == 3


def test_a_failed_fold_says_why_and_goes_on_from_its_checkpoint() -> None:
    dealt = folds()
    with pytest.raises(TrainingError, match="the training of study-fold-1 failed: too warm"):
        predict_by_training(runs(dealt, "if 'fold-1' in str(run): sys.exit('error: too warm')"))
    assert calls() == ["study-fold-0 anew", "study-fold-1 anew"]
    predict_by_training(
        runs(dealt, "if 'fold-1' in str(run): sys.exit('error: too warm')".replace("sys.exit", "print"))
    )
    assert calls() == ["study-fold-1 last", "study-fold-2 anew"]


def test_a_signal_stops_the_fold_under_way_and_nothing_is_left_running() -> None:
    folds()
    code = (
        "from tests.training.test_suspects import *; predict_by_training(runs(folds(), 'import time; time.sleep(60)'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not Path("calls.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert calls() == ["study-fold-0 anew"] and not Path("runs/study/plots").exists()


@pytest.mark.parametrize(("key", "value"), [("by", "magic"), ("folds", 1), ("highest_loss", 1.5), ("max_listed", -1)])
def test_a_setting_that_cannot_be_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"suspects.{key}"):
        SuspectSettings(**{key: value})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("data.folds=3", "makes all folds itself"),
        ("overwrite=true", "resumes by itself"),
        ("apply=often", "accepts the proposals"),
        ("suspects.folds=40", "folds would have no image: take at most"),
    ],
)
def test_a_command_that_cannot_be_is_one_line(command: Command, tree: Path, word: str, words: str) -> None:
    answer = command("suspects", "data=folder", f"data.dir={tree}", "suspects.by=training", word)
    assert answer.code == 2 and words in answer.err


def spoil(images: Path, count: int) -> set[str]:
    """Move some digits into the folder of the next class; their new paths."""
    random, moved = np.random.default_rng(0), set()
    for path in random.permutation(sorted(str(path) for path in images.rglob("*.png")))[:count].tolist():
        label, name = Path(path).parent.name, Path(path).name
        target = images / str((int(label) + 1) % 10) / f"moved-{label}-{name}"
        Path(path).rename(target)
        moved.add(target.relative_to(images).as_posix())
    return moved


def digits(command: Command, per_class: int) -> Path:
    """So many handwritten digits a class."""
    assert command("prepare", "data=digits", "data.dir=source").code == 0
    images = Path("images")
    for folder in sorted(Path("source/train").iterdir()):
        (images / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:per_class]:
            shutil.copy(path, images / folder.name)
    return images


@pytest.mark.slow
def test_planted_errors_are_found_accepted_honoured_and_taken_back(command: Command) -> None:
    moved = spoil(digits(command, 60), 30)
    line = ("suspects", "data=folder", "data.dir=images", "data.image_size=16", "logger=none", "suspects.by=embeddings")
    answer = command(*line, "--apply", "20")
    assert answer.code == 0, answer.err
    table, fix = (Path(re.findall(rf"^{name} +([^:\n]+)", answer.out, re.MULTILINE)[0]) for name in ("table", "fix"))
    with table.open(newline="") as file:
        ranked = [row["path"] for row in csv.DictReader(file)]
    assert len(set(ranked[: 2 * len(moved)]) & moved) >= 0.8 * len(moved)
    assert table.with_name("suspects.html").stat().st_size < 10_000_000
    again = command(*line)
    assert again.err.count("has its answers") == 0  # labels have changed: the folds are fitted anew
    assert "20 decided before, 0 accepted now" in again.out
    assert command("prepare", "data=folder", "data.dir=images").code == 0
    corrected = json.loads((table.with_name("audit.json")).read_text())["data"]["corrected"]
    assert corrected["relabelled"] + corrected["excluded"] == 20
    fix.unlink()
    last = command("prepare", "data=folder", "data.dir=images")
    assert "fix.csv" not in last.err and "600 images" in last.err


@pytest.mark.slow
def test_folds_are_trained_for_real_without_torch_in_this_process(tmp_path: Path, command: Command) -> None:
    from tests.test_architecture import assert_torch_free

    digits(command, 12)
    line = (
        "suspects",
        "data=folder",
        "data.dir=images",
        "data.image_size=16",
        "logger=none",
        "suspects.folds=2",
        "trainer.max_epochs=1",
    )
    printed = assert_torch_free(tmp_path, *line, timeout_s=1200)
    assert "of 120 images" in printed and len(list(Path("runs/images-suspects/bundles").iterdir())) == 2
