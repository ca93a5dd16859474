"""The verb `train`: resolve what is resumed, train, and print the summary."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.options import translate
from image_classifier.cli.train_config import compose_train_config, train_config
from image_classifier.program import child_command, program
from image_classifier.training import run
from image_classifier.training.cross_validation import all_folds
from image_classifier.training.distributed import is_rank_zero
from image_classifier.training.launch import needs_ranks, run_ranks
from image_classifier.training.resume import ResumePoint, find_resume_point, new_overrides, score_if_finished
from image_classifier.training.run_dir import RunSettings
from image_classifier.training.settle import settled


def train(config: DictConfig) -> float:
    """Train a classifier; return the F1 on val that a sweep compares, NaN where this process only started ranks."""
    overrides = hydra_app.running_line("train").overrides
    settings = hydra_app.selected(RunSettings, config)
    resume = find_resume_point(settings, overrides)
    if resume:
        config = _resumed(config, resume, overrides)
    typed = train_config(hydra_app.replaced(config, {"resume": None}), overrides)
    if resume:
        score = score_if_finished(resume, typed.flat(), settings.resume)
        if score is not None:
            return score
    trainer = typed.trainer
    if needs_ranks(trainer.accelerator, trainer.devices, trainer.num_nodes):
        run.check_config(typed)  # once, and not in every rank
        run_ranks(trainer.accelerator, trainer.devices, [*child_command(), *sys.argv[1:]])
        return math.nan
    result = all_folds.train(typed, resume=resume, overrides=overrides)
    if is_rank_zero():
        print("\n".join(result.summary))
        print(f"next     {program()} infer --checkpoint_name {shlex.quote(result.name)} --images PATH")
    return result.score


def print_settled(arguments: Sequence[str]) -> None:
    """Print what `--cfg job` shows where the run chooses by the images: the settled values."""
    hydra_app.configure_logging()
    config, _ = settled(compose_train_config(translate("train", arguments).overrides))
    print(config.yaml, end="")


def _resumed(config: DictConfig, resume: ResumePoint, overrides: Sequence[str]) -> DictConfig:
    """Return the settings with which a run began, and the new ones of the command line."""
    if resume.directory is None:
        return config
    names = {"name": resume.directory.name, "run_dir": str(resume.directory)}
    new = new_overrides(resume.directory, overrides)
    composed = hydra_app.replaced(config, names)
    config = hydra_app.replaced(hydra_app.resumed(composed, resume.directory / "config.yaml", new), names)
    keys = {item.partition("=")[0] for item in new}
    if "trainer.max_time" in keys and "trainer.max_steps" not in keys and config.trainer.max_epochs is None:
        # The steps that were planned for the old time are planned again.
        config = hydra_app.replaced(config, {"trainer.max_steps": -1})
    return config
