"""Hyperparameter search of the verb `tune`; loads no torch, as each trial is a `train` process."""
