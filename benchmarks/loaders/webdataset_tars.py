"""webdataset: tars read from front to back, shards split over ranks and workers, a buffer that shuffles."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset as wds

from benchmarks.clips import Clip
from benchmarks.loaders.contender import (
    SAMPLES_PER_SHARD,
    Collation,
    Contender,
    Setting,
    batch_of,
)
from pretrain.data.batch import Batch

BUFFER_SAMPLES = 1000  # of its README


class WebDataset(Contender):
    name = "webdataset"
    how = (
        "ShardWriter; WebDataset(shardshuffle, nodesplitter=split_by_node).shuffle(1000).batched, WebLoader; each "
        "epoch built with its own seed, so that replay is possible; batches are not mixed across workers"
    )
    resume = "no state: read the samples again and drop them"
    resampled = False

    @staticmethod
    def version() -> str:
        return version("webdataset")

    @staticmethod
    def write(clips: Sequence[Clip], folder: Path) -> None:
        with wds.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
            for clip in clips:
                writer.write({"__key__": clip.key, **clip.members})

    def __init__(self, setting: Setting, state: dict[str, Any] | None) -> None:
        self._setting = setting
        self._read = 0 if state is None else int(state["num_samples"]) // setting.world  # of this rank
        self._skip = self._read
        self._loader: Any = None

    def _open(self, epoch: int) -> Iterator[Batch]:
        setting = self._setting
        urls = sorted(str(path) for path in setting.folder.glob("*.tar"))
        seed = setting.seed + epoch
        if self.resampled:
            dataset = wds.WebDataset(
                urls, resampled=True, shardshuffle=False, nodesplitter=wds.split_by_node, seed=seed
            )
        else:
            dataset = wds.WebDataset(
                urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node, seed=seed, empty_check=False
            )
        dataset = dataset.shuffle(BUFFER_SAMPLES, seed=seed).batched(
            setting.local_batch, collation_fn=Collation(setting)
        )
        self._loader = wds.WebLoader(
            dataset, batch_size=None, num_workers=setting.num_workers, prefetch_factor=setting.prefetch
        )
        if self.resampled:
            self._loader = self._loader.with_epoch(setting.num_samples // setting.global_batch)
        for collated in self._loader:
            yield batch_of(collated)

    def batches(self) -> Generator[Batch, None, None]:
        epoch = 0
        while True:
            for batch in self._open(epoch):
                if self._skip:
                    self._skip = max(0, self._skip - batch.num_samples)
                    continue
                self._read += batch.num_samples
                yield batch
            epoch += 1

    def rest_of_epoch(self) -> Iterator[list[str]]:
        dropped = self._skip // self._setting.local_batch
        self._skip = 0
        for batch in islice(self._open(0), dropped, None):
            self._read += batch.num_samples
            yield batch.keys

    def state(self) -> dict[str, Any]:
        return {"num_samples": self._read * self._setting.world}

    @classmethod
    def state_at(cls, setting: Setting, step: int) -> dict[str, Any]:
        return {"num_samples": step * setting.global_batch}

    def close(self) -> None:
        self._loader = None


class ResampledWebDataset(WebDataset):
    name = "webdataset, resampled"
    how = "the same with resampled=True and with_epoch, as its README trains: shards are drawn with replacement"
    resampled = True
