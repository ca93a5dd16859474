"""The models of the API's answers and the OpenAPI documentation of its requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ABOUT = "Image classification. Send images and get the class of each, its confidence, and whether the model abstains."


class _Schema(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class LivenessResponse(_Schema):
    """The server is alive."""

    status: Literal["alive"]


class ReadinessResponse(_Schema):
    """Whether each model answered an image with a known answer correctly, at most a second ago; if not, why."""

    status: Literal["ready", "not ready"]
    models: dict[str, str]


class ProblemDetail(_Schema):
    """A code for programs and a message for people."""

    code: str
    message: str


class Problem(_Schema):
    """A refused request."""

    error: ProblemDetail
    request_id: str


class V2Problem(_Schema):
    """A refused request of the V2 protocol."""

    error: str


class PredictionResponse(_Schema):
    """The answer for one image. `decision` is abstain where the class is not reliable, and `reason` explains it."""

    path: str = Field(description="The client's name for the image.")
    predicted_class: str
    confidence: float = Field(ge=0, le=1)
    all_predictions: dict[str, float] = Field(description="Probability of each class, the most probable first.")
    decision: Literal["label", "abstain"]
    reason: str
    prediction_set: list[str] | None = Field(
        description="The classes that are likely enough; null where the model has no such rule."
    )


class Unreadable(_Schema):
    """An image that cannot be read."""

    path: str
    error: str


class PredictResponse(_Schema):
    """An answer for each image, in order."""

    model: str
    model_version: str
    request_id: str
    predictions: list[PredictionResponse | Unreadable]


class ExplainResponse(_Schema):
    """A heat map: how much each region supports the class, 0 to 1, row by row; null outside the model's view."""

    model: str
    model_version: str
    request_id: str
    path: str
    label: str = Field(alias="class")
    heat: list[list[float | None]]


class ModelState(_Schema):
    """One model."""

    name: str
    version: str
    ready: bool
    default: bool


class ModelList(_Schema):
    """All models."""

    models: list[ModelState]


class Card(_Schema):
    """The model card."""

    name: str
    version: str
    backend: str
    classes: list[str]
    image_size: int
    temperature: float
    threshold: float
    decision: dict[str, Any] | None
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    limits: dict[str, Any]
    explain: bool
    urls: bool


_ERRORS = {
    400: "The request cannot be read",
    401: "An API key is needed",
    403: "This host name or site is not allowed",
    404: "There is no such model or class",
    408: "The body came too slowly",
    413: "The body is too large, or has too many images",
    415: "The body is neither a form nor JSON",
    422: "The image cannot be read, or the request is invalid",
    429: "Too many requests; Retry-After gives the seconds to wait",
    500: "The model failed",
    503: "The queue is full, or the server is shutting down; Retry-After gives the seconds to wait",
}


def answer(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Document an answer of status 200. An example in the model itself would lose its order."""
    return {200: {"content": {"application/json": {"example": example}}}}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Document these errors."""
    return {code: {"model": Problem, "description": _ERRORS[code]} for code in codes}


def v2_errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Document these errors of the V2 protocol."""
    return {code: {"model": V2Problem, "description": _ERRORS[code]} for code in codes}


def document_keys(description: dict[str, Any], is_open: Callable[[str], bool]) -> None:
    """Add to an OpenAPI description that all paths but the open ones need a key."""
    description["components"]["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "bearer": {"type": "http", "scheme": "bearer", "description": "The same key."},
    }
    for path, operations in description["paths"].items():
        for operation in operations.values():
            if not is_open(path):
                operation["security"] = [{"key": []}, {"bearer": []}]
                operation["responses"].setdefault("401", {"description": _ERRORS[401]})


_JSON: dict[str, Any] = {
    "type": "object",
    "required": ["images"],
    "additionalProperties": False,
    "properties": {
        "images": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "maxLength": 1000},
                    "base64": {"type": "string", "contentEncoding": "base64"},
                    "url": {"type": "string", "maxLength": 4000},
                },
            },
        },
        "top_k": {"type": "integer", "minimum": 1},
    },
}


def _body(images: dict[str, Any], example: dict[str, Any], form_example: dict[str, Any]) -> dict[str, Any]:
    known = _JSON["properties"] if "top_k" in example else {"images": _JSON["properties"]["images"]}
    form = {"schema": {**_JSON, "properties": {**known, "images": images}}, "example": form_example}
    plain = {"schema": {**_JSON, "properties": known}, "example": example}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form, "application/json": plain}}}


_FILE = {"type": "string", "format": "binary"}
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mM8UaHBgA0wMeAAg1MCAB4nAXgllso1AAAAAElFTkSuQmCC"
_ONE_IMAGE = {"images": [{"name": "garden.png", "base64": _PNG}]}
IMAGES_BODY = _body(
    {"type": "array", "minItems": 1, "items": _FILE},
    {**_ONE_IMAGE, "top_k": 3},
    {"images": ["(a file)", "(another)"], "top_k": 3},
)
IMAGE_BODY = _body(_FILE, _ONE_IMAGE, {"images": "(a file)"})
_PROVENANCE = {"model": "flowers", "model_version": "3fa9c1d2b04e", "request_id": "0b0c6f7e5a1d4d0c9d3a1f2b3c4d5e6f"}
_PREDICTION = {
    "path": "garden.jpg",
    "predicted_class": "tulip",
    "confidence": 0.973,
    "all_predictions": {"tulip": 0.973, "rose": 0.021, "daisy": 0.006},
    "decision": "label",
    "reason": "",
    "prediction_set": ["tulip"],
}
ANSWERS = answer({**_PROVENANCE, "predictions": [_PREDICTION]})
_HEAT = [[None, 0.0, 0.12, None], [None, 0.31, 1.0, None], [None, 0.05, 0.4, None]]
EXPLANATION = answer({**_PROVENANCE, "path": "garden.jpg", "class": "tulip", "heat": _HEAT})
