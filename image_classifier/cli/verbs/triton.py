"""The verb `triton`: start and stop a Triton server over a bundle's model repository."""

from __future__ import annotations

from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.inference.triton.server import ServerSettings, start_server, stop_server
from image_classifier.program import program


def triton(config: Any) -> None:
    """Start or stop the server; errors as `start_server` and `stop_server`."""
    settings = hydra_app.typed(ServerSettings, config, "")
    if settings.action == "stop":
        stopped = stop_server(settings)
        print(f"triton    {'stopped' if stopped.was_running else 'had already ended'}: {stopped.url}")
        return
    started = start_server(settings)
    addresses = f"{started.url} and grpc://127.0.0.1:{settings.grpc_port}"
    print(f"triton    {started.model} at {addresses}, golden image answered correctly after {started.seconds:.1f} s")
    runs_dir = "" if settings.runs_dir == ServerSettings.runs_dir else f" --runs_dir {settings.runs_dir}"
    print(f"stop it   {program()} triton stop {settings.checkpoint_name}{runs_dir}")
