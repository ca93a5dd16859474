"""The library behind the verb `report`: the page of one run, or the comparison of two."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from image_classifier.atomic_io import write_text
from image_classifier.errors import ConfigError
from image_classifier.evaluation.compare import Comparison, compare
from image_classifier.evaluation.report import comparison as comparison_page
from image_classifier.evaluation.report.locate import EvaluatedRun, evaluated_split, find_evaluated, limits_of
from image_classifier.evaluation.report.page import run_page
from image_classifier.evaluation.report.run_data import AUDITS, RunData, RunPaths, gather, sizes_of
from image_classifier.evaluation.report.schemas import LatencyFile, read_sidecar
from image_classifier.manifest import SPLITS


@dataclass(frozen=True)
class ReportSettings:
    """The keys of conf/report.yaml.

    Raises:
        ConfigError: A value is invalid.
    """

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
            raise ConfigError(f"invalid resamples {self.resamples}: expected 100 to 100000")
        if self.output is not None and not self.output.lower().endswith(".html"):
            raise ConfigError(f"invalid output {self.output}: the report is an HTML page", "write output=NAME.html")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            hint = "give the folder that the paths of the predictions start from"
            raise ConfigError(f"data_dir {self.data_dir!r} is not a folder", hint)

    def find(self, name: str) -> EvaluatedRun:
        """Find the predictions of a name; see `find_evaluated`."""
        data_dir = Path(self.data_dir) if self.data_dir else None
        return find_evaluated(name, self.split, Path(self.models_dir), Path(self.plots_dir), data_dir)


@dataclass(frozen=True)
class WrittenComparison:
    """A comparison of two runs: its result, the two names, the path of its page, and what both cost where measured."""

    comparison: Comparison
    names: tuple[str, str]
    path: Path
    costs: comparison_page.Costs | None = None


def write_report(settings: ReportSettings) -> tuple[RunData, Path]:
    """Write the page of one run; return its data and the page's path.

    Raises:
        CheckpointError: Nothing has that name.
        DataError: The predictions, or a file next to them, are missing or damaged.
        StorageError: The page cannot be written.
    """
    evaluated = settings.find(settings.name)
    run = evaluated.run
    root = evaluated.root if evaluated.root is not None and evaluated.root.is_dir() else None
    paths = RunPaths(
        evaluated.directory, evaluated.bundle, Path(settings.runs_dir) / run, Path(settings.audit_dir), root
    )
    data = gather(run, evaluated.table, paths, evaluated.info, sizes_of(evaluated.bundle))
    # Each split has its own page; that of the main split is in the run's folder.
    folder = "" if data.split == evaluated_split(evaluated.directory.parent) else data.split
    path = Path(settings.output) if settings.output else Path(settings.plots_dir) / run / folder / "report.html"
    write_text(path, run_page(data))
    return data, path


def write_comparison(settings: ReportSettings, other: str) -> WrittenComparison:
    """Compare `settings.name` with `other` and write the page.

    Raises:
        ConfigError: Both names mean the same predictions.
        CheckpointError: Nothing has one of the names.
        DataError: Predictions are missing or damaged, or have no image in common.
        StorageError: The page cannot be written.
    """
    first = settings.find(settings.name)
    second = settings.find(other)
    if first.directory.resolve() == second.directory.resolve():
        raise ConfigError(f"{settings.name!r} and {other!r} are the same predictions", "name two different ones")
    comparison = compare(first.table, second.table, settings.resamples, settings.seed)
    names = (first.name, second.name)
    costs = _costs(first, second)
    html = comparison_page.page(
        comparison,
        names,
        first.split if first.split == second.split else f"{first.split} and {second.split}",
        first.root or second.root,
        limits_of(first.info or second.info),
        [
            ("A", str(first.directory)),
            ("B", str(second.directory)),
            ("paired bootstrap", f"{settings.resamples} resamples, seed {settings.seed}"),
        ],
        costs,
    )
    folder = f"compare-{first.name}-{second.name}".replace("/", "_")
    path = Path(settings.output) if settings.output else Path(settings.plots_dir) / folder / "report.html"
    write_text(path, html)
    return WrittenComparison(comparison, names, path, costs)


def _costs(first: EvaluatedRun, second: EvaluatedRun) -> comparison_page.Costs | None:
    """Return what both cost; None unless both were measured on one backend and one kind of processor."""
    measured = []
    for run in (first, second):
        path = RunPaths(run.directory).measured("latency.json")
        measured.append(read_sidecar(path, LatencyFile, "measure it again with `test --latency`, or remove it"))
    machines = [(content.get("hardware") or {}).get("processor") for content in measured]
    backends = [content.get("backends") or {} for content in measured]
    backend = next((name for name in ("onnx", *backends[0]) if all(name in rows for rows in backends)), None)
    if backend is None or machines[0] is None or machines[0] != machines[1]:
        return None
    rows = [known[backend] for known in backends]
    if not all(
        isinstance(row.get(key), int | float) and row[key] > 0 for row in rows for key in ("megabytes", "p50_ms")
    ):
        return None
    a, b = (comparison_page.Cost(row["megabytes"], row["p50_ms"], backend, str(machines[0])) for row in rows)
    return a, b
