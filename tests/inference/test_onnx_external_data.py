"""Models whose weights lie elsewhere, and models of OpenVINO that are none: one clear error, no other file is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from image_classifier.bundle import Bundle, read_bundle
from image_classifier.errors import CheckpointError
from image_classifier.inference import onnx_runtime
from image_classifier.inference.backends import open_backend
from image_classifier.inference.onnx_external_data import is_self_contained
from image_classifier.inference.onnx_runtime import OnnxBackend
from tests.conftest import ROOT


def tensor(elsewhere: bool) -> TensorProto:
    made = numpy_helper.from_array(np.arange(4, dtype=np.float32), "weights")
    if elsewhere:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        made.external_data.add(key="location", value="secret")
    return made


def model(place: str, elsewhere: bool) -> onnx.ModelProto:
    """A model with one tensor, at this place."""
    found = tensor(elsewhere)
    inner = helper.make_graph([], "inner", [], [], [found] if place == "subgraph" else [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    if place in ("attribute", "function"):
        node = helper.make_node("Constant", [], ["y"], value=found)
    if place == "attributes":
        node.attribute.append(helper.make_attribute("many", [found]))
    graph = helper.make_graph(
        [] if place == "function" else [node], "outer", [], [], [found] if place == "initializer" else []
    )
    if place == "sparse":
        graph.sparse_initializer.add().values.CopyFrom(found)
    made = helper.make_model(graph)
    if place == "function":
        made.functions.append(helper.make_function("own", "f", [], ["y"], [node], made.opset_import))
    if place == "training":
        made.training_info.add().algorithm.initializer.append(found)
    return made


@pytest.mark.parametrize(
    "place", ["initializer", "subgraph", "attribute", "attributes", "sparse", "function", "training"]
)
def test_weights_elsewhere_are_found_wherever_they_are_named(place: str) -> None:
    assert is_self_contained(model(place, elsewhere=False).SerializeToString())
    assert not is_self_contained(model(place, elsewhere=True).SerializeToString())


@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_or_none(content: bytes) -> None:
    try:
        found = is_self_contained(content)
    except ValueError:
        return
    assert found in (True, False)


def test_a_field_whose_number_others_cut_off_is_refused() -> None:
    content = model("initializer", elsewhere=True).SerializeToString()
    field = bytes([7 << 3 | 2])  # `graph`, which readers with 32 bits see in a number of 33 too
    assert content.count(field) >= 1
    start = content.index(field)
    with pytest.raises(ValueError, match="invalid field number"):
        is_self_contained(content[:start] + bytes([field[0] | 128, 128, 128, 128, 16]) + content[start + 1 :])


def weights_moved(path: Path, location: str) -> bytes:
    """A model whose first weights are said to lie in another file."""
    found = onnx.load(path)
    weight = max(found.graph.initializer, key=lambda made: len(made.raw_data))
    content, weight.data_location = weight.raw_data, TensorProto.EXTERNAL
    weight.ClearField("raw_data")
    weight.external_data.add(key="location", value=location)
    path.write_bytes(found.SerializeToString())
    return content


def test_a_file_beside_the_model_is_not_read(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((digits_bundle / "model.onnx").read_bytes())
    (tmp_path / "secret").write_bytes(weights_moved(path, "secret"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="its weights are in another file"):
        OnnxBackend(path)


def test_what_runs_are_the_bytes_that_were_compared(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes after its hash was taken is not read again."""
    bundle, right = read_bundle(digits_bundle), (digits_bundle / "model.onnx").read_bytes()
    own = Bundle.content

    def changed(self: Bundle, name: str) -> bytes:
        content = own(self, name)
        monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
        return content

    ran: list[bytes] = []
    session = onnx_runtime.onnxruntime.InferenceSession

    def started(content: bytes, *rest: Any, **words: Any) -> Any:
        ran.append(content)
        return session(content, *rest, **words)

    monkeypatch.setattr(Bundle, "content", changed)
    monkeypatch.setattr(onnx_runtime.onnxruntime, "InferenceSession", started)
    open_backend(bundle, "onnx")
    assert ran == [right]


SCRIPT = """
import sys
from pathlib import Path
import numpy as np, openvino
from image_classifier.errors import CheckpointError
from image_classifier.inference.openvino_runtime import OpenVinoBackend
from tests.inference.test_onnx_external_data import weights_moved
xml, onnx, size = Path("model.xml"), Path("model.onnx"), int(sys.argv[1])
openvino.save_model(openvino.convert_model(str(onnx)), "model.xml", compress_to_fp16=False)
words, backend = xml.read_text(), OpenVinoBackend(xml)
backend.check(size, 10)
assert backend.logits(np.zeros((2, 3, size, size), np.uint8)).shape == (2, 10)
def said(act):
    try:
        act()
    except CheckpointError as error:
        print(str(error))
    else:
        print("nothing")
said(lambda: backend.check(size + 1, 10))
said(lambda: backend.check(size, 9))
said(lambda: backend.logits(np.zeros((1, 3, 5, 5), np.uint8)))
for other in (words.replace('"logits"', '"other"'), "<layers/>", "", words[:900]):
    xml.write_text(other)
    said(lambda: OpenVinoBackend(xml))
xml.write_text(words)
Path("model.bin").write_bytes(b"short")
said(lambda: OpenVinoBackend(xml))
Path("secret").write_bytes(weights_moved(onnx, "secret"))
said(lambda: OpenVinoBackend(onnx))
xml.write_bytes(onnx.read_bytes())
said(lambda: OpenVinoBackend(xml))
"""


@pytest.mark.slow  # a process of its own, and OpenVINO in it
def test_openvino_refuses_what_is_not_the_bundles(digits_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "model.onnx").write_bytes((digits_bundle / "model.onnx").read_bytes())
    size = str(read_bundle(digits_bundle).info.preprocess["size"])
    line = [sys.executable, "-c", SCRIPT, size]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == 10, done.stderr
    assert (
        "pixels of" in said[0]
        and "logits of" in said[1]
        and all("OpenVINO cannot run 'model." in line for line in said[2:])
    )
    assert "are in another file" in said[8] and "not OpenVINO's XML" in said[5] and "not OpenVINO's XML" in said[9]
