"""Whether an ONNX model holds all its weights itself; read without the package onnx, which serving does not need."""

from __future__ import annotations

from collections.abc import Iterator

# Where a message of onnx.proto holds others in which a tensor may lie: {message: {number of the field: message in it}}.
_WITHIN = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_ELSEWHERE = (13, 14)  # fields of a tensor: external_data, data_location
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def is_self_contained(content: bytes) -> bool:
    """Whether no tensor of the model lies in another file, or anywhere else in the memory; ValueError where this is no model."""
    view, waiting = memoryview(content), [("model", 0, len(content))]
    while waiting:
        message, start, end = waiting.pop()
        for field, kind, first, last in _fields(view, start, end):
            if message == "tensor" and field in _ELSEWHERE and (kind != _VARINT or first):
                return False
            if kind == _BYTES and field in _WITHIN[message]:
                waiting.append((_WITHIN[message][field], first, last))
    return True


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of a message: its number, its kind, and where it begins and ends (of a number its value)."""
    while start < end:
        tag, start = _number(view, start, end)
        kind, first = tag & 7, start
        if tag >= 2**32:
            raise ValueError("an invalid field")  # others cut its number off, and see another field
        if kind == _VARINT:
            first, start = _number(view, start, end)
        elif kind == _BYTES:
            length, first = _number(view, start, end)
            start = first + length
        elif kind in (_FIXED32, _FIXED64):
            start += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("not a message of onnx.proto")
        if start > end:
            raise ValueError("it ends too early")
        yield tag >> 3, kind, first, start


def _number(view: memoryview, start: int, end: int) -> tuple[int, int]:
    """A number of the bytes from `start`, 7 bits in each, and where it ends."""
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
