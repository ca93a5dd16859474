"""A check that an ONNX model holds all its weights itself, done without the package onnx, which serving does not need.

Specification: `onnx/onnx.proto3` of ONNX (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3; field numbers never
change). A tensor's data is elsewhere where TensorProto.data_location = 14 is EXTERNAL (1) or TensorProto.external_data
= 13 has entries. `_NESTED` lists every field that leads from ModelProto to a TensorProto.

Encoding: "Encoding" of Protocol Buffers (https://protobuf.dev/programming-guides/encoding/). A message is a sequence of
records, each a tag (a varint: field number << 3 | wire type, section "Message Structure") and its payload; a varint has
7 bits a byte, lowest first, and at most 10 bytes (section "Base 128 Varints").
"""

from __future__ import annotations

from collections.abc import Iterator

# Fields of onnx.proto3 whose values are messages in which a tensor may lie: {message: {field number: message}}.
_NESTED = {
    # ModelProto: graph = 7, training_info = 20, functions = 25
    "model": {7: "graph", 20: "training", 25: "function"},
    # TrainingInfoProto: initialization = 1, algorithm = 2
    "training": {1: "graph", 2: "graph"},
    # FunctionProto: node = 7, attribute_proto = 11
    "function": {7: "node", 11: "attribute"},
    # GraphProto: node = 1, initializer = 5, sparse_initializer = 15
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    # NodeProto: attribute = 5
    "node": {5: "attribute"},
    # AttributeProto: t = 5, g = 6, tensors = 10, graphs = 11, sparse_tensor = 22, sparse_tensors = 23
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    # SparseTensorProto: values = 1, indices = 2
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL = (13, 14)  # TensorProto: external_data = 13, data_location = 14
# Wire types, section "Message Structure"; groups (3, 4) are not used by onnx.proto3.
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MAX_TAG = 2**32  # a tag is a 32-bit number: a larger one would be read as another field elsewhere


def is_self_contained(content: bytes) -> bool:
    """Return whether no tensor of the model lies in another file or elsewhere in memory; ValueError for other content.

    >>> is_self_contained(b"")
    True
    >>> # graph (field 7, 4 bytes) { initializer (field 5, 2 bytes) { data_location (field 14) = 1 } }
    >>> is_self_contained(bytes([7 << 3 | 2, 4, 5 << 3 | 2, 2, 14 << 3, 1]))
    False
    """
    view = memoryview(content)
    waiting = [("model", 0, len(content))]
    while waiting:
        message, start, end = waiting.pop()
        for field, wire_type, first, last in _records(view, start, end):
            # A data_location of 0 is DEFAULT: the data is in the tensor.
            if message == "tensor" and field in _EXTERNAL and (wire_type != _VARINT or first):
                return False
            if wire_type == _LENGTH_DELIMITED and field in _NESTED[message]:
                waiting.append((_NESTED[message][field], first, last))
    return True


def _records(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each record of a message: field number, wire type, start and end of the payload.

    For a varint its value takes the place of the start.
    """
    while start < end:
        tag, start = _varint(view, start, end)
        wire_type = tag & 7
        first = start
        if tag >= _MAX_TAG:
            raise ValueError("invalid field number")
        if wire_type == _VARINT:
            first, start = _varint(view, start, end)
        elif wire_type == _LENGTH_DELIMITED:
            length, first = _varint(view, start, end)
            start = first + length
        elif wire_type in (_FIXED32, _FIXED64):
            start += 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError("not a message of onnx.proto")
        if start > end:
            raise ValueError("it ends too early")
        yield tag >> 3, wire_type, first, start


def _varint(view: memoryview, start: int, end: int) -> tuple[int, int]:
    """Return the varint at `start`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            raise ValueError("it ends too early")
        byte = view[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
    raise ValueError("a number of more than ten bytes")
