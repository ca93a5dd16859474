"""A Triton server over gRPC, with `grpcio` and no generated code: the messages that are used are described here.

Specification: Triton's `grpc_service.proto` (package `inference`, service `GRPCInferenceService`) and
`model_config.proto`, in https://github.com/triton-inference-server/common/tree/main/protobuf. They implement KServe's
Open Inference Protocol V2 over gRPC
(https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md).
The encoding, "Encoding" of Protocol Buffers (https://protobuf.dev/programming-guides/encoding/), is left to
`google.protobuf`. Only field numbers and types are sent: names of messages may differ from the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from image_classifier.errors import ConfigError
from image_classifier.extras import install
from image_classifier.inference.triton.protocol import MAX_ANSWER_BYTES, Address, Outputs, Refused, tensor

# The fields that are used of each message: name, number, type; `*` is `repeated`, a type with a capital is a message.
# Tensor stands for ModelInferRequest.InferInputTensor and ModelInferResponse.InferOutputTensor, which share these
# fields; RequestedOutput for ModelInferRequest.InferRequestedOutputTensor; ModelConfig is that of model_config.proto.
_MESSAGES = {
    "ServerReadyRequest": (),
    "ServerReadyResponse": (("ready", 1, "bool"),),
    "ModelReadyRequest": (("name", 1, "string"),),
    "ModelReadyResponse": (("ready", 1, "bool"),),
    "ModelConfigRequest": (("name", 1, "string"),),
    "ModelConfigResponse": (("config", 1, "ModelConfig"),),
    "ModelConfig": (("max_batch_size", 4, "int32"),),
    "Tensor": (("name", 1, "string"), ("datatype", 2, "string"), ("shape", 3, "int64*")),
    "RequestedOutput": (("name", 1, "string"),),
    "ModelInferRequest": (
        ("model_name", 1, "string"),
        ("inputs", 5, "Tensor*"),
        ("outputs", 6, "RequestedOutput*"),
        ("raw_input_contents", 7, "bytes*"),
    ),
    "ModelInferResponse": (("outputs", 5, "Tensor*"), ("raw_output_contents", 6, "bytes*")),
}
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    ("grpc.enable_http_proxy", 0),
]


class GrpcChannel:
    """A client over gRPC; ConfigError where the package is not installed."""

    def __init__(self, address: Address) -> None:
        try:
            import grpc
        except ImportError as error:
            raise ConfigError(
                f"{address} needs a package that is not installed", f"{install('triton')}, or use http://"
            ) from error
        self.grpc = grpc
        self.messages = _messages()
        secure = address.scheme == "grpcs"
        self.channel = (
            grpc.secure_channel(address.target, grpc.ssl_channel_credentials(), _CHANNEL_OPTIONS)
            if secure
            else grpc.insecure_channel(address.target, _CHANNEL_OPTIONS)
        )

    def ready(self, model: str, timeout_s: float) -> bool:
        if not self._call("ServerReady", timeout_s).ready:
            return False
        return bool(self._call("ModelReady", timeout_s, name=model).ready)

    def max_batch_size(self, model: str, timeout_s: float) -> int:
        return int(self._call("ModelConfig", timeout_s, name=model).config.max_batch_size)

    def infer(self, model: str, pixels: np.ndarray, outputs: Sequence[str], timeout_s: float) -> Outputs:
        answer = self._call(
            "ModelInfer",
            timeout_s,
            model_name=model,
            inputs=[{"name": "pixels", "datatype": "UINT8", "shape": pixels.shape}],
            outputs=[{"name": name} for name in outputs],
            raw_input_contents=[pixels.tobytes()],
        )
        if len(answer.outputs) != len(answer.raw_output_contents):
            raise Refused(
                f"it answers with {len(answer.outputs)} outputs and the bytes of {len(answer.raw_output_contents)}"
            )
        pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
        return {item.name: tensor(item.name, item.datatype, list(item.shape), content) for item, content in pairs}

    def _call(self, method: str, timeout_s: float, **values: Any) -> Any:
        """Return the response message of a method, called with a request message of these fields."""
        request = self.messages[f"{method}Request"]
        response = self.messages[f"{method}Response"]
        call = self.channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}", request.SerializeToString, response.FromString
        )
        try:
            return call(request(**values), timeout=timeout_s)
        except self.grpc.RpcError as error:
            code = error.code()
            codes = self.grpc.StatusCode
            if code == codes.DEADLINE_EXCEEDED:
                raise Refused(f"no answer within {timeout_s:g} s") from error
            raise Refused(f"{error.details()} (gRPC {code.name})", retryable=code == codes.UNAVAILABLE) from error


@cache
def _messages() -> dict[str, Any]:
    """Return the classes of the messages by name.

    They are in a separate descriptor pool, as another client of the protocol in this process may describe them too.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="image_classifier_triton.proto", package="image_classifier_triton", syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, rows in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind in rows:
            plain = kind.rstrip("*")
            field = described.field.add(
                name=name, number=number, label=kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            )
            if plain in _MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{file.package}.{plain}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
        for name in _MESSAGES
    }
