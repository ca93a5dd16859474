"""Pages that a colleague can open: the report of one run, and the comparison of two. They read files, never a model."""
