"""Flips and shifts by whole pixels are exact copies; an alternating flip shows each image from both sides in any two
epochs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.errors import ConfigError
from image_classifier.manifest import Manifest, Record
from image_classifier.training.augment import BatchAugment, geometry
from image_classifier.training.augment.erasing import cut_out
from image_classifier.training.datamodule import ImageDataModule

STILL: dict[str, Any] = {"crop_scale": (1, 1), "aspect": (1, 1)}
COUNT, SIZE = 12, 8


def noise(count: int, side: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, *side), dtype=np.uint8))


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 5),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    last=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_copy_is_the_crop_of_a_padded_image(count: int, height: int, width: int, last: bool, seed: int) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    pixels, rng = noise(count, (height, width), seed).contiguous(memory_format=layout), np.random.default_rng(seed)
    down, across = (torch.from_numpy(rng.integers(-2, 3, count)) for _ in range(2))
    mirrored = torch.from_numpy(rng.random(count) < 0.5)
    border, padding = ("reflect", "reflect") if seed % 2 else ("background", "replicate")
    copies = geometry.copied(pixels, down, across, mirrored, border)
    padded = functional.pad(
        torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels).float(), (2, 2, 2, 2), padding
    ).to(torch.uint8)
    for copy, image, y, x in zip(copies, padded, down.tolist(), across.tolist(), strict=True):
        assert torch.equal(copy, image[:, 2 - y : 2 - y + height, 2 - x : 2 - x + width])
    assert copies.is_contiguous(memory_format=layout)


def test_every_shift_is_equally_likely_and_half_of_the_images_are_mirrored() -> None:
    pixels = torch.zeros(4000, 3, 9, 9, dtype=torch.uint8)
    pixels[:, :, 4, 3] = 255  # a point left of the middle: its mirror image lies right of it
    augment = BatchAugment(**STILL, flip=True, shift=1)
    moved, _ = augment(pixels, torch.zeros(4000, dtype=torch.int64), 1, torch.Generator().manual_seed(0))
    rows, columns = moved[:, 0].flatten(1).argmax(dim=1) // 9, moved[:, 0].flatten(1).argmax(dim=1) % 9
    assert set(rows.tolist()) == {3, 4, 5} and torch.bincount(rows)[3:].min() > 1200
    assert set(columns.tolist()) == {2, 3, 4, 5, 6}
    assert 1800 < int((columns > 4).sum() + (columns == 4).sum() / 2) < 2200


def test_a_cut_out_square_has_the_images_mean_colour_and_the_rest_stays() -> None:
    pixels = noise(20, (16, 16), 0)
    cut = cut_out(pixels, 6, torch.Generator().manual_seed(0))
    changed = (cut != pixels).any(dim=1)
    assert changed.flatten(1).sum(dim=1).max() <= 36 and changed.flatten(1).any(dim=1).all()
    mean = pixels.float().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8)
    assert torch.equal(cut, torch.where((cut == pixels), pixels, mean.expand_as(pixels)))


@pytest.mark.parametrize("key", ["shift", "cutout"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "many"])
def test_a_value_that_is_no_number_of_pixels_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"augment.{key}"):
        BatchAugment(**{key: value})


def module_over(augment: BatchAugment, views: int = 1, **more: Any) -> ImageDataModule:
    """Images dark at the left and bright at the right, each of its own brightness."""
    pixels = np.zeros((COUNT, SIZE, SIZE, 3), np.uint8)
    pixels[:, :, SIZE // 2 :] = (np.arange(COUNT, dtype=np.uint8) + 1).reshape(-1, 1, 1, 1)
    records = [
        Record(f"{row:02d}.png", "ab"[row % 2], "train" if row < 10 else "val", f"{row:016x}", f"{row:064x}", 6, 6)
        for row in range(COUNT)
    ]
    cache = PixelCache(pixels, np.arange(COUNT))
    return ImageDataModule(cache, Manifest.of(Path("images"), records), 5, augment, 3, False, False, views, **more)


class Watching(pl.LightningModule):
    """Keeps what each training step is given: (epoch, pixels)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), list[tuple[int, torch.Tensor]]()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch[0].clone()))
        return self.layer(torch.zeros(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def watched(datamodule: ImageDataModule, **limits: Any) -> Watching:
    module = Watching()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    trainer = pl.Trainer(accelerator="cpu", limit_val_batches=0, use_distributed_sampler=False, **quiet, **limits)
    trainer.fit(module, datamodule=datamodule)
    return module


def test_two_epochs_of_an_alternating_flip_show_each_image_from_both_sides() -> None:
    sides: dict[int, list[list[bool]]] = {}
    for epoch, pixels in watched(module_over(BatchAugment(**STILL, flip=True, alternate_flip=True)), max_epochs=4).seen:
        for image in pixels:
            sides.setdefault(int(image.max()), [[] for _ in range(4)])[epoch].append(bool(image[0, 0, 0] > 0))
    assert len(sides) == 10
    for epochs in sides.values():
        assert [len(seen) for seen in epochs] == [1] * 4
        (first,), (second,), (third,), (fourth,) = epochs
        assert first == third != second == fourth
    assert len({epochs[0][0] for epochs in sides.values()}) == 2  # in each epoch some are mirrored and some are not


def test_both_views_of_an_image_are_opposite() -> None:
    datamodule = module_over(BatchAugment(**STILL, flip=True, alternate_flip=True), views=2)
    rows = datamodule.batch_rows(0, 1)
    pixels, _ = datamodule.augmented(datamodule.batches[rows], 1, 0, rows)
    assert torch.equal(pixels[:5], pixels[5:].flip(3))


def test_images_that_must_not_be_mirrored_never_are() -> None:
    augment = BatchAugment(**STILL, flip=False, alternate_flip=True, shift=2)
    for epoch, pixels in watched(module_over(augment), max_epochs=2).seen:
        assert epoch in (0, 1) and not (pixels[:, :, :, 0] > pixels[:, :, :, -1]).any()
