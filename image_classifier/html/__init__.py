"""HTML pages in one file with thumbnails, without network or other scripts; used by audit, report and suspects."""
