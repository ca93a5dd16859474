"""What brings a package that is optional: the extra of this package, in the words that install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from image_classifier.errors import ConfigError

# By the names under which they are imported.
_PACKAGES = {
    "train": """
        torch torchvision pytorch_lightning torchmetrics timm safetensors optuna sqlalchemy mlflow dvc
        onnx onnxscript scipy sklearn matplotlib
    """,
    "serve": "fastapi uvicorn starlette pydantic python_multipart prometheus_client",
    "arrow": "pyarrow",
    "openvino": "openvino",
    "triton": "grpc",
    "ray": "ray",
    "s3": "dvc_s3",
    "hf": "datasets",
    "kaggle": "kagglehub",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "launchers": "hydra_joblib_launcher hydra_submitit_launcher",
}
EXTRA_OF = {package: extra for extra, packages in _PACKAGES.items() for package in packages.split()}


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'image-classifier[{extra}]'"


def install_package(package: str) -> str:
    """Return the command that installs a package: the extra that brings it, else the package itself."""
    extra = EXTRA_OF.get(package.replace("-", "_"))
    return install(extra) if extra else f"pip install {package}"


@contextmanager
def missing_packages_named() -> Iterator[None]:
    """Turn the import of an optional package that is not installed into one line that says what brings it.

    Raises:
        ConfigError: The package, and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        fact = f"this needs the package {error.name}, which is not installed"
        raise ConfigError(fact, install_package(error.name)) from error
