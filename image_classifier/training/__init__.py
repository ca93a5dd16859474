"""Training: augmentation, data module, Lightning module, callbacks, and the composition root in run.py."""
