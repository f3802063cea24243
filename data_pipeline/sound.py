"""The sound of a window, cut, resampled and encoded."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import AudioConfig
from data_pipeline.decode import decode_sound, describe, resample
from data_pipeline.filters import Reason, Rejected
from data_pipeline.media import BITEXACT, GUESSED_DURATIONS, Media
from data_pipeline.segment import Clip

SHORTFALL_S = 0.25  # sound may end this much before the time its container states: codecs pad, containers round
CODECS = {"flac": ("flac", "flac"), "opus": ("libopus", "ogg")}  # encoder and container


@dataclass(frozen=True, kw_only=True)
class SoundClip:
    """An encoded sound and what the index says of it."""

    extension: str
    data: bytes
    sample_rate_hz: int
    duration_s: float


def cut_sound(media: Media, clip: Clip, config: AudioConfig) -> SoundClip | None:
    """The sound of `clip`'s window; None where the track has none (it begins later or has ended).

    Raises:
        Rejected: damaged, or it ends before the container says so.
    """
    media.rewind()
    try:
        sound, rate_hz = decode_sound(
            media.container, clip.start_s + media.origin_s, clip.end_s + media.origin_s, config.channels
        )
    except (av.FFmpegError, ValueError) as error:
        raise media.broken(describe(error)) from error
    track_end_s = media.track_end_s("audio")
    if track_end_s is not None and media.container.format.name not in GUESSED_DURATIONS:
        missing_s = min(track_end_s, clip.end_s) - clip.start_s - sound.shape[1] / rate_hz
        if missing_s > SHORTFALL_S:
            raise Rejected(
                Reason.TRUNCATED,
                f"{media.path}: sound ends {missing_s:.2f} s before the {track_end_s:.2f} s it declares",
            )
    pcm = resample(sound, rate_hz, config.sample_rate_hz)[:, : round(clip.length_s * config.sample_rate_hz)]
    if pcm.shape[1] == 0:
        return None
    return SoundClip(
        extension=config.codec,
        data=encode_sound(pcm, config),
        sample_rate_hz=config.sample_rate_hz,
        duration_s=pcm.shape[1] / config.sample_rate_hz,
    )


def encode_sound(pcm: NDArray[np.int16], config: AudioConfig) -> bytes:
    """`pcm` int16 [channels, n] as a FLAC or Ogg Opus file; equal samples give equal bytes."""
    codec, container_name = CODECS[config.codec]
    layout = "mono" if config.channels == 1 else "stereo"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_name, container_options=BITEXACT) as container:
        stream = container.add_stream(codec, rate=config.sample_rate_hz, layout=layout)
        interleaved = np.ascontiguousarray(pcm.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
        frame.sample_rate, frame.pts = config.sample_rate_hz, 0
        packets: Sequence[av.Packet] = [*stream.encode(frame), *stream.encode(None)]
        container.mux(packets)
    return buffer.getvalue()
