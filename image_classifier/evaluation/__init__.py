"""Torch-free evaluation: reads predictions, never a model."""
