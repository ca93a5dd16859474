"""The verb `export`: other forms of a bundle's model, each compared with the checkpoint before it is kept."""

from __future__ import annotations

from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.exporting.export import ExportResult, ExportSettings
from image_classifier.exporting.export import export as write_exports


def export(config: Any) -> None:
    """Write the requested forms into the bundle and print a line for each; errors as `exporting.export.export`."""
    write_exports(hydra_app.typed(ExportSettings, config, ""), on_written=_print)


def _print(result: ExportResult) -> None:
    metadata = result.metadata
    print(
        f"{result.form:<9} {metadata['agreement']:.2%} of {metadata['images']} images get the checkpoint's class, "
        f"probabilities differ by at most {metadata['largest_difference']:.1e} ({metadata['worst_image']})"
    )
