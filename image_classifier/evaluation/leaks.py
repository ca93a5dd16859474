"""How much duplicates of training images in an evaluated split improve its scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from image_classifier.predictions import PredictionTable


@dataclass(frozen=True)
class LeakScore:
    """Accuracy on images with a duplicate, near-duplicate or group member in train, and on all others, if any."""

    leaked: int
    clean: int
    accuracy_leaked: float
    accuracy_clean: float | None
    what: str = "have a duplicate, a near-duplicate or an image of their group in the train split"

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Return plain values for JSON."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """Return the numbers by name."""
        clean = {} if self.accuracy_clean is None else {"accuracy_clean": self.accuracy_clean}
        return {"leaked_images": float(self.leaked), "accuracy_leaked": self.accuracy_leaked, **clean}

    def lines(self, split: str) -> Iterator[str]:
        """Yield both accuracies for a terminal, with names that a script may look for."""
        yield f"{split} accuracy_leaked {self.accuracy_leaked:.4f} on {self.leaked} images that {self.what}"
        if self.accuracy_clean is not None:
            yield f"{split} accuracy_clean {self.accuracy_clean:.4f} on the {self.clean} others: the score to trust"


def leak_score(table: PredictionTable, leaked: np.ndarray, what: str = LeakScore.what) -> LeakScore | None:
    """Return both accuracies; None if no image has leaked.

    `leaked` marks the rows that have leaked, bool [N], and `what` describes how.
    """
    if not leaked.any():
        return None
    correct = table.answers()[0] == table.targets
    clean = float(correct[~leaked].mean()) if not leaked.all() else None
    return LeakScore(int(leaked.sum()), int((~leaked).sum()), float(correct[leaked].mean()), clean, what)
