"""The same over gRPC, against a small server of the protocol's messages."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from image_classifier.errors import ConfigError, ServerError
from image_classifier.inference.triton import client
from image_classifier.inference.triton.client import RETRIES, TritonBackend
from image_classifier.inference.triton.over_grpc import _messages
from tests.inference.triton.v2_server import brightness

grpc = pytest.importorskip("grpc")


class GrpcServer:
    """Answers for the model `m`; `faults` are taken one a request for inference, each a function of the call's
    context and the right answer.
    """

    def __init__(self) -> None:
        self.server, self.messages = grpc.server(ThreadPoolExecutor(4)), _messages()
        self.faults: list[Callable[[Any, Any], None]] = []
        self.batches: list[int] = []
        methods = {name: self.handler(name) for name in ("ServerReady", "ModelReady", "ModelConfig", "ModelInfer")}
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)]
        )
        self.url = f"grpc://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def handler(self, name: str) -> Any:
        parse, serialise = (
            self.messages[f"{name}Request"].FromString,
            self.messages[f"{name}Response"].SerializeToString,
        )
        return grpc.unary_unary_rpc_method_handler(
            getattr(self, name), request_deserializer=parse, response_serializer=serialise
        )

    def ServerReady(self, request: Any, context: Any) -> Any:
        return self.messages["ServerReadyResponse"](ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return self.messages["ModelReadyResponse"](ready=request.name == "m")

    def ModelConfig(self, request: Any, context: Any) -> Any:
        if request.name != "m":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return self.messages["ModelConfigResponse"](config={"max_batch_size": 4})

    def ModelInfer(self, request: Any, context: Any) -> Any:
        (pixels,), (content,) = request.inputs, request.raw_input_contents
        found = brightness(np.frombuffer(content, np.uint8).reshape(list(pixels.shape)))
        self.batches.append(pixels.shape[0])
        names = [item.name for item in request.outputs]
        rows = [{"name": name, "datatype": "FP32", "shape": found[name].shape} for name in names]
        answer = self.messages["ModelInferResponse"](
            outputs=rows, raw_output_contents=[found[name].tobytes() for name in names]
        )
        if self.faults:
            self.faults.pop(0)(context, answer)
        return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpcServer]:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    running = GrpcServer()
    running.server.start()
    yield running
    running.server.stop(0).wait()


PIXELS = np.random.default_rng(0).integers(0, 256, (11, 3, 6, 6), dtype=np.uint8)


def test_batches_fit_the_server_and_keep_the_order(server: GrpcServer) -> None:
    asked = TritonBackend(server.url, "m", 2, 20)
    logits, embeddings = asked.logits_and_embeddings(PIXELS)
    np.testing.assert_array_equal(logits, brightness(PIXELS)["logits"])
    np.testing.assert_array_equal(embeddings, brightness(PIXELS)["embedding"])
    assert server.batches == [4, 4, 3]
    assert asked.channel.ready("m", 5) and not asked.channel.ready("n", 5)


def abort(code: str, words: str) -> Callable[[Any, Any], None]:
    return lambda context, answer: context.abort(grpc.StatusCode[code], words)


def test_a_full_queue_is_asked_again(server: GrpcServer) -> None:
    full = abort("UNAVAILABLE", "Exceeds maximum queue size")
    asked = TritonBackend(server.url, "m", 2, 20)
    server.faults = [full] * RETRIES
    assert asked.logits(PIXELS[:1]).shape == (1, 2)
    server.faults = [full] * (RETRIES + 1)
    with pytest.raises(
        ServerError, match=r"Exceeds maximum queue size \(gRPC UNAVAILABLE\), 6 times: .*triton\.max_queue_size"
    ):
        asked.logits(PIXELS[:1])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (abort("INVALID_ARGUMENT", "unexpected shape"), r"unexpected shape \(gRPC INVALID_ARGUMENT\)"),
        (abort("INTERNAL", "Stub process is not healthy"), "Stub process is not healthy"),
        (lambda context, answer: answer.outputs[0].shape.append(0), r"shape \[1, 2, 0\] has 8 bytes"),
        (lambda context, answer: answer.raw_output_contents.pop(), "1 outputs and the bytes of 0"),
        (lambda context, answer: answer.Clear(), "no logits, only nothing"),
        (lambda context, answer: time.sleep(0.8), r"no answer within 0\.4 s"),
    ],
)
def test_an_answer_that_cannot_be_used_is_one_clear_error_at_once(
    server: GrpcServer, fault: Callable[[Any, Any], None], words: str
) -> None:
    asked = TritonBackend(server.url, "m", 2, 0.4)
    server.faults = [fault, abort("UNKNOWN", "asked again")]
    with pytest.raises(ServerError, match=words):
        asked.logits(PIXELS[:1])
    assert len(server.faults) == 1


def test_nobody_there_another_model_or_no_package(server: GrpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerError, match=r"unknown model: 'n'.*NOT_FOUND"):
        TritonBackend(server.url, "n", 2)
    server.server.stop(0).wait()
    with pytest.raises(ServerError, match="UNAVAILABLE.*6 times: is it running there"):
        TritonBackend(server.url, "m", 2, 5)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigError, match=r"pip install 'image-classifier\[triton\]', or use http://"):
        TritonBackend(server.url, "m", 2)
