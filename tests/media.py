"""Small real media files for tests: pictures and sound whose content says when they are shown and heard."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def counting_picture(number: int, num_frames: int, width: int, height: int) -> NDArray[np.uint8]:
    """A picture whose brightness rises with its number, on a fixed slope from left to right; uint8 [H, W, 3]."""
    slope = np.linspace(0, 60, width)[None, :]
    grey = np.broadcast_to(20 + 150 * number / max(num_frames - 1, 1) + slope, (height, width))
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def stepped_tone(duration_s: float, rate_hz: int, silent_s: float = 0.0) -> NDArray[np.int16]:
    """A 440 Hz tone, silent for the first `silent_s`; int16 [n]."""
    times_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    tone = 12_000 * np.sin(2 * np.pi * 440 * times_s)
    return np.where(times_s < silent_s, 0, tone).astype(np.int16)


def write_clip(
    path: Path, *, duration_s: float = 2.0, fps: int = 25, width: int = 160, height: int = 120, sound: bool = True,
    picture: bool = True, gop: int = 25, rate_hz: int = 48_000, silent_s: float = 0.0, faststart: bool = False,
) -> Path:  # fmt: skip
    """An mp4 with H.264 and AAC; picture k is `counting_picture(k)`, the sound `stepped_tone`."""
    num_frames = round(duration_s * fps)
    options = {"movflags": "faststart"} if faststart else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options=options) as out:
        video = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "18"}) if picture else None
        audio = out.add_stream("aac", rate=rate_hz, layout="mono") if sound else None
        if video is not None:
            video.width, video.height, video.pix_fmt, video.codec_context.gop_size = width, height, "yuv420p", gop
            video.codec_context.thread_count = 1
            for number in range(num_frames):
                array = counting_picture(number, num_frames, width, height)
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts = number
                out.mux(video.encode(frame))
            out.mux(video.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(stepped_tone(duration_s, rate_hz, silent_s)[None], "s16", "mono")
            frame.sample_rate, frame.pts = rate_hz, 0
            out.mux([*audio.encode(frame), *audio.encode(None)])
    return path


def write_panning(path: Path, *, num_frames: int = 50, width: int = 160, height: int = 120) -> Path:
    """An mp4 of coloured squares that move, which is more work for an encoder than a slope."""
    squares = np.random.default_rng(0).integers(0, 255, (height // 8 + 16, width // 8 + 16, 3), dtype=np.uint8)
    scene = squares.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.thread_count = width, height, "yuv420p", 1
        for number in range(num_frames):
            top, left = number, 2 * number
            picture = np.ascontiguousarray(scene[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write_wav(path: Path, *, duration_s: float = 2.0, rate_hz: int = 22_050, silent_s: float = 0.0) -> Path:
    """A mono wav file of `stepped_tone`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="wav") as out:
        stream = out.add_stream("pcm_s16le", rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(stepped_tone(duration_s, rate_hz, silent_s)[None], "s16", "mono")
        frame.sample_rate, frame.pts = rate_hz, 0
        out.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def decode_pictures(data: bytes) -> tuple[list[float], NDArray[np.uint8]]:
    """Times and RGB pictures [T, H, W, 3] of a video, by plain PyAV."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    times = [float(frame.time or 0.0) for frame in frames]
    return times, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
