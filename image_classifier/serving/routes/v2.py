"""The V2 inference protocol (Open Inference Protocol) with Triton's binary tensors: pixels in, logits out.

Its clients, such as Triton's, work unchanged.
"""

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
from image_classifier.serving.app_state import AppState
from image_classifier.serving.registry import ServedModel
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.routes.worker_calls import ask_worker, queue_slots
from image_classifier.serving.worker.handle import WorkerCrash, WorkerHandle

_HEADER = "inference-header-content-length"
# Parsing JSON blocks the server, so pixels in JSON have a lower limit than binary ones (the limit of a body).
_MAX_JSON_BYTES = 4 * 2**20
_REFUSALS = schemas.v2_errors(401, 403, 404, 422, 429)
_ALL_REFUSALS = schemas.v2_errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
_EXTENSIONS = ["binary_tensor_data", "model_configuration"]


@dataclass(frozen=True)
class V2Request:
    """A parsed request: pixels uint8 [N, 3, S, S] as bytes; each output and whether to return it as binary data."""

    shape: list[int]
    content: bytes
    outputs: dict[str, bool]
    id: str | None


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
    "description": "The outputs; where binary data was requested, it follows the JSON",
    "content": {
        "application/json": {
            "example": {"model_name": "flowers", "model_version": "1", "outputs": _OUTPUTS, "id": "1"}
        },
        "application/octet-stream": {},
    },
}


def make_router(state: AppState) -> APIRouter:
    """Return the routes under /v2."""
    router = APIRouter(prefix="/v2", tags=["V2 inference protocol"])
    _add_server(router, state)
    _add_model(router, state)
    _add_probes(router, state)
    _add_infer(router, state)
    return router


def _add_server(router: APIRouter, state: AppState) -> None:
    @router.get("", summary="Describe the server")
    async def server() -> Response:
        return JSONResponse({"name": "image_classifier", "version": __version__, "extensions": _EXTENSIONS})

    @router.post("/repository/index", summary="List the models, as Triton does")
    async def index() -> Response:
        return JSONResponse([_index_entry(served) for served in state.models])


def _add_model(router: APIRouter, state: AppState) -> None:
    @router.get("/models/{name}", summary="Describe the tensors of a model", responses=_REFUSALS)
    @router.get("/models/{name}/versions/{version}", include_in_schema=False)
    async def metadata(request: Request, name: str) -> Response:
        return JSONResponse(_metadata(name, _handle(state, request)))

    @router.get(
        "/models/{name}/config", summary="Show the configuration of a model, as Triton does", responses=_REFUSALS
    )
    @router.get("/models/{name}/versions/{version}/config", include_in_schema=False)
    async def config(request: Request, name: str) -> Response:
        return JSONResponse(_config(name, _handle(state, request)))


def _add_probes(router: APIRouter, state: AppState) -> None:
    @router.get("/health/live", summary="Check whether the server is alive")
    async def live() -> Response:
        return JSONResponse({"live": True})

    @router.get(
        "/health/ready",
        summary="Check whether every model answers correctly",
        responses={503: {"description": "A model does not"}},
    )
    async def ready() -> Response:
        problems = await asyncio.gather(*(state.models.probe(served) for served in state.models))
        return JSONResponse({"ready": not any(problems)}, 503 if any(problems) else 200)

    @router.get(
        "/models/{name}/ready",
        summary="Check whether a model answers correctly",
        responses=_REFUSALS | {503: {"description": "The model does not"}},
    )
    @router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(request: Request, name: str) -> Response:
        _handle(state, request)
        (served,) = (served for served in state.models if served.spec.name == name)
        problem = await state.models.probe(served)
        return JSONResponse({"name": name, "ready": not problem}, 503 if problem else 200)


def _add_infer(router: APIRouter, state: AppState) -> None:
    @router.post(
        "/models/{name}/infer",
        summary="Pixels uint8 [N, 3, S, S] to logits [N, C] and embedding [N, D]",
        responses=_ALL_REFUSALS | {200: _ANSWER},
        openapi_extra=_BODY,
    )
    @router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(request: Request, name: str) -> Response:
        _handle(state, request)
        with state.models.acquire(name) as handle:
            body = bytes(request.state.body)
            parsed = await asyncio.to_thread(_parse, body, request.headers.get(_HEADER), handle.metadata)
            request.state.body.clear()
            request.state.images = parsed.shape[0]
            header, content = await _run(state, handle, parsed)
        return _response(handle, parsed, header["shapes"], content)


