"""`infer engine=ray`: a cluster answers as one machine does, row for row, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from image_classifier.cpu import usable_cores
from image_classifier.inference.onnx_runtime import open_session
from image_classifier.sources.object_store import Storage
from tests.conftest import ROOT, Answer, Command

ODD = "a b'ü,.png"  # no image


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """What is asked about: 1 066 images of two of which nothing can be read."""
    (tmp_path / ODD).write_bytes(b"no image")
    return ["data/digits/test", str(tmp_path / ODD), "data/digits/test", str(tmp_path / "none.png"), "data/digits/test"]


def line(output: object, photos: list[str], *more: str) -> list[str]:
    words = [
        "infer",
        "--checkpoint_name",
        "digits",
        "--format",
        "parquet",
        "--output",
        str(output),
        "--batch_size",
        "4",
        "--top_k",
        "3",
    ]
    return [*words, *more, "--images", *photos]


def on_ray(output: object, photos: list[str], *more: str) -> list[str]:
    return line(output, photos, "--engine", "ray", "--ray.shard_batches", "2", *more)


def rows(path: Path) -> pyarrow.Table:
    return pyarrow.parquet.read_table(path)


@pytest.fixture
def expected(command: Command, tmp_path: Path, photos: list[str]) -> pyarrow.Table:
    """What one machine answers."""
    assert command(*line(tmp_path / "local.parquet", photos)).code == 2
    return rows(tmp_path / "local.parquet")


# Without a cluster


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--engine", "spark"), "there is no engine 'spark': use one of local, ray"),
        (
            ("--engine", "ray", "--format", "csv"),
            "engine=ray writes a folder of Parquet files: add --format parquet --output DIR",
        ),
        (("--engine", "ray", "--explain"), "engine=ray does not support --explain: leave it out"),
        (
            ("--engine", "ray", "--sort_into", "x", "--images", "-"),
            "engine=ray does not support --sort_into and --images -: leave it out",
        ),
        (("--engine", "ray", "--ray.cpus", "0"), "must be at least 1"),
        (("--engine", "ray", "--ray.workers", "-1"), "must be at least 1"),
        (("--engine", "ray", "--ray.retries", "many"), "ray.retries"),
        (("--engine", "ray", "--ray.worker", "1"), "did you mean ray.workers"),
        (("--engine", "ray", "--ray.address", "ray://h:1"), "on a machine of the cluster"),
        (("--engine", "ray", "--backend", "none"), "there is no backend 'none'"),
        (("--engine", "ray", "--images", "data/digits/nothing*"), "holds no image"),
        (("--output", "s3://b/x"), "only a cluster can write to output='s3://b/x': add --engine ray"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_starts(
    more: tuple[str, ...], told: str, command: Command, tmp_path: Path
) -> None:
    found = command(*line(tmp_path / "o", ["data/digits/test/3"]), *more)
    assert found.code == 2 and told in found.err and found.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_ray_one_line_says_what_to_install(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("image_classifier.inference.cluster.find_spec", lambda name: None)
    found = command(*on_ray(tmp_path / "o", ["data/digits/test/3"]))
    assert found.code == 2 and "pip install 'image-classifier[ray]'" in found.err


def test_a_process_takes_the_threads_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, threads in (("1", 1), ("0", 1), ("4000", bound := len(os.sched_getaffinity(0))), ("many", bound)):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert usable_cores() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = open_session(Path("models/digits/model.onnx")).get_session_options()
    assert options.intra_op_num_threads == (1 if (os.cpu_count() or 1) > 1 else 0)


# On a cluster


@pytest.mark.slow
def test_workers_killed_in_the_middle_lose_and_repeat_nothing(
    expected: pyarrow.Table, photos: list[str], tmp_path: Path
) -> None:
    run = started(*on_ray(tmp_path / "o", photos, "--ray.workers", "2"))
    for kill in range(3):
        wait_for(lambda kill=kill: len(written(tmp_path / "o")) > 4 * kill, run)
        os.kill(wait_for(lambda: workers_below(run.pid), run)[0], signal.SIGKILL)
    found = ended(run)
    assert found.code == 2 and "2 of 1067 images could not be read" in found.err, found.err
    assert rows(tmp_path / "o").equals(expected)
    assert sorted(os.listdir(tmp_path)) == sorted([ODD, "local.parquet", ".local.parquet.run", "o"])


@pytest.mark.slow
def test_a_machine_killed_in_the_middle_loses_and_repeats_nothing(
    expected: pyarrow.Table, photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as tests/inference/two_nodes.py has it
    with subprocess.Popen(
        [sys.executable, "tests/inference/two_nodes.py"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as cluster:
        assert cluster.stdout is not None
        address, first, second = cluster.stdout.readline().split()
        run = started(*on_ray(tmp_path / "o", photos, "--ray.address", address))
        wait_for(lambda: workers_below(int(first)), run)
        wait_for(lambda: workers_below(int(second)) and written(tmp_path / "o"), run)
        os.kill(int(second), signal.SIGKILL)
        found = ended(run)
        cluster.communicate("")
    assert found.code == 2 and "2 of 1067 images could not be read" in found.err, found.err
    assert rows(tmp_path / "o").equals(expected)


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_that_looks_whole_and_is_gone_on_with(
    expected: pyarrow.Table, photos: list[str], tmp_path: Path
) -> None:
    run = started(*on_ray(tmp_path / "o", photos))
    wait_for(lambda: len(written(tmp_path / "o")) > 10, run)
    below = descendants(run.pid)
    run.kill()
    run.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    left = {path: path.stat().st_mtime_ns for path in written(tmp_path / "o")}
    assert 10 < len(left) < 133 and not (tmp_path / "o").exists() and not (tmp_path / "o.part/_SUCCESS").exists()
    assert "add --resume to continue it" in ended(started(*on_ray(tmp_path / "o", photos))).err
    assert "the images are others" in ended(started(*on_ray(tmp_path / "o", photos[1:], "--resume"))).err
    found = ended(started(*on_ray(tmp_path / "o", photos, "--resume")))
    assert (
        found.code == 2
        and f"resume: {len(left)} of 134 files" in found.err
        and "2 of 1067 images could not be read" in found.err
    ), found.err
    assert rows(tmp_path / "o").equals(expected)
    assert {path: (tmp_path / "o" / path.name).stat().st_mtime_ns for path in left} == left


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_cluster_that_was_started(number: int, code: int, photos: list[str], tmp_path: Path) -> None:
    run = started(*on_ray(tmp_path / "o", photos))
    wait_for(lambda: written(tmp_path / "o"), run)
    below = descendants(run.pid)
    run.send_signal(number)
    found = ended(run)
    assert found.code == code and "Traceback" not in found.err, found.err
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_workers_that_die_again_and_again_end_in_one_line(photos: list[str], tmp_path: Path) -> None:
    run = started(*on_ray(tmp_path / "o", photos, "--ray.retries", "1", "--ray.workers", "1"))
    while run.poll() is None:
        for pid in workers_below(run.pid):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    found = ended(run)
    assert (
        found.code == 2
        and found.err.splitlines()[-1].startswith("error: the cluster gave up")
        and "Traceback" not in found.err
    ), found.err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_no_cluster_at_the_address_is_one_line(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray would remember one that runs here
    for address in ("auto", "127.0.0.1:9"):
        found = ended(started(*on_ray(tmp_path / "o", photos, "--ray.address", address)))
        assert found.code == 2 and found.err.splitlines()[-1].startswith(
            f"error: there is no Ray cluster at '{address}'"
        ), found.err


# On S3-like storage


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server that speaks as S3 does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=-3, stderr=-3
    )
    wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close() or True)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Images in the bucket photos, and this process' environment as it must be."""
    import boto3

    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    keys = {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_ENDPOINT_URL": s3,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    client.create_bucket(Bucket="photos")
    for path in sorted(Path("data/digits/test").rglob("*.png")):
        client.put_object(Bucket="photos", Key=f"new/{path.relative_to('data/digits/test')}", Body=path.read_bytes())
    for name in (ODD, ".hidden/1.png", "readme.txt"):
        client.put_object(Bucket="photos", Key=f"new/{name}", Body=b"no image")
    return Storage.here()


@pytest.mark.slow
def test_images_in_a_bucket_are_answered_as_on_a_disk(bucket: Storage, command: Command, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "path\ns3://photos/new/3/none.png\ns3://none/1.png\ns3://photos/new/readme.txt\n"
    )
    found = command(
        *line(tmp_path / "s3.parquet", ["s3://photos/new/", "s3://photos/new/readme.txt", str(tmp_path / "list.csv")])
    )
    assert found.code == 2 and "5 of 360 images could not be read" in found.err, found.err
    assert command(*line(tmp_path / "local.parquet", ["data/digits/test"])).code == 0
    mine, theirs = rows(tmp_path / "s3.parquet").to_pylist(), rows(tmp_path / "local.parquet").to_pylist()
    assert [row["path"] for row in mine[:355]] == [
        row["path"].replace("data/digits/test", "s3://photos/new") for row in theirs
    ]
    assert [row["predicted_class"] for row in mine[:355]] == [row["predicted_class"] for row in theirs]
    assert mine[357]["error"] == "there is no such file"
    for number, (place, told) in enumerate(
        [("s3://photos/empty", "holds no image"), ("s3://none/x", "holds no image"), ("s3://", "names no bucket")]
    ):
        found = command(*line(tmp_path / f"{number}.parquet", [place]))
        assert found.code == 2 and told in found.err and found.err.count("\n") == 1, found.err


@pytest.mark.slow
def test_a_cluster_reads_and_writes_a_bucket(bucket: Storage, command: Command, tmp_path: Path) -> None:
    from pyarrow.fs import S3FileSystem

    assert command(*line(tmp_path / "local.parquet", ["s3://photos/new"])).code == 2
    found = ended(started(*on_ray("s3://photos/answers", ["s3://photos/new"])))
    assert found.code == 2 and "1 of 356 images could not be read" in found.err, found.err
    files = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    assert pyarrow.parquet.read_table("photos/answers", filesystem=files).equals(rows(tmp_path / "local.parquet"))
    again = ended(started(*on_ray("s3://photos/answers", ["s3://photos/new"], "--resume")))
    assert again.code == 2 and "'s3://photos/answers' holds complete answers" in again.err


# Processes


def started(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "commands.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(run: subprocess.Popen[str]) -> Answer:
    out, err = run.communicate(timeout=300)
    return Answer(run.returncode, out, err)


def written(output: Path) -> list[Path]:
    return sorted(output.with_name(f"{output.name}.part").glob("part-*.parquet"))


def descendants(pid: int) -> dict[int, str]:
    """All processes below one, with their command lines."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    processes = [
        (int(own), int(parent), args) for own, parent, args in (each.split(None, 2) for each in listed.splitlines())
    ]
    found: dict[int, str] = {}
    while more := {
        own: args for own, parent, args in processes if (parent == pid or parent in found) and own not in found
    }:
        found |= more
    return found


def workers_below(pid: int) -> list[int]:
    return [own for own, args in descendants(pid).items() if args.startswith("ray::MapBatches")]


def wait_for(
    condition: Callable[[], object], run: subprocess.Popen[str] | None = None, seconds: float = 120.0
) -> object:
    """What the condition gives, once that is something; fails where the run ends before."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except OSError:
            pass
        assert time.monotonic() < end, "nothing happened"
        assert run is None or run.poll() is None, ended(run).err
        time.sleep(0.02)
