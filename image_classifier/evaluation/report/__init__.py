"""HTML pages: the report of one run and the comparison of two. They read files, never a model."""
