"""litdata: binary chunks, order from (seed, epoch), state re-striped over another grid of ranks and workers."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize

from benchmarks.clips import Clip
from benchmarks.loaders.contender import (
    EXTENSIONS,
    SAMPLES_PER_SHARD,
    Collation,
    Contender,
    Members,
    Setting,
    batch_of,
)
from pretrain.data.batch import Batch


def members_of(clip: Clip) -> Members:
    """What litdata stores of a sample."""
    return {extension: clip.members[extension] for extension in EXTENSIONS}


class LitData(Contender):
    name = "litdata"
    how = (
        "optimize(chunk_size); StreamingDataset(shuffle=True, drop_last=False), StreamingDataLoader; drop_last is "
        "stated because its default depends on the number of ranks, and a state under one is refused under the other"
    )
    resume = "loader.state_dict(): epoch and samples seen, elastic"

    @staticmethod
    def version() -> str:
        return version("litdata")

    @staticmethod
    def write(clips: Sequence[Clip], folder: Path) -> None:
        optimize(
            fn=members_of, inputs=list(clips), output_dir=str(folder), chunk_size=SAMPLES_PER_SHARD, num_workers=1,
            verbose=False,
        )  # fmt: skip

    def __init__(self, setting: Setting, state: dict[str, Any] | None) -> None:
        warnings.filterwarnings("ignore", module="litdata")
        dataset = StreamingDataset(str(setting.folder), shuffle=True, drop_last=False, seed=setting.seed)
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=setting.local_batch,
            num_workers=setting.num_workers,
            prefetch_factor=setting.prefetch,
            collate_fn=Collation(setting),
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def batches(self) -> Generator[Batch, None, None]:
        while True:
            for collated in self._loader:
                yield batch_of(collated)

    def rest_of_epoch(self) -> Iterator[list[str]]:
        for collated in self._loader:
            yield batch_of(collated).keys

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict()

    @classmethod
    def state_at(cls, setting: Setting, step: int) -> dict[str, Any]:
        """Of a loader that has begun, moved to the step: a state is all integers."""
        loader = cls(setting, None)
        next(loader.batches())
        state = loader.state()
        loader.close()
        steps_an_epoch = -(-setting.num_samples // setting.global_batch)
        epochs, inside = divmod(step, steps_an_epoch)
        num_samples = inside * setting.local_batch
        worker = (inside - 1) % max(1, setting.num_workers)
        state |= {"current_epoch": 1 + epochs, "num_samples_yielded": num_samples, "latest_worker_idx": worker}
        state["dataset"] |= {
            "current_epoch": 1 + epochs,
            "num_samples_yielded": num_samples,
            "sample_in_epoch": num_samples * setting.world,
        }
        return state

    def close(self) -> None:
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None
