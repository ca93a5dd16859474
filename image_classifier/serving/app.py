"""The FastAPI application: all routes, the page and the format of errors. `middleware` wraps it."""

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
from image_classifier.serving.app_state import AppState
from image_classifier.serving.auth import is_open
from image_classifier.serving.middleware import INTERNAL_ERROR, is_v2, problem_response
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.routes import docs, info, predict, v2

PAGE = Path(__file__).with_name("page")
_CODES = {400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}


def make_app(state: AppState, needs_key: bool = False) -> FastAPI:
    """Return the application over this state."""
    app = FastAPI(
        title="image_classifier", version=__version__, description=schemas.ABOUT, docs_url=None, redoc_url=None
    )
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(Exception, _on_exception)
    for router in (predict.make_router(state), info.make_cards(state), info.make_probes(state), v2.make_router(state)):
        app.include_router(router)
    mimetypes.add_type("text/javascript", ".js")  # the registry of Windows may name another type
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False), name="page")

    _add_pages(app, needs_key)
    if needs_key:
        schemas.document_keys(app.openapi(), is_open)
    return app


def _add_pages(app: FastAPI, needs_key: bool) -> None:
    rendered = cache(lambda: docs.render_docs(app.openapi(), needs_key))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> HTMLResponse:
        return HTMLResponse(rendered().replace(docs.ORIGIN, escape(str(request.base_url).rstrip("/"))))

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:
        return FileResponse(PAGE / "icon.svg", media_type="image/svg+xml")


def _problem(request: Request, refusal: Refusal) -> Response:
    content, headers = problem_response(refusal, request.state.request_id, is_v2(request.url.path))
    return Response(content, refusal.status, {name.decode(): value.decode() for name, value in headers})


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _problem(request, error)


async def _on_exception(request: Request, error: Exception) -> Response:
    return _problem(request, INTERNAL_ERROR)  # Starlette raises it again, and the middleware logs it


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "error")
    response = _problem(request, Refusal(error.status_code, code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return _problem(request, Refusal(422, "invalid", f"{where}: {first['msg']}"))
