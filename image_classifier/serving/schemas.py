"""What the API's answers look like, for its documentation and its clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ABOUT = (
    "What images show. Send pictures, get their class, how sure that is, and whether the answer should be held back."
)


class _Schema(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class LivenessResponse(_Schema):
    """The server is alive."""

    status: Literal["alive"]


class ReadinessResponse(_Schema):
    """Whether every model answered a known image as it should, at most a second ago; where one did not, its words."""

    status: Literal["ready", "not ready"]
    models: dict[str, str]


class Complaint(_Schema):
    """A code for programs and words for people."""

    code: str
    message: str


class Problem(_Schema):
    """An answer that is no."""

    error: Complaint
    request_id: str


class V2Problem(_Schema):
    """An answer of the V2 protocol that is no."""

    error: str


class PredictionResponse(_Schema):
    """The answer for one image; `decision` is abstain where the label should not be relied on, and `reason` says why."""

    path: str = Field(description="The client's own name for the image.")
    predicted_class: str
    confidence: float = Field(ge=0, le=1)
    all_predictions: dict[str, float] = Field(description="Probability of each class, the most probable first.")
    decision: Literal["label", "abstain"]
    reason: str
    prediction_set: list[str] | None = Field(
        description="The classes that it may be; null where the model does not know that of itself."
    )


class Unreadable(_Schema):
    """An image without an answer."""

    path: str
    error: str


class PredictResponse(_Schema):
    """One answer an image, in their order."""

    model: str
    model_version: str
    request_id: str
    predictions: list[PredictionResponse | Unreadable]


class ExplainResponse(_Schema):
    """What in the image speaks for a class: rows from top to bottom over the whole picture, 0 to 1, null where the network does not look."""

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
    """What is known of a model."""

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


_WORDS = {
    400: "The request cannot be read",
    401: "It needs an API key",
    403: "It may not be asked from there",
    404: "There is no such model or class",
    408: "The body came too slowly",
    413: "Too large, or too many images",
    415: "Neither a form nor JSON",
    422: "The image cannot be read, or the request is not as it should be",
    429: "Too many requests; Retry-After says when to come back",
    500: "The model failed",
    503: "The queue is full or the server is being stopped; Retry-After says when to come back",
}


def answer(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The documentation of an answer of 200; an example of the model itself would lose its order."""
    return {200: {"content": {"application/json": {"example": example}}}}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of these answers."""
    return {code: {"model": Problem, "description": _WORDS[code]} for code in codes}


def v2_errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The same for the V2 protocol."""
    return {code: {"model": V2Problem, "description": _WORDS[code]} for code in codes}


def tell_of_keys(description: dict[str, Any], is_open: Callable[[str], bool]) -> None:
    """Write into an OpenAPI description that requests must bring a key, wherever a path is not open."""
    description["components"]["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "bearer": {"type": "http", "scheme": "bearer", "description": "The same key."},
    }
    for path, operations in description["paths"].items():
        for operation in operations.values():
            if not is_open(path):
                operation["security"] = [{"key": []}, {"bearer": []}]
                operation["responses"].setdefault("401", {"description": _WORDS[401]})


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


def _body(images: dict[str, Any], example: dict[str, Any], of_form: dict[str, Any]) -> dict[str, Any]:
    known = _JSON["properties"] if "top_k" in example else {"images": _JSON["properties"]["images"]}
    form = {"schema": {**_JSON, "properties": {**known, "images": images}}, "example": of_form}
    plain = {"schema": {**_JSON, "properties": known}, "example": example}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form, "application/json": plain}}}


_FILE = {"type": "string", "format": "binary"}
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mM8UaHBgA0wMeAAg1MCAB4nAXgllso1AAAAAElFTkSuQmCC"
_ONE = {"images": [{"name": "garden.png", "base64": _PNG}]}
IMAGES_BODY = _body(
    {"type": "array", "minItems": 1, "items": _FILE},
    {**_ONE, "top_k": 3},
    {"images": ["(a file)", "(another)"], "top_k": 3},
)
IMAGE_BODY = _body(_FILE, _ONE, {"images": "(a file)"})
_WHOSE = {"model": "flowers", "model_version": "3fa9c1d2b04e", "request_id": "0b0c6f7e5a1d4d0c9d3a1f2b3c4d5e6f"}
_PREDICTION = {
    "path": "garden.jpg",
    "predicted_class": "tulip",
    "confidence": 0.973,
    "all_predictions": {"tulip": 0.973, "rose": 0.021, "daisy": 0.006},
    "decision": "label",
    "reason": "",
    "prediction_set": ["tulip"],
}
ANSWERS = answer({**_WHOSE, "predictions": [_PREDICTION]})
_HEAT = [[None, 0.0, 0.12, None], [None, 0.31, 1.0, None], [None, 0.05, 0.4, None]]
EXPLANATION = answer({**_WHOSE, "path": "garden.jpg", "class": "tulip", "heat": _HEAT})
