"""The HTTP server: `run` is the verb, `app` the routes, `process` and `model_process` the two ends of the process that holds a model."""
