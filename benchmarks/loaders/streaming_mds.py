"""mosaicml-streaming: MDS shards, order from (seed, epoch), position from the number of samples seen."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.clips import Clip
from benchmarks.loaders.contender import (
    EXTENSIONS,
    SAMPLES_PER_SHARD,
    Collation,
    Contender,
    Setting,
    batch_of,
)
from pretrain.data.batch import Batch
from pretrain.towers.torchvision_ops import allow_torchvision

allow_torchvision()

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402 - imports torchvision


class MosaicStreaming(Contender):
    name = "mosaicml-streaming"
    how = "MDSWriter without compression; StreamingDataset(local, shuffle=True, py1e by default), StreamingDataLoader"
    resume = "loader.state_dict(): epoch and samples seen"

    @staticmethod
    def version() -> str:
        return version("mosaicml-streaming")

    @staticmethod
    def write(clips: Sequence[Clip], folder: Path) -> None:
        mean_bytes = sum(len(part) for clip in clips for part in clip.members.values()) // len(clips)
        columns = dict.fromkeys(EXTENSIONS, "bytes")
        with MDSWriter(out=str(folder), columns=columns, size_limit=mean_bytes * SAMPLES_PER_SHARD) as writer:
            for clip in clips:
                writer.write(clip.members)

    def __init__(self, setting: Setting, state: dict[str, Any] | None) -> None:
        dataset = StreamingDataset(
            local=str(setting.folder), shuffle=True, shuffle_seed=setting.seed, batch_size=setting.local_batch
        )
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
        state = self._loader.state_dict()
        assert state is not None
        return dict(state)

    @classmethod
    def state_at(cls, setting: Setting, step: int) -> dict[str, Any]:
        steps_an_epoch = -(-setting.num_samples // setting.global_batch)
        epoch, inside = divmod(step, steps_an_epoch)
        return {
            "epoch": epoch,
            "sample_in_epoch": inside * setting.global_batch,
            "num_canonical_nodes": 1,
            "shuffle_seed": setting.seed,
            "initial_physical_nodes": 1,
        }

    def close(self) -> None:
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
            self._loader._iterator = None
