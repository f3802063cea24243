"""What every loader of the comparison must do, and what is the same for all: samples, collation, decoding."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import tokenizers  # noqa: F401 - here, because imports are not part of what is measured
import torch
from torch import Tensor

from benchmarks.clips import SAMPLE_RATE_HZ, Clip
from pretrain.config import AudioTowerConfig, AugmentConfig, TextTowerConfig, TowersConfig, VideoTowerConfig
from pretrain.data.batch import Batch, Inputs
from pretrain.data.tokenize import Tokenizer
from pretrain.data.transforms import draw_augmentation, frame_times_s, sound_window, video_frames, window_start_s

Mode = Literal["raw", "decoded"]
Members = dict[str, bytes]
SAMPLES_PER_SHARD = 64
EXTENSIONS = ("mp4", "flac", "json")  # the order of the members
WINDOW_S = 1.5
AUGMENT = AugmentConfig()
VIDEO = VideoTowerConfig(num_frames=4, size_px=64)
TEXT = TextTowerConfig(max_tokens=16)
TOWERS = TowersConfig(video=VIDEO, audio=AudioTowerConfig(sample_rate_hz=SAMPLE_RATE_HZ), text=TEXT)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a loader is run.

    folder: where its own format of the samples lies. mode: what a batch holds: the bytes of all members, or tensors.
    """

    folder: Path
    num_samples: int
    global_batch: int
    num_workers: int
    mode: Mode = "raw"
    prefetch: int = 2
    rank: int = 0
    world: int = 1
    seed: int = 7

    @property
    def local_batch(self) -> int:
        """Samples of a batch on one rank."""
        return self.global_batch // self.world


class Contender(ABC):
    """A loader of one rank, from the start or from a state that one like it gave; a state is JSON."""

    name: ClassVar[str]
    how: ClassVar[str]  # how it is used: one line for the page
    resume: ClassVar[str]  # what it offers

    @staticmethod
    @abstractmethod
    def version() -> str:
        """Of the library."""

    @staticmethod
    @abstractmethod
    def write(clips: Sequence[Clip], folder: Path) -> None:
        """Write the samples in the library's own format, with its own writer."""

    @abstractmethod
    def __init__(self, setting: Setting, state: dict[str, Any] | None) -> None: ...

    @abstractmethod
    def batches(self) -> Generator[Batch, None, None]:
        """Batches for ever, epoch after epoch."""

    @abstractmethod
    def rest_of_epoch(self) -> Iterator[list[str]]:
        """The keys of each batch to the end of the epoch in which it stands."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where it stands, after the last batch it gave."""

    @classmethod
    @abstractmethod
    def state_at(cls, setting: Setting, step: int) -> dict[str, Any]:
        """The state after `step` batches, without having read them."""

    @abstractmethod
    def close(self) -> None:
        """End its processes."""


class Collation:
    """A list of samples to {keys, batch}: a mapping, because loaders that count samples look at its first value."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._tokenizer: Tokenizer | None = None

    def __call__(self, samples: Sequence[Members]) -> dict[str, Any]:
        batch = raw_batch(samples) if self._setting.mode == "raw" else self._decoded(samples)
        return {"keys": batch.keys, "batch": batch}

    def _decoded(self, samples: Sequence[Members]) -> Batch:
        """What `TrainLoader` makes of the samples in epoch 0, by the same functions."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer("default", TEXT.max_tokens)
        rows = [self._sample(json.loads(parts["json"]), parts, self._tokenizer) for parts in samples]
        stacked = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0] if name != "key"}
        inputs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in stacked.items():
            modality, part = name.split(".")
            inputs.setdefault(modality, {})[part] = tensor
        return batch_with([str(row["key"]) for row in rows], inputs)

    def _sample(self, record: dict[str, Any], parts: Members, tokenizer: Tokenizer) -> dict[str, Any]:
        how = draw_augmentation(AUGMENT, self._setting.seed, 0, record["key"])
        row = {**record, "video_ext": "mp4", "audio_ext": "flac"}
        start_s = window_start_s(row, ("video", "audio"), WINDOW_S, how.window)
        times_s = frame_times_s(start_s, WINDOW_S, VIDEO.num_frames)
        frames, frame_mask = video_frames(parts["mp4"], record["video_duration_s"], times_s, VIDEO.size_px, how)
        waveform, num_samples = sound_window(parts["flac"], start_s, WINDOW_S, SAMPLE_RATE_HZ, how)
        token_ids, token_mask = tokenizer.encode(record["caption"])
        return {
            "key": record["key"],
            "video.frames": frames,
            "video.frame_mask": frame_mask,
            "audio.waveform": waveform,
            "audio.num_samples": np.int64(num_samples),
            "text.token_ids": token_ids,
            "text.token_mask": token_mask,
        }


def batch_with(keys: list[str], inputs: Inputs, next_position: int = 0) -> Batch:
    """A batch of whole samples."""
    whole = torch.ones(len(keys), dtype=torch.bool)
    return Batch(
        keys=keys,
        ids=torch.arange(len(keys)),
        epochs=torch.zeros(len(keys), dtype=torch.int64),
        present=dict.fromkeys(inputs, whole),
        inputs=inputs,
        position=0,
        next_position=next_position,
        events=[],
    )


def raw_batch(samples: Sequence[Members]) -> Batch:
    """All members of all samples as one tensor of bytes [total], and their sizes [samples, members]."""
    everything = bytearray(b"".join(parts[extension] for parts in samples for extension in EXTENSIONS))
    sizes = torch.tensor([[len(parts[extension]) for extension in EXTENSIONS] for parts in samples])
    members = {"bytes": torch.frombuffer(everything, dtype=torch.uint8), "sizes": sizes}
    return batch_with([str(json.loads(parts["json"])["key"]) for parts in samples], {"members": members})


def batch_of(collated: object) -> Batch:
    """The batch of what `Collation` returned in a worker."""
    return cast(Batch, cast(dict[str, Any], collated)["batch"])
