"""The V2 inference protocol (Open Inference Protocol) with Triton's binary tensors: pixels in, logits out, so that its clients work unchanged."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from image_classifier import __version__
from image_classifier.serving import schemas
from image_classifier.serving.registry import ServedModel
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.routes.predict import AppState, ask, room
from image_classifier.serving.worker.handle import WorkerCrash, WorkerHandle

_HEADER = "inference-header-content-length"
_MOST_JSON = (
    4 * 2**20
)  # bytes of numbers written out: nothing else runs while they are read; binary tensors have the limit of all bodies
_REFUSALS = schemas.v2_errors(401, 403, 404, 422, 429)
_ALL_REFUSALS = schemas.v2_errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
_EXTENSIONS = ["binary_tensor_data", "model_configuration"]


@dataclass(frozen=True)
class Asked:
    """A request that was understood: pixels uint8 [N, 3, S, S] as bytes, and for each output whether it goes back as bytes."""

    shape: list[int]
    content: bytes
    outputs: dict[str, bool]
    id: str | None


def make_router(parts: AppState) -> APIRouter:
    """The routes under /v2."""
    router = APIRouter(prefix="/v2", tags=["V2 inference protocol"])
    _add_metadata(router, parts)

    @router.get("/health/live", summary="Whether the server is alive")
    async def live() -> Response:
        return JSONResponse({"live": True})

    @router.get(
        "/health/ready", summary="Whether every model really answers", responses={503: {"description": "One does not"}}
    )
    async def ready() -> Response:
        troubles = await asyncio.gather(*(parts.models.trouble(served) for served in parts.models))
        return JSONResponse({"ready": not any(troubles)}, 503 if any(troubles) else 200)

    @router.get(
        "/models/{name}/ready",
        summary="Whether a model really answers",
        responses=_REFUSALS | {503: {"description": "It does not"}},
    )
    @router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(request: Request, name: str) -> Response:
        _handle(parts, request)
        (served,) = (served for served in parts.models if served.order.name == name)
        trouble = await parts.models.trouble(served)
        return JSONResponse({"name": name, "ready": not trouble}, 503 if trouble else 200)

    @router.post(
        "/models/{name}/infer",
        summary="Pixels uint8 [N, 3, S, S] to logits [N, C] and embedding [N, D]",
        responses=_ALL_REFUSALS | {200: _ANSWER},
        openapi_extra=_BODY,
    )
    @router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request, name: str) -> Response:
        _handle(parts, request)
        with parts.models.held(name) as handle:
            body, length = bytes(request.state.body), request.headers.get(_HEADER)
            asked = await asyncio.to_thread(_understood, body, length, handle.facts)
            request.state.body.clear()
            request.state.images = asked.shape[0]
            head, content = await _answered(parts, handle, asked)
        return _response(handle, asked, head["shapes"], content)

    return router


_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"const": "pixels"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"const": "UINT8"},
        "data": {"type": "array"},
        "parameters": {"type": "object"},
    },
}
_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _TENSOR},
    },
}
_EXAMPLE = {
    "id": "1",
    "inputs": [{"name": "pixels", "shape": [1, 3, 2, 2], "datatype": "UINT8", "data": [0, 64, 128, 255] * 3}],
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _REQUEST, "example": _EXAMPLE}, "application/octet-stream": {}},
    }
}
_OUTPUTS = [
    {"name": "logits", "datatype": "FP32", "shape": [1, 3], "data": [4.1, 0.3, -1.2]},
    {"name": "embedding", "datatype": "FP32", "shape": [1, 4], "data": [0.8, 0.0, 1.5, 0.1]},
]
_ANSWER = {
    "description": "The outputs; as binary data behind the JSON where that was asked for",
    "content": {
        "application/json": {
            "example": {"model_name": "flowers", "model_version": "1", "outputs": _OUTPUTS, "id": "1"}
        },
        "application/octet-stream": {},
    },
}


def _add_metadata(router: APIRouter, parts: AppState) -> None:
    @router.get("", summary="The server")
    async def server() -> Response:
        return JSONResponse({"name": "image_classifier", "version": __version__, "extensions": _EXTENSIONS})

    @router.post("/repository/index", summary="The models, as Triton lists them")
    async def index() -> Response:
        return JSONResponse([_state(one) for one in parts.models])

    @router.get("/models/{name}", summary="A model's tensors", responses=_REFUSALS)
    @router.get("/models/{name}/versions/{version}", include_in_schema=False)
    async def metadata(request: Request, name: str) -> Response:
        facts = _handle(parts, request).facts
        side, classes = facts["image_size"], len(facts["classes"])
        outputs = [{"name": "logits", "datatype": "FP32", "shape": [-1, classes]}]
        if facts["embeddings"]:
            outputs.append({"name": "embedding", "datatype": "FP32", "shape": [-1, -1]})
        inputs = [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, side, side]}]
        own = {"classes": facts["classes"], "version": facts["version"]}
        content = {
            "name": name,
            "versions": ["1"],
            "platform": facts["backend"],
            "inputs": inputs,
            "outputs": outputs,
            "parameters": own,
        }
        return JSONResponse(content)

    @router.get("/models/{name}/config", summary="A model's configuration, as Triton tells it", responses=_REFUSALS)
    @router.get("/models/{name}/versions/{version}/config", include_in_schema=False)
    async def config(request: Request, name: str) -> Response:
        handle = _handle(parts, request)
        side = handle.facts["image_size"]
        inputs = [{"name": "pixels", "data_type": "TYPE_UINT8", "dims": [3, side, side]}]
        outputs = [{"name": "logits", "data_type": "TYPE_FP32", "dims": [len(handle.facts["classes"])]}]
        if handle.facts["embeddings"]:
            outputs.append({"name": "embedding", "data_type": "TYPE_FP32", "dims": [-1]})
        return JSONResponse(
            {
                "name": name,
                "platform": handle.facts["backend"],
                "max_batch_size": _most(handle),
                "input": inputs,
                "output": outputs,
            }
        )


def _state(served: ServedModel) -> dict[str, str]:
    return {
        "name": served.order.name,
        "version": "1",
        "state": "UNAVAILABLE" if served.known_trouble else "READY",
        "reason": served.known_trouble,
    }


def _handle(parts: AppState, request: Request) -> WorkerHandle:
    """The model that a path names, whose version may be left out."""
    name = request.path_params["name"]
    if request.path_params.get("version", "1") != "1":
        raise Refusal(404, "not_found", f"the model {name[:100]!r} has no version but 1")
    return parts.models.get(name)


def _most(handle: WorkerHandle) -> int:
    return int(handle.started.order["batch"]["max_images"])


async def _answered(parts: AppState, handle: WorkerHandle, asked: Asked) -> tuple[dict[str, Any], bytes]:
    rows = asked.shape[0]
    if rows > _most(handle):
        raise Refusal(400, "bad_request", f"a batch of {rows} is more than the {_most(handle)} that this model takes")
    message = {"do": "pixels", "shape": asked.shape, "embeddings": "embedding" in asked.outputs}
    try:
        with room(handle, rows):
            head, content = await ask(handle, message, asked.content, parts.limits.answer_s)
    except WorkerCrash as error:
        raise Refusal(500, "model_failed", str(error)) from None
    if not np.isfinite(np.frombuffer(content, "<f4")).all():
        raise Refusal(500, "model_failed", "the model answers with numbers that are not finite")
    parts.metrics.batch.labels(handle.name).observe(head["batch"])
    return head, content


def _understood(body: bytes, length: str | None, facts: Mapping[str, Any]) -> Asked:
    """The request; Refusal with what is wrong about it. Nothing is made of a size that a client only says."""
    start = len(body) if length is None else int(length) if length.isdecimal() and len(length) < 12 else -1
    if not 0 <= start <= len(body):
        raise _bad(f"{_HEADER} is {length!r}, the body has {len(body)} bytes")
    if start > _MOST_JSON:
        raise Refusal(413, "too_large", f"more than {_MOST_JSON} bytes of JSON: send the pixels as binary data")
    try:
        head = json.loads(body[:start])
        if not isinstance(head, dict) or not isinstance(head.get("id", ""), str):
            raise _bad("the body is no V2 request")
        (tensor,) = head["inputs"]
        shape = _shape(tensor, facts["image_size"])
        return Asked(shape, _content(tensor, shape, body[start:]), _outputs(head, facts), head.get("id"))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise _bad(f"the body is no V2 request with the one input pixels ({type(error).__name__}: {error})") from None


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_request", message[:300])


def _shape(tensor: Mapping[str, Any], side: int) -> list[int]:
    if tensor["name"] != "pixels" or tensor["datatype"] != "UINT8":
        raise _bad("the input must be named pixels and be UINT8: pixels from 0 to 255, as the page's and Triton's")
    shape = tensor["shape"]
    whole = isinstance(shape, list) and all(type(value) is int for value in shape)
    if not whole or len(shape) != 4 or shape[1:] != [3, side, side] or shape[0] < 1:
        raise _bad(f"pixels must have the shape [N, 3, {side}, {side}], not {shape}")
    return list(shape)


def _content(tensor: Mapping[str, Any], shape: Sequence[int], binary: bytes) -> bytes:
    """The bytes of the pixels; numbers that are no whole ones from 0 to 255 are refused, never rounded."""
    size = math.prod(shape)
    told = (tensor.get("parameters") or {}).get("binary_data_size")
    if told is not None:
        if type(told) is not int or told != len(binary) or told != size:
            raise _bad(
                f"pixels of the shape {list(shape)} are {size} bytes; binary_data_size says {told}, {len(binary)} came"
            )
        return binary
    if binary:
        raise _bad("binary data came, but pixels has no binary_data_size")
    values = tensor["data"]
    for _ in shape:  # flat, or nested as the shape is
        if isinstance(values, list) and values and isinstance(values[0], list):
            values = list(itertools.chain.from_iterable(values))
    if isinstance(values, list) and len(values) == size and set(map(type, values)) == {int}:
        with suppress(ValueError):
            return bytes(values)
    raise _bad(f"the data of pixels must be {size} whole numbers from 0 to 255")


def _outputs(head: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, bool]:
    known = ["logits", "embedding"] if facts["embeddings"] else ["logits"]
    always = bool((head.get("parameters") or {}).get("binary_data_output", False))
    chosen = {}
    for item in head.get("outputs") or [{"name": name} for name in known]:
        parameters = item.get("parameters") or {}
        if item["name"] not in known or "classification" in parameters:
            raise _bad(f"the model gives {' and '.join(known)}, and no classification of them")
        chosen[str(item["name"])] = bool(parameters.get("binary_data", always))
    return chosen


def _response(handle: WorkerHandle, asked: Asked, shapes: Sequence[Sequence[int]], content: bytes) -> Response:
    tables, start = {}, 0
    for name, shape in zip(("logits", "embedding"), shapes, strict=False):
        end = start + 4 * math.prod(shape)
        tables[name] = (list(shape), content[start:end])
        start = end
    outputs, tail = [], []
    for name, binary in asked.outputs.items():
        shape, values = tables[name]
        described: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": shape}
        if binary:
            tail.append(values)
            outputs.append({**described, "parameters": {"binary_data_size": len(values)}})
        else:
            outputs.append({**described, "data": np.frombuffer(values, "<f4").tolist()})
    head: dict[str, Any] = {"model_name": handle.name, "model_version": "1", "outputs": outputs}
    words = json.dumps(head if asked.id is None else {**head, "id": asked.id}, allow_nan=False).encode()
    if not tail:
        return Response(words, media_type="application/json")
    return Response(b"".join([words, *tail]), media_type="application/octet-stream", headers={_HEADER: str(len(words))})
