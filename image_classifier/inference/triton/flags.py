"""How a Triton server is started: the flags that a container and a program on this machine share, and the container's file."""

from __future__ import annotations

# What a model repository holds can be run as code: it is read once, and nothing is loaded or changed over the network.
FLAGS = (
    "--model-control-mode=none",
    "--strict-readiness=true",
    "--exit-on-error=true",
    "--disable-auto-complete-config",
    "--exit-timeout-secs=10",
)

COMPOSE = """# NVIDIA's Triton Inference Server over the models in this folder, for this machine alone:
#   docker compose up --detach --wait        starts it
#   docker compose down                      ends it
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
