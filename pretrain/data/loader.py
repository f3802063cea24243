"""The two ways to go through a dataset split: for ever in shuffled epochs, or once in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset
from pretrain.config import DataConfig, TowersConfig
from pretrain.data.batch import Batch
from pretrain.data.mixture import Mixture
from pretrain.data.reader import BatchReader
from pretrain.data.workers import BatchStream

LAST = 1 << 62  # no run gets there


class TrainLoader:
    """This rank's rows of the global batches of a run, for ever; close it to end its processes.

    The batch at a position is a function of datasets, weights, seed and global batch size: of neither rank count nor
    workers nor what was read before.

    Args:
        global_batch: samples of one step over all `world` ranks.
        start_position: where to begin: the `next_position` of the last batch that was used.
        second_view: each batch also has `data.second_view` of its samples.

    Raises:
        UserError: ranks do not divide the global batch, the split is empty, or the tokenizer cannot be had.
    """

    def __init__(
        self,
        dataset: ShardedDataset | Mixture,
        data: DataConfig,
        towers: TowersConfig,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_position: int = 0,
        second_view: bool = False,
    ) -> None:
        if global_batch % world:
            below = global_batch - global_batch % world
            raise UserError(
                f"train.global_batch {global_batch} is not divisible by {world} ranks; nearest: "
                + (f"{below} or {below + world}" if below else str(world))
            )
        mixture = dataset if isinstance(dataset, Mixture) else Mixture([dataset])
        self._names = mixture.names
        self._order = mixture.order(seed, data.block_shards)
        second = data.second_view if second_view else None
        self._reader = BatchReader(mixture, towers, data.window_s, data.augment, seed, second)
        self._global_batch = global_batch
        self._rows = (rank * global_batch // world, (rank + 1) * global_batch // world)
        positions = range(start_position, LAST, global_batch)
        self._stream = BatchStream(self._reader, self._read, positions, data.num_workers, data.prefetch_batches)

    def __iter__(self) -> Iterator[Batch]:
        return self._stream

    def epochs_at(self, position: int) -> dict[str, float]:
        """Epochs of each dataset before `position`, as metrics: "epoch", or "epoch/NAME" where there are several."""
        epochs = self._order.epochs_at(position)
        names = ["epoch"] if len(epochs) == 1 else [f"epoch/{name}" for name in self._names]
        return dict(zip(names, epochs, strict=True))

    def close(self) -> None:
        """End the worker processes."""
        self._stream.close()

    def _read(self, position: int, check: Callable[[], None]) -> Batch:
        first, last = self._rows
        epochs, indices = self._order.samples(position + first, position + last)
        return self._reader.read(indices.tolist(), epochs.tolist(), position, position + self._global_batch, check)


class EvalLoader:
    """Each sample of a split once, in order, without augmentation: rank r of W has the r-th of W even stretches.

    Ranks may have different numbers of batches (`num_batches`), one or none; the last batch may be short. Positions
    are sample indices.

    Args:
        max_samples: stop after the first so many samples of the split; None: all.

    Raises:
        UserError: the split is empty, or the tokenizer cannot be had.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        data: DataConfig,
        towers: TowersConfig,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        max_samples: int | None = None,
    ) -> None:
        if not len(dataset):
            raise UserError(f"dataset {dataset.location}: split '{dataset.split}' has no samples")
        total = len(dataset) if max_samples is None else min(len(dataset), max_samples)
        self._batch_size = batch_size
        self._stop = (rank + 1) * total // world
        self._positions = range(rank * total // world, self._stop, batch_size)
        self._reader = BatchReader(dataset, towers, data.window_s, augment=None, seed=0)
        self._num_workers = min(data.num_workers, len(self._positions))
        self._prefetch = data.prefetch_batches
        self._streams: list[BatchStream] = []

    @property
    def num_batches(self) -> int:
        """Batches of this rank."""
        return len(self._positions)

    def __iter__(self) -> Iterator[Batch]:
        stream = BatchStream(self._reader, self._read, self._positions, self._num_workers, self._prefetch)
        self._streams.append(stream)
        try:
            yield from stream
        finally:
            stream.close()
            self._streams.remove(stream)

    def close(self) -> None:
        """End the worker processes of passes that were not finished."""
        for stream in self._streams:
            stream.close()

    def _read(self, position: int, check: Callable[[], None]) -> Batch:
        stop = min(position + self._batch_size, self._stop)
        return self._reader.read(range(position, stop), [0] * (stop - position), position, stop, check)
