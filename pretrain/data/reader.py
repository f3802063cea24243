"""Samples of a dataset, read, decoded and laid into the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.decode import UndecodableMedia
from data_pipeline.shards import DamagedMember, ShardedDataset
from pretrain.config import AugmentConfig, TowersConfig
from pretrain.data.batch import Batch, LoadEvent
from pretrain.data.mixture import Mixture
from pretrain.data.tokenize import Tokenizer
from pretrain.data.transforms import (
    Augmentation,
    chosen_caption,
    draw_augmentation,
    frame_times_s,
    image_frames,
    sound_window,
    video_frames,
    window_start_s,
)

Arrays = dict[str, dict[str, NDArray[Any]]]
Values = dict[str, Any]  # one row of each of the arrays of a modality


class BatchReader:
    """Makes the batch of any list of samples.

    What a sample lacks is masked. What it should have and cannot be read is masked too, and told in `Batch.events`;
    nothing is put in its place.

    Args:
        augment: random changes of training, drawn from (seed, epoch, key); None: the fixed ones of evaluation.
        second_view: those of a second view of each sample, in `Batch.augmented`; None: there is none.

    Raises:
        UserError: the tokenizer cannot be had.
    """

    def __init__(
        self,
        dataset: ShardedDataset | Mixture,
        towers: TowersConfig,
        window_s: float,
        augment: AugmentConfig | None,
        seed: int,
        second_view: AugmentConfig | None = None,
    ) -> None:
        self.dataset = dataset if isinstance(dataset, Mixture) else Mixture([dataset])
        self._towers = towers
        self._window_s = window_s
        self._augment = augment
        self._seed = seed
        self._second_view = second_view
        self._tracks = [name for name in ("video", "audio") if name in towers.names]
        self._tokenizer = Tokenizer(towers.text.tokenizer, towers.text.max_tokens) if towers.text is not None else None

    def read(
        self,
        indices: Sequence[int],
        epochs: Sequence[int],
        position: int,
        next_position: int,
        check: Callable[[], None] | None = None,
    ) -> Batch:
        """The batch of samples `indices` as seen in `epochs`; `check` is called between samples and may raise."""
        views = [self._zeros(len(indices)) for _ in range(1 if self._second_view is None else 2)]
        present = {name: np.zeros(len(indices), dtype=np.bool_) for name in views[0]}
        keys: list[str] = []
        events: list[LoadEvent] = []
        self.dataset.expect(indices)
        for place, (index, epoch) in enumerate(zip(indices, epochs, strict=True)):
            if check is not None:
                check()
            row = self.dataset.row(index)
            keys.append(row["key"])
            try:
                values, problems = self._sample(index, row, epoch)
            except Exception as error:
                error.add_note(f"while loading sample {row['key']} of {self.dataset.location_of(index)}")
                raise
            events += problems
            for modality, found in values.items():
                present[modality][place] = True
                for arrays, parts in zip(views, found, strict=True):
                    for name, value in parts.items():
                        arrays[modality][name][place] = value
        return Batch(
            keys=keys,
            ids=torch.tensor(indices, dtype=torch.int64),
            epochs=torch.tensor(epochs, dtype=torch.int64),
            present={name: torch.from_numpy(mask) for name, mask in present.items()},
            inputs=_as_tensors(views[0]),
            augmented=_as_tensors(views[1]) if len(views) > 1 else None,
            position=position,
            next_position=next_position,
            events=events,
        )

    def _sample(self, index: int, row: dict[str, Any], epoch: int) -> tuple[dict[str, list[Values]], list[LoadEvent]]:
        """The modalities a sample has, each as a row of the batch in every view, and those it should have and that
        cannot be read."""
        key = row["key"]
        views = [Augmentation() if self._augment is None else draw_augmentation(self._augment, self._seed, epoch, key)]
        if self._second_view is not None:
            views.append(draw_augmentation(self._second_view, self._seed, epoch, key, "second view"))
        values: dict[str, list[Values]] = {}
        events: list[LoadEvent] = []
        for modality in self._towers.names:
            try:
                found = self._modality(index, row, modality, views)
            except (DamagedMember, UndecodableMedia) as error:
                (number,) = self.dataset.numbers([index])
                reason = f"{type(error).__name__}: {error}"
                events.append(LoadEvent(key=key, modality=modality, reason=reason, dataset=number))
                continue
            if found is not None:
                values[modality] = found
        return values, events

    def _modality(
        self, index: int, row: dict[str, Any], modality: str, views: Sequence[Augmentation]
    ) -> list[Values] | None:
        """Read once, decoded for each view; None: the sample lacks it."""
        if modality == "text":
            texts = [self._text(row, how) for how in views]
            return [text for text in texts if text is not None] or None
        data = self.dataset.read_member(index, modality, row)
        if data is None:
            return None
        read = self._video if modality == "video" else self._audio
        starts_s = [window_start_s(row, self._tracks, self._window_s, how.window) for how in views]
        return [read(data, row, start_s, how) for start_s, how in zip(starts_s, views, strict=True)]

    def _video(self, data: bytes, row: dict[str, Any], start_s: float, how: Augmentation) -> Values:
        video = self._towers.video
        assert video is not None
        if row["video_ext"] == "jpg":
            frames, mask = image_frames(data, video.num_frames, video.size_px, how)
        else:
            times_s = frame_times_s(start_s, self._window_s, video.num_frames)
            frames, mask = video_frames(data, row["video_duration_s"], times_s, video.size_px, how)
        return {"frames": frames, "frame_mask": mask}

    def _audio(self, data: bytes, row: dict[str, Any], start_s: float, how: Augmentation) -> Values:
        audio = self._towers.audio
        assert audio is not None
        waveform, num_samples = sound_window(data, start_s, self._window_s, audio.sample_rate_hz, how)
        return {"waveform": waveform, "num_samples": num_samples}

    def _text(self, row: dict[str, Any], how: Augmentation) -> Values | None:
        assert self._tokenizer is not None
        caption = chosen_caption(row, how)
        if caption is None:
            return None
        token_ids, token_mask = self._tokenizer.encode(caption)
        return {"token_ids": token_ids, "token_mask": token_mask}

    def _zeros(self, n: int) -> Arrays:
        arrays: Arrays = {}
        if (video := self._towers.video) is not None:
            shape = (n, video.num_frames, video.size_px, video.size_px, 3)
            arrays["video"] = {
                "frames": np.zeros(shape, dtype=np.uint8),
                "frame_mask": np.zeros(shape[:2], dtype=np.bool_),
            }
        if (audio := self._towers.audio) is not None:
            length = round(self._window_s * audio.sample_rate_hz)
            arrays["audio"] = {
                "waveform": np.zeros((n, length), dtype=np.int16),
                "num_samples": np.zeros(n, dtype=np.int64),
            }
        if (text := self._towers.text) is not None:
            arrays["text"] = {
                "token_ids": np.zeros((n, text.max_tokens), dtype=np.int64),
                "token_mask": np.zeros((n, text.max_tokens), dtype=np.bool_),
            }
        return arrays


def _as_tensors(arrays: Arrays) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {k: torch.from_numpy(a) for k, a in parts.items()} for name, parts in arrays.items()}
