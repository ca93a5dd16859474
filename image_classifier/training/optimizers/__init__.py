"""Optimizers: parameter groups, freezing, Muon, and the schedule of the learning rate."""
