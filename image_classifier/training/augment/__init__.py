"""Random changes to whole batches of training pixels, on the training device; every choice comes from one generator on the CPU."""

from image_classifier.training.augment.batch import BatchAugment
from image_classifier.training.augment.mixup_cutmix import Mix
from image_classifier.training.augment.rand_augment import RandomOperations

__all__ = ["BatchAugment", "Mix", "RandomOperations"]
