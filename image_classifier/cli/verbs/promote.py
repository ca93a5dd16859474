"""The verb `promote`: register a bundle's model in MLflow and let an alias point to it."""

from __future__ import annotations

from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.exporting.promote import PromoteSettings
from image_classifier.exporting.promote import promote as register_bundle


def promote(config: Any) -> None:
    """Promote the bundle and print the command that serves it; errors as `exporting.promote.promote`."""
    promotion = register_bundle(hydra_app.typed(PromoteSettings, config, ""))
    uri = promotion.tracking_uri
    print(f"promoted  {promotion.name} version {promotion.version} is @{promotion.alias} in {uri}")
    print(
        f"next      MLFLOW_TRACKING_URI={uri} mlflow models serve -m models:/{promotion.name}@{promotion.alias} "
        "--env-manager local --port 5001"
    )
