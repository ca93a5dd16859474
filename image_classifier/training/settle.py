"""The choices that a configuration leaves to the run: network, recipe, split, preprocessing; made once, then kept."""

from __future__ import annotations

import logging

from image_classifier.dataset.run import prepare_dataset
from image_classifier.manifest import Manifest
from image_classifier.training.config import AUTO, TrainConfig
from image_classifier.training.distributed import first_on_each_node, from_rank_zero
from image_classifier.training.initial_weights import own_preprocessing, resolve_initial_weights
from image_classifier.training.launch import uses_gpu
from image_classifier.training.transfer.plan import ImageFacts, find_pretrained, plan
from image_classifier.training.transfer.pretrained import Pretrained, fetching_command
from image_classifier.training.transfer.resize import best_resize

log = logging.getLogger(__name__)


def settled(config: TrainConfig, is_new: bool = True) -> tuple[TrainConfig, Manifest]:
    """Return the configuration with a value in place of each choice that is left to the run, and the images.

    Args:
        config: The configuration.
        is_new: Whether the run has not begun; one that is resumed keeps what it chose.

    Raises:
        CheckpointError: Weights are missing or damaged, which is found before any image is read.
        DataError: Images that cannot be trained on.
    """
    found = from_rank_zero(lambda: find_pretrained(config)) if is_new else None
    config = _with_weights(config)
    manifest = from_rank_zero(lambda: prepare_dataset(config.data, config.audit, config.run.trusted_packages)[0])
    if found is not None:
        recipe = from_rank_zero(lambda: _planned(config, found, manifest))
        # The images are split already: `baseline` and `suspects` see the same split, whatever the recipe.
        split = {"data.split.val": config.data.split.val, "data.fold": config.data.fold}
        config = _with_weights(config.recompose(recipe).with_values(split))
    config = config.with_preprocessing(own_preprocessing(config.model))
    if config.data.resize == AUTO:
        config = config.with_values({"data.resize": from_rank_zero(lambda: best_resize(config, manifest))})
    return config, manifest


def _with_weights(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the network of the bundle that the run starts from, once its weights are there."""
    if config.model.backbone == AUTO and not config.model.bundle:
        return config
    return config.with_model(first_on_each_node(lambda: resolve_initial_weights(config.model, config.data.image_size)))


def _planned(config: TrainConfig, found: Pretrained | str, manifest: Manifest) -> tuple[str, ...]:
    """Log what the run does and why in three lines; return the overrides."""
    on_gpu = uses_gpu(config.trainer.accelerator)
    planned = plan(ImageFacts.of(manifest), found, config.run.effort, fetching_command(on_gpu))
    for line in planned.lines:
        log.info("%s", line)
    return planned.overrides
