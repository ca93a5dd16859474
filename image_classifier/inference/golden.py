"""The golden images: what a bundle keeps to tell whether a backend still answers as the day it was made."""

from __future__ import annotations

from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np

from image_classifier.bundle import Bundle
from image_classifier.errors import CheckpointError


@dataclass(frozen=True)
class Golden:
    """Preprocessed images uint8 [N, 3, S, S] that a bundle keeps, and the checkpoint's logits [N, C] and embeddings [N, D] for them."""

    pixels: np.ndarray
    logits: np.ndarray
    embeddings: np.ndarray

    @classmethod
    def of(cls, bundle: Bundle) -> Golden:
        """Those of a bundle; CheckpointError where golden.npz is damaged."""
        try:
            with np.load(bundle.path("golden.npz"), allow_pickle=False) as content:
                return cls(content["pixels"], content["logits"], content["embeddings"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, MemoryError) as error:  # a header may claim any size
            raise CheckpointError(f"golden.npz of {str(bundle.directory)!r} is damaged ({type(error).__name__})", "copy the bundle anew") from error
