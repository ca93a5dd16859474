"""Export to the sealed model: an image of any size in, calibrated probabilities out.

Resizing, cropping, normalisation and temperature are in the graph.
"""

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

# Resizing in the graph differs from Pillow's by a grey level here and there, which a network may amplify.
TOLERANCE = 0.02
AGREEMENT = 0.99
_IR_VERSION = 10


def export_sealed(parity_set: ParitySet, directory: Path) -> dict[str, Any]:
    """Write sealed.onnx, compare it with the checkpoint on files at their original sizes, and return the metadata.

    Raises:
        ParityError: It answers differently.
    """
    info = parity_set.bundle.info
    preprocess = parity_set.preprocess
    metadata = {
        "name": info.name,
        "classes": list(info.classes),
        "threshold": info.threshold,
        "temperature": info.temperature,
        "preprocess": dict(info.preprocess),
        "manifest_sha256": info.provenance.get("manifest_sha256"),
    }
    network = onnx.load(parity_set.bundle.path("model.onnx"))
    model = sealed(network, preprocess, info.temperature, metadata)
    onnx.save(model, directory / FILE)
    runner = SealedModel(directory / FILE)
    squares: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    for file in parity_set.files:
        # Both get the image at its full size; `Preprocess.read` could decode a JPEG at a reduced one.
        image = decode(file, parity_set.limits, preprocess.background)
        squares.append(preprocess(image).transpose(2, 0, 1))
        answers.append(runner.probabilities(image))
    expected = parity_set.answers(np.stack(squares))
    parity = Parity.of(expected, np.stack(answers), parity_set.paths, FILE).check(FILE, TOLERANCE, AGREEMENT)
    return {**parity.as_dict(), "tolerance": TOLERANCE, "opset": _opset(model)}


def sealed(
    model: onnx.ModelProto, preprocess: Preprocess, temperature: float, metadata: Mapping[str, Any]
) -> onnx.ModelProto:
    """Return a model of pixels -> logits as one of `image` uint8 [H, W, 3] -> `probabilities` float32 [C].

    The metadata goes into the file as JSON values.
    """
    model.ir_version = _IR_VERSION
    # Build the graphs before and behind the network, with its opset.
    opset = helper.make_opsetid("", _opset(model))
    squaring = _squaring_graph(preprocess)
    answering = _answering_graph(len(metadata["classes"]), temperature)
    before_model = helper.make_model(squaring, opset_imports=[opset], ir_version=_IR_VERSION)
    after_model = helper.make_model(answering, opset_imports=[opset], ir_version=_IR_VERSION)
    # Prefix all names, so that no two of the three models share one.
    before = compose.add_prefix(before_model, "before/")
    network = compose.add_prefix(model, "network/")
    after = compose.add_prefix(after_model, "after/")
    # Connect image -> pixels -> logits -> probabilities.
    joined = compose.merge_models(
        before, network, io_map=[("before/pixels", "network/pixels")], outputs=["network/logits"]
    )
    joined = compose.merge_models(joined, after, io_map=[("network/logits", "after/logits")])
    # Restore the names at the ends, replace the metadata, and check the result.
    _rename(joined.graph, {"before/image": "image", "after/probabilities": "probabilities"})
    del joined.metadata_props[:]
    helper.set_model_props(joined, {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()})
    onnx.checker.check_model(joined)
    return joined


