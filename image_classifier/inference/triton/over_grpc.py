"""A Triton server over gRPC: the V2 protocol's messages, described here, so that `grpcio` alone is needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from image_classifier.errors import ConfigError
from image_classifier.inference.triton.protocol import MOST_BYTES, Address, Outputs, Refused, tensor

# The fields that are used of each message: name, number, type; `*` for many, a type with a capital is a message.
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
_UNLIMITED = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.enable_http_proxy", 0),
]


class GrpcChannel:
    """Speaks gRPC to the server at an address; ConfigError where the package is not installed."""

    def __init__(self, address: Address) -> None:
        try:
            import grpc
        except ImportError as error:
            raise ConfigError(
                f"{address} needs a package that is not installed", "pip install grpcio, or use http://"
            ) from error
        self.grpc, self.messages = grpc, _messages()
        secure = address.scheme == "grpcs"
        self.channel = (
            grpc.secure_channel(address.target, grpc.ssl_channel_credentials(), _UNLIMITED)
            if secure
            else grpc.insecure_channel(address.target, _UNLIMITED)
        )

    def ready(self, model: str, timeout_s: float) -> bool:
        return bool(self._ask("ServerReady", timeout_s).ready and self._ask("ModelReady", timeout_s, name=model).ready)

    def max_batch_size(self, model: str, timeout_s: float) -> int:
        return int(self._ask("ModelConfig", timeout_s, name=model).config.max_batch_size)

    def infer(self, model: str, pixels: np.ndarray, outputs: Sequence[str], timeout_s: float) -> Outputs:
        answer = self._ask(
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

    def _ask(self, method: str, timeout_s: float, **values: Any) -> Any:
        serialise, parse = (
            self.messages[f"{method}Request"].SerializeToString,
            self.messages[f"{method}Response"].FromString,
        )
        call = self.channel.unary_unary(f"/inference.GRPCInferenceService/{method}", serialise, parse)
        try:
            return call(self.messages[f"{method}Request"](**values), timeout=timeout_s)
        except self.grpc.RpcError as error:
            code, codes = error.code(), self.grpc.StatusCode
            if code == codes.DEADLINE_EXCEEDED:
                raise Refused(f"no answer within {timeout_s:g} s") from error
            raise Refused(f"{error.details()} (gRPC {code.name})", again=code == codes.UNAVAILABLE) from error


@cache
def _messages() -> dict[str, Any]:
    """The classes of the messages, in a pool of their own: another client of the protocol in this process describes them too."""
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
