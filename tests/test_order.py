"""The order of samples: each once an epoch, any stretch at once, a function of sizes, seed and block only."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.data.order import SampleOrder

SIZES = [7, 3, 0, 11, 5, 5, 1]
TOTAL = sum(SIZES)


@pytest.mark.parametrize("block_shards", [1, 2, 3, 100])
def test_each_epoch_has_each_sample_once(block_shards: int) -> None:
    epochs, indices = SampleOrder(SIZES, seed=3, block_shards=block_shards).samples(0, 5 * TOTAL)
    seen = []
    for epoch in range(5):
        stretch = slice(epoch * TOTAL, (epoch + 1) * TOTAL)
        assert (epochs[stretch] == epoch).all()
        assert sorted(indices[stretch].tolist()) == list(range(TOTAL))
        seen.append(tuple(indices[stretch].tolist()))
    assert len(set(seen)) == 5  # another order each time


@pytest.mark.parametrize("block_shards", [1, 2, 100])
def test_random_access_equals_sequential_reading_whatever_was_read_before(block_shards: int) -> None:
    epochs, indices = SampleOrder(SIZES, seed=1, block_shards=block_shards).samples(0, 4 * TOTAL)
    random = np.random.default_rng(0)
    reused = SampleOrder(SIZES, seed=1, block_shards=block_shards)
    for _ in range(50):
        start, stop = sorted(random.integers(0, 4 * TOTAL + 1, 2).tolist())
        for order in (reused, SampleOrder(SIZES, seed=1, block_shards=block_shards)):
            some_epochs, some_indices = order.samples(start, stop)
            assert some_epochs.tolist() == epochs[start:stop].tolist()
            assert some_indices.tolist() == indices[start:stop].tolist()


def test_a_far_position_is_reached_at_once() -> None:
    order = SampleOrder(SIZES, seed=0, block_shards=2)
    start = 10**12 // TOTAL * TOTAL  # an epoch begins here
    epochs, indices = order.samples(start, start + TOTAL)
    assert set(epochs.tolist()) == {start // TOTAL}
    assert sorted(indices.tolist()) == list(range(TOTAL))
    assert order.samples(start + 5, start + 9)[1].tolist() == indices[5:9].tolist()


def test_samples_stay_in_blocks_of_shards_and_mix_inside() -> None:
    sizes = [10] * 12
    _, indices = SampleOrder(sizes, seed=5, block_shards=3).samples(0, 120)
    shards_of_blocks = [(indices[start : start + 30] // 10) for start in range(0, 120, 30)]
    for shards in shards_of_blocks:
        assert len(set(shards.tolist())) == 3
        assert (np.diff(shards) != 0).sum() > 5  # not one shard after the other
    assert {tuple(sorted(set(shards.tolist()))) for shards in shards_of_blocks} != {
        (0, 1, 2),
        (3, 4, 5),
        (6, 7, 8),
        (9, 10, 11),
    }  # fmt: skip - the shards themselves are permuted


def test_seed_changes_the_order() -> None:
    orders = {tuple(SampleOrder(SIZES, seed=seed, block_shards=2).samples(0, TOTAL)[1].tolist()) for seed in (-1, 0, 1)}
    assert len(orders) == 3


def test_the_order_is_the_one_of_earlier_releases() -> None:
    """Written down once: a checkpoint's position means the same samples in every later version."""
    epochs, indices = SampleOrder([5, 3, 4], seed=7, block_shards=2).samples(0, 24)
    assert epochs.tolist() == [0] * 12 + [1] * 12
    first = [7, 9, 11, 6, 10, 5, 8, 0, 1, 3, 4, 2]
    assert indices.tolist() == [*first, 0, 8, 9, 10, 3, 1, 4, 11, 2, 7, 5, 6]
