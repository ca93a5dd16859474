"""The model repository for Triton: what stands in its files, and that the export verb keeps it in the bundle."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.bundle import BundleInfo, read_bundle
from image_classifier.errors import ConfigError
from image_classifier.exporting.triton import TritonSettings, compose_of, config_of
from image_classifier.inference.triton.client import model_name
from tests.conftest import Command

SIZES = {"pixels": [3, 32, 32], "logits": [10], "embedding": [128]}


def test_the_configuration_says_what_was_asked() -> None:
    asked = TritonSettings(
        max_batch_size=20, max_queue_delay_us=700, max_queue_size=9, queue_timeout_ms=30, instances=2, device="gpu"
    )
    text = config_of("digits", SIZES, asked)
    for words in (
        'name: "digits"',
        'backend: "onnxruntime"',
        "max_batch_size: 20",
        'input [ { name: "pixels" data_type: TYPE_UINT8 dims: [3, 32, 32] } ]',
        '{ name: "logits" data_type: TYPE_FP32 dims: [10] label_filename: "labels.txt" },\n',
        '{ name: "embedding" data_type: TYPE_FP32 dims: [128] }\n',
        "instance_group [ { count: 2 kind: KIND_GPU } ]",
        "preferred_batch_size: [8, 16]",
        "max_queue_delay_microseconds: 700",
        "max_queue_size: 9",
        "default_timeout_microseconds: 30000",
        "timeout_action: REJECT",
    ):
        assert words in text


@given(
    st.builds(
        TritonSettings,
        max_batch_size=st.integers(1, 999),
        preferred_batch_sizes=st.lists(st.integers(1, 999), max_size=5),
        max_queue_size=st.integers(1, 9999),
        instances=st.integers(1, 8),
        device=st.sampled_from(["cpu", "gpu"]),
    )
)
def test_the_configuration_is_what_tritons_own_message_reads(asked: TritonSettings) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed; the tests marked triton parse the file with it")
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse(config_of("a", SIZES, asked), model_config_pb2.ModelConfig())
    assert config.max_batch_size == asked.max_batch_size
    assert all(size <= asked.max_batch_size for size in config.dynamic_batching.preferred_batch_size)
    assert config.dynamic_batching.default_queue_policy.max_queue_size == asked.max_queue_size


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"device": "tpu"}, "there is no triton.device 'tpu': use cpu or gpu"),
        ({"max_batch_size": 0}, "at least 1"),
        ({"preferred_batch_sizes": [0, 8]}, "at least 1"),
        ({"instances": 0}, "at least 1"),
        ({"max_queue_size": 0}, "at least 1"),
        ({"max_queue_delay_us": -1}, "must be at least 0"),
        ({"queue_timeout_ms": -1}, "must be at least 0"),
    ],
)
def test_settings_that_cannot_be(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TritonSettings(**changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_container_is_pinned_private_and_reads_only(device: str) -> None:
    service = yaml.safe_load(compose_of(TritonSettings(device=device)))["services"]["triton"]
    assert service["image"] == "nvcr.io/nvidia/tritonserver:26.06-py3"
    assert [port.rpartition("}")[2] for port in service["ports"]] == [":8000", ":8001", ":8002"]
    assert all(port.startswith("127.0.0.1:$") for port in service["ports"])
    assert service["volumes"] == ["./:/models:ro"]
    assert (
        service["command"][:2] == ["tritonserver", "--model-repository=/models"]
        and "--model-control-mode=none" in service["command"]
    )
    assert service["healthcheck"]["test"][-1] == "http://127.0.0.1:8000/v2/health/ready"
    assert ("deploy" in service) == (device == "gpu")


@given(st.text(min_size=1, max_size=30))
def test_any_name_becomes_one_of_a_folder_and_of_a_url(name: str) -> None:
    found = model_name(BundleInfo(name, (), {}, {}, {}, {}))
    assert found and not found.startswith(".") and found.isascii() and not set(found) & set("/\\ %?#\"'")


@pytest.fixture
def copy(digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits_bundle, tmp_path / "models" / "digits")
    return tmp_path / "models" / "digits"


def test_the_verb_adds_it_to_the_bundle(copy: Path, digits_bundle: Path, command: Command) -> None:
    data = digits_bundle.parents[1] / "data/digits"
    line = ["export", "digits", "--to", "triton", "--images", "30", "--data_dir", str(data), "--triton.instances", "2"]
    done = command(*line)
    assert done.code == 0, done.err
    assert done.out.startswith("triton    100.00% of 30 images get the checkpoint's class")
    bundle = read_bundle(copy)
    files = [
        "triton/digits/1/model.onnx",
        "triton/digits/config.pbtxt",
        "triton/digits/labels.txt",
        "triton/docker-compose.yml",
    ]
    known = bundle.info.exports["triton"]
    assert (known["files"], known["model"], known["tolerance"]) == (files, "digits", 1e-4)
    bundle.verify()
    assert bundle.path(files[0]).read_bytes() == bundle.path("model.onnx").read_bytes()
    assert bundle.path(files[2]).read_text() == "".join(f"{label}\n" for label in bundle.info.classes)
    golden_size = json.loads((copy / "bundle.json").read_text())["preprocess"]["size"]
    assert f"dims: [3, {golden_size}, {golden_size}]" in bundle.path(files[1]).read_text()
    assert "hashes    " in command("verify", "digits", "--backend", "onnx").out
    wrong = command(*line, "--triton.device", "tpu")
    assert wrong.code == 2 and "use cpu or gpu" in wrong.err and wrong.err.count("\n") == 1
