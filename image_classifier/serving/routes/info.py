"""The routes about the server and its models: probes, metrics, model cards."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from image_classifier.serving import schemas
from image_classifier.serving.app_state import AppState
from image_classifier.serving.routes.query import ONLY_KNOWN_QUERY, ModelName

_FORM_BYTES = 1024  # of a form around one image


def make_probes(state: AppState) -> APIRouter:
    """Return the routes for orchestrators and Prometheus."""
    router = APIRouter(tags=["probes"])

    @router.get("/healthz", summary="Check whether the server is alive")
    async def healthz() -> schemas.LivenessResponse:
        return schemas.LivenessResponse(status="alive")

    @router.get(
        "/readyz",
        summary="Check whether every model answers correctly",
        responses={503: {"model": schemas.ReadinessResponse}},
    )
    async def readyz() -> Response:
        problems = await asyncio.gather(*(state.models.probe(served) for served in state.models))
        states = {served.spec.name: problem or "ready" for served, problem in zip(state.models, problems, strict=True)}
        ready = not any(problems)
        return JSONResponse({"status": "ready" if ready else "not ready", "models": states}, 200 if ready else 503)

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(state.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def make_cards(state: AppState) -> APIRouter:
    """Return the routes about the models."""
    router = APIRouter(tags=["models"])

    @router.get("/models", summary="List the models")
    async def models() -> schemas.ModelList:
        states = [
            schemas.ModelState(
                name=served.spec.name,
                version=served.handle.metadata["version"],
                ready=not served.last_problem,
                default=served.spec.name == state.models.default,
            )
            for served in state.models
        ]
        return schemas.ModelList(models=states)

    @router.get(
        "/model", summary="Show a model card", dependencies=ONLY_KNOWN_QUERY, responses=schemas.errors(404, 422)
    )
    async def model(name: ModelName = None) -> schemas.Card:
        metadata = state.models.get(name).metadata
        # An image must also fit into a request: subtract the form around it.
        max_bytes = min(metadata["limits"]["max_bytes"], max(1, state.limits.max_bytes - _FORM_BYTES))
        limits = {**metadata["limits"], "max_bytes": max_bytes, "max_images": state.limits.max_images}
        return schemas.Card(**{**metadata, "limits": limits, "explain": True, "urls": state.urls})

    return router
