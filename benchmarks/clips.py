"""Procedural samples for benchmarks: an h264 clip, a FLAC and a JSON record each, a few tens of KB, from a seed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

WIDTH_PX, HEIGHT_PX, FPS, DURATION_S, SAMPLE_RATE_HZ = 128, 96, 12, 2.0, 16_000
WORDS = ("a", "red", "blue", "slow", "loud", "square", "tone", "left", "quiet", "ground", "moving", "while", "plays")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One sample: its key and its members {extension: bytes} with extensions mp4, flac and json."""

    key: str
    members: dict[str, bytes]
    caption: str


def draw_clips(num_clips: int, seed: int = 0) -> Iterator[Clip]:
    """`num_clips` different clips."""
    for number in range(num_clips):
        generator = np.random.default_rng([seed, number])
        key, caption = f"clip-{number:06d}", " ".join(generator.choice(WORDS, 12))
        record = {"key": key, "caption": caption, "video_duration_s": DURATION_S, "audio_duration_s": DURATION_S}
        members = {"mp4": _video(generator), "flac": _sound(generator), "json": json.dumps(record).encode()}
        yield Clip(key=key, members=members, caption=caption)


def _video(generator: np.random.Generator) -> bytes:
    """A square on a textured ground that moves with the camera; a key frame each second."""
    texture = generator.integers(60, 180, (HEIGHT_PX + 48, WIDTH_PX + 48, 3), dtype=np.uint8)
    colour = generator.integers(0, 255, 3, dtype=np.uint8)
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        options = {"preset": "veryfast", "crf": "30", "g": str(FPS), "threads": "1"}
        track = container.add_stream("libx264", rate=FPS, options=options)
        track.width, track.height, track.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        for step in range(int(FPS * DURATION_S)):
            picture = texture[step : step + HEIGHT_PX, step : step + WIDTH_PX].copy()
            picture[20:60, 2 * step : 2 * step + 40] = colour
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


def _sound(generator: np.random.Generator) -> bytes:
    """A tone in noise."""
    times_s = np.arange(int(SAMPLE_RATE_HZ * DURATION_S)) / SAMPLE_RATE_HZ
    wave = 6000 * np.sin(2 * np.pi * generator.uniform(200, 3000) * times_s) + generator.normal(0, 40, len(times_s))
    sound: NDArray[np.int16] = wave.astype(np.int16)
    stream = io.BytesIO()
    with av.open(stream, "w", format="flac") as container:
        track = container.add_stream("flac", rate=SAMPLE_RATE_HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()