def _metadata(name: str, handle: WorkerHandle) -> dict[str, Any]:
    model = handle.metadata
    side = model["image_size"]
    outputs = [{"name": "logits", "datatype": "FP32", "shape": [-1, len(model["classes"])]}]
    if model["embeddings"]:
        outputs.append({"name": "embedding", "datatype": "FP32", "shape": [-1, -1]})
    return {
        "name": name,
        "versions": ["1"],
        "platform": model["backend"],
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, side, side]}],
        "outputs": outputs,
        "parameters": {"classes": model["classes"], "version": model["version"]},
    }


def _config(name: str, handle: WorkerHandle) -> dict[str, Any]:
    model = handle.metadata
    side = model["image_size"]
    outputs = [{"name": "logits", "data_type": "TYPE_FP32", "dims": [len(model["classes"])]}]
    if model["embeddings"]:
        outputs.append({"name": "embedding", "data_type": "TYPE_FP32", "dims": [-1]})
    return {
        "name": name,
        "platform": model["backend"],
        "max_batch_size": _max_rows(handle),
        "input": [{"name": "pixels", "data_type": "TYPE_UINT8", "dims": [3, side, side]}],
        "output": outputs,
    }


def _index_entry(served: ServedModel) -> dict[str, str]:
    return {
        "name": served.spec.name,
        "version": "1",
        "state": "UNAVAILABLE" if served.last_problem else "READY",
        "reason": served.last_problem,
    }


def _handle(state: AppState, request: Request) -> WorkerHandle:
    """Return the model that a path names; the only version is 1, which may be left out."""
    name = request.path_params["name"]
    if request.path_params.get("version", "1") != "1":
        raise Refusal(404, "not_found", f"the model {name[:100]!r} has only the version 1")
    return state.models.get(name)


def _max_rows(handle: WorkerHandle) -> int:
    """Return how many images the model takes in one request."""
    return int(handle.worker.spec["batch"]["max_images"])


async def _run(state: AppState, handle: WorkerHandle, parsed: V2Request) -> tuple[dict[str, Any], bytes]:
    """Return the shapes of the outputs and their values, float32 one after the other."""
    rows = parsed.shape[0]
    max_rows = _max_rows(handle)
    if rows > max_rows:
        raise _bad_request(f"a batch of {rows} is more than the {max_rows} that this model takes")
    message = {"do": "pixels", "shape": parsed.shape, "embeddings": "embedding" in parsed.outputs}
    try:
        with queue_slots(handle, rows):
            header, content = await ask_worker(handle, message, parsed.content, state.limits.answer_s)
    except WorkerCrash as error:
        raise Refusal(500, "model_failed", str(error)) from None
    if not np.isfinite(np.frombuffer(content, "<f4")).all():
        raise Refusal(500, "model_failed", "the model's outputs are not finite")
    state.metrics.batch.labels(handle.name).observe(header["batch"])
    return header, content


def _parse(body: bytes, json_length: str | None, model: Mapping[str, Any]) -> V2Request:
    """Parse a request; raise Refusal where it is invalid. No memory is allocated by a size that is only claimed."""
    # Without the header the body is JSON alone.
    length = len(body) if json_length is None else _parse_length(json_length)
    if not 0 <= length <= len(body):
        raise _bad_request(f"{_HEADER} is {json_length!r}, but the body has {len(body)} bytes")
    if length > _MAX_JSON_BYTES:
        raise Refusal(413, "too_large", f"more than {_MAX_JSON_BYTES} bytes of JSON: send the pixels as binary data")
    try:
        header = json.loads(body[:length])
        if not isinstance(header, dict) or not isinstance(header.get("id", ""), str):
            raise _bad_request("this is not a V2 request")
        (tensor,) = header["inputs"]
        shape = _parse_shape(tensor, model["image_size"])
        content = _parse_pixels(tensor, shape, body[length:])
        return V2Request(shape, content, _parse_outputs(header, model), header.get("id"))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise _bad_request(f"this is not a V2 request with one input named pixels ({reason})") from None


