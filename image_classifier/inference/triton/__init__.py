"""A Triton server as a backend, and a server of this machine, started and stopped."""
