"""A model repository for NVIDIA's Triton Inference Server: its ONNX Runtime backend runs the bundle's own model.onnx."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from image_classifier.atomic_io import write_text
from image_classifier.errors import CheckpointError, ConfigError
from image_classifier.exporting.parity import TOLERANCE, Parity
from image_classifier.exporting.parity_data import ParitySet, answers_of
from image_classifier.inference.onnx_runtime import OnnxBackend
from image_classifier.inference.triton.client import model_name
from image_classifier.inference.triton.flags import COMPOSE, FLAGS
from image_classifier.predictions import softmax

_GPU_TOLERANCE = 1e-2  # of a probability: convolutions on a GPU are rounded to TF32


@dataclass(frozen=True)
class TritonSettings:
    """How the server is to run the model.

    Args:
        max_batch_size: The most images in one execution, and in one request.
        preferred_batch_sizes: What the server gathers single requests to; sizes above `max_batch_size` are left out.
        max_queue_delay_us: How many microseconds a request may wait for others.
        max_queue_size: Requests that may wait; the next is refused with 503.
        queue_timeout_ms: How long one may wait before it is refused; 0: for ever.
        instances: Copies of the model that run at once.
        device: `cpu` or `gpu`.
        image: The container that docker-compose.yml starts.
    """

    max_batch_size: int = 64
    preferred_batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    max_queue_delay_us: int = 500
    max_queue_size: int = 256
    queue_timeout_ms: int = 0
    instances: int = 1
    device: str = "cpu"
    image: str = "nvcr.io/nvidia/tritonserver:26.06-py3"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "gpu"):
            raise ConfigError(f"triton.device={self.device!r} is no device", "use cpu or gpu")
        if min(self.max_batch_size, self.max_queue_size, self.instances, *self.preferred_batch_sizes, 1) < 1:
            raise ConfigError("the batch sizes, triton.max_queue_size and triton.instances must be at least 1")
        if min(self.max_queue_delay_us, self.queue_timeout_ms) < 0:
            raise ConfigError("triton.max_queue_delay_us and triton.queue_timeout_ms cannot be negative")


def export_triton(reference: ParitySet, directory: Path, asked: TritonSettings) -> dict[str, Any]:
    """Write triton/ and hold the model in it against the checkpoint; what was found.

    Raises:
        ParityError: It answers otherwise.
    """
    info = reference.bundle.info
    name, root = model_name(info), directory / "triton"
    model = root / name / "1" / "model.onnx"
    model.parent.mkdir(parents=True)
    shutil.copyfile(reference.bundle.path("model.onnx"), model)
    write_text(root / name / "config.pbtxt", config_of(name, sizes_of(model), asked))
    write_text(root / name / "labels.txt", "".join(f"{' '.join(label.split())}\n" for label in info.classes))
    write_text(root / "docker-compose.yml", compose_of(asked))
    logits, _ = answers_of(OnnxBackend(model), reference.pixels)
    parity = Parity.of(
        reference.probabilities, softmax(logits, info.temperature), reference.paths, "the model for Triton"
    ).check("the model for Triton")
    return {
        **parity.as_dict(),
        "tolerance": TOLERANCE if asked.device == "cpu" else _GPU_TOLERANCE,
        "model": name,
        "device": asked.device,
    }


def sizes_of(path: Path) -> dict[str, list[int]]:
    """The inputs and outputs of a model, each with its sizes but for the batch; CheckpointError where one is open."""
    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim][1:]
        for value in (*graph.input, *graph.output)
    }
    if "pixels" not in sizes or "logits" not in sizes or not all(all(rest) for rest in sizes.values()):
        raise CheckpointError(f"model.onnx has inputs and outputs of open size ({sizes})", "export it again: --to onnx")
    return sizes


def config_of(name: str, sizes: dict[str, list[int]], asked: TritonSettings) -> str:
    """config.pbtxt: what the server must know of the model."""
    preferred = sorted({size for size in asked.preferred_batch_sizes if size <= asked.max_batch_size})
    outputs = ",\n".join(_output(output, rest) for output, rest in sizes.items() if output != "pixels")
    return f"""name: {json.dumps(name)}
platform: "onnxruntime_onnx"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {asked.max_batch_size}
input [ {{ name: "pixels" data_type: TYPE_UINT8 dims: {sizes["pixels"]} }} ]
output [
{outputs}
]
instance_group [ {{ count: {asked.instances} kind: KIND_{asked.device.upper()} }} ]
dynamic_batching {{
  preferred_batch_size: {preferred}
  max_queue_delay_microseconds: {asked.max_queue_delay_us}
  default_queue_policy {{
    max_queue_size: {asked.max_queue_size}
    default_timeout_microseconds: {1000 * asked.queue_timeout_ms}
    timeout_action: REJECT
  }}
}}
"""


def _output(name: str, rest: list[int]) -> str:
    labels = ' label_filename: "labels.txt"' if name == "logits" else ""
    return f"  {{ name: {json.dumps(name)} data_type: TYPE_FP32 dims: {rest}{labels} }}"


def compose_of(asked: TritonSettings) -> str:
    """docker-compose.yml: a server that only this machine reaches, over a repository that it cannot change."""
    gpus = (
        "    deploy: {resources: {reservations: {devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}}\n"
        if asked.device == "gpu"
        else ""
    )
    return COMPOSE.format(image=asked.image, flags=", ".join(FLAGS), gpus=gpus)
