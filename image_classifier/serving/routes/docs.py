"""The page /docs: the API's own description (openapi.json) for people, with commands to copy; no script, nothing from other servers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from image_classifier.program import program

ORIGIN = "{origin}"  # where the page names the address by which its reader came
_COMMANDS = {
    "/predict": "curl -F images=@photo.jpg -F images=@other.jpg '{origin}/predict?top_k=3'",
    "/explain": "curl -F images=@photo.jpg '{origin}/explain'",
    "/v2/models/{name}/infer": "{program} infer --checkpoint_name NAME --images photo.jpg --backend triton --url {origin}",
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


def rendered(description: Mapping[str, Any], needs_key: bool) -> str:
    """The page, with `ORIGIN` in place of the server's address."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    groups: dict[str, list[Operation]] = {}
    for tag, operation in _operations(description):
        groups.setdefault(tag, []).append(operation)
    return environment.get_template("docs.html.j2").render(info=description["info"], groups=groups, needs_key=needs_key)


def _operations(description: Mapping[str, Any]) -> Iterator[tuple[str, Operation]]:
    for path, methods in description["paths"].items():
        for method, told in methods.items():
            command = _COMMANDS.get(path, "").replace("{program}", program()) or (
                f"curl '{ORIGIN}{path}'" if method == "get" else ""
            )
            if "security" in told:
                command = command.replace("curl ", 'curl -H "X-API-Key: $KEY" ', 1)
            answers = [(code, str(answer.get("description") or "")) for code, answer in told["responses"].items()]
            bodies = list(told.get("requestBody", {}).get("content", {}))
            shown = _example(told)
            yield (
                told["tags"][0],
                Operation(
                    method.upper(), path, told["summary"], told.get("parameters", []), bodies, shown, command, answers
                ),
            )


def _example(told: Mapping[str, Any]) -> str:
    """What an answer of 200 looks like, where the description has an example."""
    content = told["responses"].get("200", {}).get("content", {}).get("application/json", {})
    return json.dumps(content["example"], indent=2, ensure_ascii=False) if "example" in content else ""
