"""Query parameters that several routes have."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from image_classifier.serving.request_limits import Refusal

ModelName = Annotated[
    str | None,
    Query(alias="model", description="A name from GET /models. The default is the first model.", max_length=300),
]


async def _check_query(request: Request) -> None:
    """Refuse unknown query parameters: a mistyped one would change the answer unnoticed."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]  # codespell:ignore dependant
    for key in request.query_params:
        if key not in known:
            raise Refusal(422, "invalid", f"unknown query parameter {key[:100]!r}: this path has {' and '.join(known)}")


ONLY_KNOWN_QUERY = [Depends(_check_query)]
