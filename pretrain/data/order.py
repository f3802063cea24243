"""Which sample comes when: an endless sequence of epochs, any stretch of which can be asked for at once.

In each epoch the shards are permuted, the samples are permuted inside fixed blocks of consecutive (permuted) shards,
and the blocks are concatenated. The sequence depends on shard sizes, seed and block size only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def permutation(length: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of range(length) that depends on `key` alone.

    Drawn by sorting the raw output of a counter-based generator: numpy promises that stream for ever, but not what its
    `permutation` makes of it.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(length)
    return np.argsort(raw, kind="stable").astype(np.int64)


class SampleOrder:
    """The order in which a run sees the samples of a dataset split.

    Global batch t is positions [t * B, (t + 1) * B); rank r of W takes rows [r * B / W, (r + 1) * B / W) of it.

    Args:
        shard_sizes: samples in each shard; sample i of the split is the i-th in the order of shards.
        seed: of the run.
        block_shards: samples move at most as far as a block of this many shards reaches, so that the rows of
            neighbouring batches come from few shards.
        dataset: its number among several that are mixed: alike in size, they are not shuffled alike.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, block_shards: int, dataset: int = 0) -> None:
        assert sum(shard_sizes) > 0, "there is no order of no samples"
        self.num_samples = sum(shard_sizes)
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._key: tuple[int | str, ...] = (seed,) if dataset == 0 else (seed, "dataset", dataset)
        self._block_shards = block_shards
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._block = lru_cache(maxsize=2)(self._draw_block)

    def samples(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and sample indices, int64 [stop - start] each, at absolute positions [start, stop).

        Costs the sorting of the blocks it touches, wherever `start` lies.
        """
        epochs = np.empty(stop - start, dtype=np.int64)
        indices = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.num_samples)
            _, block_ends = self._epoch(epoch)
            number = int(np.searchsorted(block_ends, offset, side="right"))
            block = self._block(epoch, number)
            inside = offset - (int(block_ends[number]) - len(block))
            piece = block[inside : inside + stop - position]
            rows = slice(position - start, position - start + len(piece))
            epochs[rows], indices[rows] = epoch, piece
            position += len(piece)
        return epochs, indices

    def _draw_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards of an epoch, and the offset in the epoch at which each block ends."""
        shards = permutation(len(self._sizes), "shards", *self._key, epoch)
        last_of_block = np.arange(self._block_shards, len(shards) + self._block_shards, self._block_shards) - 1
        ends = np.cumsum(self._sizes[shards])
        return shards, ends[np.minimum(last_of_block, len(shards) - 1)]

    def _draw_block(self, epoch: int, number: int) -> NDArray[np.int64]:
        """The permuted sample indices of one block."""
        shards, _ = self._epoch(epoch)
        chosen = shards[number * self._block_shards : (number + 1) * self._block_shards]
        indices = np.concatenate([np.arange(self._sizes[s], dtype=np.int64) + self._starts[s] for s in chosen])
        return indices[permutation(len(indices), "samples", *self._key, epoch, number)]
