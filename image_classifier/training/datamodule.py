"""The data module: whole batches of cached pixels, shuffled by seed and epoch, augmented on the training device.

A batch may hold more pixels than targets: the last images are unlabelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from image_classifier.dataset.pixel_cache import PixelCache
from image_classifier.errors import ConfigError
from image_classifier.manifest import SPLITS, Manifest
from image_classifier.training.augment.geometry import downsized
from image_classifier.training.balance import balanced_rows
from image_classifier.training.distributed import rank, rank_share, world_size

Batch = tuple[torch.Tensor, torch.Tensor]
# Pixels uint8 [N, 3, S, S], targets int64 [N], the number of classes and a generator -> pixels, and targets or class
# probabilities [N, C]. One that has `alternate_flip` also takes which images to mirror, bool [N].
Augment = Callable[..., Batch]


class PixelBatches:
    """Batches by row numbers: pixels uint8 [B, 3, S, S] and targets int64; the cache keeps pixels channels last.

    Rows beyond the targets are unlabelled, and come last in a batch.
    """

    def __init__(self, cache: PixelCache, targets: np.ndarray, channels_last: bool) -> None:
        self.cache, self.targets = cache, targets
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __getitem__(self, rows: np.ndarray) -> Batch:
        pixels = torch.from_numpy(self.cache.gather(rows)).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=self.layout), torch.from_numpy(
            self.targets[rows[rows < len(self.targets)]]
        )


class ShuffledBatches:
    """The rows in a new order each epoch, decided by (seed, epoch) alone; a last, smaller batch is left out."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.batch_size = min(batch_size, len(rows))
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def order(self) -> np.ndarray:
        """Return this epoch's rows, int64 [N]."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.rows)

    def of_all_ranks(self) -> Iterator[np.ndarray]:
        """Yield the rows of each global batch, int64 [B]."""
        order = self.order()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from map(rank_share, self.of_all_ranks())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this at the start of each."""
        self.epoch = epoch


class BalancedBatches(ShuffledBatches):
    """As many rows an epoch, but each class equally often.

    A rare class repeats rows; of a frequent one, some rows wait for a later epoch.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, targets: np.ndarray) -> None:
        """`targets` int64 [N] are the classes of `rows`."""
        super().__init__(rows, batch_size, seed)
        self.targets = targets

    def order(self) -> np.ndarray:
        return balanced_rows(self.rows, self.targets, self.seed, self.epoch)


class WithUnlabelled:
    """The batches of labelled rows, each followed by as many unlabelled rows as their share of all rows.

    An epoch is one pass over the labelled rows, and about one over the unlabelled ones. Each rank has as many rows of
    each kind in a batch as the others, and at least one.
    """

    def __init__(self, labelled: Callable[[int], ShuffledBatches], count: int, rows: np.ndarray, size: int) -> None:
        """Set up the batches.

        Args:
            labelled: Makes the batches of labelled rows of a given size.
            count: Number of labelled rows.
            rows: The unlabelled rows, int64 [U].
            size: Rows of a batch, both kinds together.
        """
        ranks = world_size()
        share = round(size * count / (count + len(rows)) / ranks)
        self.labelled = labelled(ranks * max(1, min(share, size // ranks - 1)))
        self.rows, self.num_unlabelled = rows, max(ranks, size - self.labelled.batch_size)

    def __len__(self) -> int:
        return len(self.labelled)

    def of_all_ranks(self) -> Iterator[np.ndarray]:
        """Yield the rows of each global batch, int64 [B]."""
        order = np.random.default_rng((self.labelled.seed, self.labelled.epoch, 1)).permutation(self.rows)
        order = np.resize(order, (len(self), self.num_unlabelled))  # from the start again where they are too few
        yield from map(np.concatenate, zip(self.labelled.of_all_ranks(), order, strict=True))

    def __iter__(self) -> Iterator[np.ndarray]:
        for rows in self.of_all_ranks():
            parts = np.split(rows, [self.labelled.batch_size])
            yield np.concatenate([rank_share(part) for part in parts])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this at the start of each."""
        self.labelled.set_epoch(epoch)


TrainBatches = ShuffledBatches | WithUnlabelled


