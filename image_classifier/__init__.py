"""Point it at a folder of images, one sub-folder per class, and get a classifier that can be trusted.

import image_classifier as ic

result = ic.train("photos/", name="mine")
model = ic.load("mine")
model.predict("a.jpg")
"""

import os

TYPE_CHECKING = False  # type checkers take it for true; importing typing would double the time of this file
if TYPE_CHECKING:
    from image_classifier.api import Model, audit, load, train

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "audit", "load", "train"]

# ONNX Runtime's builds for Windows report each process to Microsoft unless this is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    """Return a name of the Python API; `import image_classifier` alone loads nothing heavy."""
    if name in ("Model", "audit", "load", "train"):
        from image_classifier import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
