"""Augmentation of batches of training pixels on the training device; one generator on the CPU makes every choice."""

from image_classifier.training.augment.batch import BatchAugment
from image_classifier.training.augment.mixup_cutmix import Mix
from image_classifier.training.augment.rand_augment import RandomOperations

__all__ = ["BatchAugment", "Mix", "RandomOperations"]
