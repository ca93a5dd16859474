"""The verb `audit`: a table of what is wrong with a data set, and a page to look at."""

from __future__ import annotations

from typing import Any

from image_classifier.cli.verbs.prepare import typed_settings
from image_classifier.dataset.run import audit_dataset


def audit(config: Any) -> None:
    """Check every image, print the issues and the files written; exit with 1 for issues of `audit.fail_on` or above."""
    data, settings, trusted = typed_settings(config)
    scan = audit_dataset(data, settings, trusted)
    print("\n".join(scan.audit.table()))
    print(f"page     {scan.directory / 'audit.html'}")
    print(f"facts    {scan.directory / 'audit.json'}")
    print(f"exclude  {scan.exclusions.path}")
    if scan.audit.exceeds(settings.fail_on):
        raise SystemExit(1)
