"""The suffixes by which archives and tables are known; loads nothing, so that the command line may use them."""

from __future__ import annotations

ZSTD_SUFFIXES = (".tar.zst", ".tzst")
ARCHIVE_SUFFIXES = (".tar.bz2", ".tar.gz", ".tar.xz", ".tar", ".tbz2", ".tgz", ".txz", ".zip", *ZSTD_SUFFIXES)
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
