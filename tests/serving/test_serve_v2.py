"""The V2 protocol: our Triton client, tested on Triton, works unchanged; invalid input is refused, never cast."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.bundle import read_bundle
from image_classifier.inference.golden import Golden
from image_classifier.inference.load import load_predictor
from image_classifier.inference.triton.client import TritonBackend
from image_classifier.serving.request_limits import Refusal
from image_classifier.serving.routes import v2
from tests.conftest import Command
from tests.serving.conftest import Server

SIDE, SIZE = 32, 3 * 32 * 32
FACTS = {"image_size": SIDE, "embeddings": True, "classes": ["a", "b"]}
RNG = np.random.default_rng(0)


def body(**changed: object) -> dict[str, object]:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, SIDE, SIDE], "data": [7] * SIZE}
    return {"inputs": [{**tensor, **changed}]}


def test_our_triton_client_works_unchanged(server: Server, digits_bundle: Path) -> None:
    bundle = read_bundle(digits_bundle)
    backend = TritonBackend.of(bundle, f"http://127.0.0.1:{server.port}")  # asks the golden image too
    golden = Golden.of(bundle)
    logits, embeddings = backend.logits_and_embeddings(golden.pixels)
    np.testing.assert_allclose(logits, golden.logits, atol=1e-4)
    np.testing.assert_allclose(embeddings, golden.embeddings, atol=1e-4)
    many = RNG.integers(0, 256, (100, 3, SIDE, SIDE), dtype=np.uint8)
    np.testing.assert_allclose(backend.logits(many), load_predictor(digits_bundle).backend.logits(many), atol=1e-4)
    assert backend.max_batch_size == 32


def test_verify_and_infer_ask_it(server: Server, digits_bundle: Path, command: Command) -> None:
    url = ("--backend", "triton", "--url", f"http://127.0.0.1:{server.port}")
    answer = command("verify", str(digits_bundle), *url)
    assert answer.code == 0 and "100% of 8 golden images" in answer.out, answer.err


def test_numbers_written_out_answer_as_bytes_do(server: Server) -> None:
    values = [value % 256 for value in range(SIZE)]
    asked = {"id": "mine", **body(data=values), "outputs": [{"name": "embedding"}, {"name": "logits"}]}
    reply = server.ask("POST", "/v2/models/digits/versions/1/infer", json.dumps(asked).encode())
    assert reply.status == 200 and reply.json["id"] == "mine" and reply.json["model_name"] == "digits"
    embedding, logits = reply.json["outputs"]
    assert (embedding["name"], logits["name"], logits["shape"], len(logits["data"])) == (
        "embedding",
        "logits",
        [1, 10],
        10,
    )
    head = json.dumps(
        {"inputs": [{**body()["inputs"][0], "data": None, "parameters": {"binary_data_size": SIZE}}]}
    ).encode()  # type: ignore[index]
    same = server.ask(
        "POST", "/v2/models/digits/infer", head + bytes(values), {"Inference-Header-Content-Length": str(len(head))}
    )
    assert same.json["outputs"][0]["data"] == pytest.approx(logits["data"], abs=1e-4)


def test_metadata(server: Server) -> None:
    assert server.ask("GET", "/v2").json["name"] == "image_classifier"
    assert server.ask("GET", "/v2/health/live").json == {"live": True} and server.ask(
        "GET", "/v2/health/ready"
    ).json == {"ready": True}
    assert server.ask("GET", "/v2/models/digits/ready").json == {"name": "digits", "ready": True}
    found = server.ask("GET", "/v2/models/digits").json
    assert found["inputs"] == [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, SIDE, SIDE]}] and found[
        "outputs"
    ][0]["shape"] == [-1, 10]
    assert server.ask("GET", "/v2/models/digits/config").json["max_batch_size"] == 32
    for path in ("/v2/models/other", "/v2/models/other/ready", "/v2/models/digits/versions/2"):
        reply = server.ask("GET", path)
        assert reply.status == 404 and isinstance(reply.json["error"], str)


@pytest.mark.parametrize(
    "changed",
    [
        {"data": [0.5] * SIZE},
        {"data": [7.0] * SIZE},
        {"data": [256] * SIZE},
        {"data": [-1] * SIZE},
        {"data": ["7"] * SIZE},
        {"data": [True] * SIZE},
        {"data": [[7, 8], [9]]},
        {"data": [7] * (SIZE - 1)},
        {"data": []},
        {"data": None},
        {"data": 10**30},
        {"datatype": "FP32"},
        {"name": "image"},
        {"shape": [1, 100_000, 100_000, 3]},
        {"shape": [2**62, 3, SIDE, SIDE]},
        {"shape": [0, 3, SIDE, SIDE]},
        {"shape": [-1, 3, SIDE, SIDE]},
        {"shape": [1.0, 3, SIDE, SIDE]},
        {"shape": [True, 3, SIDE, SIDE]},
        {"shape": "1388"},
        {"parameters": {"binary_data_size": SIZE}},
        {"parameters": {"binary_data_size": -1}},
        {"parameters": [1]},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_what_is_not_right_is_refused_and_never_cast(server: Server, changed: dict[str, object]) -> None:
    reply = server.ask("POST", "/v2/models/digits/infer", json.dumps(body(**changed)).encode())
    assert reply.status == 400 and isinstance(reply.json["error"], str), reply.content


def test_more_than_a_batch_and_other_outputs_are_refused(server: Server) -> None:
    head = json.dumps(
        {"inputs": [{**body()["inputs"][0], "shape": [33, 3, SIDE, SIDE], "data": [1] * 33 * SIZE}]}
    ).encode()  # type: ignore[index]
    assert "more than the 32" in server.ask("POST", "/v2/models/digits/infer", head).json["error"]
    for output in ({"name": "probabilities"}, {"name": "logits", "parameters": {"classification": 3}}):
        assert (
            server.ask("POST", "/v2/models/digits/infer", json.dumps({**body(), "outputs": [output]}).encode()).status
            == 400
        )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "shape", "data", "inputs", "parameters", "id"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.one_of(json_values, st.builds(lambda value: {"inputs": [{**body()["inputs"][0], "data": value}]}, json_values)),
    st.binary(max_size=10),
)  # type: ignore[index]
def test_nothing_but_a_refusal_comes_of_nonsense(value: object, tail: bytes) -> None:
    words = json.dumps(value).encode()
    for content, length in (
        (words + tail, str(len(words))),
        (words, None),
        (tail, "99999999999999999999"),
        (tail, "-1"),
        (tail, "x"),
    ):
        with suppress(Refusal):
            asked = v2._parse(content, length, FACTS)
            assert len(asked.content) == np.prod(asked.shape)
