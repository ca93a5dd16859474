"""Inference: a predictor, and one module for each backend that it can run."""
