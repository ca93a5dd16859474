"""Order of callbacks at a hook: Lightning calls them in the order of the list, with its own Checkpoint classes last."""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning.callbacks import Callback

from image_classifier.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from image_classifier.training.callbacks.exact_resume import ExactResume
from image_classifier.training.callbacks.preemption import StopOnSignal

# Checkpoints are taken before the other callbacks act at a hook; callbacks.exact_resume says why.
_FIRST = (ExactResume, StopOnSignal, LastCheckpoint, BestCheckpoint)


def in_hook_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks that take checkpoints first, in a fixed order, then the others as given."""
    return sorted(callbacks, key=_position)


def _position(callback: Callback) -> int:
    return next((position for position, kind in enumerate(_FIRST) if isinstance(callback, kind)), len(_FIRST))
