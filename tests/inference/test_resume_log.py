"""`infer --resume`: killed at any moment and gone on with, the answers are those of a run that was never stopped, to
the byte.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from image_classifier.errors import ConfigError
from image_classifier.inference.resume_log import ResumeLog, check_same_run
from image_classifier.sources.image_source import ImageSource
from tests.conftest import ROOT, Command

FORMATS = ("jsonl", "csv", "parquet", "json", "table")


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def line(output: Path, *more: str) -> list[str]:
    images = ["--images", "data/digits/test", str(output.parent / "none.png"), "data/digits/test/3"]
    form = output.suffix[1:] if output.suffix[1:] in FORMATS else "table"
    return [
        "infer",
        "--checkpoint_name",
        "digits",
        "--format",
        form,
        "--output",
        str(output),
        "--batch_size",
        "16",
        *more,
        *images,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_the_answers_are_the_same_to_the_byte(
    form: str, tmp_path: Path, command: Command
) -> None:
    whole, output = tmp_path / f"whole.{form}", tmp_path / f"answers.{form}"
    assert command(*line(whole)).code == 2  # one image is not there
    part, moments, kills = ResumeLog.of(output).path, random.Random(form), 0
    for _ in range(5):
        before = part.stat().st_size if part.exists() else 0
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "commands.py"), *line(output, "--resume")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while run.poll() is None and not (part.exists() and part.stat().st_size > before):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            kills += 1
        run.wait()
        assert output.exists() <= (run.returncode == 2)  # whole or not there
        if output.exists():
            break
    assert kills >= 2
    answer = command(*line(output, "--resume"))
    assert answer.code == 2 and "could not be read" in answer.err
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(
        [output.name, whole.name, f".{output.name}.run", f".{whole.name}.run"]
    )


def broken_off(output: Path, command: Command, monkeypatch: pytest.MonkeyPatch, share: float = 0.5) -> None:
    """What a kill leaves when this share was written."""
    with monkeypatch.context() as patch:
        patch.setattr("image_classifier.inference.infer.atomic_file", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(*line(output))
    content = ResumeLog.of(output).path.read_bytes()
    ResumeLog.of(output).path.write_bytes(content[: int(share * len(content))])


CUT = [("jsonl", 0.0), ("csv", 0.77), ("parquet", 0.5)]
CUT_MORE = [pytest.param(*cut, marks=pytest.mark.slow) for cut in [("jsonl", 1.0), ("json", 0.9), ("table", 0.2)]]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "share"), [*CUT, *CUT_MORE])
def test_whatever_was_written_is_gone_on_with(
    form: str, share: float, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / f"whole.{form}", tmp_path / f"answers.{form}"
    command(*line(whole))
    broken_off(output, command, monkeypatch, share)
    answer = command(*line(output, "--resume"))
    assert answer.code == 2 and "could not be read" in answer.err, answer.err
    assert output.read_bytes() == whole.read_bytes() and not ResumeLog.of(output).path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--top_k", "2"), "top_k=2 was None"),
        (("--threshold", "0.5"), "threshold=0.5 was 0"),
        (("--decision.risk", "0.2"), "decision.risk=0.2 was None"),
        (("--backend", "checkpoint"), "backend=checkpoint was onnx"),
        (("--limits.max_bytes", "1000"), "limits.max_bytes=1000 was"),
    ],
)
def test_another_run_is_refused(
    more: tuple[str, ...], says: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    broken_off(output, command, monkeypatch)
    before = ResumeLog.of(output).path.read_bytes()
    answer = command(*line(output, "--resume", *more))
    assert answer.code == 2 and says in answer.err and not output.exists()
    assert ResumeLog.of(output).path.read_bytes() == before


def test_a_finished_run_is_not_answered_again(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.csv"
    base = ("infer", "--checkpoint_name", "digits", "--format", "csv", "--output", str(output), "--resume")
    few = ("--images", str(tmp_path / "none.png"), "data/digits/test/3")
    first = command(*base, *few)
    content, status = output.read_bytes(), output.stat()
    with monkeypatch.context() as patch:
        patch.setattr("image_classifier.inference.infer._answers", lambda *_: 1 / 0)
        again = command(*base, *few)
        assert again.code == first.code == 2 and again.err.splitlines()[-1] == first.err.splitlines()[-1]
        assert f"all {content.count(bytes([10])) - 1} images are answered" in again.err and output.stat() == status
        other = command(*base, "--top_k", "2", *few)
        assert other.code == 2 and "belongs to another run: top_k=2 was None" in other.err
        more = command(*base, *few, "another.png")
        assert more.code == 2 and "holds the answers for other images" in more.err
    assert output.read_bytes() == content
    output.write_text("changed by hand")
    assert "there is no stopped run to resume" in command(*base, *few).err and output.read_bytes() == content


def test_another_model_and_other_images_are_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    broken_off(output, command, monkeypatch)
    base = [
        "infer",
        "--format",
        "jsonl",
        "--output",
        str(output),
        "--batch_size",
        "16",
        "--resume",
        "--checkpoint_name",
    ]
    other = command(*base, "digits", "--images", "data/digits/train/3")
    assert other.code == 2 and "image 1 is 'data/digits/train/3" in other.err
    fewer = command(*base, "digits", "--images", "data/digits/test/0")
    assert fewer.code == 2 and ("there are only" in fewer.err or "image " in fewer.err)
    shutil.copytree("models/digits", tmp_path / "copy")
    info = json.loads((tmp_path / "copy/bundle.json").read_text())
    (tmp_path / "copy/bundle.json").write_text(json.dumps({**info, "name": "other"}))
    model = command(*base, str(tmp_path / "copy"), "--images", "data/digits/test")
    assert model.code == 2 and "the model is another one" in model.err


@pytest.mark.slow
def test_without_resume_a_run_starts_over_and_says_so(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "answers.jsonl"
    broken_off(output, command, monkeypatch)
    answer = command(*line(output))
    command(*line(tmp_path / "other.jsonl"))
    assert (
        "--resume would have continued it" in answer.err
        and output.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    )


def test_resuming_needs_a_file_and_a_second_writer_is_refused(tmp_path: Path, command: Command) -> None:
    from image_classifier.atomic_io import file_lock

    answer = command("infer", "--checkpoint_name", "digits", "--resume", "--images", "data/digits/test/0")
    assert answer.code == 2 and "--output FILE" in answer.err
    with file_lock(tmp_path / ".answers.jsonl.lock"):
        refused = command(*line(tmp_path / "answers.jsonl"))
    assert refused.code == 2 and "another run is writing" in refused.err


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12), st.integers(1, 5), st.data())
def test_a_part_cut_anywhere_keeps_whole_batches(
    tmp_path: Path, count: int, batch_size: int, data: st.DataObject
) -> None:
    part = ResumeLog.of(tmp_path / "x.jsonl")
    part.begin({"model": "m"})
    part.append({"path": f"odd \udcff\n{number}.png", "error": "no"} for number in range(count))
    content = part.path.read_bytes()
    first = content.index(b"\n") + 1
    cut = data.draw(st.integers(first, len(content)))
    part.path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n") - 1
    kept = part.keep(batch_size)
    assert kept == whole // batch_size * batch_size
    assert [answer["path"] for answer in part.answers()] == [f"odd \udcff\n{number}.png" for number in range(kept)]
    items = iter([ImageSource.missing(f"odd \udcff\n{number}.png", "no") for number in range(20)])
    part.skip(items, kept)
    assert next(items).name == f"odd \udcff\n{kept}.png"


def test_a_first_line_that_was_cut_is_no_run(tmp_path: Path) -> None:
    part = ResumeLog.of(tmp_path / "x.jsonl")
    assert part.run() is None
    for content in (b"", b'{"model": ', b"\xff\n", b"[1]\n"):
        part.path.write_bytes(content)
        assert part.run() is None


def test_a_key_that_one_run_did_not_know_is_another_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threshold=None was 0"):
        check_same_run({"model": "m", "threshold": 0}, {"model": "m"}, "x.part")
