"""The backend `triton` against a small server of the V2 protocol: what it asks, and what it makes of every way to be
refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from image_classifier.bundle import read_bundle
from image_classifier.errors import ConfigError, ServerError
from image_classifier.inference.backends import ServerAddress
from image_classifier.inference.golden import Golden
from image_classifier.inference.load import load_predictor
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.inference.triton import client, over_http
from image_classifier.inference.triton.client import RETRIES, TritonBackend, model_name
from image_classifier.inference.triton.protocol import Address, Refused
from tests.inference.triton.v2_server import Handler, V2Server, brightness, serving

Fault = Callable[[Handler], None]


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 6, 6), dtype=np.uint8)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[V2Server]:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    with serving(V2Server()) as running:
        yield running


def backend(server: V2Server, timeout_s: float = 20) -> TritonBackend:
    return TritonBackend(server.url, server.name, 2, timeout_s)


@given(count=st.integers(1, 23), most=st.integers(0, 9))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_fit_the_server_and_keep_the_order(server: V2Server, count: int, most: int) -> None:
    server.most, server.batches = max(1, most), []
    pixels = images(count, count)
    asked = backend(server)
    assert asked.max_batch_size == max(1, most)
    logits, embeddings = asked.logits_and_embeddings(pixels)
    np.testing.assert_array_equal(logits, brightness(pixels)["logits"])
    np.testing.assert_array_equal(embeddings, brightness(pixels)["embedding"])
    assert logits.dtype == np.float32 and logits.flags.writeable
    assert max(server.batches) <= asked.max_batch_size and sum(server.batches) == count


def test_pixels_in_any_memory_order(server: V2Server) -> None:
    pixels = np.asfortranarray(images(5))[::-1]
    np.testing.assert_array_equal(backend(server).logits(pixels), brightness(pixels)["logits"])


def status(code: int, content: object) -> Fault:
    return lambda handler: handler.answer(code, content)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def cut_short(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


def lies(true_shape: tuple[int, ...], **changed: object) -> Fault:
    return lambda handler: handler.tensors({"logits": np.zeros(true_shape, np.float32)}, **changed)


FULL = status(503, {"error": "in ensemble 'm', Exceeds maximum queue size"})


@pytest.mark.parametrize("fault", [FULL, hang_up, cut_short], ids=["queue full", "hangs up", "cut short"])
def test_what_may_pass_is_asked_again(server: V2Server, fault: Fault) -> None:
    asked = backend(server)
    server.faults = [fault] * RETRIES
    np.testing.assert_array_equal(asked.logits(images(1)), brightness(images(1))["logits"])
    server.faults = [fault] * (RETRIES + 1)
    with pytest.raises(ServerError, match=f"cannot be used: .*, {RETRIES + 1} times"):
        asked.logits(images(1))
    assert server.faults == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            status(400, {"error": "unexpected shape for input 'pixels'"}),
            r"unexpected shape for input 'pixels' \(HTTP 400\)",
        ),
        (
            status(500, {"error": "Stub process 'm_0_0' is not healthy."}),
            r"Stub process 'm_0_0' is not healthy\. \(HTTP 500\)",
        ),
        (status(500, b"<html>\n  oh"), r"<html> oh \(HTTP 500\)"),
        (status(401, b""), r"no reason given \(HTTP 401\)"),
        (status(302, b""), r"HTTP 302"),
        (status(200, b'{"outputs": [{"na'), "not JSON"),
        (status(200, b"[1, 2]"), "not the V2 protocol"),
        (status(200, {"outputs": [{"name": "logits"}]}), "not the V2 protocol"),
        (status(200, {"outputs": []}), "its answer has no logits, only nothing"),
        (
            status(200, {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": ["a", "b"]}]}),
            "not the V2 protocol",
        ),
        (
            status(200, {"outputs": [{"name": "logits", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}]}),
            "its logits is INT64, not FP32",
        ),
        (lambda handler: handler.tensors({"other": np.zeros((1, 2), np.float32)}), "no logits, only other"),
        (lies((0,)), r"its logits have the shape \[0\] instead of \[1, 2\]"),
        (lies((1, 0)), r"the shape \[1, 0\]"),
        (lies((2, 2)), r"the shape \[2, 2\]"),
        (lies((1, 3)), r"the shape \[1, 3\] instead of \[1, 2\]"),
        (lies((1, 2), shape=[1, 100000, 100000]), r"its logits of shape \[1, 100000, 100000\] has 8 bytes"),
        (status(200, b"[" * 100_000), "not JSON"),
        (status(500, b"[" * 100_000), r"HTTP 500"),
        (lies((0, 2), shape=[0, 2**62, 2**62]), "3 dimensions|instead of"),
        (lies((1, 2), shape=[2**32, 2**32]), "has 8 bytes"),
        (lies((1, 2), shape=[-1, -2]), r"its logits of shape \[-1, -2\]"),
        (lies((1, 2), parameters={"binary_data_size": 99999}), "not the V2 protocol .*99999"),
    ],
)
def test_an_answer_that_cannot_be_used_is_one_clear_error_at_once(server: V2Server, fault: Fault, words: str) -> None:
    asked = backend(server)
    server.faults = [fault, lambda handler: pytest.fail("asked again")]
    with pytest.raises(ServerError, match=words) as caught:
        asked.logits(images(1))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert len(server.faults) == 1


def test_plain_json_tensors_are_understood_too(server: V2Server) -> None:
    asked = backend(server)
    server.faults = [
        status(200, {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1]}]})
    ]
    np.testing.assert_array_equal(asked.logits(images(1)), np.float32([[0.5, 1]]))


def test_a_slow_answer_is_not_waited_for_nor_asked_again(server: V2Server) -> None:
    asked = backend(server, timeout_s=0.3)
    server.faults = [lambda handler: time.sleep(1), None]
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer within 0\.3 s: raise server_timeout_s"):
        asked.logits(images(1))
    assert time.monotonic() - start < 0.9
    assert server.faults == [None]


def test_an_answer_that_drips_is_not_waited_for(server: V2Server) -> None:
    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    asked = backend(server, timeout_s=0.4)
    server.faults = [drip]
    start = time.monotonic()
    with pytest.raises(ServerError, match="no answer within"):
        asked.logits(images(1))
    assert time.monotonic() - start < 1.5


def test_a_body_without_end_does_not_fill_the_memory(server: V2Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_http, "MAX_ANSWER_BYTES", 10_000)
    asked = backend(server)
    server.faults = [status(200, b" " * 3_000_000)]
    with pytest.raises(ServerError, match="longer than 10000 bytes"):
        asked.logits(images(1))


def test_nobody_there_or_another_model(server: V2Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerError, match=r"'n o' at .* unknown model.*HTTP 404.*triton start NAME"):
        TritonBackend(server.url, "n o", 2)
    with serving(V2Server()) as gone:
        pass
    with pytest.raises(ServerError, match="Connection refused.*, 6 times: is it running there"):
        TritonBackend(gone.url, "m", 2)
    with pytest.raises(ServerError, match="the connection failed"):
        TritonBackend("http://nowhere.invalid", "m", 2)
    monkeypatch.setattr(server, "most", "many")
    with pytest.raises(ServerError, match="not a Triton server's configuration"):
        backend(server)


def test_a_golden_image_tells_another_model_and_zeros(server: V2Server) -> None:
    pixels = images(3)
    right = brightness(pixels)
    golden = Golden(pixels, right["logits"], right["embedding"])
    backend(server).check_golden(golden, 100.0, 1e-4)
    for wrong in (
        lambda given: brightness(given[:, ::-1]),
        lambda given: brightness(0 * given),
        lambda given: {"logits": np.full((1, 2), np.nan, "f4")},
    ):
        server.model = wrong
        with pytest.raises(ServerError, match="its answer for a golden image differs from the bundle"):
            backend(server).check_golden(golden, 100.0, 1e-4)


def test_a_bundle_is_predicted_with_by_a_server(digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    onnx = load_predictor(digits_bundle)
    outputs = cast(EmbeddingBackend, onnx.backend).logits_and_embeddings
    image = next((digits_bundle.parents[1] / "data/digits/test/3").iterdir())
    with serving(
        V2Server(
            lambda pixels: dict(zip(("logits", "embedding"), outputs(pixels), strict=True)), model_name(bundle.info)
        )
    ) as running:
        (answer,) = load_predictor(digits_bundle, "triton", server=ServerAddress(running.url)).predict([image])
    assert answer == next(onnx.predict([image]))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:9", "http://a:9"),
        ("https://a", "https://a:443"),
        ("http://a/triton/", "http://a:8000/triton"),
        ("grpc://[::1]", "grpc://[::1]:8001"),
        ("grpcs://a.b", "grpcs://a.b:443"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert str(Address.of(url)) == address


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "localhost",
        "ftp://a",
        "http://",
        "http://a:b",
        "http://a:99999",
        "http://u:p@a",
        "grpc://a/b",
        "http://a?b",
        "http://[::1",
        "",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:8000"):
        Address.of(url)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with suppress(ConfigError):
        assert Address.of(text).host


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=True)
    | st.text(max_size=3)
    | st.sampled_from(["logits", "FP32"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "parameters", "data", "binary_data_size"]), inner, max_size=6
        )
    ),
    max_leaves=12,
)


@given(length=st.none() | st.text("0123456789-x", max_size=3), outputs=VALUES, rest=st.binary(max_size=9))
@example(None, [{"name": "logits", "datatype": "FP32", "shape": [1], "data": 3.4028235677973366e38}], b"")
@settings(max_examples=300)
def test_any_answer_is_tensors_or_refused(length: str | None, outputs: object, rest: bytes) -> None:
    body = json.dumps({"outputs": outputs}).encode()
    for told in (length, str(len(body))):
        try:
            found = over_http._outputs(told, body + rest)
        except Refused:
            continue
        assert all(value.dtype == np.float32 for value in found.values())


def test_each_request_closes_its_connection(server: V2Server, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[HTTPConnection] = []
    monkeypatch.setattr(
        over_http, "HTTPConnection", lambda *place, **more: opened.append(HTTPConnection(*place, **more)) or opened[-1]
    )
    backend(server).logits(images(9))
    assert len(opened) == 4 and all(connection.sock is None for connection in opened)
