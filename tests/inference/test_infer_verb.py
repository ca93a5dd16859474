"""The verb `infer` with everything that it takes and gives, as a shell would call it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.conftest import ROOT, Command
from tests.sources.test_inputs import as_tar, as_zip


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


BASE = ("infer", "--checkpoint_name", "digits", "--format", "json")


def classes(out: str) -> list[str]:
    return [row["predicted_class"] for row in json.loads(out)]


def test_folder_archives_table_and_list_give_the_same_answers(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(Path("data/digits/test/3").iterdir())
    files = [(path.name, path.read_bytes()) for path in paths]
    as_zip(tmp_path / "a.zip", files)
    as_tar(tmp_path / "a.tar.zst", files)
    (tmp_path / "t.csv").write_text("path\n" + "".join(f"{path.resolve()}\n" for path in paths))
    expected = classes(command(*BASE, "--images", "data/digits/test/3").out)
    for name in ("a.zip", "a.tar.zst", "t.csv"):
        assert classes(command(*BASE, "--images", str(tmp_path / name)).out) == expected
    together = command(*BASE, "--images", *(str(tmp_path / name) for name in ("a.zip", "a.tar.zst")))
    assert classes(together.out) == expected * 2


@pytest.mark.parametrize("image", [True, False])
def test_standard_input_is_an_image_or_a_list(image: bool, trained: Path) -> None:
    path = next(Path("data/digits/test/3").iterdir())
    content = path.read_bytes() if image else f"{path}\n".encode()
    line = [sys.executable, str(ROOT / "commands.py"), *BASE, "--images", "-"]
    done = subprocess.run(line, input=content, capture_output=True, check=True, cwd=trained)
    (row,) = json.loads(done.stdout)
    assert row["path"] == ("-" if image else str(path)) and row["predicted_class"]


def test_parquet_sorting_and_a_threshold_at_once(command: Command, tmp_path: Path) -> None:
    output, sorted_to = tmp_path / "answers.parquet", tmp_path / "sorted"
    line = [
        "infer",
        "--checkpoint_name",
        "digits",
        "--format",
        "parquet",
        "--output",
        str(output),
        "--sort_into",
        str(sorted_to),
    ]
    answer = command(
        *line,
        "--threshold",
        "0.3",
        "--decision.ood_rate",
        "0",
        "--images",
        "data/digits/test",
        str(tmp_path / "none.png"),
    )
    assert answer.code == 2 and "1 of 356 images could not be read" in answer.err
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert len(rows) == 356 and sum(bool(row["error"]) for row in rows) == 1
    abstained = [row for row in rows if row["decision"] == "abstain"]
    assert abstained and all(row["confidence"] < 0.3 and "the limit is 0.300" in row["reason"] for row in abstained)
    counts = {folder.name: len(list(folder.iterdir())) for folder in sorted_to.iterdir()}
    assert counts.get("_abstain") == len(abstained) and sum(counts.values()) == 355


def test_images_of_an_archive_can_be_explained(command: Command, tmp_path: Path) -> None:
    as_zip(tmp_path / "a.zip", [("x/1.png", next(Path("data/digits/test/3").iterdir()).read_bytes())])
    answer = command(*BASE, "--explain", str(tmp_path / "heat"), "--images", str(tmp_path / "a.zip"))
    assert answer.code == 0, answer.err
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "heat").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("--threshold", "2"), "expected a confidence from 0 to 1"),
        (("--format", "parquet"), "--output FILE"),
        (("--fetch.timeout_s", "0"), "fetch.timeout_s"),
        (("--archive.max_members", "0"), "archive.max_members"),
        (("--sort_into", "data"), "is within the images"),
        (("--backend", "tensorrt"), "TensorRT needs"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(command: Command, line: tuple[str, ...], says: str) -> None:
    answer = command("infer", "--checkpoint_name", "digits", *line, "--images", "data")
    assert (
        answer.code == 2 and answer.out == "" and says in answer.err.splitlines()[-1] and "Traceback" not in answer.err
    )


def test_a_private_address_is_a_row_and_exit_code_2(command: Command) -> None:
    answer = command(*BASE, "--images", "http://127.0.0.1:9/1.png")
    (row,) = json.loads(answer.out)
    assert answer.code == 2 and "private network" in row["error"]


def test_a_bar_is_shown_only_where_somebody_looks(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    command(
        "infer", "--checkpoint_name", "digits", "--output", str(tmp_path / "a.txt"), "--images", "data/digits/test/3"
    )
    assert "36" in terminal.getvalue()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(trained: Path, tmp_path: Path) -> None:
    path = next(Path("data/digits/test/3").resolve().parent.glob("*/*.png"))
    code = "import resource,runpy,sys;sys.argv=sys.argv[1:];sys.path.insert(0,sys.argv[0].rpartition('/')[0])\n"
    code += "try: runpy.run_path(sys.argv[0],run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,file=sys.stderr)"
    peaks = []
    for count in (1000, 100_000):
        line = [
            sys.executable,
            "-c",
            code,
            str(ROOT / "commands.py"),
            "infer",
            "--checkpoint_name",
            "digits",
            "--format",
            "csv",
            "--images",
            "-",
        ]
        done = subprocess.run(
            [*line, "--output", str(tmp_path / "a.csv")],
            input=f"{path}\n" * count,
            capture_output=True,
            text=True,
            check=True,
            cwd=trained,
        )
        peaks.append(int(done.stderr.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0]
