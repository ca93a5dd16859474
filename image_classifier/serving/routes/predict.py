"""The routes /predict and /explain."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from image_classifier.serving import schemas
from image_classifier.serving.app_state import AppState
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.routes.query import ONLY_KNOWN_QUERY, ModelName
from image_classifier.serving.routes.worker_calls import ask_worker, queue_slots
from image_classifier.serving.uploads import Upload
from image_classifier.serving.worker.handle import WorkerCrash, WorkerHandle

_MAX_EXPLANATIONS = 4  # at the same time: each runs the model more than a hundred times
_CRASHED = "the process that reads images crashed on it repeatedly"
_REFUSALS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
_NOTHING_READABLE: dict[str, Any] = {
    "model": schemas.PredictResponse | schemas.Problem,
    "description": "No image can be read, or the request is invalid",
}

TopK = Annotated[
    int | None,
    Query(ge=1, description="How many classes all_predictions lists, the most probable first. The default is all."),
]
Label = Annotated[
    str | None, Query(alias="class", description="The class to explain. The default is the most probable one.")
]


def make_router(state: AppState) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["answers"])
    _add_predict(router, state)
    _add_explain(router, state)
    return router


def _add_predict(router: APIRouter, state: AppState) -> None:
    @router.post(
        "/predict",
        summary="Classify images",
        response_model=schemas.PredictResponse,
        dependencies=ONLY_KNOWN_QUERY,
        responses={**schemas.ANSWERS, **schemas.errors(*_REFUSALS), 422: _NOTHING_READABLE},
        openapi_extra=schemas.IMAGES_BODY,
    )
    async def predict(request: Request, name: ModelName = None, top_k: TopK = None) -> Response:
        with state.models.acquire(name) as handle:
            images, body_top_k = await state.uploads.parse(request.headers, request.state.body, request.state.lease)
            request.state.images = len(images)
            answers = await _predict_all(state, handle, images)
        limit = top_k or body_top_k
        if limit is not None:
            _limit_classes(answers, limit)
        content = {**_provenance(handle, request), "predictions": answers}
        return JSONResponse(content, 422 if all("error" in answer for answer in answers) else 200)


def _add_explain(router: APIRouter, state: AppState) -> None:
    @router.post(
        "/explain",
        summary="Show which parts of an image support a class",
        response_model=schemas.ExplainResponse,
        dependencies=ONLY_KNOWN_QUERY,
        responses={**schemas.EXPLANATION, **schemas.errors(*_REFUSALS)},
        openapi_extra=schemas.IMAGE_BODY,
    )
    async def explain(request: Request, name: ModelName = None, label: Label = None) -> Response:
        with state.models.acquire(name) as handle:
            images, top_k = await state.uploads.parse(request.headers, request.state.body, request.state.lease)
            request.state.images = len(images)
            if top_k is not None:
                raise Refusal(422, "invalid", "an explanation has no top_k")
            if len(images) != 1:
                raise Refusal(400, "bad_request", "send exactly one image to explain")
            (image,) = images
            if image.error:
                raise Refusal(422, "unreadable", image.error)
            if label is not None and label not in handle.metadata["classes"]:
                raise Refusal(404, "not_found", "the model has no such class: GET /model lists them")
            explained, heat = await _explain(state, handle, image, label)
        return JSONResponse({**_provenance(handle, request), "path": image.name, "class": explained, "heat": heat})


def _provenance(handle: WorkerHandle, request: Request) -> dict[str, str]:
    """Return which model answered which request."""
    return {
        "model": handle.metadata["name"],
        "model_version": handle.metadata["version"],
        "request_id": request.state.request_id,
    }


def _limit_classes(answers: Sequence[dict[str, Any]], limit: int) -> None:
    """Keep the most probable classes of each answer, which come first."""
    for answer in answers:
        if "all_predictions" in answer:
            probabilities = answer["all_predictions"]
            # islice takes no number above sys.maxsize.
            shown = itertools.islice(probabilities.items(), min(limit, len(probabilities)))
            answer["all_predictions"] = dict(shown)


async def _explain(
    state: AppState, handle: WorkerHandle, image: Upload, label: str | None
) -> tuple[str, list[list[float | None]]]:
    """Return the explained class and its heat map, [H][W] from 0 to 1, None where the model does not look."""
    if state.explaining >= _MAX_EXPLANATIONS:
        raise Refusal(503, "queue_full", "too many explanations are being computed", 5.0)
    state.explaining += 1
    try:
        message = {"do": "explain", "class": label}
        header, body = await ask_worker(handle, message, image.content, 2 * state.limits.answer_s)
    except WorkerCrash:
        raise Refusal(422, "unreadable", _CRASHED) from None
    finally:
        state.explaining -= 1
    if "unreadable" in header:
        raise Refusal(422, "unreadable", header["unreadable"])
    grid = np.frombuffer(body, np.float32).reshape(header["shape"]).astype(np.float64).round(3)
    return header["class"], [[None if np.isnan(value) else float(value) for value in row] for row in grid]


async def _predict_all(state: AppState, handle: WorkerHandle, images: Sequence[Upload]) -> list[dict[str, Any]]:
    """Return the answer for each image, in order."""
    try:
        with queue_slots(handle, len(images)):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_predict(state, handle, image)) for image in images]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


async def _predict(state: AppState, handle: WorkerHandle, image: Upload) -> dict[str, Any]:
    if image.error:
        unreadable = {"path": image.name, "error": image.error}
        state.metrics.count_answer(handle.metadata, unreadable, 0)
        return unreadable
    header: dict[str, Any]
    try:
        message = {"do": "image", "name": image.name}
        header, _ = await ask_worker(handle, message, image.content, state.limits.answer_s)
        answer = header["answer"]
    except WorkerCrash:
        header = {}
        answer = {"path": image.name, "error": _CRASHED}
    state.metrics.count_answer(handle.metadata, answer, header.get("batch", 0))
    state.drift_window.record(handle.metadata, answer, header.get("ood_score"))
    return dict(answer)
