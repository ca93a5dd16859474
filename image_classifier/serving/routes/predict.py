"""The routes that answer: /predict and /explain."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response

from image_classifier.errors import ClassifierError
from image_classifier.serving import schemas
from image_classifier.serving.drift_window import DriftWindow
from image_classifier.serving.metrics import ServerMetrics
from image_classifier.serving.registry import ModelRegistry
from image_classifier.serving.request_limits import Refusal, RequestLimits
from image_classifier.serving.uploads import Upload, Uploads
from image_classifier.serving.worker.handle import DeadlineExceeded, QueueFull, WorkerCrash, WorkerEnded, WorkerHandle

_EXPLANATIONS = 4  # at once: each asks the model more than a hundred times
_DEADLY = "the process that reads images ended over it, more than once"
_REFUSALS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)

ModelName = Annotated[
    str | None,
    Query(alias="model", description="One of GET /models; the first of them where none is named.", max_length=300),
]
TopK = Annotated[
    int | None,
    Query(ge=1, description="How many classes all_predictions lists, the most probable ones; all where left out."),
]
Label = Annotated[
    str | None, Query(alias="class", description="The class to explain; the most probable one where left out.")
]


async def _known_keys(request: Request) -> None:
    """Refusal where the query has a key that the route does not know: a word mistyped would change the answer unseen."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]  # codespell:ignore dependant
    for key in request.query_params:
        if key not in known:
            raise Refusal(422, "invalid", f"the query has {key[:100]!r}: here it can have {' and '.join(known)}")


KNOWN_KEYS = [Depends(_known_keys)]


@dataclass
class AppState:
    """What the routes share."""

    models: ModelRegistry
    uploads: Uploads
    metrics: ServerMetrics
    traffic: DriftWindow
    limits: RequestLimits
    urls: bool
    explaining: int = 0


def make_router(parts: AppState) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["answers"])
    unread = {
        "model": schemas.PredictResponse | schemas.Problem,
        "description": "No image can be read, or the request is not as it should be",
    }

    @router.post(
        "/predict",
        summary="What images show",
        response_model=schemas.PredictResponse,
        dependencies=KNOWN_KEYS,
        responses={**schemas.ANSWERS, **schemas.errors(*_REFUSALS), 422: unread},
        openapi_extra=schemas.IMAGES_BODY,
    )
    async def predict(request: Request, name: ModelName = None, top_k: TopK = None) -> Response:
        with parts.models.held(name) as handle:
            images, own_top_k = await parts.uploads.of(request.headers, request.state.body, request.state.share)
            request.state.images = len(images)
            answers, shown = await _predicted(parts, handle, images), top_k or own_top_k
        for answer in answers:
            if shown is not None and "all_predictions" in answer:
                probabilities = answer["all_predictions"]
                answer["all_predictions"] = dict(
                    itertools.islice(probabilities.items(), min(shown, len(probabilities)))
                )
        content = {**_of(handle, request), "predictions": answers}
        return JSONResponse(content, 422 if all("error" in answer for answer in answers) else 200)

    @router.post(
        "/explain",
        summary="What in an image speaks for a class",
        response_model=schemas.ExplainResponse,
        dependencies=KNOWN_KEYS,
        responses={**schemas.EXPLANATION, **schemas.errors(*_REFUSALS)},
        openapi_extra=schemas.IMAGE_BODY,
    )
    async def explain(request: Request, name: ModelName = None, label: Label = None) -> Response:
        with parts.models.held(name) as handle:
            images, top_k = await parts.uploads.of(request.headers, request.state.body, request.state.share)
            request.state.images = len(images)
            if top_k is not None:
                raise Refusal(422, "invalid", "an explanation has no top_k")
            if len(images) != 1:
                raise Refusal(400, "bad_request", "send one image to be explained")
            if images[0].error:
                raise Refusal(422, "unreadable", images[0].error)
            if label is not None and label not in handle.facts["classes"]:
                raise Refusal(404, "not_found", "the model has no such class: GET /model lists them")
            found, heat = await _explained(parts, handle, images[0], label)
        return JSONResponse({**_of(handle, request), "path": images[0].name, "class": found, "heat": heat})

    return router


def _of(handle: WorkerHandle, request: Request) -> dict[str, str]:
    """Whose answer it is."""
    return {
        "model": handle.facts["name"],
        "model_version": handle.facts["version"],
        "request_id": request.state.request_id,
    }


async def _explained(
    parts: AppState, handle: WorkerHandle, image: Upload, label: str | None
) -> tuple[str, list[list[float | None]]]:
    if parts.explaining >= _EXPLANATIONS:
        raise Refusal(503, "queue_full", "other explanations are being made", 5.0)
    parts.explaining += 1
    try:
        head, body = await ask(handle, {"do": "explain", "class": label}, image.content, 2 * parts.limits.answer_s)
    except WorkerCrash:
        raise Refusal(422, "unreadable", _DEADLY) from None
    finally:
        parts.explaining -= 1
    if "unreadable" in head:
        raise Refusal(422, "unreadable", head["unreadable"])
    grid = np.frombuffer(body, np.float32).reshape(head["shape"]).astype(np.float64).round(3)
    return head["class"], [[None if np.isnan(value) else float(value) for value in row] for row in grid]


async def _predicted(parts: AppState, handle: WorkerHandle, images: Sequence[Upload]) -> list[dict[str, Any]]:
    """The answer of each image, in order."""
    try:
        with room(handle, len(images)):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_one(parts, handle, image)) for image in images]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


async def _one(parts: AppState, handle: WorkerHandle, image: Upload) -> dict[str, Any]:
    if image.error:
        unread = {"path": image.name, "error": image.error}
        parts.metrics.answered(handle.facts, unread, 0)
        return unread
    head: dict[str, Any]
    try:
        head, _ = await ask(handle, {"do": "image", "name": image.name}, image.content, parts.limits.answer_s)
        answer = head["answer"]
    except WorkerCrash:
        head, answer = {}, {"path": image.name, "error": _DEADLY}
    parts.metrics.answered(handle.facts, answer, head.get("batch", 0))
    parts.traffic.seen(handle.facts, answer, head.get("ood_score"))
    return dict(answer)


@contextmanager
def room(handle: WorkerHandle, images: int) -> Iterator[None]:
    """Places in the queue for so many; Refusal at once where there are not enough."""
    try:
        with handle.room_for(images):
            yield
    except QueueFull as error:
        raise Refusal(503, "queue_full", str(error), error.after_s) from None


async def ask(
    handle: WorkerHandle, head: Mapping[str, Any], content: bytes, timeout_s: float
) -> tuple[dict[str, Any], bytes]:
    """What the model's process answers, its troubles as refusals, but for `Deadly`."""
    try:
        return await handle.ask(head, content, timeout_s)
    except DeadlineExceeded as error:
        raise Refusal(503, "too_late", str(error), 1.0) from None
    except WorkerEnded as error:
        raise Refusal(503, "stopping", str(error), 1.0) from None
    except ClassifierError as error:
        raise Refusal(500, "model_failed", str(error)) from None
