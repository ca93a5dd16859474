"""The verb `report`: the page of one run, or of two side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_classifier.atomic_io import write_text
from image_classifier.cli import hydra_app
from image_classifier.errors import ConfigError
from image_classifier.evaluation.compare import compare
from image_classifier.evaluation.report import comparison as comparison_page
from image_classifier.evaluation.report.locate import EvaluatedRun, find_evaluated, judged_part, limits_of
from image_classifier.evaluation.report.page import run_page
from image_classifier.evaluation.report.run_data import AUDITS, RunData, RunPaths, gather, sizes_of
from image_classifier.manifest import SPLITS


@dataclass(frozen=True)
class ReportSettings:
    """The keys of conf/report.yaml."""

    name: str
    other: str | None = None
    split: str | None = None
    data_dir: str | None = None
    models_dir: str = "models"
    plots_dir: str = "plots"
    runs_dir: str = "runs"
    audit_dir: str = AUDITS
    output: str | None = None
    resamples: int = 1000
    seed: int = 0
    trusted_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLITS:
            raise ConfigError(f"there is no split {self.split!r}", f"use one of {', '.join(SPLITS)}")
        if not 100 <= self.resamples <= 100_000:
            raise ConfigError(f"resamples must be from 100 to 100000, not {self.resamples}")
        if self.output is not None and not self.output.lower().endswith(".html"):
            raise ConfigError(
                f"the report is an HTML page, and output={self.output} does not end so", "write output=NAME.html"
            )
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ConfigError(
                f"data_dir {self.data_dir!r} is not a folder",
                "give the folder that the paths of the predictions start from",
            )


def report(config: Any) -> Path:
    """Write the page, print what it says, and return where it is."""
    asked = hydra_app.typed(ReportSettings, config, "")
    return _compare(asked, asked.other) if asked.other is not None else _report(asked)


def _report(asked: ReportSettings) -> Path:
    """Write the page of one run."""
    judged = _find(asked, asked.name)
    run = judged.bundle.name if judged.bundle else judged.directory.parent.name
    places = RunPaths(
        judged.directory, judged.bundle, Path(asked.runs_dir) / run, Path(asked.audit_dir), _there(judged.root)
    )
    facts = gather(run, judged.table, places, judged.info, sizes_of(judged.bundle))
    part = "" if facts.split == judged_part(judged.directory.parent) else facts.split  # each part has a page of its own
    path = Path(asked.output) if asked.output else Path(asked.plots_dir) / run / part / "report.html"
    write_text(path, run_page(facts))
    print("\n".join([f"split      {facts.split}", *_answer(facts), f"page       {path}"]))
    return path


def _there(root: Path | None) -> Path | None:
    """The folder of the images, where it is one on this machine."""
    return root if root is not None and root.is_dir() else None


def _answer(facts: RunData) -> Iterator[str]:
    accuracy, bounds = facts.metrics["accuracy"], facts.interval("accuracy")
    yield f"accuracy   {accuracy:.4f}" + (f", 95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "")


def _find(asked: ReportSettings, name: str) -> EvaluatedRun:
    return find_evaluated(
        name,
        asked.split,
        Path(asked.models_dir),
        Path(asked.plots_dir),
        Path(asked.data_dir) if asked.data_dir else None,
    )


def _compare(asked: ReportSettings, other: str) -> Path:
    """Write the comparison of two and say whether the second is better."""
    first, second = _find(asked, asked.name), _find(asked, other)
    if first.directory.resolve() == second.directory.resolve():
        raise ConfigError(f"{asked.name!r} and {other!r} are the same predictions", "name two different ones")
    comparison, names = compare(first.table, second.table, asked.resamples, asked.seed), (first.name, second.name)
    html = comparison_page.page(
        comparison,
        names,
        _part(first, second),
        first.root or second.root,
        limits_of(first.info or second.info),
        list(_origin(asked, first, second)),
    )
    folder = f"compare-{first.name}-{second.name}".replace("/", "_")
    path = Path(asked.output) if asked.output else Path(asked.plots_dir) / folder / "report.html"
    write_text(path, html)
    print("\n".join([*comparison_page.lines(comparison, names), f"page       {path}"]))
    return path


def _part(first: EvaluatedRun, second: EvaluatedRun) -> str:
    return first.split if first.split == second.split else f"{first.split} and {second.split}"


def _origin(asked: ReportSettings, first: EvaluatedRun, second: EvaluatedRun) -> Iterator[tuple[str, str]]:
    """The lines of the footer: where both come from, and the draws."""
    yield "A", str(first.directory)
    yield "B", str(second.directory)
    yield "paired bootstrap", f"{asked.resamples} draws, seed {asked.seed}"
