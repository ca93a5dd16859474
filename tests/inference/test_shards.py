"""Shards of a cluster: dealt in order, written whole or not at all, by a worker with the right model."""

from __future__ import annotations

import json
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest

from image_classifier.errors import CheckpointError, ConfigError, StorageError
from image_classifier.inference.cluster import ShardPlan
from image_classifier.inference.cluster_worker import ShardJob, WorkerModel, answer
from image_classifier.inference.load import load_predictor
from image_classifier.inference.shards import Shards
from image_classifier.sources.inputs import Inputs
from image_classifier.sources.object_store import Storage
from tests.inference.test_cluster import rows


@pytest.fixture(autouse=True)
def in_the_trained_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def dealt(*items: str, size: int = 8) -> ShardPlan:
    return ShardPlan.of(Inputs(items, lambda: sys.stdin.buffer), size)


def test_images_are_dealt_in_order_and_any_machine_finds_them(tmp_path: Path) -> None:
    addresses = ["https://host/1.jpg", "s3://bucket/2.jpg"]
    (tmp_path / "list.csv").write_text("\n".join(["path", *addresses, '""']))
    found = dealt("data/digits/test/3", str(tmp_path / "list.csv"))
    items = [item for shard in found.shards for item in pickle.loads(shard)]
    names = [*map(str, sorted(Path("data/digits/test/3").iterdir())), *addresses, str(tmp_path / "list.csv")]
    assert [item.name for item in items] == names and found.images == len(names)
    assert all(item.source.is_absolute() for item in items if isinstance(item.source, Path))
    assert dealt("data/digits/test/3").sha256 != found.sha256


def test_an_archive_is_refused(tmp_path: Path) -> None:
    from tests.sources.test_inputs import as_zip

    as_zip(tmp_path / "a.zip", [("1.png", b"x")])
    with pytest.raises(ConfigError, match="only this process can read"):
        dealt(str(tmp_path / "a.zip"))


@pytest.fixture
def job(trained: Path, tmp_path: Path) -> ShardJob:
    """Answers 36 images in five shards."""
    model = trained / "models/digits"
    shards = Shards(str(tmp_path / "out"), Storage(), {"images": "those"}, 5)
    fetch = partial(WorkerModel.of, model)
    return ShardJob(
        fetch().sha256, partial(load_predictor, batch_size=4), shards, 3, 1, fetch, str(tmp_path / "models")
    )


def do(job: ShardJob, images: ShardPlan) -> list[object]:
    return [
        pickle.loads(answer({"shard": [number], "items": [items]}, job)["result"][0])
        for number, items in enumerate(images.shards)
    ]


def test_a_shard_done_twice_is_there_once_and_a_worker_leaves_whole_files_only(job: ShardJob, tmp_path: Path) -> None:
    images = dealt("data/digits/test/3")
    assert len(images.shards) == 5 and job.shards.check(resume=False) == 0
    job.shards.begin()
    first = do(job, images)
    content = {path.name: path.read_bytes() for path in (tmp_path / "out.part").iterdir()}
    assert do(job, images) == first
    (tmp_path / "out.part" / "part-00003.parquet").unlink()
    assert do(job, images) == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "out.part").iterdir()} == content
    assert not (tmp_path / "out").exists()
    job.shards.finish(images.images, 0)
    assert rows(tmp_path / "out").num_rows == images.images and not (tmp_path / "out.part").exists()
    assert json.loads((tmp_path / "out/_SUCCESS").read_text()) == {"images": images.images, "errors": 0, "shards": 5}


def test_what_lies_in_the_way_is_never_touched(job: ShardJob, tmp_path: Path) -> None:
    shards, part = job.shards, tmp_path / "out.part"
    part.mkdir()
    (part / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"out.part' holds other files"):
        shards.check(resume=True)
    (part / "mine.txt").unlink()
    shards.begin()
    assert shards.check(resume=False) == 0  # a run that ended before its first answer
    (part / "part-00001.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="add --resume to continue"):
        shards.check(resume=False)
    assert shards.check(resume=True) == 1
    with pytest.raises(ConfigError, match="the images are others"):
        Shards(shards.output, Storage(), {"images": "others"}, 5).check(resume=True)
    with pytest.raises(StorageError, match=r"part-00000.parquet was written and is not in"):
        shards.finish(1, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="exists"):
        shards.check(resume=True)


def test_a_machine_that_sees_another_folder_says_so(job: ShardJob) -> None:
    (found, *_) = do(job, dealt("data/digits/test/3"))
    assert isinstance(found, StorageError) and "give a folder that all machines share" in str(found)


def test_a_model_that_is_not_what_was_sent_is_refused(job: ShardJob, tmp_path: Path) -> None:
    job.shards.begin()
    (unpacked,) = {WorkerModel.of(Path("models/digits")).unpacked(tmp_path / "models") for _ in range(2)}
    (unpacked / "model.onnx").write_bytes(b"another")
    with pytest.raises(CheckpointError, match="damaged on .*: remove"):
        WorkerModel.of(Path("models/digits")).unpacked(tmp_path / "models")
    lone = WorkerModel.of(Path("models/digits/model.onnx"))
    assert lone.unpacked(tmp_path / "models").name == "model.onnx"


def test_names_of_shards_sort_as_their_numbers() -> None:
    for count in (3, 100_000, 100_001):
        shards = Shards("o", Storage(), {}, count)
        names = [shards.name(number) for number in (0, 2, 9, 10, count - 1)]
        assert sorted(names[:-1]) == names[:-1] and len({len(name) for name in names}) == 1
