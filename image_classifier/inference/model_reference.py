"""The settings by which a verb names a model: where it is looked for, and which backend runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from image_classifier.bundle import Bundle
from image_classifier.inference.backends import ServerAddress
from image_classifier.inference.load import pulled_bundle, pulled_checkpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointReference:
    """A model by name.

    Args:
        checkpoint_name: A bundle, a `.ckpt` or an `.onnx`: its name under `models_dir`, or a path.
        dvc: None: run `dvc pull` where a `.dvc` file stands next to a missing file; False: never.
        trusted_packages: Packages of the user that the network of a checkpoint may come from.
    """

    checkpoint_name: str
    models_dir: str = "models"
    dvc: bool | None = None
    trusted_packages: list[str] = field(default_factory=list)

    def path(self) -> Path:
        """Return the path of the bundle or file; raises as `load.pulled_checkpoint`."""
        return pulled_checkpoint(self.checkpoint_name, Path(self.models_dir), self.dvc)

    def bundle(self) -> Bundle:
        """Return the bundle, every file compared with its hash; raises as `load.pulled_bundle`."""
        return pulled_bundle(self.checkpoint_name, Path(self.models_dir), self.dvc)


@dataclass(frozen=True, kw_only=True)
class ModelReference(CheckpointReference):
    """A model by name, and the backend that runs it: one of this machine, or a Triton server at `url`."""

    backend: str | None = None
    url: str | None = None
    server_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        self.server.check(self.backend)

    @property
    def server(self) -> ServerAddress:
        """The server that the backend `triton` calls."""
        return ServerAddress(self.url, self.server_timeout_s)
