"""From a folder of images to a split manifest and a pixel cache; no torch."""
