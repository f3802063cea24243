"""What a person has (files, bytes, arrays, texts) to what a tower takes, by the transforms of evaluation."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from data_pipeline.decode import TIME_TOLERANCE_S, UndecodableMedia, describe, resample
from pretrain.config import AudioTowerConfig, TowersConfig, VideoTowerConfig
from pretrain.data.tokenize import Tokenizer
from pretrain.data.transforms import (
    Augmentation,
    frame_times_s,
    image_frames,
    resized_crop,
    sound_window,
    video_frames,
    window_start_s,
)

Values = dict[str, Any]  # one row of each of the arrays of a modality
PICTURE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG, PNG
GUESSED_DURATIONS = ("mp3", "aac")  # containers that state none: the reader guesses it from the bit rate
FULL_SCALE = 32768.0
PLAIN = Augmentation()  # nothing random: the middle of the clip, the largest square, centred


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """A decoded video: `pixels` uint8 [T, H, W, 3] RGB, `fps` of them a second, the first at second 0.

    Raises:
        ValueError: another shape or type, no frame, or an impossible rate.
    """

    pixels: NDArray[np.uint8]
    fps: float

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
            raise ValueError(f"Frames.pixels: found {pixels.dtype} {list(pixels.shape)}, expected uint8 [T, H, W, 3]")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"Frames.fps: found {self.fps}, expected frames a second, more than 0")

    @property
    def length_s(self) -> float:
        """How long they are shown."""
        return len(self.pixels) / self.fps


@dataclass(frozen=True, kw_only=True, eq=False)
class Waveform:
    """A decoded sound: mono `samples` [n], int16, or float32 from -1 to 1, `sample_rate_hz` of them a second.

    Raises:
        ValueError: another shape or type, no sample, values beyond all bounds, or an impossible rate.
    """

    samples: NDArray[np.int16] | NDArray[np.float32]
    sample_rate_hz: int

    def __post_init__(self) -> None:
        samples = self.samples
        if samples.dtype not in (np.int16, np.float32) or samples.ndim != 1 or not len(samples):
            raise ValueError(
                f"Waveform.samples: found {samples.dtype} {list(samples.shape)}, expected int16 or float32 [n], mono"
            )
        if samples.dtype == np.float32 and not np.abs(samples).max() <= 2:  # also when it is NaN
            raise ValueError("Waveform.samples: float32 beyond 2 or NaN, expected -1 to 1")
        if self.sample_rate_hz < 1:
            raise ValueError(f"Waveform.sample_rate_hz: found {self.sample_rate_hz}, expected more than 0")

    def int16(self) -> NDArray[np.int16]:
        """The samples as int16 [n]."""
        if self.samples.dtype == np.int16:
            return np.asarray(self.samples, dtype=np.int16)
        return np.clip(np.rint(self.samples * np.float32(FULL_SCALE)), -32768, 32767).astype(np.int16)


class NoSuchTrack(UndecodableMedia):
    """A medium that is whole, and silent or without pictures."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """A medium in memory and the times of the track in question, in seconds of the container."""

    data: bytes
    start_s: float = 0.0
    end_s: float | None = None  # None: a still picture, or nobody knows
    is_still: bool = False


class InputReader:
    """Makes the tower inputs of one sample.

    Raises:
        UserError: the tokenizer cannot be had.
    """

    def __init__(self, towers: TowersConfig, window_s: float) -> None:
        self._towers = towers
        self._window_s = window_s
        self._tokenizer = Tokenizer(towers.text.tokenizer, towers.text.max_tokens) if towers.text is not None else None

    def read(self, sample: Mapping[str, Any]) -> tuple[dict[str, Values], dict[str, str]]:
        """The inputs by modality of what `sample` has, and the reason for each modality that cannot be read.

        sample: modality -> path, bytes, Frames, Waveform or text. Picture and sound are cut to one window, in the
        middle of the time that they have in common, as in evaluation.
        """
        tracks: dict[str, _File | Frames | Waveform] = {}
        values: dict[str, Values] = {}
        problems: dict[str, str] = {}
        for name in ("video", "audio"):
            if name in sample:
                try:
                    tracks[name] = _opened(sample[name], name)
                except (OSError, UndecodableMedia) as error:
                    problems[name] = _reason(error)
        start_s = window_start_s(_lengths(tracks), tracks, self._window_s, PLAIN.window)
        for name, track in tracks.items():
            try:
                values[name] = self._video(track, start_s) if name == "video" else self._audio(track, start_s)
            except UndecodableMedia as error:
                problems[name] = _reason(error)
        if "text" in sample:
            assert self._tokenizer is not None
            token_ids, token_mask = self._tokenizer.encode(sample["text"])
            values["text"] = {"token_ids": token_ids, "token_mask": token_mask}
        return values, problems

    def _video(self, track: _File | Frames | Waveform, start_s: float) -> Values:
        video = self._towers.video
        assert video is not None
        times_s = frame_times_s(start_s, self._window_s, video.num_frames)
        if isinstance(track, Frames):
            frames, mask = _array_frames(track, times_s, video)
        else:
            assert isinstance(track, _File)
            if track.is_still:
                frames, mask = image_frames(track.data, video.num_frames, video.size_px, PLAIN)
            else:
                length_s = None if track.end_s is None else track.end_s - track.start_s
                frames, mask = video_frames(track.data, length_s, times_s - track.start_s, video.size_px, PLAIN)
        return {"frames": frames, "frame_mask": mask}

    def _audio(self, track: _File | Frames | Waveform, start_s: float) -> Values:
        audio = self._towers.audio
        assert audio is not None
        if isinstance(track, Waveform):
            waveform, num_samples = _array_sound(track, start_s, self._window_s, audio)
        else:
            assert isinstance(track, _File)
            waveform, num_samples = sound_window(
                track.data, start_s + track.start_s, self._window_s, audio.sample_rate_hz, PLAIN
            )
        return {"waveform": waveform, "num_samples": num_samples}


def _opened(item: Any, kind: str) -> _File | Frames | Waveform:
    if isinstance(item, Frames | Waveform):
        return item
    data = item if isinstance(item, bytes) else Path(item).expanduser().read_bytes()
    if kind == "video" and data.startswith(PICTURE_SIGNATURES):
        return _File(data=data, is_still=True)
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            return _timed(data, container, kind)
    except (av.FFmpegError, ValueError) as error:
        raise UndecodableMedia(describe(error)) from error


def _timed(data: bytes, container: av.container.InputContainer, kind: str) -> _File:
    """Where the track begins and ends. A sound begins with its container, and is read in the container's own time."""
    tracks = container.streams.video if kind == "video" else container.streams.audio
    covers = av.stream.Disposition.attached_pic
    moving = [track for track in tracks if not track.disposition & covers]
    if not moving:
        raise NoSuchTrack(f"no {'picture' if kind == 'video' else 'sound'} track")
    track = moving[0]
    origin_s = 0.0 if container.start_time is None else container.start_time / av.time_base
    begin_s = float((track.start_time or 0) * track.time_base)
    if track.duration is not None and container.format.name not in GUESSED_DURATIONS:
        end_s: float | None = begin_s + float(track.duration * track.time_base)
    else:
        ends_s = [
            float((packet.pts + (packet.duration or 0)) * packet.time_base)
            for packet in container.demux(track)
            if packet.pts is not None
        ]
        end_s = max(ends_s, default=None)
    if end_s is not None:
        end_s -= origin_s
    return _File(data=data, start_s=begin_s - origin_s if kind == "video" else origin_s, end_s=end_s)


