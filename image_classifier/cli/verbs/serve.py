"""The verb `serve`: models over HTTP, until SIGINT or SIGTERM."""

from __future__ import annotations

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.serving.launch import run_server
from image_classifier.serving.settings import ServeSettings


def serve(config: DictConfig) -> None:
    """Serve until SIGINT or SIGTERM; print the URL when all models answer."""
    settings = hydra_app.typed(ServeSettings, config, "")
    run_server(settings, on_ready=lambda url: print(f"serving   {url}", flush=True))
