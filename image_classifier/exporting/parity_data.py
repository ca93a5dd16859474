"""What every export is held against: real validation images, and what the checkpoint answers for them."""

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
    """Images of the val part as they lie on the disk, their class indices int64 [N], and the checkpoint that answers for them."""

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
        most: int,
        trusted: Sequence[str],
        limits: DecodeLimits,
        dvc: bool | None = None,
    ) -> ParitySet:
        """At most so many images, every class in its share, from the folder the bundle was trained on, or `data_dir` in its place.

        Raises:
            DataError: The images are not there.
            CheckpointError: model.onnx, of which other forms are made, cannot be run, or its weights lie in another file.
        """
        if "model.onnx" in bundle.info.files:
            open_backend(bundle, "onnx")
        root = data_dir or Path(str(bundle.info.provenance.get("data_root", "")))
        manifest = Manifest.read(bundle.path("manifest.csv"), root)
        val, codes = manifest.part("val"), {label: code for code, label in enumerate(bundle.info.classes)}
        if not len(val):
            raise DataError(
                "the model was trained without a val part, and exports are held against its images",
                "train with data.split.val above 0",
            )
        targets = np.array([codes[record.label] for record in val], dtype=np.int64)
        rows = stratified(targets, most).tolist()
        files = tuple(val.file(val[row]) for row in rows)
        gone = next((file for file in files if not file.is_file() and not pull_missing(file, dvc)), None)
        if gone:
            raise DataError(
                f"{str(gone)!r} is gone, and exports are held against the validation images",
                "give the folder they lie in: --data_dir PATH",
            )
        classifier, _ = load_classifier(bundle.path("model.ckpt"), trusted)
        paths = tuple(val.paths[row] for row in rows)
        return cls(bundle, files, paths, targets[rows], manifest.part("train"), CheckpointBackend(classifier), limits)

    @cached_property
    def preprocess(self) -> Preprocess:
        """How files become pixels."""
        return Preprocess.from_dict(self.bundle.info.preprocess)

    @cached_property
    def pixels(self) -> np.ndarray:
        """The images as the network sees them, uint8 [N, 3, S, S]."""
        return self.read(self.files)

    def read(self, files: Sequence[Path]) -> np.ndarray:
        """Files as the network sees them, uint8 [N, 3, S, S]; UnreadableImage for the first that cannot be read."""
        with ThreadPoolExecutor(2) as pool:
            squares = list(pool.map(lambda file: self.preprocess.read(file, self.limits), files))
        return np.ascontiguousarray(np.stack(squares).transpose(0, 3, 1, 2))

    @cached_property
    def _answers(self) -> tuple[np.ndarray, np.ndarray]:
        return answers_of(self.checkpoint, self.pixels)

    @property
    def logits(self) -> np.ndarray:
        """What the checkpoint answers, float32 [N, C]."""
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
        """The checkpoint's calibrated probabilities, float64 [N, C], of other pixels, uint8 [N, 3, S, S]."""
        return softmax(answers_of(self.checkpoint, pixels)[0], self.bundle.info.temperature)


def answers_of(backend: EmbeddingBackend, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] and embeddings [N, D] of pixels uint8 [N, 3, S, S], a batch at a time."""
    answers = [backend.logits_and_embeddings(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    return np.concatenate([logits for logits, _ in answers]), np.concatenate([embeddings for _, embeddings in answers])
