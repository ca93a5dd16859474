"""How much copies of training images in a judged part flatter its figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from image_classifier.predictions import PredictionTable


@dataclass(frozen=True)
class LeakScore:
    """Accuracy on images that have a copy, twin or group mate in the train part, and on those that have none (None where there are none)."""

    leaked: int
    clean: int
    accuracy_leaked: float
    accuracy_clean: float | None
    what: str = "have a copy, a twin or one of their group in the train part"

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """The numbers under their stable names."""
        clean = {} if self.accuracy_clean is None else {"accuracy_clean": self.accuracy_clean}
        return {"leaked_images": float(self.leaked), "accuracy_leaked": self.accuracy_leaked, **clean}

    def lines(self, split: str) -> Iterator[str]:
        """The two figures for a terminal, under names that a script may look for."""
        yield f"{split} accuracy_leaked {self.accuracy_leaked:.4f} on {self.leaked} images that {self.what}"
        if self.accuracy_clean is not None:
            yield f"{split} accuracy_clean {self.accuracy_clean:.4f} on the {self.clean} others: the honest figure"


def leak_score(table: PredictionTable, leaked: np.ndarray, what: str = LeakScore.what) -> LeakScore | None:
    """The two accuracies, `leaked` bool [N] saying which rows have leaked and `what` in which way; None where none has."""
    if not leaked.any():
        return None
    correct = table.answers()[0] == table.targets
    clean = float(correct[~leaked].mean()) if not leaked.all() else None
    return LeakScore(int(leaked.sum()), int((~leaked).sum()), float(correct[leaked].mean()), clean, what)
