"""The bundle as a model of MLflow: `mlflow models serve` answers pictures with it, and needs no torch for that."""

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
REQUIREMENTS = ("numpy", "pillow", "onnxruntime", "rich")  # all that inference with ONNX imports; a test looks
_KEPT = (INFO_NAME, "model.onnx", "ood.npz", "golden.npz", "MODEL_CARD.md")


def export_mlflow(reference: ParitySet, directory: Path) -> dict[str, Any]:
    """Write the folder mlflow/ and hold what it answers to the files' bytes against the checkpoint; what was found.

    Raises:
        ParityError: It answers otherwise.
    """
    bundle, package = reference.bundle, Path(image_classifier.__file__).parent
    copied = directory / "bundle"
    for name in _KEPT:
        if name == INFO_NAME or name in bundle.info.files:
            copied.mkdir(exist_ok=True)
            shutil.copyfile(bundle.directory / name, copied / name)
    pinned = [f"mlflow=={version('mlflow')}", *(f"{name}=={version(name)}" for name in REQUIREMENTS)]
    facts = {"classes": list(bundle.info.classes), "manifest_sha256": bundle.info.provenance.get("manifest_sha256")}
    save_pyfunc(directory / NAME, package / "exporting/pyfunc.py", copied, package, pinned, facts)
    shutil.rmtree(copied)
    answers = load_pyfunc(directory / NAME).predict([file.read_bytes() for file in reference.files])
    for compiled in [*(directory / NAME).rglob("__pycache__")]:
        shutil.rmtree(compiled)  # Python wrote it, and will write it anew where the model is served
    probabilities = np.array(
        [[answer["all_predictions"][label] for label in bundle.info.classes] for answer in answers]
    )
    parity = Parity.of(reference.probabilities, probabilities, reference.paths, "the model of MLflow").check(
        "the model of MLflow"
    )
    return {**parity.as_dict(), "tolerance": TOLERANCE, "requirements": pinned}