def _opset(model: onnx.ModelProto) -> int:
    return int(next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx")))


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename inputs and outputs of the graph, wherever they are used."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]


class _GraphBuilder:
    """A graph under construction: each method adds a node or a constant and returns the name of its output."""

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

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output or f"n{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])


def _squaring_graph(preprocess: Preprocess) -> onnx.GraphProto:
    """Return `images.Preprocess` as a graph: image uint8 [H, W, 3] -> pixels uint8 [1, 3, S, S]."""
    graph = _GraphBuilder()
    side = preprocess.size
    # [H, W, 3] -> planes [1, 3, H, W], and the image's own height and width, int64 [2].
    planes = graph.add("Unsqueeze", graph.add("Transpose", "image", perm=[2, 0, 1]), graph.integers(0))
    image_size = graph.add("Slice", graph.add("Shape", "image"), graph.integers(0), graph.integers(2))
    # Resize to the target height and width.
    target = _target_size(graph, image_size, preprocess)
    resized = _resized(graph, planes, image_size, target, preprocess)
    # What is too much on each axis, int64 [2]; negative where padding must be added.
    slack = graph.add("Sub", target, graph.integers(side, side))
    if preprocess.mode == "pad":
        # Add black on both sides; of an odd number the second side gets one more.
        slack = graph.add("Neg", slack)
        before = graph.add("Div", slack, graph.integers(2, 2))
        pads = graph.add(
            "Concat", graph.integers(0, 0), before, graph.integers(0, 0), graph.add("Sub", slack, before), axis=0
        )
        graph.add("Pad", resized, pads, graph.constant(np.array(0, dtype=np.uint8)), output="pixels")
    else:
        # Cut out the middle.
        start = graph.add("Div", slack, graph.integers(2, 2))
        end = graph.add("Add", start, graph.integers(side, side))
        graph.add("Slice", resized, start, end, graph.integers(2, 3), output="pixels")
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, 3, side, side])
    return helper.make_graph(graph.nodes, "preprocess", [image], [pixels], graph.constants)


def _resized(graph: _GraphBuilder, planes: str, image_size: str, target: str, preprocess: Preprocess) -> str:
    """Resize planes uint8 [1, 3, H, W] to `target` as Pillow does: one pass an axis, rounded to grey levels in between.

    The order of the axes matters where a kernel overshoots: it is that of Pillow 13 (Resample.c, ImagingResampleInner).
    """
    kernel: dict[str, Any] = (
        {"mode": "cubic", "cubic_coeff_a": -0.5} if preprocess.interpolation == "bicubic" else {"mode": "linear"}
    )
    # By how much each axis shrinks, measured on what remains after the crop, int64 [2].
    remaining = target if preprocess.mode == "pad" else graph.integers(preprocess.size, preprocess.size)
    shrinks = graph.add("Sub", image_size, remaining)
    rows, columns = (graph.add("Slice", shrinks, graph.integers(axis), graph.integers(axis + 1)) for axis in (0, 1))
    # Pillow resizes rows first only where they shrink by more than twice as much as the columns.
    bound = graph.add("Max", graph.add("Mul", columns, graph.integers(2)), graph.integers(0))
    rows_first = graph.add("Greater", rows, bound)
    # The size after the first pass: one axis at its target, the other unchanged.
    between = graph.add("Where", graph.add("Equal", rows_first, graph.booleans(True, False)), target, image_size)
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


def _target_size(graph: _GraphBuilder, image_size: str, preprocess: Preprocess) -> str:
    """Return height and width, int64 [2], to which an image is resized before it is cropped or padded."""
    side = preprocess.size
    if preprocess.mode == "squash":
        return graph.integers(side, side)
    pad = preprocess.mode == "pad"
    # One side is given: the longer one where the image is padded, else the shorter one before the crop.
    sides = graph.add("Cast", image_size, to=TensorProto.DOUBLE)
    wanted = graph.constant(np.array([side if pad else round(side / preprocess.crop_fraction)], dtype=np.float64))
    scale = graph.add("Div", wanted, graph.add("ReduceMax" if pad else "ReduceMin", sides, keepdims=1))
    # Round to whole pixels; rounding must not make a side too small, or too large for the square.
    scaled = graph.add("Round", graph.add("Mul", sides, scale))
    bounded = (
        graph.add("Clip", scaled, graph.constant(np.array(1.0)), graph.constant(np.array(float(side))))
        if pad
        else graph.add("Max", scaled, wanted)
    )
    return graph.add("Cast", bounded, to=TensorProto.INT64)


def _answering_graph(num_classes: int, temperature: float) -> onnx.GraphProto:
    """Return softmax(logits / temperature) as a graph: logits float32 [1, C] -> probabilities float32 [C]."""
    graph = _GraphBuilder()
    row = graph.add("Reshape", "logits", graph.integers(num_classes))
    graph.add(
        "Softmax",
        graph.add("Div", row, graph.constant(np.array(temperature, dtype=np.float32))),
        axis=0,
        output="probabilities",
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, num_classes])
    probabilities = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [num_classes])
    return helper.make_graph(graph.nodes, "answer", [logits], [probabilities], graph.constants)
