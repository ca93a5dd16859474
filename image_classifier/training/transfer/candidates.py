"""The models that a run could deliver, compared on the same val images; the choice is kept with its figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from image_classifier.evaluation.reliability.calibration import fit_temperature
from image_classifier.modeling.classifier import Classifier, in_evaluation
from image_classifier.modeling.embeddings import EmbeddingStore
from image_classifier.predictions import PredictionTable
from image_classifier.training.baseline import device_of
from image_classifier.training.builders import TrainingInputs
from image_classifier.training.distributed import from_rank_zero, world_size
from image_classifier.training.forward import fast_backend, forward
from image_classifier.training.transfer.activations import KeptActivations
from image_classifier.training.transfer.probe import Probe, fit_probe, install

log = logging.getLogger(__name__)

_BATCH = 64  # images
PROBE = "probe"  # the candidate that is always there


@dataclass(frozen=True)
class Candidate:
    """One model: its name, what it is in words, the seconds it took, and its predictions of val.

    `share` is how far its weights are on the way from the probe's, 0, to the trained ones, 1.
    """

    name: str
    about: str
    seconds: float
    val: PredictionTable
    share: float

    @property
    def right(self) -> np.ndarray:
        """Whether each val image is predicted right, bool [N]."""
        return np.asarray(self.val.logits.argmax(axis=1) == self.val.targets)

    @property
    def accuracy(self) -> float:
        """On val, 0..1."""
        return float(self.right.mean())

    @property
    def log_loss(self) -> float:
        """On val, nats, at the temperature that fits it best: how sure a model is differs by how it was trained."""
        return fit_temperature(self.val).nll_after


@dataclass(frozen=True)
class CandidateChoice:
    """The candidates in the order they were made, and the delivered one."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate

    def as_dict(self) -> list[dict[str, Any]]:
        """Return plain values for JSON: a row for each candidate, with the paired test against the delivered one."""
        return [
            {
                "name": one.name,
                "about": one.about,
                "seconds": round(one.seconds, 1),
                "val_accuracy": one.accuracy,
                "val_log_loss": one.log_loss,
                "delivered": one is self.chosen,
                "p_value": None if one is self.chosen else paired_p(self.chosen.right, one.right),
            }
            for one in self.candidates
        ]


def choose(candidates: Sequence[Candidate]) -> CandidateChoice:
    """Return the choice: most val images right; of equals the one with the smaller calibrated log loss.

    The first candidate, the probe, is the fall-back: another one must not be worse on val.
    """
    best = max(candidates, key=lambda one: (one.accuracy, -one.log_loss))
    choice = CandidateChoice(tuple(candidates), best)
    for row in choice.as_dict():
        against = "" if row["p_value"] is None else f", p {row['p_value']:.2f} against it"
        log.info(
            "tried %-15s val accuracy %.4f  log loss %.4f  %5.1f s  %s%s",
            *(row["name"], row["val_accuracy"], row["val_log_loss"], row["seconds"]),
            "delivered" if row["delivered"] else "not delivered",
            against,
        )
    return choice


@dataclass
class ProbeStart:
    """The probe in the last layer, and all weights as they were then, for the choice at the end of the run.

    `trained` are the weights at the end of the training, once it has ended.
    """

    fitted: Probe
    weights: Mapping[str, torch.Tensor]
    started: float
    trained: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def choose(self, classifier: Classifier, inputs: TrainingInputs, kept: KeptActivations | None) -> CandidateChoice:
        """Compare the probe, the trained weights and weights between them on val; load the best into `classifier`."""
        seconds = time.perf_counter() - self.started
        self.trained = {name: value.detach().clone() for name, value in classifier.state_dict().items()}
        candidates = [Candidate(PROBE, self.fitted.about, self.fitted.seconds, self.fitted.tables["val"], 0.0)]
        if inputs.config.trainer.max_epochs != 0:
            for share in (*inputs.config.finetune.interpolate, 1.0):
                name = "fine-tuned" if share == 1 else f"{share:.0%} of the way"
                classifier.load_state_dict(self.weights_at(share))
                table = replace(self.fitted.tables["val"], logits=val_logits(classifier, inputs, kept))
                about = "all trained weights" if share == 1 else "weights between the probe's and the trained ones"
                candidates.append(Candidate(name, about, seconds, table, share))
        choice = choose(candidates)
        classifier.load_state_dict(self.weights_at(choice.chosen.share))
        return choice

    def known_embeddings(self, classifier: Classifier) -> EmbeddingStore | None:
        """Return the embeddings of all images where a classifier answers by them alone, on this one machine."""
        return self.fitted.store if classifier.tta == "none" and world_size() == 1 else None

    def weights_at(self, share: float) -> Mapping[str, torch.Tensor]:
        """Return the weights at a share of the way from the probe's to the trained ones, 0..1."""
        return interpolated(self.weights, self.trained, share) if share else self.weights


def val_logits(classifier: Classifier, inputs: TrainingInputs, kept: KeptActivations | None) -> np.ndarray:
    """Return the logits float32 [N, C] of the val images, from kept activations where there are any."""
    rows = inputs.manifest.indices("val")
    if kept is None:
        backend = fast_backend(classifier, inputs.config.data.image_size, len(rows))
        return np.concatenate([logits for _, logits, _ in forward(backend, rows, inputs.cache.gather)])
    device = classifier.scale.device
    parts = []
    with in_evaluation(classifier), torch.inference_mode():
        for first in range(0, len(rows), _BATCH):
            activations = kept.of_val(rows[first : first + _BATCH]).to(device).float()
            parts.append(classifier.classify(torch.flatten(kept.upper(activations), 1)).cpu().numpy())
    return np.concatenate(parts)


def start_from_probe(inputs: TrainingInputs, classifier: Classifier) -> ProbeStart:
    """Fit the probe, write it into the classifier's last layer, and return it with the weights of this moment."""
    before = classifier.scale.device
    classifier.to(device_of(inputs.config.trainer.accelerator))
    fitted = from_rank_zero(lambda: fit_probe(inputs.network, classifier))
    classifier.to(before)
    install(fitted.model, classifier)
    weights = {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}
    return ProbeStart(fitted, weights, time.perf_counter())


def interpolated(
    start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """Return weights at a share of the way from start to end, 0..1 (Wortsman et al., 2022, section 3).

    >>> interpolated({"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}, 0.75)["w"].item()
    1.5
    """
    return {
        name: torch.lerp(start[name].to(value), value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Return the p-value of McNemar's exact test: do two classifiers, right or wrong bool [N], differ?

    Source: McNemar (1947); Dietterich (1998), section 3.1.

    >>> paired_p(np.array([True] * 8), np.array([False] * 8))
    0.0078125
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if not only_first + only_second:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)
