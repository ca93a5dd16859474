"""The data stage as one call: fetch the images, audit and split them, write manifest and audit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from image_classifier.dataset.audit.html_report import write_audit
from image_classifier.dataset.audit.issues import AuditSettings
from image_classifier.dataset.prepare import DatasetScan, prepare, scan_dataset
from image_classifier.dataset.settings import DataSettings
from image_classifier.dataset.sources import Folder, TorchvisionDataset
from image_classifier.errors import DataError
from image_classifier.instantiate import instantiate
from image_classifier.manifest import Manifest
from image_classifier.program import program

log = logging.getLogger(__name__)


def prepare_dataset(
    data: DataSettings, audit: AuditSettings, trusted: Sequence[str] = ()
) -> tuple[Manifest, DatasetScan]:
    """Fetch the images of `data.source`, audit and split them, and write manifest.csv, exclude.csv and audit.json.

    Args:
        data: The config group `data`.
        audit: The config group `audit`.
        trusted: Packages whose classes `data.source` may name besides this one's.

    Raises:
        ConfigError: `data.source` is invalid.
        DataError: The images cannot be found or trained on, or the audit found issues of `audit.fail_on` or above.
    """
    manifest, scan = prepare(fetch_images(data, trusted), data, audit, sys.stderr.isatty())
    report = write_audit(scan.audit, scan.directory, page=False)
    for line in scan.audit.summary():
        log.info("%s", line)
    log.info("audit: %s; for a page to look at: %s audit with the same data.*", report, program())
    if scan.audit.exceeds(audit.fail_on):
        raise DataError(
            f"the audit found issues of level {audit.fail_on!r} or above", f"see {report}, or set audit.fail_on=null"
        )
    return manifest, scan


def audit_dataset(data: DataSettings, audit: AuditSettings, trusted: Sequence[str] = ()) -> DatasetScan:
    """Fetch the images, look at every one, and write audit.json, audit.html and exclude.csv.

    Raises:
        ConfigError: `data.source` is invalid.
        DataError: The images cannot be found, or exclude.csv or fix.csv is damaged.
    """
    scan = scan_dataset(fetch_images(data, trusted), data, audit, sys.stderr.isatty())
    write_audit(scan.audit, scan.directory, True, data.limits, data.background)
    return scan


def fetch_images(data: DataSettings, trusted: Sequence[str] = ()) -> list[Path]:
    """Return the folders and tables of `data.source`, which is downloaded and unpacked first where it has to be."""
    source = instantiate(data.source, key="data.source", trusted=trusted)
    if isinstance(source, Folder | TorchvisionDataset):
        source = replace(source, unpack=data.unpack, download=data.download)
    paths = source()
    return [Path(path) for path in paths] if isinstance(paths, list | tuple) else [Path(paths)]
