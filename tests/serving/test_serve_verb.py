"""The verb: several models by name, aliases of the registry, and errors in one line before the server listens."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.serving import model_sources
from image_classifier.serving.model_sources import LocalModel, RegisteredModel, model_source
from tests.conftest import Command, run_apart
from tests.serving.conftest import Server, start_server


def test_models_answer_by_their_names(digits_bundle: Path, tmp_path: Path, digit: bytes) -> None:
    shutil.copytree(digits_bundle, tmp_path / "models" / "second")
    line = (
        "models={other: second, file: models/second/model.onnx}",
        "drift.enabled=true",
        "access.allowed_hosts=[127.0.0.1]",
    )
    server = start_server(tmp_path, digits_bundle, *line)
    try:
        found = server.ask("GET", "/models").json["models"]
        assert [(one["name"], one["default"], one["ready"]) for one in found] == [
            ("digits", True, True),
            ("other", False, True),
            ("file", False, True),
        ]
        answers = [server.send(f"/predict?model={name}", ("7.png", digit)).json for name in ("digits", "other", "file")]
        assert [answer["model"] for answer in answers] == ["digits", "other", "file"]
        assert len({answer["predictions"][0]["predicted_class"] for answer in answers}) == 1
        assert (tmp_path / "runs/serve/digits.jsonl").exists()
        assert server.gauge('drift_images{figure="confidence",model="other"}') == 1
        assert server.ask("GET", "/models", headers={"Host": "localhost"}).status == 403
    finally:
        assert server.end() == 0, server.log.read_text()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("nothing",), "nothing"),
        (("{bundle}", "--port", "70000"), "invalid port 70000: expected 0 to 65535"),
        (("{bundle}", "--host", "no.such.host.invalid"), "no address of this machine"),
        (("{bundle}", "--backend", "magic"), "there is no backend 'magic'"),
        (("{bundle}", "--backend", "triton"), "needs the server's address"),
        (("{bundle}", "models={digits: {bundle}}"), "two models would be served as 'digits'"),
        (("{bundle}", "access.keys_file=missing.txt"), "cannot be read"),
        (("{bundle}", "access.cors_origins=['*']"), "write an origin"),
        (("{bundle}", "queue=1"), "less than request.max_images"),
        (("{bundle}", "batch.max_images=0"), "batch.max_images"),
        (("{bundle}", "request.body_s=0"), "invalid request.body_s"),
        (("{bundle}", "hang_s=1"), "must be above canary_s"),
        (("{bundle}", "decision.risk=2"), "decision.risk"),
        (("models:/digits",), "models:/NAME@ALIAS"),
    ],
)
def test_what_cannot_be_is_one_line(
    digits_bundle: Path, line, words, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = command(
        "serve",
        *(part.replace("{bundle}", str(digits_bundle)) for part in line),
        *([] if "--port" in line else ["port=0"]),
    )
    assert answer.code == 2 and words in answer.err and answer.err.count("\n") == 1, answer.err
    assert answer.out == ""


@pytest.mark.slow
def test_a_port_that_is_taken_and_a_damaged_model_are_one_line(digits_bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = run_apart("serve", str(digits_bundle), "--port", str(taken.getsockname()[1]))
        assert answer.code == 2 and "cannot listen at 127.0.0.1" in answer.err and answer.err.count("\n") == 1
    shutil.copytree(digits_bundle, tmp_path / "broken")
    (tmp_path / "broken/model.onnx").write_bytes(b"nothing")
    answer = run_apart("serve", str(tmp_path / "broken"), "--port", "0")
    assert answer.code == 2 and "is damaged" in answer.err and answer.err.count("\n") == 1 and answer.out == ""


_TRAINING = {"torch", "torchvision", "lightning", "pytorch_lightning", "timm", "torchmetrics", "mlflow"}
_TELL_IMPORTS = """
import os, sys
told = open(f"{os.path.dirname(__file__)}/imports-{os.getpid()}", "w", buffering=1)
sys.addaudithook(lambda event, details: event == "import" and told.write(f"{details[0]}\\n"))
"""


def test_nothing_of_training_is_loaded_from_the_command_to_the_answers(
    digits_bundle: Path, tmp_path: Path, digit: bytes
) -> None:
    """Each process writes down what it imports."""
    (tmp_path / "sitecustomize.py").write_text(_TELL_IMPORTS)
    server = start_server(tmp_path, digits_bundle, "reload_s=0.2", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        for path in ("/readyz", "/model", "/metrics", "/docs"):
            assert server.ask("GET", path).status == 200
        body = json.dumps({"images": [{"url": "http://127.0.0.1/"}]}).encode()
        assert server.ask("POST", "/predict", body, {"Content-Type": "application/json"}).status == 403
        assert (
            server.send("/predict", ("7.png", digit)).status == server.send("/explain", ("7.png", digit)).status == 200
        )
    finally:
        assert server.end() == 0, server.log.read_text()
    told = {
        path.name: {line.partition(".")[0] for line in path.read_text().split()} for path in tmp_path.glob("imports-*")
    }
    own = told.pop(f"imports-{server.process.pid}")
    (models,) = told.values()
    assert "fastapi" in own and "onnxruntime" in models  # it was written down
    assert not own & _TRAINING and not models & _TRAINING
    assert "onnxruntime" not in own and not models & {"fastapi", "hydra"}  # each loads its own part, beside the other


def test_documentation_is_a_page_without_scripts(server: Server, strict: Server) -> None:
    page = server.ask("GET", "/docs")
    text = page.content.decode()
    assert page.status == 200 and "<script" not in text and "style=" not in text
    assert (
        f"curl -F images=@photo.jpg -F images=@other.jpg &#39;http://127.0.0.1:{server.port}/predict?top_k=3&#39;"
        in text
    )
    assert "X-API-Key: $KEY" not in text and "X-API-Key: $KEY" in strict.ask("GET", "/docs").content.decode()
    assert "curl &#39;http" in strict.ask("GET", "/docs").content.decode()  # a probe needs none
    assert (
        strict.ask("GET", "/openapi.json").status
        == strict.ask("GET", "/").status
        == strict.ask("GET", "/favicon.ico").status
        == 200
    )


def test_documentation_names_the_readers_own_address_and_runs_nothing_of_it(
    digits_bundle: Path, tmp_path: Path
) -> None:
    server = start_server(tmp_path, digits_bundle, "access.allowed_hosts=['*']")
    try:
        for number in range(3):
            text = server.ask("GET", "/docs", headers={"Host": f"<b>'\"{number}.example"}).content.decode()
            assert "<b>" not in text and (
                f"{number}.example/predict" in text or f"http://127.0.0.1:{server.port}/predict" in text
            )
            assert "{origin}" not in text
        assert (
            text.index("&#34;tulip&#34;: 0.973") < text.index("&#34;daisy&#34;: 0.006") < text.index("&#34;heat&#34;")
        )
    finally:
        assert server.end() == 0


def test_the_description_says_which_routes_want_a_key(strict: Server) -> None:
    found = strict.ask("GET", "/openapi.json").json
    schemes = found["components"]["securitySchemes"]
    assert (schemes["key"]["in"], schemes["key"]["name"], schemes["bearer"]["scheme"]) == (
        "header",
        "X-API-Key",
        "bearer",
    )
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            needed = strict.ask(method.upper(), path).status == 401
            assert operation.get("security") == ([{"key": []}, {"bearer": []}] if needed else None), path
            assert not needed or "401" in operation["responses"]
    assert "security" not in found["paths"]["/healthz"]["get"] and "security" in found["paths"]["/predict"]["post"]


class Registry:
    """Stands in for MLflow's: an alias, and where its version lies."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source, self.downloads = folder, "runs:/1/model", 0

    def version(self, tracking_uri: str, name: str, alias: str) -> tuple[str, str]:
        assert (tracking_uri, name, alias) == ("sqlite:///mlflow.db", "digits", "champion")
        return "1", self.source

    def download(self, tracking_uri: str, source: str, directory: Path) -> Path:
        self.downloads += 1
        shutil.copytree(self.folder, directory / "model")
        return directory / "model"


