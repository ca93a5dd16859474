"""The routes that tell of the server and its models: probes, figures, cards."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from image_classifier.serving import schemas
from image_classifier.serving.routes.predict import KNOWN_KEYS, AppState, ModelName

_FORM_BYTES = 1024  # of a form around one image


def make_probes(parts: AppState) -> APIRouter:
    """What orchestrators and Prometheus ask."""
    router = APIRouter(tags=["probes"])

    @router.get("/healthz", summary="Whether the server is alive")
    async def healthz() -> schemas.LivenessResponse:
        return schemas.LivenessResponse(status="alive")

    @router.get(
        "/readyz", summary="Whether every model really answers", responses={503: {"model": schemas.ReadinessResponse}}
    )
    async def readyz() -> Response:
        troubles = await asyncio.gather(*(parts.models.trouble(served) for served in parts.models))
        states = {served.order.name: trouble or "ready" for served, trouble in zip(parts.models, troubles, strict=True)}
        ready = not any(troubles)
        return JSONResponse({"status": "ready" if ready else "not ready", "models": states}, 200 if ready else 503)

    @router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def make_cards(parts: AppState) -> APIRouter:
    """What clients ask of the models."""
    router = APIRouter(tags=["models"])

    @router.get("/models", summary="The models that are served")
    async def models() -> schemas.ModelList:
        first = parts.models.first
        found = [
            schemas.ModelState(
                name=one.order.name,
                version=one.handle.facts["version"],
                ready=not one.known_trouble,
                default=one.order.name == first,
            )
            for one in parts.models
        ]
        return schemas.ModelList(models=found)

    @router.get("/model", summary="A model's card", dependencies=KNOWN_KEYS, responses=schemas.errors(404, 422))
    async def model(name: ModelName = None) -> schemas.Card:
        facts = parts.models.get(name).facts
        most = min(facts["limits"]["max_bytes"], max(1, parts.limits.max_bytes - _FORM_BYTES))
        limits = {**facts["limits"], "max_bytes": most, "max_images": parts.limits.max_images}
        return schemas.Card(**{**facts, "limits": limits, "explain": True, "urls": parts.urls})

    return router
