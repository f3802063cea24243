"""Several datasets as one endless sequence of samples, mixed by weight.

The sequence is cut into windows of `WINDOW` positions. Each dataset has the same number of positions in every window,
permuted by (seed, window); its samples come to them in its own order and epochs. Where position p leads is therefore
found from p's window alone, wherever p lies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset
from pretrain.data.order import SampleOrder, permutation

WINDOW = 4096  # positions; a weight is met to 1 / WINDOW


def positions_a_window(weights: Sequence[float | None], sizes: Sequence[int], names: Sequence[str]) -> list[int]:
    """How many of the `WINDOW` positions each dataset has, by largest remainder.

    Args:
        weights: relative shares; all None: in proportion to `sizes`, the numbers of samples.
        names: of the datasets, for the message.

    Raises:
        UserError: a dataset would have none.
    """
    shares = np.array([size if weight is None else weight for weight, size in zip(weights, sizes, strict=True)], float)
    exact = shares / shares.sum() * WINDOW
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: WINDOW - int(counts.sum())]] += 1
    for name, share, count in zip(names, exact / WINDOW, counts, strict=True):
        if count == 0:
            raise UserError(
                f"data.train: {name} would be {share:.2g} of the samples; expected a weight that makes it at least "
                f"{1 / WINDOW:.2g} of them"
            )
    return [int(count) for count in counts]


class MixtureOrder:
    """The order in which a run sees the samples of several datasets; of one dataset, that of its `SampleOrder`.

    Sample ids of dataset d begin where those of the dataset before end. Every sample of a dataset comes once in each
    of that dataset's epochs.

    Args:
        counts: positions of each dataset in a window, as of `positions_a_window`.
        shard_sizes: samples in each shard of each dataset.
    """

    def __init__(
        self, counts: Sequence[int], shard_sizes: Sequence[Sequence[int]], seed: int, block_shards: int
    ) -> None:
        assert sum(counts) == WINDOW, "a window is not full"
        self._counts = np.asarray(counts, dtype=np.int64)
        self._orders = [
            SampleOrder(sizes, seed, block_shards, dataset=number) for number, sizes in enumerate(shard_sizes)
        ]
        sizes = [order.num_samples for order in self._orders]
        self._first_ids = np.cumsum(sizes) - sizes
        self._seed = seed
        self._labels = lru_cache(maxsize=2)(self._draw_labels)

    def samples(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs (each sample's own dataset's) and sample ids, int64 [stop - start] each, at positions [start, stop).

        Costs the drawing of the windows and blocks it touches, wherever `start` lies.
        """
        epochs = np.empty(stop - start, dtype=np.int64)
        ids = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            window, offset = divmod(position, WINDOW)
            labels = self._labels(window)[offset : offset + stop - position]
            before = self._before(window, offset)
            for number, order in enumerate(self._orders):
                places = position - start + np.flatnonzero(labels == number)
                if len(places):
                    first = before[number]
                    epochs[places], own = order.samples(first, first + len(places))
                    ids[places] = own + self._first_ids[number]
            position += len(labels)
        return epochs, ids

    def epochs_at(self, position: int) -> list[float]:
        """How many epochs of each dataset lie before `position`."""
        before = self._before(*divmod(position, WINDOW))
        return [count / order.num_samples for count, order in zip(before, self._orders, strict=True)]

    def _before(self, window: int, offset: int) -> list[int]:
        """How many positions of each dataset come before this one."""
        inside = np.bincount(self._labels(window)[:offset], minlength=len(self._orders))
        return [window * int(count) + int(more) for count, more in zip(self._counts, inside, strict=True)]

    def _draw_labels(self, window: int) -> NDArray[np.int64]:
        """The number of the dataset at each position of a window."""
        labels = np.repeat(np.arange(len(self._orders), dtype=np.int64), self._counts)
        if len(self._orders) == 1:
            return labels
        return labels[permutation(WINDOW, "mixture", self._seed, window)]


class Mixture:
    """Several dataset splits behind the interface of one: sample ids are those of `MixtureOrder`.

    Args:
        datasets: at least one; none without samples.
        weights: as `positions_a_window` takes them; None: all None.

    Raises:
        UserError: a split has no samples, or so small a weight that it would never be seen.
    """

    def __init__(self, datasets: Sequence[ShardedDataset], weights: Sequence[float | None] | None = None) -> None:
        self.datasets = list(datasets)
        for dataset in self.datasets:
            if not len(dataset):
                raise UserError(f"dataset {dataset.location}: split '{dataset.split}' has no samples")
        self.names = unique_names([dataset.name for dataset in self.datasets])
        self._weights = list(weights) if weights is not None else [None] * len(self.datasets)
        sizes = [len(dataset) for dataset in self.datasets]
        self.counts = positions_a_window(self._weights, sizes, [dataset.location for dataset in self.datasets])
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def order(self, seed: int, block_shards: int) -> MixtureOrder:
        """The order in which a run of `seed` sees the samples."""
        return MixtureOrder(self.counts, [dataset.shard_sizes for dataset in self.datasets], seed, block_shards)

    def numbers(self, ids: Iterable[int]) -> list[int]:
        """The number of the dataset that each sample is of."""
        return [bisect_right(self._ends, sample) for sample in ids]

    def numbers_in_log(self, ids: Iterable[int]) -> list[int] | None:
        """`numbers` where there are several datasets."""
        return self.numbers(ids) if len(self.datasets) > 1 else None

    def row(self, sample: int) -> dict[str, Any]:
        """The index row of a sample."""
        dataset, position = self._find(sample)
        return dataset.row(position)

    def location_of(self, sample: int) -> str:
        """Where the dataset of a sample is."""
        return self._find(sample)[0].location

    def read_member(self, sample: int, slot: str, row: dict[str, Any] | None = None) -> bytes | None:
        """As `ShardedDataset.read_member`."""
        dataset, position = self._find(sample)
        return dataset.read_member(position, slot, row)

    def expect(self, samples: Sequence[int]) -> None:
        """As `ShardedDataset.expect`."""
        for dataset, end in zip(self.datasets, self._ends, strict=True):
            if dataset.is_remote:
                first = end - len(dataset)
                dataset.expect([sample - first for sample in samples if first <= sample < end])

    def close(self) -> None:
        """Close the open tars."""
        for dataset in self.datasets:
            dataset.close()

    def _find(self, sample: int) -> tuple[ShardedDataset, int]:
        number = bisect_right(self._ends, sample)
        dataset = self.datasets[number]
        return dataset, sample - (self._ends[number] - len(dataset))


def unique_names(names: Sequence[str]) -> list[str]:
    """`names`, each that is there more than once with its number behind it."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}-{number}" for number, name in enumerate(names)]
