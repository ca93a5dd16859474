"""The verb `report` on files as `test` leaves them: what it finds, says and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from image_classifier.evaluation.metrics.compute import compute_metrics
from image_classifier.evaluation.results import metrics_dict
from image_classifier.predictions import PredictionTable
from tests.conftest import Command, MakeTree, listed
from tests.evaluation.report.made_run import make_run
from tests.evaluation.test_compare import made, taken
from tests.test_architecture import assert_torch_free


@pytest.fixture
def plots(make_tree: MakeTree, tmp_path: Path) -> Path:
    """plots/first/test, plots/second/test: predictions of the same 80 images, the second better."""
    manifest = listed(make_tree(a=20, b=20, c=20, d=20))
    for number, (name, accuracy) in enumerate({"first": 0.5, "second": 0.95}.items()):
        table = made(manifest.targets, accuracy, number)
        table = type(table)(tuple(manifest.paths), table.targets, table.logits, table.classes)
        directory = tmp_path / "plots" / name / "test"
        table.write(directory)
        (directory / "metrics.json").write_text(json.dumps(metrics_dict(compute_metrics(table), None)))
    return tmp_path / "plots"


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    table = made(np.arange(40) % 3, 0.5, 0)  # no image of class d
    write = tmp_path / "x"
    table.write(write)
    (write / "metrics.json").write_text(
        '{"per_class": [{"label": "a"}, {"label": "b"}, {"label": "c"}, {"label": "d"}]}'
    )
    back = PredictionTable.read(write)
    assert back.paths == table.paths and back.classes == table.classes
    assert np.array_equal(back.targets, table.targets) and np.array_equal(back.logits, table.logits)


def test_two_names_say_whether_the_second_is_better(plots: Path, command: Command) -> None:
    answer = command(
        "report", "first", "second", f"plots_dir={plots}", "models_dir=none", f"--data_dir={plots.parent / 'tree'}"
    )
    assert answer.code == 0, answer.err
    assert "Yes: second is better than first by " in answer.out and "McNemar    only A right" in answer.out
    html = (plots / "compare-first-second" / "report.html").read_text()
    assert html.count("data:image/webp") > 20 and "Is second really better than first?" in html


def write_latency(folder: Path, p50_ms: float, megabytes: float, processor: str = "a processor") -> None:
    row = {"p50_ms": p50_ms, "megabytes": megabytes}
    content = {"backends": {"checkpoint": row, "onnx": row}, "hardware": {"processor": processor}}
    (folder / "latency.json").write_text(json.dumps(content))


def test_two_models_are_weighed_by_speed_and_accuracy(plots: Path, command: Command) -> None:
    line = ("report", "second", "first", f"plots_dir={plots}", "models_dir=none")
    page = plots / "compare-second-first" / "report.html"
    assert "tradeoff" not in command(*line).out
    write_latency(plots / "second", 34.0, 9.1)
    assert "tradeoff" not in command(*line).out
    write_latency(plots / "first", 10.0, 2.2, "another")
    assert "tradeoff" not in command(*line).out and "times faster" not in page.read_text()
    write_latency(plots / "first", 10.0, 2.2)
    answer = command(*line)
    assert "size       A 9.1 MB, B 2.2 MB\n" in answer.out
    assert "latency    A 34.00 ms, B 10.00 ms for one image (onnx, a processor)\n" in answer.out
    said = r"Compared with second, first is 3.4 times faster and [\d.]+ points worse \(95 % interval -[\d.]+ to -"
    assert re.search(said, answer.out), answer.out
    assert "first is 3.4 times faster" in page.read_text() and "Size: A 9.1 MB, B 2.2 MB." in page.read_text()
    answer = command("report", "first", "second", f"plots_dir={plots}", "models_dir=none")
    assert "second is 3.4 times slower and" in answer.out and "points better" in answer.out
    (plots / "first" / "latency.json").write_text("{")
    answer = command(*line)
    assert answer.code == 2 and "latency.json" in answer.err and len(answer.err.splitlines()) == 1


@pytest.mark.slow
def test_folders_are_compared_without_images_or_torch(plots: Path) -> None:
    line = ("report", "plots/second/test", "plots/first/test", "resamples=100", "output=page.html")
    assert "No, the other way round: second/test is better than first/test" not in assert_torch_free(
        plots.parent, *line[:1], "--help"
    )
    assert "No, the other way round: second/test is better than first/test" in assert_torch_free(plots.parent, *line)
    html = (plots.parent / "page.html").read_text()
    assert "give their folder with data_dir=PATH" in html and "data:image/webp" not in html


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("first", "first"), "are the same predictions"),
        (("first", "second", "third"), "unexpected word 'third'"),
        (("first", "secondo"), "there is no checkpoint 'secondo'"),
        (("first", "second", "split=val"), "'first' has no predictions for its val split"),
        (("first", "second", "split=tests"), "there is no split 'tests'"),
        (("first", "second", "resamples=5"), "invalid resamples 5"),
        (("first", "second", "output=page.pdf"), "invalid output page.pdf"),
        (("first", "second", "data_dir=nowhere"), "is not a folder"),
        ((), "name is missing"),
    ],
)
def test_what_cannot_be_is_one_line(line: tuple[str, ...], said: str, plots: Path, command: Command) -> None:
    answer = command("report", *line, f"plots_dir={plots}", "models_dir=none")
    assert answer.code == 2 and said in answer.err and len(answer.err.splitlines()) == 1, answer.err


def test_predictions_that_are_damaged_are_refused(plots: Path, command: Command) -> None:
    whole = PredictionTable.read(plots / "first/test")
    taken(whole, np.arange(10)).write(plots / "first/test/cut")
    (plots / "first/test/cut/logits.npy").replace(plots / "first/test/logits.npy")
    answer = command("report", "first", "second", f"plots_dir={plots}", "models_dir=none")
    assert answer.code == 2 and "80 rows of 4 classes, logits of the shape [10, 4]" in answer.err
    (plots / "second/test/logits.npy").write_bytes(b"")
    answer = command("report", "second", "first", f"plots_dir={plots}", "models_dir=none")
    assert answer.code == 2 and "predictions.csv, logits.npy or predictions.json" in answer.err


def test_a_run_without_a_test_part_is_read_from_val(plots: Path, command: Command) -> None:
    (plots / "first/test").replace(plots / "first/val")
    answer = command("report", "first", f"plots_dir={plots}", "models_dir=none")
    assert answer.code == 0 and "split      val" in answer.out, answer.err
    html = (plots / "first/report.html").read_text()
    assert "evaluated on the val split" in html
    for said in ("test --checkpoint_name first --split val --robustness", "report first --split val"):
        assert said in html
    answer = command("report", "first", f"plots_dir={plots}", "models_dir=none", "split=test")
    assert answer.code == 2 and "'first' has no predictions for its test split" in answer.err


def test_no_advice_leads_to_a_part_that_the_data_has_not(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, num_classes=3, each=4, pictures=False)
    shutil.rmtree(tmp_path / "plots/run/test")
    bundle = tmp_path / "models/run"
    (bundle / "manifest.csv").write_text((bundle / "manifest.csv").read_text().replace(",test,", ",val,"))
    monkeypatch.chdir(tmp_path)
    assert "test --checkpoint_name run --split val" in command("report", "run").err
    answer = command("report", "run", "--split", "test")
    assert (
        answer.code == 2
        and "its data has no test split, only train, val" in answer.err
        and "test --checkpoint_name" not in answer.err
    )


def test_each_part_has_a_page_of_its_own(plots: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plots.parent)
    for part in ("val", "test-holiday-01234567"):
        shutil.copytree(plots / "first/test", plots / "first" / part)
    pages = {}
    for line in (
        ("first",),
        ("first", "--split", "val"),
        ("plots/first/test-holiday-01234567",),
        ("plots/first/test",),
    ):
        answer = command("report", *line, "models_dir=none")
        assert answer.code == 0, answer.err
        pages[line] = Path(answer.out.splitlines()[-1].partition("page")[2].strip())
    folder = Path("plots/first")
    assert list(pages.values()) == [folder / part / "report.html" for part in ("", "val", "test-holiday-01234567", "")]
    html = (folder / "test-holiday-01234567/report.html").read_text()
    assert (
        "evaluated on the test-holiday-01234567 split" in html
        and "test --checkpoint_name first --test_dir PATH --robustness" in html
    )
    assert (
        "report plots/first/test-holiday-01234567" in html.replace(str(plots.parent) + "/", "")
        and "no bundle" not in html
    )


def test_what_was_measured_of_the_model_stands_in_each_of_its_parts(plots: Path, command: Command) -> None:
    for place, accuracy in (("first", 0.123), ("first/val", 0.456), ("first/test-holiday", 0.789)):
        if place != "first":
            shutil.copytree(plots / "first/test", plots / place)
        (plots / place / "robustness.json").write_text(json.dumps({"blur": {"0": accuracy}}))
    shutil.copytree(plots / "first/test", plots / "first/test-own")
    for part, shown in (("test", "0.123"), ("val", "0.456"), ("test-holiday", "0.789"), ("test-own", "")):
        assert (
            command(
                "report",
                str(plots / "first" / part),
                "models_dir=none",
                f"plots_dir={plots}",
                f"output={plots}/page.html",
            ).code
            == 0
        )
        html = (plots / "page.html").read_text()
        assert (f">{shown}</td>" in html) if shown else ("no robustness.json" in html), part
