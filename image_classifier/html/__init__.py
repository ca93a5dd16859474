"""Pages: one HTML file with thumbnails that needs no network and runs no foreign script. What the audit, the report and galleries share."""
