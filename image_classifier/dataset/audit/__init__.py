"""The audit of a data set: issues with paths, the page that shows them, and the images to exclude."""
