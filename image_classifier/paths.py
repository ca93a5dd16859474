"""The folders of the files that the package comes with."""

from __future__ import annotations

from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
# A wheel holds the configuration inside the package, a checkout beside it; the copy in a model of MLflow has none.
_CANDIDATES = (PACKAGE_DIR / "conf", PACKAGE_DIR.parent / "conf")
CONF_DIR = next((path for path in _CANDIDATES if path.is_dir()), _CANDIDATES[0])
