"""The verb `infer`: answers for images, on standard output or in a file."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.errors import DataError
from image_classifier.inference.infer import InferSettings
from image_classifier.inference.infer import infer as answer_images


def infer(config: Any) -> None:
    """Answer for each image; DataError at the end where some could not be read (their rows hold the reason)."""
    settings = hydra_app.typed(InferSettings, config, "")
    with _ImageBar(sys.stderr.isatty() and (settings.output is not None or not sys.stdout.isatty())) as bar:
        summary = answer_images(settings, sys.stdout.buffer, advance=bar.advance)
    if summary.failed:
        raise DataError(
            f"{summary.failed} of {summary.images} images could not be read, first {summary.first_error}",
            "the reason is in the row of each",
        )


class _ImageBar:
    """A progress bar on standard error, from the first answer on, where `shown`."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._progress: Any = None

    def __enter__(self) -> _ImageBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, count: int) -> None:
        """Count images that were answered."""
        if not self._shown:
            return
        if self._progress is None:
            self._start()
        self._progress.advance(self._task, count)
        speed = self._progress.tasks[0].speed
        self._progress.update(self._task, speed=f"{speed:.0f} images/s" if speed else "")

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("images"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._task = self._progress.add_task("images", total=None, speed="")