def _parse_length(text: str) -> int:
    """Return a length of up to 11 digits, else -1.

    >>> _parse_length("120"), _parse_length("-1"), _parse_length("9" * 20)
    (120, -1, -1)
    """
    return int(text) if text.isdecimal() and len(text) < 12 else -1


def _bad_request(message: str) -> Refusal:
    return Refusal(400, "bad_request", message[:300])


def _parse_shape(tensor: Mapping[str, Any], side: int) -> list[int]:
    if tensor["name"] != "pixels" or tensor["datatype"] != "UINT8":
        raise _bad_request("the input must be named pixels and have the datatype UINT8 (0 to 255)")
    shape = tensor["shape"]
    integers = isinstance(shape, list) and all(type(value) is int for value in shape)
    if not integers or len(shape) != 4 or shape[1:] != [3, side, side] or shape[0] < 1:
        raise _bad_request(f"pixels must have the shape [N, 3, {side}, {side}], not {shape}")
    return list(shape)


def _parse_pixels(tensor: Mapping[str, Any], shape: Sequence[int], binary: bytes) -> bytes:
    """Return the bytes of the pixels. Numbers that are no integers from 0 to 255 are refused, never rounded."""
    size = math.prod(shape)
    claimed = (tensor.get("parameters") or {}).get("binary_data_size")
    if claimed is not None:
        if type(claimed) is not int or claimed != len(binary) or claimed != size:
            raise _bad_request(
                f"pixels of the shape {list(shape)} have {size} bytes, but binary_data_size is {claimed} "
                f"and {len(binary)} bytes were sent"
            )
        return binary
    if binary:
        raise _bad_request("there is binary data, but pixels has no binary_data_size")
    # The numbers are a flat list, or nested like the shape: flatten one level for each dimension.
    values = tensor["data"]
    for _ in shape:
        if isinstance(values, list) and values and isinstance(values[0], list):
            values = list(itertools.chain.from_iterable(values))
    if isinstance(values, list) and len(values) == size and set(map(type, values)) == {int}:
        with suppress(ValueError):
            return bytes(values)
    raise _bad_request(f"the data of pixels must be {size} integers from 0 to 255")


def _parse_outputs(header: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, bool]:
    """Return each requested output and whether it is returned as binary data."""
    known = ["logits", "embedding"] if model["embeddings"] else ["logits"]
    default = bool((header.get("parameters") or {}).get("binary_data_output", False))
    outputs = {}
    for item in header.get("outputs") or [{"name": name} for name in known]:
        parameters = item.get("parameters") or {}
        if item["name"] not in known or "classification" in parameters:
            raise _bad_request(f"the model returns {' and '.join(known)}, without the classification extension")
        outputs[str(item["name"])] = bool(parameters.get("binary_data", default))
    return outputs


def _response(handle: WorkerHandle, parsed: V2Request, shapes: Sequence[Sequence[int]], content: bytes) -> Response:
    """Return the outputs in the requested order, as JSON or as JSON followed by binary data."""
    # Split the worker's answer into its tables.
    tables = {}
    start = 0
    for name, shape in zip(("logits", "embedding"), shapes, strict=False):
        end = start + 4 * math.prod(shape)
        tables[name] = (list(shape), content[start:end])
        start = end
    # Describe each output; binary ones are appended after the JSON.
    outputs = []
    binary_data = []
    for name, binary in parsed.outputs.items():
        shape, values = tables[name]
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": shape}
        if binary:
            binary_data.append(values)
            outputs.append({**output, "parameters": {"binary_data_size": len(values)}})
        else:
            outputs.append({**output, "data": np.frombuffer(values, "<f4").tolist()})
    header: dict[str, Any] = {"model_name": handle.name, "model_version": "1", "outputs": outputs}
    if parsed.id is not None:
        header["id"] = parsed.id
    text = json.dumps(header, allow_nan=False).encode()
    if not binary_data:
        return Response(text, media_type="application/json")
    headers = {_HEADER: str(len(text))}
    return Response(b"".join([text, *binary_data]), media_type="application/octet-stream", headers=headers)
