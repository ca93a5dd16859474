"""Evaluation without torch: it reads predictions, never a model."""