def _lengths(tracks: Mapping[str, _File | Frames | Waveform]) -> dict[str, Any]:
    """The columns of a dataset's index from which `window_start_s` places the window."""
    row: dict[str, Any] = {}
    for name, track in tracks.items():
        if isinstance(track, Waveform):
            length_s: float | None = len(track.samples) / track.sample_rate_hz
        else:
            length_s = track.length_s if isinstance(track, Frames) else track.end_s
        row[f"{name}_duration_s"] = length_s
        row[f"{name}_ext"] = "jpg" if isinstance(track, _File) and track.is_still else "media"
    return row


def _array_frames(
    clip: Frames, times_s: NDArray[np.floating], video: VideoTowerConfig
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """As `pretrain.data.transforms.video_frames`, of frames that are decoded already."""
    inside = times_s < clip.length_s
    if not inside.any():
        times_s, inside = np.full_like(times_s, clip.length_s / 2), np.arange(len(times_s)) == 0
    frames = np.zeros((len(times_s), video.size_px, video.size_px, 3), dtype=np.uint8)
    shown = np.searchsorted(np.arange(len(clip.pixels)) / clip.fps, times_s + TIME_TOLERANCE_S, side="right") - 1
    for place in np.flatnonzero(inside):
        frames[place] = resized_crop(np.ascontiguousarray(clip.pixels[shown[place]]), video.size_px, PLAIN)
    return frames, inside


def _array_sound(
    sound: Waveform, start_s: float, window_s: float, audio: AudioTowerConfig
) -> tuple[NDArray[np.int16], int]:
    """As `pretrain.data.transforms.sound_window`, of sound that is decoded already."""
    waveform = np.zeros(round(window_s * audio.sample_rate_hz), dtype=np.int16)
    first, last = round(start_s * sound.sample_rate_hz), round((start_s + window_s) * sound.sample_rate_hz)
    cut = resample(sound.int16()[None, first:last], sound.sample_rate_hz, audio.sample_rate_hz)[0, : len(waveform)]
    if not len(cut):
        raise UndecodableMedia(f"no sound after {start_s:.3f} s")
    waveform[: len(cut)] = cut
    return waveform, len(cut)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, NoSuchTrack):
        return f"it has {error}; expected None for what a sample lacks, or on_error="
    return f"cannot be decoded: {error}"
