"""The routes, as a FastAPI application; what stands around them is `fence`."""

from __future__ import annotations

import mimetypes
from functools import cache
from html import escape
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from image_classifier import __version__
from image_classifier.serving import schemas
from image_classifier.serving.auth import is_open
from image_classifier.serving.middleware import FAILED, is_v2, problem_body
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.routes import docs, info, predict, v2
from image_classifier.serving.routes.predict import AppState

PAGE = Path(__file__).with_name("page")
_CODES = {400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}


def make_app(parts: AppState, needs_key: bool = False) -> FastAPI:
    """The routes over these parts."""
    app = FastAPI(
        title="image_classifier", version=__version__, description=schemas.ABOUT, docs_url=None, redoc_url=None
    )
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    for router in (
        predict.make_router(parts),
        info.make_cards(parts),
        info.make_probes(parts),
        v2.make_router(parts),
    ):
        app.include_router(router)
    mimetypes.add_type("text/javascript", ".js")  # what Windows' registry says may be another
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False), name="page")

    _add_pages(app, needs_key)
    if needs_key:
        schemas.tell_of_keys(app.openapi(), is_open)
    return app


def _add_pages(app: FastAPI, needs_key: bool) -> None:
    documented = cache(lambda: docs.rendered(app.openapi(), needs_key))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> HTMLResponse:
        return HTMLResponse(documented().replace(docs.ORIGIN, escape(str(request.base_url).rstrip("/"))))

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:
        return FileResponse(PAGE / "icon.svg", media_type="image/svg+xml")


def _error(request: Request, refusal: Refusal) -> Response:
    content, headers = problem_body(refusal, request.state.request_id, is_v2(request.url.path))
    return Response(content, refusal.status, {name.decode(): value.decode() for name, value in headers})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _error(request, error)


async def _failed(request: Request, error: Exception) -> Response:
    return _error(request, FAILED)  # `Fence` logs the error


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _error(request, Refusal(error.status_code, _CODES.get(error.status_code, "error"), str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return _error(request, Refusal(422, "invalid", f"{place}: {first['msg']}"))
