"""What a sample looks and sounds like, small enough to stand inside a page: JPEG frames, an MP3, its caption."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.decode import UndecodableMedia, read_frames, read_image, read_sound
from data_pipeline.shards import DamagedMember, ShardedDataset, sample_name
from pretrain.config import RunConfig
from pretrain.data.transforms import Augmentation, chosen_caption, frame_times_s, resized_crop, window_start_s

NUM_FRAMES, FRAME_PX, JPEG_QUALITY = 3, 112, 78
SOUND_RATE_HZ, SOUND_BITS_PER_S, MAX_SOUND_S = 16_000, 32_000, 10.0
NUM_BARS = 44  # of the drawn loudness
SILENCE = 64  # peak, of 32767


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """A sample as a page shows it: in the window and the crop that evaluation takes.

    name, key: as its manifest and its shard call it. frames, sound: data URIs. bars: peaks of equal parts of the sound,
    0 to 100. notes: what it lacks and why.
    """

    name: str
    key: str
    caption: str | None
    frames: tuple[str, ...] = ()
    sound: str | None = None
    sound_s: float = 0.0
    bars: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of the data URIs."""
        return sum(len(uri) for uri in (*self.frames, self.sound or ""))


def view_sample(dataset: ShardedDataset, position: int, config: RunConfig) -> SampleView:
    """The sample at `position`, in the modalities of `config`; what cannot be read is a note."""
    row = dataset.row(position)
    tracks = [name for name in ("video", "audio") if name in config.towers.names]
    start_s = window_start_s(row, tracks, config.data.window_s, Augmentation().window)
    found: dict[str, Any] = {}
    notes: list[str] = []
    for slot, what in (("video", "pictures"), ("audio", "sound")):
        if slot not in tracks:
            continue
        try:
            data = dataset.read_member(position, slot, row)
            if data is None:
                notes.append(f"no {what}")
            elif slot == "video":
                found["frames"] = _frames(data, row, start_s, config.data.window_s)
            else:
                found |= _sound(data, start_s, min(config.data.window_s, MAX_SOUND_S))
        except (DamagedMember, UndecodableMedia, av.FFmpegError) as error:
            notes.append(f"{what} cannot be read: {error}")
    caption = chosen_caption(row, Augmentation())
    return SampleView(name=sample_name(row), key=row["key"], caption=caption, notes=tuple(notes), **found)


def without_media(view: SampleView) -> SampleView:
    """The same sample as words alone."""
    note = "pictures and sound are left out to keep this page small"
    return SampleView(name=view.name, key=view.key, caption=view.caption, notes=(*view.notes, note))


def _frames(data: bytes, row: dict[str, Any], start_s: float, window_s: float) -> tuple[str, ...]:
    if row["video_ext"] == "jpg":
        pictures = [read_image(data)]
    else:
        times_s = frame_times_s(start_s, window_s, NUM_FRAMES)
        end_s = row["video_duration_s"]
        inside = [float(time_s) for time_s in times_s if end_s is None or time_s < end_s]
        pictures = list(read_frames(data, inside or [(end_s or 0.0) / 2]))
    return tuple(_jpeg(resized_crop(picture, FRAME_PX, Augmentation())) for picture in pictures)


def _jpeg(picture: NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=JPEG_QUALITY)
    return _data_uri("image/jpeg", stream.getvalue())


def _sound(data: bytes, start_s: float, length_s: float) -> dict[str, Any]:
    sound = read_sound(data, start_s, length_s, SOUND_RATE_HZ)
    if not len(sound):
        raise UndecodableMedia(f"it is over before second {start_s:.1f}")
    return {
        "sound": _data_uri("audio/mpeg", encode_mp3(sound, SOUND_RATE_HZ)),
        "sound_s": len(sound) / SOUND_RATE_HZ,
        "bars": loudness_bars(sound),
    }


def loudness_bars(sound: NDArray[np.int16]) -> tuple[int, ...]:
    """Peaks of `NUM_BARS` equal parts, in per cent of the loudest; all 0 for silence."""
    parts = np.array_split(np.abs(sound.astype(np.int32)), min(NUM_BARS, len(sound)))
    peaks = np.array([part.max() for part in parts])
    if peaks.max() < SILENCE:
        return (0,) * len(peaks)
    return tuple(int(peak) for peak in np.rint(100 * peaks / peaks.max()))


def encode_mp3(sound: NDArray[np.int16], rate_hz: int) -> bytes:
    """Mono `sound` int16 [n] as an MP3 file, which every browser plays."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp3") as container:
        track = container.add_stream("libmp3lame", rate=rate_hz, layout="mono")
        track.bit_rate = SOUND_BITS_PER_S
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[None]), format="s16p", layout="mono")
        frame.sample_rate = rate_hz
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
