"""What all pages share: one self-contained HTML file, no network, no foreign script, file names shown and never run."""
