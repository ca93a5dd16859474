"""Export to a model repository for NVIDIA's Triton Inference Server, whose ONNX Runtime backend runs model.onnx."""

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
from image_classifier.inference.triton.server import FLAGS
from image_classifier.predictions import softmax

_GPU_TOLERANCE = 1e-2  # of a probability: a GPU rounds convolutions to TF32

_COMPOSE = """# NVIDIA's Triton Inference Server over the models in this folder, for this machine alone:
#   docker compose up --detach --wait        starts it
#   docker compose down                      stops it
# Other ports: TRITON_HTTP_PORT, TRITON_GRPC_PORT, TRITON_METRICS_PORT.
services:
  triton:
    image: {image}
    command: [tritonserver, --model-repository=/models, {flags}]
    ports:
      - "127.0.0.1:${{TRITON_HTTP_PORT:-8000}}:8000"
      - "127.0.0.1:${{TRITON_GRPC_PORT:-8001}}:8001"
      - "127.0.0.1:${{TRITON_METRICS_PORT:-8002}}:8002"
    volumes:
      - "./:/models:ro"
    healthcheck:
      test: [CMD, curl, --fail, --silent, "http://127.0.0.1:8000/v2/health/ready"]
      interval: 5s
      timeout: 5s
      retries: 3
      start_period: 120s
    security_opt: ["no-new-privileges:true"]
    restart: on-failure:3
{gpus}"""


@dataclass(frozen=True)
class TritonSettings:
    """The keys of `triton` in conf/export.yaml: how the server runs the model.

    Args:
        max_batch_size: Largest number of images in one execution, and in one request.
        preferred_batch_sizes: Batch sizes that the server collects requests for; larger ones than
            `max_batch_size` are left out.
        max_queue_delay_us: Microseconds that a request may wait for others.
        max_queue_size: Requests that may wait; the next is refused with 503.
        queue_timeout_ms: Milliseconds that a request may wait before it is refused; 0: no limit.
        instances: Copies of the model that run at the same time.
        device: `cpu` or `gpu`.
        image: The container image that docker-compose.yml starts.
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
            raise ConfigError(f"there is no triton.device {self.device!r}", "use cpu or gpu")
        if min(self.max_batch_size, self.max_queue_size, self.instances, *self.preferred_batch_sizes, 1) < 1:
            raise ConfigError("the batch sizes, triton.max_queue_size and triton.instances must be at least 1")
        if min(self.max_queue_delay_us, self.queue_timeout_ms) < 0:
            raise ConfigError("triton.max_queue_delay_us and triton.queue_timeout_ms must be at least 0")


def export_triton(parity_set: ParitySet, directory: Path, settings: TritonSettings) -> dict[str, Any]:
    """Write triton/, compare the model in it with the checkpoint, and return the metadata.

    Raises:
        ParityError: It answers differently.
    """
    info = parity_set.bundle.info
    name = model_name(info)
    root = directory / "triton"
    model = root / name / "1" / "model.onnx"
    model.parent.mkdir(parents=True)
    shutil.copyfile(parity_set.bundle.path("model.onnx"), model)
    write_text(root / name / "config.pbtxt", config_of(name, sizes_of(model), settings))
    write_text(root / name / "labels.txt", "".join(f"{' '.join(label.split())}\n" for label in info.classes))
    write_text(root / "docker-compose.yml", compose_of(settings))
    logits, _ = answers_of(OnnxBackend(model), parity_set.pixels)
    title = "the model for Triton"
    probabilities = softmax(logits, info.temperature)
    parity = Parity.of(parity_set.probabilities, probabilities, parity_set.paths, title).check(title)
    return {
        **parity.as_dict(),
        "tolerance": TOLERANCE if settings.device == "cpu" else _GPU_TOLERANCE,
        "model": name,
        "device": settings.device,
    }


def sizes_of(path: Path) -> dict[str, list[int]]:
    """Return the sizes of each input and output without the batch; CheckpointError where a size is open."""
    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim][1:]
        for value in (*graph.input, *graph.output)
    }
    if "pixels" not in sizes or "logits" not in sizes or not all(all(rest) for rest in sizes.values()):
        raise CheckpointError(f"model.onnx has inputs and outputs of open size ({sizes})", "export it again: --to onnx")
    return sizes


def config_of(name: str, sizes: dict[str, list[int]], settings: TritonSettings) -> str:
    """Return config.pbtxt, the server's description of the model.

    Specification: `ModelConfig` of Triton's model_config.proto, as protobuf text.
    """
    preferred = sorted({size for size in settings.preferred_batch_sizes if size <= settings.max_batch_size})
    outputs = ",\n".join(_output(output, rest) for output, rest in sizes.items() if output != "pixels")
    return f"""name: {json.dumps(name)}
platform: "onnxruntime_onnx"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {settings.max_batch_size}
input [ {{ name: "pixels" data_type: TYPE_UINT8 dims: {sizes["pixels"]} }} ]
output [
{outputs}
]
instance_group [ {{ count: {settings.instances} kind: KIND_{settings.device.upper()} }} ]
dynamic_batching {{
  preferred_batch_size: {preferred}
  max_queue_delay_microseconds: {settings.max_queue_delay_us}
  default_queue_policy {{
    max_queue_size: {settings.max_queue_size}
    default_timeout_microseconds: {1000 * settings.queue_timeout_ms}
    timeout_action: REJECT
  }}
}}
"""


def _output(name: str, rest: list[int]) -> str:
    labels = ' label_filename: "labels.txt"' if name == "logits" else ""
    return f"  {{ name: {json.dumps(name)} data_type: TYPE_FP32 dims: {rest}{labels} }}"


def compose_of(settings: TritonSettings) -> str:
    """Return docker-compose.yml: a server that only this machine reaches, over a repository that it cannot change."""
    gpus = (
        "    deploy: {resources: {reservations: {devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}}\n"
        if settings.device == "gpu"
        else ""
    )
    return _COMPOSE.format(image=settings.image, flags=", ".join(FLAGS), gpus=gpus)
