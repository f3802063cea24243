"""`TrainLoader` on our shards."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.dataset  # noqa: F401 - pyarrow would import it, and pandas with it, where it reads the first table

from benchmarks.clips import DURATION_S, Clip
from benchmarks.loaders.contender import AUGMENT, SAMPLES_PER_SHARD, TOWERS, WINDOW_S, Contender, Setting, raw_batch
from data_pipeline.shards import SCHEMA_VERSION, Sample, ShardedDataset, ShardWriter, write_json
from pretrain.config import DataConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import TrainLoader
from pretrain.data.reader import BatchReader

SLOTS = {"video": "mp4", "audio": "flac", "json": "json"}


class RawReader(BatchReader):
    """Gives the bytes of the members instead of tensors: `TrainLoader` itself has no such mode."""

    def read(
        self,
        indices: Sequence[int],
        epochs: Sequence[int],
        position: int,
        next_position: int,
        check: Callable[[], None] | None = None,
    ) -> Batch:
        samples = []
        for index in indices:
            row = self.dataset.row(index)
            found = {extension: self.dataset.read_member(index, slot, row) for slot, extension in SLOTS.items()}
            samples.append({extension: data for extension, data in found.items() if data is not None})
        batch = raw_batch(samples)
        return replace(batch, epochs=batch.epochs.new_tensor(epochs), position=position, next_position=next_position)


class Parallelotope(Contender):
    name = "parallelotope"
    how = "ShardWriter; ShardedDataset and TrainLoader, shuffled in blocks of 8 shards (the default)"
    resume = "one integer; order is a function of (seed, position)"

    @staticmethod
    def version() -> str:
        return version("parallelotope")

    @staticmethod
    def write(clips: Sequence[Clip], folder: Path) -> None:
        shards = []
        for number, start in enumerate(range(0, len(clips), SAMPLES_PER_SHARD)):
            writer = ShardWriter(folder=folder, name=f"shard-{number:06d}", split="train")
            for clip in clips[start : start + SAMPLES_PER_SHARD]:
                members = {slot: (extension, clip.members[extension]) for slot, extension in SLOTS.items()}
                index = {
                    "row_id": clip.key, "clip_index": 0, "weight": 1.0, "start_s": 0.0, "end_s": DURATION_S,
                    "video_duration_s": DURATION_S, "audio_duration_s": DURATION_S, "subtitles": [], "metadata": "{}",
                    "captions": [{"text": clip.caption, "source": "procedural"}],
                }  # fmt: skip
                writer.write(Sample(key=clip.key, members=members, index=index))
            shards.append(asdict(writer.close()))
        write_json(folder / "dataset.json", {"schema_version": SCHEMA_VERSION, "shards": shards})

    def __init__(self, setting: Setting, state: dict[str, Any] | None) -> None:
        self._position = 0 if state is None else int(state["position"])
        dataset = ShardedDataset(setting.folder, "train")
        data = DataConfig.model_validate(
            {
                "train": {"path": str(setting.folder), "split": "train"},
                "window_s": WINDOW_S,
                "num_workers": setting.num_workers,
                "prefetch_batches": setting.prefetch,
                "augment": AUGMENT.model_dump(),
            }
        )
        towers = TOWERS if setting.mode == "decoded" else TOWERS.model_copy(update={"text": None})  # no tokenizer
        self._loader = TrainLoader(
            dataset, data, towers, global_batch=setting.global_batch, seed=setting.seed, rank=setting.rank,
            world=setting.world, start_position=self._position,
        )  # fmt: skip
        if setting.mode == "raw":
            self._loader._reader = RawReader(dataset, towers, WINDOW_S, AUGMENT, setting.seed)
        self._num_samples = len(dataset)

    def batches(self) -> Generator[Batch, None, None]:
        for batch in self._loader:
            self._position = batch.next_position
            yield batch

    def rest_of_epoch(self) -> Iterator[list[str]]:
        epoch, ends = self._position // self._num_samples, 0
        while not ends or self._position < ends:
            batch = next(self.batches())
            ends = (epoch + 1) * self._num_samples
            yield [key for key, of in zip(batch.keys, batch.epochs.tolist(), strict=True) if of == epoch]

    def state(self) -> dict[str, Any]:
        return {"position": self._position}

    @classmethod
    def state_at(cls, setting: Setting, step: int) -> dict[str, Any]:
        return {"position": step * setting.global_batch}

    def close(self) -> None:
        self._loader.close()
