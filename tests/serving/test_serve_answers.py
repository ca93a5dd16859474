"""What the server answers is what `infer` answers, however the images come."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.inference.load import load_predictor
from image_classifier.sources.image_source import ImageSource
from tests.serving.conftest import Server


@pytest.fixture(scope="module")
def images(digits_bundle: Path) -> list[tuple[str, bytes]]:
    """Pictures of several kinds: digits as they lie, and larger ones turned by EXIF, transparent, grey, of 16 bits."""
    found = [
        (path.name, path.read_bytes())
        for path in sorted((digits_bundle.parents[1] / "data/digits/test").rglob("*.png"))[:40]
    ]
    rng = np.random.default_rng(0)
    for name, kind, options in (
        ("a.jpg", "JPEG", {}),
        ("b.webp", "WEBP", {}),
        ("c.gif", "GIF", {}),
        ("d.bmp", "BMP", {}),
        ("e.tiff", "TIFF", {}),
    ):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)).save(
            buffer, kind, **({"exif": exif} if kind == "JPEG" else options)
        )
        found.append((name, buffer.getvalue()))
    return found


@pytest.fixture(scope="module")
def expected(digits_bundle: Path, images: list[tuple[str, bytes]]) -> list[dict[str, object]]:
    predictor = load_predictor(digits_bundle)
    return [
        prediction.answer()
        for prediction, _ in predictor.answers(ImageSource(name, content) for name, content in images)
    ]


def assert_equal(found: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        probabilities, due = one.pop("all_predictions"), other["all_predictions"]
        assert probabilities == pytest.approx(due, abs=1e-5)  # batches of other sizes are summed in another order
        assert next(iter(probabilities)) == next(iter(due))
        assert one.pop("confidence") == pytest.approx(other["confidence"], abs=1e-5)
        assert re.sub(r"[\d.]+", "", one.pop("reason")) == re.sub(r"[\d.]+", "", other["reason"])
        assert one == {key: other[key] for key in ("path", "predicted_class", "decision", "prediction_set")}


@pytest.mark.slow
def test_many_at_once_answer_as_infer(server: Server, images, expected) -> None:
    reply = server.send("/predict", *images)
    assert reply.status == 200
    assert_equal(reply.json["predictions"], expected)
    assert reply.json["model"] == "digits" and len(reply.json["model_version"]) == 12
    assert reply.headers["x-request-id"] == reply.json["request_id"]


def test_many_clients_get_each_their_own_answer(server: Server, images, expected) -> None:
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda image: server.send("/predict", image), images))
    assert_equal([reply.json["predictions"][0] for reply in replies], expected)


def test_json_answers_as_a_form_does(server: Server, images, expected) -> None:
    listed = [{"name": name, "base64": base64.b64encode(content).decode()} for name, content in images]
    listed[1]["base64"] = f"data:image/png;base64,{listed[1]['base64']}"
    listed[2]["base64"] = base64.encodebytes(images[2][1]).decode()
    listed[-1]["base64"] = base64.urlsafe_b64encode(images[-1][1]).decode()
    body = json.dumps({"images": listed}).encode()
    assert_equal(
        server.ask("POST", "/predict", body, {"Content-Type": "application/json; charset=utf-8"}).json["predictions"],
        expected,
    )


def test_so_many_classes_are_listed_as_are_asked_for(server: Server, digit: bytes) -> None:
    whole = server.send("/predict", ("7.png", digit)).json["predictions"][0]["all_predictions"]
    assert len(whole) == 10 and sum(whole.values()) == pytest.approx(1)
    assert list(whole.values()) == sorted(whole.values(), reverse=True)
    assert server.send("/predict?top_k=2", ("7.png", digit)).json["predictions"][0]["all_predictions"] == dict(
        list(whole.items())[:2]
    )
    assert server.send("/predict", ("7.png", digit), texts={"top_k": "2"}).json["predictions"][0][
        "all_predictions"
    ] == dict(list(whole.items())[:2])
    assert (
        len(
            server.send("/predict?top_k=3", ("7.png", digit), texts={"top_k": "2"}).json["predictions"][0][
                "all_predictions"
            ]
        )
        == 3
    )
    body = json.dumps({"images": [{"base64": base64.b64encode(digit).decode()}], "top_k": 1}).encode()
    (own,) = server.ask("POST", "/predict", body, {"Content-Type": "application/json"}).json["predictions"]
    assert own["path"] == "image-1" and own["all_predictions"] == dict(list(whole.items())[:1])


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\cat.png", "cat.png"),
        ("", "image-1"),
        ("a\x1b[2Jb.png", "a\\x1b[2Jb.png"),
        ("é" * 300, "é" * 200),
    ],
)
def test_a_clients_name_is_a_name_only(server: Server, digit: bytes, given: str, shown: str) -> None:
    body = json.dumps({"images": [{"name": given, "base64": base64.b64encode(digit).decode()}]}).encode()
    assert (
        server.ask("POST", "/predict", body, {"Content-Type": "application/json"}).json["predictions"][0]["path"]
        == shown
    )


def test_what_cannot_be_read_has_its_reason_beside_the_others_answers(server: Server, digit: bytes) -> None:
    reply = server.send(
        "/predict", ("good.png", digit), ("bad.png", digit[:-30]), ("note.txt", b"no picture"), ("empty.png", b"")
    )
    assert reply.status == 200
    good, *bad = reply.json["predictions"]
    assert good["path"] == "good.png" and good["confidence"] > 0
    assert [sorted(one) for one in bad] == [["error", "path"]] * 3
    assert "not a JPEG" in bad[1]["error"] and "empty" in bad[2]["error"]
    alone = server.send("/predict", ("bad.png", digit[:-30]))
    assert alone.status == 422 and alone.json["predictions"] == [bad[0]]


def test_the_card_says_what_the_bundle_says(server: Server, digits_bundle: Path) -> None:
    info = json.loads((digits_bundle / "bundle.json").read_text())
    card = server.ask("GET", "/model").json
    assert card == server.ask("GET", "/model?model=digits").json
    assert (card["name"], card["classes"], card["metrics"]) == ("digits", info["classes"], info["metrics"])
    assert card["limits"]["max_images"] == 64 and card["explain"] is True and card["urls"] is False
    (only,) = server.ask("GET", "/models").json["models"]
    assert only == {"name": "digits", "version": card["version"], "ready": True, "default": True}


def test_a_heat_map_covers_the_whole_picture(server: Server) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 120, 3), dtype=np.uint8)).save(buffer, "PNG")
    reply = server.send("/explain?class=3", ("wide.png", buffer.getvalue()))
    assert reply.status == 200 and (reply.json["path"], reply.json["class"]) == ("wide.png", "3")
    heat = np.array(reply.json["heat"], dtype=float)
    assert heat.shape[1] == 28 and heat.shape[0] == round(28 * 40 / 120)
    assert np.nanmin(heat) >= 0 and np.nanmax(heat) in (
        0,
        pytest.approx(1, abs=0.35),
    )  # stretched: the greatest may lie between two places
    assert server.send("/explain?class=none", ("wide.png", buffer.getvalue())).status == 404
    assert server.send("/explain", ("a.png", buffer.getvalue()), ("b.png", buffer.getvalue())).status == 400
    assert server.send("/explain", ("a.png", b"nothing")).status == 422


def test_probes_and_figures(server: Server, digit: bytes) -> None:
    assert server.ask("GET", "/healthz").json == {"status": "alive"}
    assert server.ask("GET", "/readyz").json == {"status": "ready", "models": {"digits": "ready"}}
    label = server.send("/predict", ("7.png", digit)).json["predictions"][0]["predicted_class"]
    name = f'predictions_total{{label="{label}"'
    before = server.gauge(name)
    server.send("/predict", ("7.png", digit))
    assert server.gauge(name) == before + 1
    assert server.gauge("queue_images{") == 0 and server.gauge("ready{") == 1 and server.gauge("restarts{") == 0


def test_the_api_describes_itself(server: Server) -> None:
    found = server.ask("GET", "/openapi.json").json
    assert {
        "/predict",
        "/explain",
        "/model",
        "/models",
        "/healthz",
        "/readyz",
        "/metrics",
        "/v2/models/{name}/infer",
    } <= set(found["paths"])
    assert set(found["paths"]["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }
    assert "securitySchemes" not in found["components"] and "X-API-Key" not in json.dumps(found["paths"])


def test_the_examples_of_the_api_work(server: Server) -> None:
    paths = server.ask("GET", "/openapi.json").json["paths"]
    for path in ("/predict", "/explain"):
        content = paths[path]["post"]["requestBody"]["content"]
        reply = server.ask(
            "POST",
            path,
            json.dumps(content["application/json"]["example"]).encode(),
            {"Content-Type": "application/json"},
        )
        assert reply.status == 200, reply.content
        shown = paths[path]["post"]["responses"]["200"]["content"]["application/json"]["example"]
        assert list(shown) == list(reply.json)
        form = content["multipart/form-data"]
        assert (
            set(form["example"])
            == set(form["schema"]["properties"])
            == {"images", "top_k"} - ({"top_k"} if path == "/explain" else set())
        )
    infer = paths["/v2/models/{name}/infer"]["post"]
    asked = infer["requestBody"]["content"]["application/json"]["example"]
    (tensor,) = asked["inputs"]
    assert len(tensor["data"]) == np.prod(tensor["shape"])
    side = server.ask("GET", "/model").json["image_size"]
    tensor.update(shape=[1, 3, side, side], data=[0] * (3 * side * side))
    reply = server.ask("POST", "/v2/models/digits/infer", json.dumps(asked).encode())
    shown = infer["responses"]["200"]["content"]["application/json"]["example"]
    assert reply.status == 200 and set(reply.json) == set(shown)
    assert [set(output) for output in reply.json["outputs"]] == [set(output) for output in shown["outputs"]]
    assert all(len(output["data"]) == np.prod(output["shape"]) for output in shown["outputs"])


def test_each_request_is_a_line_of_json_without_its_content(server: Server, digit: bytes) -> None:
    server.send(
        "/predict?top_k=1",
        ("secret-name.png", digit),
        headers={"X-Request-Id": "my-own-id", "X-API-Key": "secret-key-secret"},
    )
    while '"my-own-id"' not in (text := server.log.read_text()):  # it is written when the answer is out
        time.sleep(0.05)
    (line,) = [json.loads(line) for line in text.splitlines() if '"my-own-id"' in line]
    assert (line["method"], line["path"], line["status"], line["images"]) == ("POST", "/predict", 200, 1)
    assert "secret" not in text
