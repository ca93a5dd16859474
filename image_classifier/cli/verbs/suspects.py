"""The verb `suspects`: find the images that are probably labelled wrong, and print where they are listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.options import CommandLine
from image_classifier.cli.verbs.prepare import typed_settings
from image_classifier.dataset.settings import DataSettings
from image_classifier.errors import ConfigError
from image_classifier.manifest import Manifest
from image_classifier.training.cross_validation.by_training import fold_runs, predict_by_training
from image_classifier.training.run_dir import RunSettings
from image_classifier.training.suspects import PredictFolds, SuspectSearch, SuspectSettings, search_suspects
from image_classifier.training.tuning.subprocess_run import spared_words, tracking_words

# Keys of this verb that are not a fold's.
_OWN_KEYS = (
    "name",
    "overwrite",
    "resume",
    "suspects",
    "apply",
    "checkpoint_name",
    "runs_dir",
    "models_dir",
    "plots_dir",
)
_FOLD_KEYS = ("data.fold=", "data.folds=", "data.manifest_path=")


def suspects(config: DictConfig) -> Path:
    """List the suspects in suspects.csv, suspects.html and, as proposals, in fix.csv; print where they are."""
    if config.data.folds is not None or config.data.fold is not None:
        raise ConfigError(
            "suspects makes all folds itself",
            "leave data.folds and data.fold out, and give their number as suspects.folds",
        )
    if config.model.get("teacher"):
        raise ConfigError(
            "suspects takes no model.teacher: it may have been trained on the images to judge", "leave it out"
        )
    settings = hydra_app.typed(SuspectSettings, config.suspects, "suspects")
    start = config.model.get("from")
    data, audit, _ = typed_settings(config)
    search = SuspectSearch(
        settings,
        run=hydra_app.selected(RunSettings, config),
        data=data,
        audit=audit,
        apply=config.get("apply"),
        starts_from=str(start) if start else None,
        bundle=str(config.checkpoint_name) if config.checkpoint_name else None,
    )
    by_embeddings = settings.by == "embeddings" or (settings.by == "auto" and _is_pretrained(config))
    report = search_suspects(search, _by_embeddings(config) if by_embeddings else _by_training(config))
    print("\n".join(report.lines()))
    print("next     write relabel, exclude or keep into the column action of fix.csv; removing a row undoes it")
    return report.table


def _is_pretrained(config: DictConfig) -> bool:
    backbone = hydra_app.to_plain(config.model.backbone) if config.model.backbone else {}
    return bool(config.model.weights or config.model["from"] or backbone.get("pretrained") or backbone.get("weights"))


def _by_embeddings(config: DictConfig) -> PredictFolds:
    # These load torch, which the processes of the other way load themselves.
    from image_classifier.cli.train_config import model_config
    from image_classifier.training.cross_validation.by_embeddings import predict_by_embeddings

    trainer = config.trainer

    def predict(folds: Sequence[Manifest], data: DataSettings, directory: Path) -> Sequence[Path]:
        return predict_by_embeddings(
            model_config(config),
            folds,
            data,
            directory,
            seed=config.seed,
            precision=trainer.precision,
            accelerator=trainer.accelerator,
        )

    return predict


def _by_training(config: DictConfig) -> PredictFolds:
    def predict(folds: Sequence[Manifest], data: DataSettings, directory: Path) -> Sequence[Path]:
        return predict_by_training(fold_runs(directory.name, directory, folds, _words(config, directory.name)))

    return predict


def _words(config: DictConfig, study: str) -> tuple[str, ...]:
    """Return the flags and overrides of this command that every fold is given too."""
    line = hydra_app.running_line("suspects").for_training(_OWN_KEYS)
    kept = tuple(text for text in line.overrides if not text.lstrip("+~").startswith(_FOLD_KEYS))
    tracking = tracking_words(hydra_app.to_plain(config), study)
    return (*CommandLine(line.flags, kept).argv(), "plots.figures=false", *spared_words(kept), *tracking)
