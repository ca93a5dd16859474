"""A folder of images in, a classifier that can be trusted out."""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime's own builds would tell Microsoft of each process
