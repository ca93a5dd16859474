"""The sealed model: a picture of any size in, calibrated probabilities out; resize, crop, normalisation and temperature lie in the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from image_classifier.exporting.parity import Parity
from image_classifier.exporting.parity_data import ParitySet
from image_classifier.images import Preprocess, decode
from image_classifier.inference.sealed import FILE, SealedModel

# Resizing in the graph rounds as Pillow does but for a grey level here and there, which a network may amplify.
TOLERANCE, AGREEMENT = 0.02, 0.99
_IR_VERSION = 10


def export_sealed(reference: ParitySet, directory: Path) -> dict[str, Any]:
    """Write sealed.onnx and hold it against the checkpoint on the same files at their own sizes; what was found.

    Raises:
        ParityError: It answers otherwise.
    """
    info = reference.bundle.info
    facts = {
        "name": info.name,
        "classes": list(info.classes),
        "threshold": info.threshold,
        "temperature": info.temperature,
        "preprocess": dict(info.preprocess),
        "manifest_sha256": info.provenance.get("manifest_sha256"),
    }
    model = sealed(onnx.load(reference.bundle.path("model.onnx")), reference.preprocess, info.temperature, facts)
    onnx.save(model, directory / FILE)
    runner = SealedModel(directory / FILE)
    squares, answers = [], []
    for file in reference.files:
        image = decode(file, reference.limits, reference.preprocess.background)
        squares.append(
            reference.preprocess(image).transpose(2, 0, 1)
        )  # of the whole picture: `read` may let a JPEG be decoded to a part of it
        answers.append(runner.probabilities(image))
    expected = reference.answers(np.stack(squares))
    parity = Parity.of(expected, np.stack(answers), reference.paths, FILE).check(FILE, TOLERANCE, AGREEMENT)
    return {**parity.as_dict(), "tolerance": TOLERANCE, "opset": _opset(model)}


def sealed(
    model: onnx.ModelProto, preprocess: Preprocess, temperature: float, metadata: Mapping[str, Any]
) -> onnx.ModelProto:
    """A model of pixels -> logits as one of `image` uint8 [H, W, 3] -> `probabilities` float32 [C]; the metadata is kept as JSON values."""
    model.ir_version = _IR_VERSION
    opset = helper.make_opsetid("", _opset(model))
    parts = {
        "before/": helper.make_model(_squaring(preprocess), opset_imports=[opset], ir_version=_IR_VERSION),
        "network/": model,
        "after/": helper.make_model(
            _answering(len(metadata["classes"]), temperature), opset_imports=[opset], ir_version=_IR_VERSION
        ),
    }
    before, network, after = (compose.add_prefix(part, prefix) for prefix, part in parts.items())
    joined = compose.merge_models(
        before, network, io_map=[("before/pixels", "network/pixels")], outputs=["network/logits"]
    )
    joined = compose.merge_models(joined, after, io_map=[("network/logits", "after/logits")])
    _rename(joined.graph, {"before/image": "image", "after/probabilities": "probabilities"})
    del joined.metadata_props[:]
    helper.set_model_props(joined, {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})
    onnx.checker.check_model(joined)
    return joined


def _opset(model: onnx.ModelProto) -> int:
    return int(next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx")))


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give the graph's inputs and outputs other names, wherever they stand."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for places in (node.input, node.output):
            places[:] = [names.get(name, name) for name in places]


class _Graph:
    """Nodes and constants as they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, f"c{len(self.constants)}"))
        return str(self.constants[-1].name)

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def booleans(self, *values: bool) -> str:
        return self.constant(np.array(values))

    def add(self, operator: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [named or f"n{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])


def _squaring(preprocess: Preprocess) -> onnx.GraphProto:
    """`images.Preprocess` as a graph: image uint8 [H, W, 3] -> pixels uint8 [1, 3, S, S]."""
    graph, side = _Graph(), preprocess.size
    planes = graph.add("Unsqueeze", graph.add("Transpose", "image", perm=[2, 0, 1]), graph.integers(0))
    whole = graph.add("Slice", graph.add("Shape", "image"), graph.integers(0), graph.integers(2))
    target = _target(graph, whole, preprocess)
    resized = _resized(graph, planes, whole, target, preprocess)
    slack = graph.add("Sub", target, graph.integers(side, side))
    if preprocess.mode == "pad":
        slack = graph.add("Neg", slack)
        before = graph.add("Div", slack, graph.integers(2, 2))
        pads = graph.add(
            "Concat", graph.integers(0, 0), before, graph.integers(0, 0), graph.add("Sub", slack, before), axis=0
        )
        graph.add("Pad", resized, pads, graph.constant(np.array(0, dtype=np.uint8)), named="pixels")
    else:
        start = graph.add("Div", slack, graph.integers(2, 2))
        end = graph.add("Add", start, graph.integers(side, side))
        graph.add("Slice", resized, start, end, graph.integers(2, 3), named="pixels")
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, 3, side, side])
    return helper.make_graph(graph.nodes, "preprocess", [image], [pixels], graph.constants)


