"""Callbacks of a training, one file a subject; conf/callbacks or builders.py names each class."""