class BatchLoader:
    """The batches of one split, in the order of `sampler`, which gives the rows of each batch.

    Its state is the first batch, so that an interrupted epoch resumes where it stopped. torch's DataLoader forgets its
    position, and draws from the global random state whenever it starts.
    """

    batch_sampler = None  # Lightning looks for one where it finds a sampler

    def __init__(
        self, batches: PixelBatches, sampler: TrainBatches | Sequence[np.ndarray], pinned: bool = False
    ) -> None:
        """With `pinned`, batches are made ahead in page-locked memory, from which a GPU copies while it computes."""
        self.batches = batches
        self.sampler = sampler  # Lightning sets the epoch of a loader's sampler
        self.pinned = pinned
        self._first = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # Read when the first batch is needed: Lightning may create an iterator that it never uses.
        first, self._first = self._first, 0
        made = (self.batches[rows] for rows in islice(iter(self.sampler), first, None))
        if self.pinned:
            made = ((pixels.pin_memory(), targets.pin_memory()) for pixels, targets in made)
        yield from made if self.batches.cache.is_whole and not self.pinned else _ahead(made)

    def state_dict(self) -> dict[str, int]:
        return {"first": self._first}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["first"]


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches, making the next one while the caller works on this one; for a cache that decodes on demand."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch


class ImageDataModule(pl.LightningDataModule):
    """Feeds cached pixels by split; only training batches are augmented, and only training rows are balanced."""

    def __init__(
        self,
        cache: PixelCache,
        manifest: Manifest,
        batch_size: int,
        augment: Augment | None,
        seed: int,
        channels_last: bool,
        balanced: bool,
        views: int = 1,
        progressive_sizes: Sequence[int] | None = None,
        unlabelled: Sequence[str] = (),
    ) -> None:
        """Set up the batches; the cache's rows after those of the manifest are the images at the paths `unlabelled`."""
        super().__init__()
        self.batches = PixelBatches(cache, manifest.targets, channels_last)
        self.batch_size = batch_size
        self.rows = {split: manifest.indices(split) for split in SPLITS}
        self.num_classes = len(manifest.classes)
        self.augment, self.seed, self.balanced, self.views = augment, seed, balanced, views
        self.paths, self.unlabelled = manifest.paths, unlabelled
        self.progressive_sizes = progressive_sizes
        # Puts another loader in the place of one of a fit, such as one of kept activations (transfer/activations.py).
        self.replaced: Callable[[BatchLoader], BatchLoader] | None = None
        self._steps = 0  # of the run, once known
        self._generator = torch.Generator()
        self._epoch, self._batches = -1, list[np.ndarray]()

    def train_dataloader(self) -> BatchLoader:
        loader = BatchLoader(self.batches, self._train_batches(), self._on_cuda())
        return self.replaced(loader) if self.replaced else loader

    def val_dataloader(self) -> BatchLoader:
        loader = self.in_order("val")
        return self.replaced(loader) if self.replaced else loader

    def in_order(self, split: str) -> BatchLoader:
        """Return this rank's share of one split (of a single process: all rows) in manifest order."""
        rows, size = rank_share(self.rows[split]), 4 * self.batch_size // world_size()
        if world_size() > 1:
            # As many batches on every rank: the ranks of a sharded network wait for one another.
            max_rows = -(-len(self.rows[split]) // world_size())
            return BatchLoader(self.batches, np.array_split(rows, -(-max_rows // size)))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return BatchLoader(self.batches, batches, self._on_cuda())

    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def augmented(self, batch: Batch, step: int, epoch: int = 0, rows: np.ndarray | None = None) -> Batch:
        """Return a batch as training sees it; (seed, step) decide everything random.

        With two views, rows i and i + N/2 are one image, augmented twice.

        Args:
            batch: Pixels uint8 [N, 3, S, S] and targets int64, one each, or fewer: then the last images are unlabelled,
                and are mixed only with one another.
            step: Its number among all batches of the run.
            epoch: Decides, with `rows`, which images an alternating flip mirrors.
            rows: The images' rows, int64 [N].
        """
        self._generator.manual_seed(self.seed * 1_000_003 + step + rank() * 2**40)
        mirrored = self.mirrored(rows, epoch) if rows is not None and self.alternates else None
        pixels, targets = batch
        count = len(targets)
        if len(pixels) == count:
            return self._augmented(pixels, targets, mirrored)
        first, last = (None, None) if mirrored is None else (mirrored[:count], mirrored[count:])
        labelled, targets = self._augmented(pixels[:count], targets, first)
        unlabelled, _ = self._augmented(pixels[count:], targets.new_zeros(len(pixels) - count, dtype=torch.long), last)
        return torch.cat([labelled, unlabelled]), targets

    def _augmented(self, pixels: torch.Tensor, targets: torch.Tensor, mirrored: torch.Tensor | None) -> Batch:
        """Return images of one kind, labelled or not, augmented, with their targets; `mirrored` is bool [N]."""
        if self.views == 2:
            pixels, targets = torch.cat([pixels, pixels]), torch.cat([targets, targets])
            mirrored = None if mirrored is None else torch.cat([mirrored, ~mirrored])
        if self.augment is None:
            return pixels, targets
        extra = () if mirrored is None else (mirrored,)
        return self.augment(pixels, targets, self.num_classes, self._generator, *extra)

    @property
    def alternates(self) -> bool:
        """Whether the augmentation mirrors each image in every second epoch."""
        return bool(getattr(self.augment, "alternate_flip", False))

    def mirrored(self, rows: np.ndarray, epoch: int) -> torch.Tensor:
        """Return which images an alternating flip mirrors in this epoch, bool [N]: a half, the others in the next."""
        return torch.from_numpy(self._mirrored_first[rows] ^ bool(epoch % 2))

    @cached_property
    def _mirrored_first(self) -> np.ndarray:
        return np.random.default_rng((self.seed, 2)).random(len(self.batches.cache.rows)) < 0.5

    def batch_rows(self, epoch: int, batch_idx: int) -> np.ndarray:
        """Return the manifest rows of this rank's share of one training batch, int64 [N]."""
        if self._epoch != epoch:
            batches = self._train_batches()
            batches.set_epoch(epoch)
            self._epoch, self._batches = epoch, list(batches)
        return self._batches[batch_idx]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer is None or not self.trainer.training or self.replaced:
            return batch
        loop = self.trainer.fit_loop.epoch_loop
        rows = self.batch_rows(self.trainer.current_epoch, loop.batch_idx + 1) if self.alternates else None
        pixels, targets = self.augmented(batch, loop.total_batch_idx + 1, self.trainer.current_epoch, rows)
        return self._sized(pixels, self.trainer.global_step), targets

    def _sized(self, pixels: torch.Tensor, step: int) -> torch.Tensor:
        """Return the batch at the image size of this step: each size has an equal share of the run."""
        if not self.progressive_sizes:
            return pixels
        if not self._steps:
            self._steps = run_length(self.trainer, "data.progressive_sizes")
        sizes = self.progressive_sizes
        phase = min(step * len(sizes) // self._steps, len(sizes) - 1)
        return downsized(pixels, sizes[phase])

    def paths_of(self, epoch: int, batch_idx: int) -> list[str]:
        """Return the paths of one training batch, over all ranks; `epoch` and `batch_idx` count from 0."""
        sampler = self._train_batches()
        sampler.set_epoch(epoch)
        rows = next(islice(sampler.of_all_ranks(), batch_idx, None)).tolist()
        count = len(self.paths)
        return [self.paths[row] if row < count else self.unlabelled[row - count] for row in rows]

    def _train_batches(self) -> TrainBatches:
        if not self.unlabelled:
            return self._labelled_batches(self.batch_size)
        rows = len(self.paths) + np.arange(len(self.unlabelled))
        return WithUnlabelled(self._labelled_batches, len(self.rows["train"]), rows, self.batch_size)

    def _labelled_batches(self, size: int) -> ShuffledBatches:
        rows = self.rows["train"]
        if self.balanced:
            return BalancedBatches(rows, size, self.seed, self.batches.targets[rows])
        return ShuffledBatches(rows, size, self.seed)


def run_length(trainer: pl.Trainer | None, who: str) -> int:
    """Return the optimizer steps of the run.

    Raises:
        ConfigError: Nothing limits the run, and the setting `who` needs its length.
    """
    steps = trainer.estimated_stepping_batches if trainer else float("inf")
    if steps == float("inf"):
        raise ConfigError(f"{who} needs a run of known length", "set trainer.max_epochs or trainer.max_steps")
    return max(1, int(steps))
