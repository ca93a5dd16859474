"""Batches: every training image at most once an epoch, in an order decided by seed and epoch alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.training.datamodule import ShuffledBatches


@given(count=st.integers(1, 70), batch_size=st.integers(1, 80), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_is_a_shuffle(count: int, batch_size: int, seed: int, epoch: int) -> None:
    rows = np.arange(100, 100 + count)
    sampler = ShuffledBatches(rows, batch_size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) >= 1
    seen = np.concatenate(batches)
    assert len(set(seen.tolist())) == len(seen) and set(seen) <= set(rows)
    assert len(seen) > count - min(batch_size, count)
    assert all(np.array_equal(first, second) for first, second in zip(batches, sampler, strict=True))


def test_epochs_and_seeds_differ() -> None:
    orders = set()
    for seed in (0, 1):
        sampler = ShuffledBatches(np.arange(50), 10, seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders.add(tuple(np.concatenate(list(sampler)).tolist()))
    assert len(orders) == 4