def test_an_alias_is_downloaded_once_a_version(
    digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits_bundle, tmp_path / "registered/artifacts/bundle")
    registry = Registry(tmp_path / "registered")
    monkeypatch.setattr("image_classifier.mlflow_tracking.registered_version", registry.version)
    monkeypatch.setattr("image_classifier.mlflow_tracking.download", registry.download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = model_source("models:/digits@champion", tmp_path, None, "sqlite:///mlflow.db")
    assert isinstance(place, RegisteredModel) and place.name == "digits"
    first = place.find()
    assert (first / "bundle.json").is_file() and place.find() == first and registry.downloads == 1
    registry.source = "runs:/2/model"
    assert place.find() != first and registry.downloads == 2
    assert [
        path for path in (tmp_path / "cache/image_classifier/registry").iterdir() if path.name.startswith("tmp")
    ] == []
    registry.source = "runs:/3/model"
    (tmp_path / "registered/artifacts/bundle/bundle.json").unlink()
    with pytest.raises(CheckpointError, match="holds no bundle"):
        place.find()


def test_an_alias_where_mlflow_is_not_installed_says_what_to_do(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for verb in ("serve", "drift"):
        answer = command(verb, "models:/digits@champion")
        assert answer.code == 2 and answer.err.count("\n") == 1 and answer.out == "", answer.err
        assert "models:/digits@champion needs the package mlflow" in answer.err and "name its folder" in answer.err


def test_places_have_names(digits_bundle: Path, tmp_path: Path) -> None:
    assert model_source(str(digits_bundle), tmp_path, None, "").name == "digits"
    assert LocalModel(str(digits_bundle / "model.onnx"), tmp_path, None).name == "model"
    for wrong in ("models:/a b@c", "models:/a", "models:/@c", "models:/a@b/c"):
        with pytest.raises(ConfigError):
            model_sources.model_source(wrong, tmp_path, None, "")
