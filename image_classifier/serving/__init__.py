"""The HTTP server: `launch` starts it, `app` and `routes` answer, `worker` is the process that holds a model."""
