"""TensorRT: what is ours of it, with a stand-in for its package and for CUDA; and the package itself where it is
installed.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.errors import CheckpointError, ConfigError, ParityError, StorageError
from image_classifier.inference.backend_selection import candidates
from image_classifier.inference.backends import fitting, open_backend, takes_minutes
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.tensorrt.backend import TensorRtBackend, open_engine
from image_classifier.inference.tensorrt.cache import PLACE, EngineCache
from image_classifier.inference.tensorrt.engine import EngineSettings, build, logger_of
from image_classifier.inference.verify import verify_backend
from tests.conftest import Command
from tests.inference.fake_tensorrt import TensorRt

HALF_A_MINUTE = hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def engines() -> list[str]:
    return sorted(path.suffix for path in (Path.home() / PLACE).glob("*") if path.suffix != ".lock")


def engine_of(bundle: Bundle, **asked: object) -> TensorRtBackend:
    return open_engine(bundle, bundle.path("model.onnx"), EngineSettings(**asked))[0]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "tf32", "files"), [("fp32", False, []), ("tf32", True, []), ("fp16", False, ["model.fp16.onnx"])]
)
def test_an_export_is_held_against_the_checkpoint_and_infer_runs_its_engine(
    bundle: Bundle, trt: TensorRt, command: Command, precision: str, tf32: bool, files: list[str]
) -> None:
    place, line = str(bundle.directory), ("--images", "data/digits/test/3", "--format", "json", "--backend")
    answer = command(
        "export",
        place,
        "--to",
        "tensorrt",
        "--images",
        "40",
        "--tensorrt.precision",
        precision,
        "--tensorrt.max_batch_size",
        "24",
    )
    assert answer.code == 0 and answer.out.split()[:2] == ["tensorrt", "100.00%"], answer.err
    assert trt.built == [{"bounds": [[1, 3, 32, 32], [24, 3, 32, 32], [24, 3, 32, 32]], "tf32": tf32}]
    found = read_bundle(bundle.directory)
    facts = found.info.exports["tensorrt"]
    assert facts["files"] == files and set(found.info.files) - set(bundle.info.files) == set(files)
    assert (facts["precision"], facts["max_batch_size"], facts["gpu"], facts["tensorrt"]) == (
        precision,
        24,
        "NVIDIA Fake",
        "11.4.0.106",
    )
    assert facts["largest_difference"] <= facts["tolerance"] and engines() == [".engine", ".json"]
    assert not any(path.suffix == ".engine" for path in bundle.directory.rglob("*"))
    trt.cuda.batches.clear()
    rows, plain = (
        json.loads(command("infer", "--checkpoint_name", place, *line, name).out) for name in ("tensorrt", "onnx")
    )
    assert [row["predicted_class"] for row in rows] == [row["predicted_class"] for row in plain]
    for row, exact in zip(rows, plain, strict=True):
        assert row["all_predictions"] == pytest.approx(exact["all_predictions"], abs=facts["tolerance"])
    assert max(trt.cuda.batches) <= 24 < sum(trt.cuda.batches) and len(trt.built) == 1
    assert "tensorrt" in candidates(found) and [check.backend for check in [verify_backend(found, "tensorrt")]] == [
        "tensorrt"
    ]


def test_a_form_replaces_the_one_before(bundle: Bundle, trt: TensorRt, command: Command) -> None:
    for precision, there in (("fp16", True), ("fp32", False)):
        answer = command(
            "export", str(bundle.directory), "--to", "tensorrt", "--images", "20", "--tensorrt.precision", precision
        )
        info = read_bundle(bundle.directory).info
        assert (
            answer.code == 0
            and ("model.fp16.onnx" in info.files) == (bundle.directory / "model.fp16.onnx").exists() == there
        )
        assert {
            path.relative_to(bundle.directory).as_posix() for path in bundle.directory.rglob("*") if path.is_file()
        } == {
            *info.files,
            "bundle.json",
        }


def test_infer_builds_an_engine_once_and_auto_takes_none_that_must_be_built(bundle: Bundle, trt: TensorRt) -> None:
    assert "tensorrt" in fitting(bundle) and takes_minutes(bundle, "tensorrt") and "tensorrt" not in candidates(bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 3, 32, 32), dtype=np.uint8)
    expected = OnnxBackend(bundle.path("model.onnx")).logits(pixels)
    for _ in range(2):
        np.testing.assert_allclose(open_backend(bundle, "tensorrt").logits(pixels), expected, atol=1e-5)
    assert (
        len(trt.built) == 1
        and trt.built[0]["tf32"] is False
        and not takes_minutes(bundle, "tensorrt")
        and "tensorrt" in candidates(bundle)
    )


@given(count=st.integers(0, 40), most=st.integers(1, 17))
@HALF_A_MINUTE
def test_any_number_of_images_goes_through_in_batches_that_fit(
    bundle: Bundle, trt: TensorRt, count: int, most: int
) -> None:
    backend = engine_of(bundle, max_batch_size=most)
    trt.cuda.batches.clear()
    pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
    logits, embeddings = backend.logits_and_embeddings(pixels)
    assert sum(trt.cuda.batches) == count and max(trt.cuda.batches, default=1) <= most
    expected = OnnxBackend(bundle.path("model.onnx")).logits_and_embeddings(np.ascontiguousarray(pixels))
    for found, exact in zip((logits, embeddings), expected, strict=True):
        assert found.shape == exact.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, exact, atol=1e-4)


def test_what_the_engine_does_not_take_is_said(bundle: Bundle, trt: TensorRt) -> None:
    backend = engine_of(bundle)
    with pytest.raises(CheckpointError, match="takes pixels uint8"):
        backend.logits(np.zeros((1, 3, 28, 28), np.uint8))
    with pytest.raises(CheckpointError, match="takes pixels uint8"):
        backend.logits(np.zeros((1, 3, 32, 32), np.float32))
    backend.check(32, 10)
    for size, classes in ((28, 10), (32, 9)):
        with pytest.raises(CheckpointError, match="per image, not"):
            backend.check(size, classes)


def test_memory_of_the_gpu_is_given_back(bundle: Bundle, trt: TensorRt) -> None:
    engine_of(bundle)
    assert trt.cuda.memory == {}
    trt.cuda.room = 1000
    with pytest.raises(ConfigError, match="cudaErrorMemoryAllocation"):
        engine_of(bundle)


def test_an_engine_is_of_one_gpu_version_precision_batch_and_model(bundle: Bundle, trt: TensorRt) -> None:
    model = bundle.path("model.onnx")
    places = {EngineCache.of(model, EngineSettings())._path("engine")}
    places |= {
        EngineCache.of(model, asked)._path("engine")
        for asked in (EngineSettings("tf32"), EngineSettings("fp16"), EngineSettings("fp32", 63))
    }
    trt.__version__ = "10.16.1.11"
    places.add(EngineCache.of(model, EngineSettings())._path("engine"))
    trt.cuda.driver = 13010
    places.add(EngineCache.of(model, EngineSettings())._path("engine"))
    trt.cuda.name = b"NVIDIA Other"
    places.add(EngineCache.of(model, EngineSettings())._path("engine"))
    places.add(EngineCache.of(bundle.path("model.ckpt"), EngineSettings())._path("engine"))
    assert len(places) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "note", "note gone"])
def test_a_damaged_engine_is_never_loaded_but_built_anew(bundle: Bundle, trt: TensorRt, damage: str) -> None:
    _, kept = open_engine(bundle, bundle.path("model.onnx"), EngineSettings())
    plan, note = kept._path("engine"), kept._path("json")
    whole = plan.read_bytes()
    if damage in ("flip", "cut"):
        plan.write_bytes(whole[:-9] + (b"" if damage == "cut" else b"123456789"))
    elif damage == "note":
        note.write_text("[")
    else:
        (plan if damage == "gone" else note).unlink()
    engine_of(bundle)
    assert len(trt.built) == 2 and plan.read_bytes() == whole and kept.read() == whole


def test_no_engine_of_a_bundle_or_of_a_folder_that_others_may_write_is_read(bundle: Bundle, trt: TensorRt) -> None:
    folder = Path.home() / PLACE
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(StorageError, match="other users may write"):
        engine_of(bundle)
    assert trt.built == []
    folder.chmod(0o700)
    engine_of(bundle)
    (kept,) = folder.glob("*.engine")
    shutil.copy(kept, bundle.directory / "model.engine")
    kept.unlink()
    engine_of(bundle)
    assert len(trt.built) == 2


def test_two_at_once_build_one_engine(bundle: Bundle, trt: TensorRt) -> None:
    trt.takes_s = 0.3
    with ThreadPoolExecutor(3) as pool:
        backends = list(pool.map(lambda _: engine_of(bundle), range(3)))
    assert len(trt.built) == 1 and len(backends) == 3


def test_an_engine_that_answers_otherwise_is_not_kept(
    bundle: Bundle, trt: TensorRt, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt.off = 9.0
    before = {path: path.read_bytes() for path in bundle.directory.rglob("*") if path.is_file()}
    with pytest.raises(ParityError, match=r"fp32\) gives .* golden images"):
        engine_of(bundle)
    answer = command(
        "infer", "--checkpoint_name", str(bundle.directory), "--backend", "tensorrt", "--images", "data/digits/test/3"
    )
    assert answer.code == 2 and "golden images" in answer.err and answer.out == "" and engines() == []
    trt.off = 0.03  # less than the golden images, more than the gate allows
    monkeypatch.setattr("image_classifier.inference.golden.Check.fails", lambda *_: False)
    answer = command("export", str(bundle.directory), "--to", "tensorrt", "--images", "40")
    assert (
        answer.code == 2
        and "TensorRT differs by" in answer.err
        and len(answer.err.strip().splitlines()) <= 2
        and engines() == []
    )
    info = read_bundle(bundle.directory).info
    assert "TensorRT differs by" in info.exports["tensorrt"]["refused"] and info.files == bundle.info.files
    assert {path: path.read_bytes() for path in before if path.name != "bundle.json"} == {
        path: content for path, content in before.items() if path.name != "bundle.json"
    }


def test_what_tensorrt_refuses_is_one_line(bundle: Bundle, trt: TensorRt, tmp_path: Path, command: Command) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    empty = tmp_path / "empty.onnx"
    onnx.save(onnx.ModelProto(ir_version=8), empty)
    for path, says in ((broken, "it is not an ONNX model"), (empty, "In node 0")):
        with pytest.raises(CheckpointError, match=f"cannot build an engine of .*{says}") as caught:
            build(path, EngineSettings())
        assert "\n" not in str(caught.value)
    trt.refuses_to_build = True
    answer = command(
        "infer", "--checkpoint_name", str(bundle.directory), "--backend", "tensorrt", "--images", "data/digits/test/3"
    )
    assert answer.code == 2 and answer.out == "" and "no implementation for node cat" in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err and "a warning" not in answer.err and engines() == []
    trt.refuses_to_build, trt.refuses_to_load = False, True
    with pytest.raises(CheckpointError, match="cannot load its engine"):
        engine_of(bundle)
    assert engines() == []


# The package itself.


def test_a_model_is_parsed_by_the_package(bundle: Bundle) -> None:
    trt = pytest.importorskip("tensorrt", reason="the package tensorrt is not installed", exc_type=ImportError)
    logger = logger_of(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError:
        pytest.skip(f"TensorRT gives no builder without a GPU ({logger.errors})")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(bundle.path("model.onnx").read_bytes()), logger.errors
    assert [network.get_output(row).name for row in range(network.num_outputs)] == ["logits", "embedding"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_a_gpu_gives_the_golden_answers(bundle: Bundle, command: Command, precision: str) -> None:
    pytest.importorskip("tensorrt", reason="the package tensorrt is not installed", exc_type=ImportError)
    place = str(bundle.directory)
    answer = command("export", place, "--to", "tensorrt", "--images", "200", "--tensorrt.precision", precision)
    assert answer.code == 0, answer.err
    check = verify_backend(read_bundle(bundle.directory), "tensorrt")
    assert check.agreement == 1 and engines() == [".engine", ".json"]
    pixels = np.random.default_rng(0).integers(0, 256, (150, 3, 32, 32), dtype=np.uint8)
    logits = open_backend(read_bundle(bundle.directory), "tensorrt").logits(pixels)
    assert logits.shape == (150, 10) and np.isfinite(logits).all()