def _resized(graph: _Graph, planes: str, whole: str, target: str, preprocess: Preprocess) -> str:
    """Planes uint8 [1, 3, *whole] as Pillow resizes them: a pass an axis, whole grey levels between them.

    Which axis comes first matters where a kernel overshoots: the rule is that of Pillow 13 (ImagingResampleInner in Resample.c).
    """
    kernel: dict[str, Any] = (
        {"mode": "cubic", "cubic_coeff_a": -0.5} if preprocess.interpolation == "bicubic" else {"mode": "linear"}
    )
    kept = (
        target if preprocess.mode == "pad" else graph.integers(preprocess.size, preprocess.size)
    )  # what is left after the crop
    shrinks = graph.add("Sub", whole, kept)
    rows, columns = (graph.add("Slice", shrinks, graph.integers(axis), graph.integers(axis + 1)) for axis in (0, 1))
    bound = graph.add("Max", graph.add("Mul", columns, graph.integers(2)), graph.integers(0))
    rows_first = graph.add("Greater", rows, bound)
    between = graph.add("Where", graph.add("Equal", rows_first, graph.booleans(True, False)), target, whole)
    for height_and_width in (between, target):
        sizes = graph.add("Concat", graph.integers(1, 3), height_and_width, axis=0)
        planes = graph.add(
            "Resize",
            planes,
            "",
            "",
            sizes,
            antialias=1,
            exclude_outside=1,
            coordinate_transformation_mode="half_pixel",
            **kernel,
        )
    return planes


def _target(graph: _Graph, whole: str, preprocess: Preprocess) -> str:
    """Height and width, int64 [2], to which a picture of `whole` is resized before it is cropped or padded."""
    side = preprocess.size
    if preprocess.mode == "squash":
        return graph.integers(side, side)
    pad = preprocess.mode == "pad"
    sides = graph.add("Cast", whole, to=TensorProto.DOUBLE)
    wanted = graph.constant(np.array([side if pad else round(side / preprocess.crop_fraction)], dtype=np.float64))
    scale = graph.add("Div", wanted, graph.add("ReduceMax" if pad else "ReduceMin", sides, keepdims=1))
    scaled = graph.add("Round", graph.add("Mul", sides, scale))
    bounded = (
        graph.add("Clip", scaled, graph.constant(np.array(1.0)), graph.constant(np.array(float(side))))
        if pad
        else graph.add("Max", scaled, wanted)
    )
    return graph.add("Cast", bounded, to=TensorProto.INT64)


def _answering(num_classes: int, temperature: float) -> onnx.GraphProto:
    """Logits float32 [1, C] -> probabilities float32 [C]."""
    graph = _Graph()
    row = graph.add("Reshape", "logits", graph.integers(num_classes))
    graph.add(
        "Softmax",
        graph.add("Div", row, graph.constant(np.array(temperature, dtype=np.float32))),
        axis=0,
        named="probabilities",
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, num_classes])
    probabilities = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [num_classes])
    return helper.make_graph(graph.nodes, "answer", [logits], [probabilities], graph.constants)
