"""The images for the parity gate of every export: real validation images, and the checkpoint's answers for them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from image_classifier.bundle import Bundle
from image_classifier.errors import DataError
from image_classifier.images import DecodeLimits, Preprocess
from image_classifier.inference.backends import open_backend
from image_classifier.inference.checkpoint import CheckpointBackend, load_classifier
from image_classifier.inference.predictor import EmbeddingBackend
from image_classifier.inference.robustness import stratified
from image_classifier.manifest import Manifest
from image_classifier.predictions import softmax
from image_classifier.sources.dvc import pull_missing

BATCH = 32


@dataclass
class ParitySet:
    """Files of validation images, their class indices int64 [N], and the checkpoint that answers for them."""

    bundle: Bundle
    files: tuple[Path, ...]
    paths: tuple[str, ...]
    targets: np.ndarray
    train: Manifest
    checkpoint: CheckpointBackend
    limits: DecodeLimits

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        data_dir: Path | None,
        limit: int,
        trusted: Sequence[str],
        limits: DecodeLimits,
        dvc: bool | None = None,
    ) -> ParitySet:
        """Return at most `limit` images, stratified by class, from the folder of the training, or from `data_dir`.

        Raises:
            DataError: The images are missing.
            CheckpointError: model.onnx, from which other forms are made, cannot be run.
        """
        if "model.onnx" in bundle.info.files:
            open_backend(bundle, "onnx")
        root = data_dir or Path(str(bundle.info.provenance.get("data_root", "")))
        manifest = Manifest.read(bundle.path("manifest.csv"), root)
        # All folds of a training as one model have no val images; here any images will do.
        val = manifest.part("val" if len(manifest.indices("val")) else "train")
        codes = {label: code for code, label in enumerate(bundle.info.classes)}
        if not len(val):
            raise DataError(
                "the model was trained without a validation split, which exports are compared on",
                "train with data.split.val above 0",
            )
        targets = np.array([codes[record.label] for record in val], dtype=np.int64)
        rows = stratified(targets, limit).tolist()
        files = tuple(val.file(val[row]) for row in rows)
        missing = next((file for file in files if not file.is_file() and not pull_missing(file, dvc)), None)
        if missing:
            raise DataError(
                f"{str(missing)!r} is missing, and exports are compared on the validation images",
                "give the folder that holds them: --data_dir PATH",
            )
        classifier, _ = load_classifier(bundle.path("model.ckpt"), trusted)
        paths = tuple(val.paths[row] for row in rows)
        return cls(bundle, files, paths, targets[rows], manifest.part("train"), CheckpointBackend(classifier), limits)

    @cached_property
    def preprocess(self) -> Preprocess:
        """The preprocessing that turns files into pixels."""
        return Preprocess.from_dict(self.bundle.info.preprocess)

    @cached_property
    def pixels(self) -> np.ndarray:
        """The images as the network sees them, uint8 [N, 3, S, S]."""
        return self.read(self.files)

    def read(self, files: Sequence[Path]) -> np.ndarray:
        """Return files as pixels uint8 [N, 3, S, S]; UnreadableImage for the first that cannot be read."""
        with ThreadPoolExecutor(2) as pool:
            squares = list(pool.map(lambda file: self.preprocess.read(file, self.limits), files))
        return np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2))

    @cached_property
    def _answers(self) -> tuple[np.ndarray, np.ndarray]:
        return answers_of(self.checkpoint, self.pixels)

    @property
    def logits(self) -> np.ndarray:
        """The checkpoint's logits, float32 [N, C]."""
        return self._answers[0]

    @property
    def embeddings(self) -> np.ndarray:
        """The checkpoint's embeddings, float32 [N, D]."""
        return self._answers[1]

    @property
    def probabilities(self) -> np.ndarray:
        """The checkpoint's calibrated probabilities, float64 [N, C]."""
        return softmax(self.logits, self.bundle.info.temperature)

    def answers(self, pixels: np.ndarray) -> np.ndarray:
        """Return the checkpoint's calibrated probabilities, float64 [N, C], of other pixels, uint8 [N, 3, S, S]."""
        return softmax(answers_of(self.checkpoint, pixels)[0], self.bundle.info.temperature)


def answers_of(backend: EmbeddingBackend, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [N, C] and embeddings [N, D] of pixels uint8 [N, 3, S, S], computed in batches."""
    answers = [backend.logits_and_embeddings(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    return np.concatenate([logits for logits, _ in answers]), np.concatenate([embeddings for _, embeddings in answers])
