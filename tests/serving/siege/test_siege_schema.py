"""Generated requests, valid and invalid, get only the answers that the OpenAPI description documents."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.siege.attackers import Victim, victim

# What is valid by the schema and no picture is refused, so "valid is accepted" is no check here.
_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,response_headers_conformance,"
    "negative_data_rejection,missing_required_header,unsupported_method,use_after_free,ensure_resource_availability"
)


@pytest.fixture(scope="module")
def server(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(tmp_path_factory.mktemp("schema"), digits_bundle) as found:
        yield found


@pytest.mark.slow
def test_generated_requests_get_documented_answers(server: Victim, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    line = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"http://127.0.0.1:{server.port}/openapi.json",
        "--checks",
        _CHECKS,
    ]
    line += [
        "--max-examples",
        "40",
        "--seed",
        "1",
        "--no-color",
        "--suppress-health-check",
        "all",
        "--generation-database",
        "none",
    ]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    assert not [request for request in server.requests() if request["status"] >= 500]
