"""The page /docs: the API description (openapi.json) for people, with commands to copy. It has no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from image_classifier.program import program

ORIGIN = "{origin}"  # stands for the server's address, as the reader of the page reached it
_COMMANDS = {
    "/predict": f"curl -F images=@photo.jpg -F images=@other.jpg '{ORIGIN}/predict?top_k=3'",
    "/explain": f"curl -F images=@photo.jpg '{ORIGIN}/explain'",
    "/v2/models/{name}/infer": (
        f"{{program}} infer --checkpoint_name NAME --images photo.jpg --backend triton --url {ORIGIN}"
    ),
}


@dataclass(frozen=True)
class Operation:
    """One method of one path, as the page shows it."""

    method: str
    path: str
    summary: str
    parameters: list[Mapping[str, Any]]
    bodies: list[str]
    example: str
    command: str
    answers: list[tuple[str, str]]


def render_docs(description: Mapping[str, Any], needs_key: bool) -> str:
    """Return the page, with `ORIGIN` in place of the server's address."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    groups: dict[str, list[Operation]] = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            groups.setdefault(operation["tags"][0], []).append(_operation(method, path, operation))
    return environment.get_template("docs.html.j2").render(info=description["info"], groups=groups, needs_key=needs_key)


def _operation(method: str, path: str, description: Mapping[str, Any]) -> Operation:
    return Operation(
        method=method.upper(),
        path=path,
        summary=description["summary"],
        parameters=description.get("parameters", []),
        bodies=list(description.get("requestBody", {}).get("content", {})),
        example=_example(description),
        command=_command(method, path, "security" in description),
        answers=[(code, str(answer.get("description") or "")) for code, answer in description["responses"].items()],
    )


def _command(method: str, path: str, needs_key: bool) -> str:
    """Return a shell command that calls the path, "" where there is none."""
    default = f"curl '{ORIGIN}{path}'" if method == "get" else ""
    command = _COMMANDS.get(path, default).replace("{program}", program())
    return command.replace("curl ", 'curl -H "X-API-Key: $KEY" ', 1) if needs_key else command


def _example(description: Mapping[str, Any]) -> str:
    """Return the example of an answer with status 200, "" where there is none."""
    content = description["responses"].get("200", {}).get("content", {}).get("application/json", {})
    return json.dumps(content["example"], indent=2, ensure_ascii=False) if "example" in content else ""
