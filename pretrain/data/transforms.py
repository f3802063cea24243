"""From the bytes of a sample to arrays of fixed shape: one time window for picture and sound, one crop for all frames.

Random changes come from (seed, epoch, sample key) alone, so they do not depend on ranks, workers or order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.decode import UndecodableMedia, read_frames, read_image, read_sound
from pretrain.config import AugmentConfig


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to one sample in one epoch; the defaults are those of evaluation.

    window, crop_x, crop_y: place of the time window in the clip and of the crop in the picture, from 0 (first, left,
    top) over 0.5 (centred) to 1. crop_side: side of the square crop over the short side of the picture. brightness,
    gain: factors. caption: which one of several, in [0, 1). word_dropout: share of words left out, drawn from word_key.
    """

    window: float = 0.5
    crop_side: float = 1.0
    crop_x: float = 0.5
    crop_y: float = 0.5
    flip: bool = False
    brightness: float = 1.0
    gain: float = 1.0
    caption: float = 0.0
    word_dropout: float = 0.0
    word_key: int = 0


def draw_augmentation(config: AugmentConfig, seed: int, epoch: int, key: str, view: str = "augment") -> Augmentation:
    """The random changes of sample `key` in `epoch`; another `view` has other draws.

    Every draw has its fixed place in the stream, so changing one setting changes no other draw. The crop is square,
    `crop_scale` being its area over that of the largest square: shapes keep their proportions, as in evaluation.
    """
    digest = hashlib.blake2b(f"{view}/{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(9)
    window, scale, crop_x, crop_y, flip, brightness, gain, caption = ((raw[:8] >> np.uint64(11)) * 2.0**-53).tolist()
    low, high = config.crop_scale
    return Augmentation(
        window=window,
        crop_side=(low + (high - low) * scale) ** 0.5,
        crop_x=crop_x,
        crop_y=crop_y,
        flip=config.flip and flip < 0.5,
        brightness=1 + config.brightness * (2 * brightness - 1),
        gain=10 ** (config.gain_db * (2 * gain - 1) / 20),
        caption=caption,
        word_dropout=config.word_dropout,
        word_key=int(raw[8]),
    )


def window_start_s(row: dict[str, Any], tracks: Iterable[str], window_s: float, place: float) -> float:
    """Where the window of `window_s` seconds begins in the clip of index row `row`; 0 when the clip is no longer.

    Its range is the time that the `tracks` in use (of video, audio) have in common; a still picture has none.
    """
    known = [row[f"{track}_duration_s"] for track in tracks if row[f"{track}_ext"] not in (None, "jpg")]
    lengths_s = [length for length in known if length is not None]
    return place * max(0.0, min(lengths_s, default=0.0) - window_s)


def frame_times_s(start_s: float, window_s: float, num_frames: int) -> NDArray[np.floating]:
    """The middles of `num_frames` equal parts of the window, in seconds of the clip."""
    return start_s + (np.arange(num_frames, dtype=np.float64) + 0.5) * (window_s / num_frames)


def video_frames(
    data: bytes, duration_s: float | None, times_s: NDArray[np.floating], size_px: int, augmentation: Augmentation
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Frames uint8 [T, size, size, 3] of a clip at `times_s` and which of them it has, bool [T].

    Frames after its end are zero and masked; a clip shorter than the first time gives its middle.

    Raises:
        UndecodableMedia: the bytes are no video.
    """
    inside = times_s < (np.inf if duration_s is None else duration_s)
    if not inside.any():
        assert duration_s is not None
        times_s, inside = np.full_like(times_s, duration_s / 2), np.arange(len(times_s)) == 0
    frames = np.zeros((len(times_s), size_px, size_px, 3), dtype=np.uint8)
    for place, picture in zip(np.flatnonzero(inside), read_frames(data, times_s[inside].tolist()), strict=True):
        frames[place] = resized_crop(picture, size_px, augmentation)
    return _recoloured(frames, augmentation), inside


def image_frames(
    data: bytes, num_frames: int, size_px: int, augmentation: Augmentation
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A still picture as a clip of one frame: uint8 [num_frames, size, size, 3], and its mask.

    Raises:
        UndecodableMedia: the bytes are no picture.
    """
    frames = np.zeros((num_frames, size_px, size_px, 3), dtype=np.uint8)
    frames[0] = resized_crop(read_image(data), size_px, augmentation)
    return _recoloured(frames, augmentation), np.arange(num_frames) == 0


def resized_crop(picture: NDArray[np.uint8], size_px: int, augmentation: Augmentation) -> NDArray[np.uint8]:
    """A square of `picture` [H, W, 3], scaled to [size, size, 3]; by default the largest, centred."""
    height, width = picture.shape[:2]
    side = min(height, width) * augmentation.crop_side
    left, top = (width - side) * augmentation.crop_x, (height - side) * augmentation.crop_y
    image = Image.fromarray(picture)
    scaled = image.resize((size_px, size_px), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.asarray(scaled)


def _recoloured(frames: NDArray[np.uint8], augmentation: Augmentation) -> NDArray[np.uint8]:
    if augmentation.flip:
        frames = np.ascontiguousarray(frames[:, :, ::-1])
    if augmentation.brightness == 1:
        return frames
    table = np.clip(np.rint(np.arange(256) * augmentation.brightness), 0, 255).astype(np.uint8)
    return table[frames]


def sound_window(
    data: bytes, start_s: float, window_s: float, sample_rate_hz: int, augmentation: Augmentation
) -> tuple[NDArray[np.int16], int]:
    """Mono sound of the window, int16 [round(window_s * sample_rate_hz)], zero after its end, and its valid length.

    Raises:
        UndecodableMedia: the bytes are no sound, or it is over before the window.
    """
    waveform = np.zeros(round(window_s * sample_rate_hz), dtype=np.int16)
    sound = read_sound(data, start_s, window_s, sample_rate_hz)[: len(waveform)]
    if not len(sound):
        raise UndecodableMedia(f"no sound after {start_s:.3f} s")
    if augmentation.gain != 1:
        sound = np.clip(np.rint(sound * np.float32(augmentation.gain)), -32768, 32767).astype(np.int16)
    waveform[: len(sound)] = sound
    return waveform, len(sound)


def chosen_caption(row: dict[str, Any], augmentation: Augmentation) -> str | None:
    """One of the captions that are not blank, each equally likely, less the words left out; None when there is none."""
    texts = [caption["text"] for caption in row["captions"] if caption["text"] and caption["text"].strip()]
    if not texts:
        return None
    text: str = texts[int(augmentation.caption * len(texts))]
    return text if augmentation.word_dropout == 0 else _with_fewer_words(text, augmentation)


def _with_fewer_words(text: str, augmentation: Augmentation) -> str:
    words = text.split()
    draws = np.random.Generator(np.random.Philox(key=augmentation.word_key)).random(len(words))
    kept = draws >= augmentation.word_dropout
    kept[draws.argmax()] = True
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
