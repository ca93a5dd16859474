"""Odd files next to the predictions give a page or one line that names the file, and never stop a training."""

from __future__ import annotations

import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image_classifier.bundle import read_bundle
from image_classifier.errors import ClassifierError
from image_classifier.evaluation.reliability.abstention import Decision, DecisionSettings, Evidence
from image_classifier.evaluation.reliability_results import write_trust
from image_classifier.evaluation.report.page import run_page
from image_classifier.evaluation.report.run_data import RunPaths, gather
from image_classifier.predictions import PredictionTable
from tests.conftest import Command
from tests.evaluation.report.made_run import make_run

PART = "plots/run/test"
FILES = {
    "metrics": f"{PART}/metrics.json",
    "calibration": f"{PART}/calibration.json",
    "robustness": "plots/run/robustness.json",
    "latency": "plots/run/latency.json",
    "audit": "data/audit/images-1/audit.json",
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["\ud800", "\0", "about", 10**400, -1, 0.5])
)
NAMES = st.text(max_size=5) | st.sampled_from(["blur", "0", "nan", "about", "data", "\udc80"])
JSON = st.recursive(
    SCALARS, lambda values: st.lists(values, max_size=3) | st.dictionaries(NAMES, values, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    table = make_run(place, num_classes=3, each=6, pictures=False)
    write_trust(
        table, Decision.chosen(Evidence.of(table), DecisionSettings(risk=0.5)), place / PART, "run", figures=False
    )
    return place


def page(home: Path, lenient: bool = False) -> str:
    paths = RunPaths(home / PART, home / "models/run", home / "runs/run", home / "data/audit", None)
    return run_page(
        gather("run", PredictionTable.read(home / PART), paths, read_bundle(home / "models/run").info, {}, lenient)
    )


def complaint(home: Path) -> str:
    try:
        page(home).encode("utf-8", "surrogateescape")
    except ClassifierError as error:
        return str(error)
    return ""


def replaced(draw: st.DrawFn, content: Any) -> Any:
    """The content with one value somewhere in it replaced, or left out."""
    if not isinstance(content, dict | list) or not content or draw(st.integers(0, 4)) == 0:
        return draw(JSON)
    key = draw(st.sampled_from(sorted(content) if isinstance(content, dict) else range(len(content))))
    if draw(st.integers(0, 9)) == 0:
        content.pop(key)
    else:
        content[key] = replaced(draw, content[key])
    return content


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_json_gives_a_page_or_one_line(home: Path, name: str, data: st.DataObject) -> None:
    path = home / FILES[name]
    whole = path.read_text()
    content = data.draw(JSON | st.composite(lambda draw: replaced(draw, deepcopy(json.loads(whole))))())
    try:
        path.write_text(json.dumps(content))
        said = complaint(home)
        assert not said or (path.name in said and "remove it" in said and name != "audit" and page(home, lenient=True))
    finally:
        path.write_text(whole)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.lists(
            st.text(max_size=4) | st.floats().map(str) | st.sampled_from(["", "0", "1e308", "-1e38", "1e38"]),
            max_size=7,
        ),
        max_size=5,
    ),
    whole=st.booleans(),
)
def test_any_table_gives_a_page_or_one_line(home: Path, rows: list[list[str]], whole: bool) -> None:
    path = home / "runs/run/metrics.csv"
    text = path.read_text()
    try:
        lines = "".join(",".join(row) + "\n" for row in rows)
        path.write_bytes(((text if whole else "") + lines).encode("utf-8", "surrogatepass"))
        said = complaint(home)
        assert not said or ("metrics.csv" in said and "remove it" in said and page(home, lenient=True))
    finally:
        path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text"),
    [
        (FILES["metrics"], '{"a": 1}'),
        (FILES["latency"], '{"backends": {"onnx": 3}}'),
        (FILES["robustness"], '{"blur": 0.3}'),
        (FILES["robustness"], '{"blur": {"0": null}}'),
        (FILES["robustness"], '{"blur": {}, "noise": {"0": 0.5, "1": 0.4}}'),
        (FILES["robustness"], "[" * 100_000),
        (FILES["calibration"], '{"decision": {"measured": 1}}'),
        ("runs/run/metrics.csv", "epoch,step,train/loss\n1,2,low\n"),
    ],
)
def test_another_shape_is_one_line_that_names_the_file(
    home: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, file: str, text: str
) -> None:
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    Path(file).write_text(text)
    answer = command("report", "run")
    assert (
        answer.code == 2 and len(answer.err.splitlines()) == 1 and file in answer.err and "remove it" in answer.err
    ), answer.err
    Path(file).unlink()
    assert command("report", "run").code == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"data": []}', '{"data": {"root": "elsewhere"}}', '{"counts": {}}'])
def test_the_audit_of_another_data_set_is_passed_over(home: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    other = home / "data/audit/zzz/audit.json"
    other.parent.mkdir(exist_ok=True)
    other.write_text(text)
    try:
        with caplog.at_level(logging.WARNING):
            assert "near duplicates" in page(home)
        assert ("elsewhere" in text) != ("skipped: " in caplog.text and "zzz" in caplog.text)
    finally:
        shutil.rmtree(other.parent)
