"""The folders of the files that the package comes with."""

from __future__ import annotations

from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
# A wheel holds the configuration inside the package, a checkout beside it.
CONF_DIR = next(path for path in (PACKAGE_DIR / "conf", PACKAGE_DIR.parent / "conf") if path.is_dir())
