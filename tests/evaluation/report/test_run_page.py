"""The report of one run: true to the files, bounded, safe, and plain about what is absent."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.bundle import read_bundle
from image_classifier.evaluation.reliability.abstention import Decision, DecisionSettings, Evidence
from image_classifier.evaluation.reliability.selective_prediction import risk_curve
from image_classifier.evaluation.reliability_results import write_trust
from image_classifier.evaluation.report.charts import Scale
from image_classifier.evaluation.report.confusions import frequent, images_of_cells, matrix
from image_classifier.evaluation.report.locate import limits_of
from image_classifier.evaluation.report.page import risks, run_page
from image_classifier.evaluation.report.run_data import RunPaths, gather
from image_classifier.evaluation.report.sentences import per_cent
from image_classifier.html import document
from image_classifier.images import DEFAULT_LIMITS, DecodeLimits
from image_classifier.predictions import PredictionTable
from tests.conftest import Command
from tests.evaluation.report.made_run import HOSTILE, make_run
from tests.evaluation.test_compare import made
from tests.test_architecture import assert_torch_free


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    make_run(place)
    assert "accuracy   0." in assert_torch_free(place, "report", "run")
    return place


@pytest.fixture
def html(home: Path) -> str:
    return (home / "plots/run/report.html").read_text(encoding="utf-8")


def test_all_that_was_measured_is_there(html: str) -> None:
    for section in (
        "scores",
        "curves",
        "classes",
        "confusions",
        "mistakes",
        "trust",
        "robustness",
        "exports",
        "data",
        "origin",
    ):
        assert f'<h2 id="{section}">' in html and f'href="#{section}"' in html
    assert 'id="absent"' not in html
    for said in (
        "Temperature 1.500",
        "with a confidence below 0.250",
        "p50 ms",
        "model.ckpt",
        "Accuracy on 60 images",
        "3.25",
        "cores: 2",
        "&#39;name=a b&#39;",
        "near duplicates",
        "The licence cc-by-nc-4.0 forbids commercial use",
        "ab" * 32,
    ):
        assert said in html, said
    assert (
        html.count("0.40 to 0.90") == html.count("0.50 to 0.80") == 5
        and 'title="95 %' not in html
        and "are not printed" in html
    )
    assert 'class="explanation"' in html and "0.5000 to 0.9000" in html and "most frequent class (20.0 %)" in html


def test_nothing_foreign_runs_and_no_name_is_code(html: str) -> None:
    assert HOSTILE not in html and "&lt;img src=x onerror" in html
    policy = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)[0]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    style, script = (
        re.findall(r"<style>(.*?)</style>", html, re.DOTALL)[0],
        re.findall(r"<script>(.*?)</script>", html, re.DOTALL)[0],
    )
    assert (
        f"style-src 'sha256-{document.digest(style)}'" in policy
        and f"script-src 'sha256-{document.digest(script)}'" in policy
    )
    bare = re.sub(r'(?s)<style>.*?</style>|<script.*?</script>|="[^"]*"', "=", html)
    assert not re.findall(r"<[a-z]+[^>]*\s(?:style|on\w+)=", bare)
    assert all(address.startswith(("#", "data:")) for address in re.findall(r'(?:src|href)="([^"]*)"', html))


def test_every_link_leads_somewhere_and_every_picture_has_words(html: str) -> None:
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", html))
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(after <= before + 1 for before, after in pairwise(levels))


def test_the_images_behind_a_cell_are_those_of_the_pair(home: Path, html: str) -> None:
    table = PredictionTable.read(home / "plots/run/test")
    content = json.loads(re.findall(r'id="cells">(.*?)</script>', html, re.DOTALL)[0])
    predicted = table.logits.argmax(axis=1)
    for cell, places in content["cells"].items():
        truth, answer = map(int, cell.split(","))
        expected = {
            path
            for path, target, found in zip(table.paths, table.targets, predicted, strict=True)
            if (target, found) == (truth, answer)
        }
        assert {content["images"][place]["path"] for place in places} == expected
    assert content["images"][0]["picture"].startswith("data:image/webp;base64,")
    assert content["classes"] == list(table.classes)


def test_the_bundle_stays_sealed_and_the_page_is_the_same_each_time(
    home: Path, html: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    before = {path: path.read_bytes() for path in Path("models").rglob("*") if path.is_file()}
    assert command("report", "run", "output=again.html").code == 0
    assert Path("again.html").read_text() == html
    assert {path: path.read_bytes() for path in Path("models").rglob("*") if path.is_file()} == before


def test_what_is_absent_is_said_with_how_to_get_it(
    home: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "plots/run/test", tmp_path / "plots/bare/test")
    monkeypatch.chdir(tmp_path)
    assert command("report", "bare").code == 0
    html = Path("plots/bare/report.html").read_text(encoding="utf-8")
    for title in ("Learning curves", "Data audit", "Split", "Origin", "Explanations", "Robustness", "Latency"):
        assert f"<strong>{title}</strong>: no " in html
    assert "give their folder with data_dir=PATH" in html and "data:image/webp" not in html


def test_what_a_bundle_says_of_its_decisions_is_shown(home: Path) -> None:
    table = PredictionTable.read(home / "plots/run/test")
    info = read_bundle(home / "models/run").info
    for asked, words in (
        (DecisionSettings(), "no limit is set"),
        (DecisionSettings(risk=0.9), "at most 90.0 % of these are wrong, with 95.0 % confidence"),
        (DecisionSettings(risk=1e-6), "cannot promise a risk of 1e-06"),
    ):
        decision = Decision.chosen(Evidence.of(table), asked)
        object.__setattr__(info, "decision", decision.as_dict())
        html = run_page(gather("run", table, RunPaths(home / "plots/run/test"), info, {}))
        assert words in html and "include the true class for 90.0 % of the images" in html and "evidence" not in html


@pytest.mark.slow
def test_what_the_limits_do_on_the_part_stands_beside_them(home: Path, tmp_path: Path) -> None:
    table = PredictionTable.read(home / "plots/run/test")
    info, part = read_bundle(home / "models/run").info, tmp_path / "test"
    own, other = (Decision.chosen(Evidence.of(table), DecisionSettings(risk=risk)) for risk in (0.9, 0.8))
    score = write_trust(table, own, part, "run", figures=False).score
    assert score is not None
    for decision, known in ((own, True), (other, False), (None, True)):
        told = replace(info, decision=decision.as_dict()) if decision else None
        html = run_page(gather("run", table, RunPaths(part), told, {}))
        words = (
            f"{per_cent(score.answered)} get a label",
            f"{per_cent(score.set_coverage)} include the true class; {score.set_size:.2f} classes",
        )
        assert all((f"on test: {sentence}" in html) == known for sentence in words)
        assert ("no calibration.json with these limits" in html) != known


def test_thumbnails_are_read_within_the_limits_of_the_training(home: Path) -> None:
    table, info = PredictionTable.read(home / "plots/run/test"), read_bundle(home / "models/run").info
    assert limits_of(None) == limits_of(info) and limits_of(None).max_pixels > DEFAULT_LIMITS.max_pixels
    for max_bytes in (10, 10**6):
        limits = {"max_bytes": max_bytes, "max_pixels": 10_000, "formats": ["PNG"]}
        told = replace(info, provenance={**info.provenance, "config": {"data": {"limits": limits}}})
        assert limits_of(told) == DecodeLimits(max_bytes, 10_000, ("PNG",))
        html = run_page(gather("run", table, RunPaths(home / "plots/run/test", root=home / "images"), told, {}))
        assert (html.count("data:image/webp") > 1) == (max_bytes > 10)  # one is a figure of our own, an explanation


@given(st.floats(0, 1))
def test_per_cent_is_100_of_everything_alone_and_0_of_nothing(share: float) -> None:
    shown = float(per_cent(share).removesuffix(" %"))
    assert (shown == 100) == (share == 1) and (shown == 0) == (share == 0) and not per_cent(share).startswith("-")
    assert shown == pytest.approx(100 * share, rel=0.5, abs=0.051)


@given(st.lists(st.floats(-1e38, 1e38) | st.floats(0, 1), min_size=1, max_size=5), st.booleans())
def test_an_axis_holds_all_its_values(values: list[float], percent: bool) -> None:
    scale = Scale.over("loss", values, percent=percent)
    assert scale.low <= min(values) <= max(values) <= scale.high and scale.low < scale.high


@pytest.mark.slow
def test_a_thousand_classes_stay_below_ten_megabytes(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, num_classes=1000, each=4, pictures=False)
    monkeypatch.chdir(tmp_path)
    assert command("report", "run").code == 0
    html = Path("plots/run/report.html").read_text(encoding="utf-8")
    assert len(html.encode()) < 10_000_000
    assert html.count("<tr data-name=") == 1000 + 200
    assert "Only the 40 of 1\u00a0000 classes with most mistakes are shown" in html


def test_the_matrix_shows_the_classes_that_are_mixed_up_most() -> None:
    confusion = np.diag(np.full(60, 9))
    confusion[50, 7] = 4
    shown = matrix(confusion)
    assert len(shown.classes) == 40 and {7, 50} <= set(shown.classes) and not shown.complete
    (pair,) = frequent(confusion)
    assert (pair.truth, pair.predicted, pair.count) == (50, 7, 4) and pair.share == pytest.approx(4 / 13)
    assert matrix(np.diag([1, 0])).rows[1] == [None, None]


def test_every_cell_gets_its_turn_before_any_gets_a_second_image() -> None:
    table = made(np.random.default_rng(0).integers(0, 4, 800), 0.5, 1)
    confidence = table.probabilities.max(axis=1)
    chosen = images_of_cells(table, confidence, 26, 24)
    wrong = {cell: rows for cell, rows in chosen.items() if cell[0] != cell[1]}
    assert len(wrong) == 12 and {len(rows) for rows in wrong.values()} <= {2, 3}
    for rows in wrong.values():
        assert list(confidence[rows]) == sorted(confidence[rows], reverse=True)


def test_the_risks_at_round_coverages_are_those_of_the_curve() -> None:
    table = made(np.random.default_rng(0).integers(0, 4, 800), 0.6, 1)
    found = dict(risks(risk_curve(table)))
    predicted, confidence = table.answers()
    surest = np.argsort(-confidence, kind="stable")[:400]
    assert found[1.0] == pytest.approx((predicted != table.targets).mean())
    assert found[0.5] == pytest.approx((predicted != table.targets)[surest].mean(), abs=0.01)
