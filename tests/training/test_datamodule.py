"""Batches: every training image at most once an epoch, in an order decided by seed and epoch alone; only training
batches are augmented.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.dataset.pixel_cache import CacheSettings, PixelCache, open_cache
from image_classifier.errors import DataError
from image_classifier.images import Preprocess
from image_classifier.manifest import Manifest, Record
from image_classifier.training.augment import BatchAugment, Mix
from image_classifier.training.datamodule import BalancedBatches, Batch, ImageDataModule, ShuffledBatches
from tests.conftest import listed, write_image


@given(
    count=st.integers(1, 70),
    batch_size=st.integers(1, 80),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    balanced=st.booleans(),
)
def test_an_epoch_is_a_shuffle(count: int, batch_size: int, seed: int, epoch: int, balanced: bool) -> None:
    rows = np.arange(100, 100 + count)
    targets = np.arange(count) % 3
    sampler = BalancedBatches(rows, batch_size, seed, targets) if balanced else ShuffledBatches(rows, batch_size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) >= 1
    seen = np.concatenate(batches)
    assert set(seen) <= set(rows)
    assert count >= len(seen) > count - min(batch_size, count)
    assert balanced or len(set(seen.tolist())) == len(seen)
    assert all(np.array_equal(first, second) for first, second in zip(batches, sampler, strict=True))


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed in (0, 1):
        sampler = ShuffledBatches(np.arange(50), 10, seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders.add(tuple(np.concatenate(list(sampler)).tolist()))
    assert len(orders) == 4


SPLITS = ("train",) * 12 + ("val",) * 5 + ("test",) * 3


def table() -> tuple[Manifest, PixelCache]:
    """20 images of 6 x 6, each of one level: ten times its row."""
    records = [
        Record(f"{row:02d}.png", "ab"[row % 2], split, f"{row:016x}", f"{row:064x}", 6, 6)
        for row, split in enumerate(SPLITS)
    ]
    pixels = np.repeat(np.arange(20, dtype=np.uint8) * 10, 6 * 6 * 3).reshape(20, 6, 6, 3)
    return Manifest.of(Path("images"), records), PixelCache(pixels, np.arange(20))


class Watched(BatchAugment):
    """Remembers the rows it was given, and leaves a mark that no cached image has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __call__(
        self, pixels: torch.Tensor, targets: torch.Tensor, num_classes: int, generator: torch.Generator
    ) -> Batch:
        assert num_classes == 2
        self.rows += (pixels[:, 0, 0, 0] // 10).tolist()
        return torch.full_like(pixels, 255), targets


class Looker(pl.LightningModule):
    """Trains nothing, and keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.trained, self.validated = torch.nn.Parameter(torch.zeros(1)), list[int](), list[int]()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained += batch[0][:, 0, 0, 0].tolist()
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch[0][:, 0, 0, 0].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*logging interval.*", "ignore:.*GPU available.*"
)
def test_no_row_of_val_or_test_is_ever_augmented(balanced: bool, tmp_path: Path) -> None:
    manifest, cache = table()
    augment, module = Watched(), Looker()
    datamodule = ImageDataModule(cache, manifest, 4, augment, 0, channels_last=False, balanced=balanced)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)
    trainer.validate(module, datamodule=datamodule, verbose=False)
    assert set(augment.rows) == set(range(12)) and set(module.trained) == {255}
    assert set(module.validated) == {row * 10 for row in range(12, 17)}
    tested = [pixels[:, 0, 0, 0] for pixels, _ in datamodule.in_order("test")]
    assert torch.cat(tested).tolist() == [170, 180, 190]


def test_a_step_decides_its_augmentation() -> None:
    manifest, cache = table()
    datamodule = ImageDataModule(cache, manifest, 4, BatchAugment(mix=Mix()), 3, channels_last=False, balanced=False)
    batch = datamodule.batches[np.arange(4)]
    first, again, other = (datamodule.augmented(batch, step) for step in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    assert first[1].shape == (4, 2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_decoded_on_the_fly_come_in_the_same_batches(tree: Path, tmp_path: Path, split: str) -> None:
    records = [replace(record, split="val" if row % 4 == 0 else "train") for row, record in enumerate(listed(tree))]
    manifest = Manifest.of(tree, records)
    caches = [
        open_cache(manifest, Preprocess(8), CacheSettings(str(tmp_path / str(room)), max_gb=room)) for room in (1, 1e-6)
    ]
    assert [cache.is_whole for cache in caches] == [True, False]
    modules = [ImageDataModule(cache, manifest, 4, None, 0, channels_last=False, balanced=False) for cache in caches]
    whole, live = (
        list(module.train_dataloader() if split == "train" else module.in_order(split)) for module in modules
    )
    assert len(whole) == len(live) > 0
    assert all(
        torch.equal(one, other) for pair in zip(whole, live, strict=True) for one, other in zip(*pair, strict=True)
    )


def test_an_image_that_changes_while_training_stops_it_with_one_line(tree: Path, tmp_path: Path) -> None:
    manifest = Manifest.of(tree, [replace(record, split="train") for record in listed(tree)])
    cache = open_cache(manifest, Preprocess(8), CacheSettings(str(tmp_path), max_gb=0))
    write_image(tree / "cat" / "003.png", 777)
    with pytest.raises(DataError, match=r"cat/003\.png' changed"):
        list(ImageDataModule(cache, manifest, 4, None, 0, channels_last=False, balanced=False).train_dataloader())


@given(first=st.integers(0, 4), epoch=st.integers(0, 3))
def test_a_loader_goes_on_at_any_batch_and_names_its_images(first: int, epoch: int) -> None:
    manifest, cache = table()
    datamodule = ImageDataModule(cache, manifest, 3, None, 0, channels_last=False, balanced=False)
    state = torch.get_rng_state()
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(epoch)
    whole = [pixels[:, 0, 0, 0].tolist() for pixels, _ in loader]
    loader.load_state_dict({"first": first})
    assert [pixels[:, 0, 0, 0].tolist() for pixels, _ in loader] == whole[first:]
    assert [pixels[:, 0, 0, 0].tolist() for pixels, _ in loader] == whole
    assert [[int(path[:2]) * 10 for path in datamodule.paths_of(epoch, batch)] for batch in range(len(loader))] == whole
    assert torch.equal(torch.get_rng_state(), state)
