"""The verbs `prepare` and `audit`, and the first step of `train`: from the config group `data` to a manifest."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image_classifier.cli import hydra_app
from image_classifier.dataset.audit.html_report import write_audit
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.prepare import DatasetScan, DataSettings, prepare, scan_dataset
from image_classifier.errors import DataError
from image_classifier.instantiate import instantiate
from image_classifier.manifest import Manifest
from image_classifier.program import program

log = logging.getLogger(__name__)


def prepare_from(config: Any) -> tuple[Manifest, DataSettings]:
    """As `examined`, without what was found on the way."""
    manifest, data, _ = audited(config)
    return manifest, data


def audited(config: Any) -> tuple[Manifest, DataSettings, DatasetScan]:
    """Fetch the images that `config.data` describes, audit and split them and write the manifest; says the counts and the paths.

    Raises:
        ConfigError: A key of `data` or `audit` that cannot be.
        DataError: Images that cannot be found or trained on, or findings above `audit.fail_on`.
    """
    data, settings = _settings(config)
    manifest, scan = prepare_dataset(data, settings, config.get("trusted_packages") or ())
    return manifest, data, scan


def prepare_dataset(
    data: DataSettings, audit: AuditSettings, trusted: Sequence[str] = ()
) -> tuple[Manifest, DatasetScan]:
    """Fetch the images that `data` describes, audit and split them, and write the manifest; the log names counts and paths.

    Raises:
        DataError: Images cannot be found or trained on, or the audit found issues at or above `audit.fail_on`.
    """
    manifest, found = prepare(_fetched(data, trusted), data, audit, sys.stderr.isatty())
    report = write_audit(found.audit, found.directory, page=False)
    for line in found.audit.summary():
        log.info("%s", line)
    log.info("audit: %s; a page to look at: %s audit with the same data.*", report, program())
    if found.audit.exceeds(audit.fail_on):
        raise DataError(
            f"the audit found problems of level {audit.fail_on!r} or above",
            f"see {report}, or set audit.fail_on=null",
        )
    return manifest, found


def audit(config: Any) -> None:
    """Look at every image, print what is wrong, write audit.json, audit.html and exclude.csv; exit code 1 for findings above `audit.fail_on`."""
    data, asked = _settings(config)
    found = scan_dataset(_fetched(data, config.get("trusted_packages") or ()), data, asked, sys.stderr.isatty())
    write_audit(found.audit, found.directory, True, data.limits, data.background)
    print("\n".join(found.audit.table()))
    print(
        f"page     {found.directory / 'audit.html'}\nfacts    {found.directory / 'audit.json'}\nexclude  {found.exclusions.path}"
    )
    if found.audit.exceeds(audit.fail_on):
        raise SystemExit(1)


def _settings(config: Any) -> tuple[DataSettings, AuditSettings]:
    return hydra_app.typed(DataSettings, config.data, "data"), hydra_app.typed(AuditSettings, config.audit, "audit")


def _fetched(data: DataSettings, trusted: Sequence[str]) -> Sequence[Path]:
    """Return the folders and tables that the source names."""
    source = instantiate(data.source, key="data.source", trusted=trusted)
    paths = source()
    return [Path(path) for path in paths] if isinstance(paths, list | tuple) else [Path(paths)]
