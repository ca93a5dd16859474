"""The verb `suspects`: find the images that are probably labelled wrong, and print where they are listed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from image_classifier.cli import hydra_app
from image_classifier.cli.verbs.prepare import typed_settings
from image_classifier.dataset.prepare import DataSettings
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


<<<<<<< HEAD
def suspects(config: DictConfig) -> Path:
    """List the suspects in suspects.csv, suspects.html and, as proposals, in fix.csv; print where they are."""
=======
@dataclass(frozen=True)
class SuspectSettings:
    """The keys of `suspects` in conf/suspects.yaml.

    Raises:
        ConfigError: A value that cannot be, named by its key.
    """

    by: str = "auto"
    folds: int = 5
    highest_loss: float = 0.1
    max_listed: int = 500

    def __post_init__(self) -> None:
        if isinstance(self.by, str) and self.by not in WAYS:
            raise ConfigError(
                f"suspects.by={self.by} is not known", f"{did_you_mean(self.by, WAYS)}It is one of {', '.join(WAYS)}"
            )
        if isinstance(self.folds, int) and self.folds < 2:
            raise ConfigError(
                f"suspects.folds must be at least 2, not {self.folds}",
                "5 trains on four fifths of the images each time",
            )
        if isinstance(self.highest_loss, int | float) and not 0 <= self.highest_loss <= 1:
            raise ConfigError(
                f"suspects.highest_loss must lie between 0 and 1, not {self.highest_loss}", "0.1 lists the worst tenth"
            )
        if isinstance(self.max_listed, int) and self.max_listed < 0:
            raise ConfigError(f"suspects.max_listed must be at least 0, not {self.max_listed}")


def suspects(config: Any) -> Path:
    """Rank the images by how doubtful their labels are; writes suspects.csv, suspects.html and the proposals of fix.csv beside the audit."""
    asked = hydra_app.typed(SuspectSettings, config.suspects, "suspects")
    run = hydra_app.typed(RunSettings, hydra_app.only(config, *(item.name for item in fields(RunSettings))), "")
    apply = _apply(config.get("apply"))
    _check(config)
    folded = hydra_app.replaced(config, {"data.folds": asked.folds, "data.fold": 0, "data.manifest_path": None})
    first, data, found = audited(folded)
    _check_start(config, run, first)
    folds = all_folds(found, data)
    name = run.name or f"{data.name or first.root.resolve().name}-suspects".replace("/", "-").lstrip(".")
    directory = Path(run.runs_dir) / name
    answers = _out_of_fold(config, asked.by, folds, replace(data, folds=None, fold=None), directory, found)
    suspected = find_suspects(answers, _conflicts(found), asked.highest_loss)
    if config.checkpoint_name:
        suspected = merged(suspected, _of_bundle(str(config.checkpoint_name), run, first, asked.highest_loss))
    fixes = read_fixes(found.fixes.path)  # read again: a person may have written to it meanwhile
    suspected = [suspect for suspect in suspected if suspect.path not in fixes.decided]
    return _write(suspected, fixes, apply, asked.max_listed, found, data, answers)


def _apply(value: Any) -> bool | int:
    if isinstance(value, bool) or (isinstance(value, int) and value >= 0):
        return value
    raise ConfigError(
        f"invalid apply {value!r}", "apply=true accepts what confident learning says, apply=50 the worst fifty"
    )


def _check(config: Any) -> None:
    if config.overwrite or config.get("resume"):
        raise ConfigError(
            "suspects goes on by itself where it stopped", "leave overwrite= and resume= out, or choose another name="
        )
>>>>>>> w-serving
    if config.data.folds is not None or config.data.fold is not None:
        raise ConfigError(
            "suspects makes all folds itself",
            "leave data.folds and data.fold out, and give their number as suspects.folds",
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
    line = hydra_app.running_line("suspects")
    flags = [
        word for flag, value in line.flags if flag in ("--config-dir", "--config-path") for word in (flag, str(value))
    ]
    overrides = [text for text in line.overrides if _root_key(text) not in _OWN_KEYS]
    kept = [text for text in overrides if not text.lstrip("+~").startswith(_FOLD_KEYS)]
    tracking = tracking_words(hydra_app.to_plain(config), study)
    return (*flags, *kept, "plots.figures=false", *spared_words(kept), *tracking)


def _root_key(override: str) -> str:
    return re.split(r"[.=]", override.lstrip("+~"))[0].partition("@")[0]
