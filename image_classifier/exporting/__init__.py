"""Delivery: a trained classifier becomes files that answer the same elsewhere. Torch."""
