"""Export as an MLflow model: `mlflow models serve` answers for images with it, without torch."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import image_classifier
from image_classifier.bundle import INFO_NAME
from image_classifier.exporting.parity import TOLERANCE, Parity
from image_classifier.exporting.parity_data import ParitySet
from image_classifier.mlflow_tracking import load_pyfunc, save_pyfunc

NAME = "mlflow"
REQUIREMENTS = ("numpy", "pillow", "onnxruntime", "rich")  # all that inference with ONNX imports, checked by a test
_KEPT = (INFO_NAME, "model.onnx", "ood.npz", "golden.npz", "MODEL_CARD.md")


def export_mlflow(parity_set: ParitySet, directory: Path) -> dict[str, Any]:
    """Write the folder mlflow/, compare its answers for the files' bytes with the checkpoint, and return the metadata.

    Raises:
        ParityError: It answers differently.
    """
    bundle = parity_set.bundle
    package = Path(image_classifier.__file__).parent
    copied = directory / "bundle"
    for name in _KEPT:
        if name == INFO_NAME or name in bundle.info.files:
            copied.mkdir(exist_ok=True)
            shutil.copyfile(bundle.directory / name, copied / name)
    pinned = [f"mlflow=={version('mlflow')}", *(f"{name}=={version(name)}" for name in REQUIREMENTS)]
    metadata = {"classes": list(bundle.info.classes), "manifest_sha256": bundle.info.provenance.get("manifest_sha256")}
    save_pyfunc(directory / NAME, package / "exporting/pyfunc.py", copied, package, pinned, metadata)
    shutil.rmtree(copied)
    answers = load_pyfunc(directory / NAME).predict([file.read_bytes() for file in parity_set.files])
    for compiled in [*(directory / NAME).rglob("__pycache__")]:
        shutil.rmtree(compiled)  # written by Python, which writes it again where the model is served
    probabilities = np.array(
        [[answer["all_predictions"][label] for label in bundle.info.classes] for answer in answers]
    )
    title = "the MLflow model"
    parity = Parity.of(parity_set.probabilities, probabilities, parity_set.paths, title).check(title)
    return {**parity.as_dict(), "tolerance": TOLERANCE, "requirements": pinned}
