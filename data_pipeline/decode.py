"""decord and PyAV behind one door: bytes of a media file in, arrays out.

Time 0 of a picture track is its first picture (so decord counts, and PyAV is made to); time 0 of a sound is that of
its container. In the clips that sharding writes both are the start of the clip's window.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import decord
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

TIME_TOLERANCE_S = 1e-4  # a frame counts as shown this long before its time: decord's clock has 32 bits
SEEK_BEYOND_S = 20.0  # sound that starts later is sought; nearer, decoding from the beginning is cheaper and exact
SEEK_MARGIN_S = 1.0  # codecs with memory (AAC, Opus) need some sound before the window to settle


class UndecodableMedia(Exception):
    """Bytes that no decoder turns into pictures or sound; the message is the decoder's own."""


def read_frames(data: bytes, times_s: Sequence[float]) -> NDArray[np.uint8]:
    """The picture shown at each of `times_s` (the last that has begun, else the first), uint8 [T, H, W, 3] RGB.

    decord starts from the key frames nearest to the wanted times; PyAV, which decodes straight through, is asked when
    decord cannot read the file. Both return the same pixels.

    Args:
        data: a whole video file.
        times_s: seconds after the file's first picture, in any order.

    Raises:
        UndecodableMedia: neither decoder can.
    """
    try:
        return _read_frames_decord(data, times_s)
    except UndecodableMedia:
        return _read_frames_av(data, times_s)


def _read_frames_decord(data: bytes, times_s: Sequence[float]) -> NDArray[np.uint8]:
    if not _is_whole_mp4(data):  # decord would print the bytes of a file that it cannot open
        raise UndecodableMedia("not a whole mp4 file")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        starts_s = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        pictures = reader.get_batch(_shown_at(starts_s, times_s)).asnumpy()
    except (RuntimeError, decord.DECORDError, IndexError) as error:
        raise UndecodableMedia(describe(error)) from error
    return np.asarray(pictures, dtype=np.uint8)


def _is_whole_mp4(data: bytes) -> bool:
    """Whether the outermost boxes fill `data` exactly and one of them is the table of contents (ISO 14496-12, 4.2)."""
    position, kinds = 0, []
    while position + 8 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:
            return False
        kinds.append(kind)
        position += size
    return position == len(data) and b"moov" in kinds


def _read_frames_av(data: bytes, times_s: Sequence[float]) -> NDArray[np.uint8]:
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise UndecodableMedia("no picture track")
            frames = list(container.decode(video=0))  # still in the codec's own colours: a fraction of the RGB bytes
            if not frames:
                raise UndecodableMedia("no picture could be decoded")
            starts_s = np.array([0.0 if frame.time is None else frame.time for frame in frames])
            shown = _shown_at(starts_s - starts_s[0], times_s)
            pictures = {number: frames[number].to_ndarray(format="rgb24") for number in set(shown)}
    except (av.FFmpegError, ValueError) as error:
        raise UndecodableMedia(describe(error)) from error
    return np.stack([pictures[number] for number in shown])


def _shown_at(starts_s: NDArray[np.floating], times_s: Sequence[float]) -> list[int]:
    """Index of the last frame that has begun at each time; `starts_s` ascends."""
    begun = np.searchsorted(starts_s, np.asarray(times_s, dtype=np.float64) + TIME_TOLERANCE_S, side="right") - 1
    return [int(number) for number in np.clip(begun, 0, len(starts_s) - 1)]


def read_image(data: bytes) -> NDArray[np.uint8]:
    """A still picture, uint8 [H, W, 3] RGB.

    Raises:
        UndecodableMedia: Pillow cannot read it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UndecodableMedia(describe(error)) from error


def read_sound(data: bytes, start_s: float, length_s: float, sample_rate_hz: int) -> NDArray[np.int16]:
    """Mono sound of the window [start_s, start_s + length_s) at `sample_rate_hz`, int16 [n].

    n is at most round(length_s * sample_rate_hz) and less where the sound ends earlier; sound that begins after
    `start_s` is preceded by silence, so that sample 0 is always `start_s`.

    Args:
        data: a file of any container and codec PyAV reads.

    Raises:
        UndecodableMedia: it cannot be read, or has no sound track.
    """
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise UndecodableMedia("no sound track")
            sound, rate_hz = decode_sound(container, start_s, start_s + length_s, num_channels=1)
    except (av.FFmpegError, ValueError) as error:
        raise UndecodableMedia(describe(error)) from error
    return resample(sound, rate_hz, sample_rate_hz)[0, : round(length_s * sample_rate_hz)]


def decode_sound(
    container: av.container.InputContainer, start_s: float, end_s: float, num_channels: int
) -> tuple[NDArray[np.int16], int]:
    """Sound of the first sound track between two times at its own sample rate: int16 [channels, n], and the rate.

    Frames are laid on the track's time line, so a gap in it stays a gap (silence) and does not shift what follows.

    Raises:
        av.FFmpegError: damaged sound.
    """
    stream = container.streams.audio[0]
    rate_hz = stream.rate
    if start_s > SEEK_BEYOND_S:
        container.seek(int((start_s - SEEK_MARGIN_S) / stream.time_base), stream=stream)
    to_pcm = av.AudioResampler(format="s16p", layout="mono" if num_channels == 1 else "stereo", rate=rate_hz)
    first, last = round(start_s * rate_hz), round(end_s * rate_hz)
    pieces: list[NDArray[np.int16]] = [np.zeros((num_channels, 0), dtype=np.int16)]
    filled = 0
    for position, pcm in _positioned(container, stream, to_pcm, last):
        begin, skip = max(position - first, filled), max(filled - (position - first), 0)
        piece = pcm[:, skip : skip + max(last - first - begin, 0)]
        if piece.shape[1]:
            pieces += [np.zeros((num_channels, begin - filled), dtype=np.int16), piece]
            filled = begin + piece.shape[1]
    return np.concatenate(pieces, axis=1), rate_hz


def _positioned(
    container: av.container.InputContainer, stream: av.AudioStream, to_pcm: av.AudioResampler, last: int
) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Decoded frames up to sample `last`, each with the number of its first sample on the track's time line."""
    position, rate_hz, layout = 0, stream.rate, to_pcm.layout.name
    gap = max(2, rate_hz // 500)  # containers round times: 2 ms are no gap
    for frame in container.decode(stream):
        if frame.pts is not None and frame.time_base is not None:
            stated = round(Fraction(frame.pts * frame.time_base.numerator * rate_hz, frame.time_base.denominator))
            if abs(stated - position) > gap:
                position = stated
        if position >= last:
            return
        # Mono of 16 bits is what is wanted: most shards hold it, and converting costs as much as decoding.
        ready = layout == "mono" == frame.layout.name and frame.format.name in ("s16", "s16p") and frame.rate == rate_hz
        for converted in [frame] if ready else to_pcm.resample(frame):
            pcm = converted.to_ndarray()
            yield position, pcm
            position += pcm.shape[1]


def resample(sound: NDArray[np.int16], rate_hz: int, sample_rate_hz: int) -> NDArray[np.int16]:
    """`sound` int16 [channels, n] at `rate_hz` to int16 [channels, round(n * sample_rate_hz / rate_hz)]."""
    if rate_hz == sample_rate_hz or sound.shape[1] == 0:
        return sound
    layout = "mono" if sound.shape[0] == 1 else "stereo"
    resampler = av.AudioResampler(format="s16p", layout=layout, rate=sample_rate_hz)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="s16p", layout=layout)
    frame.sample_rate = rate_hz
    pieces = [out.to_ndarray() for out in (*resampler.resample(frame), *resampler.resample(None))]
    wanted = round(sound.shape[1] * sample_rate_hz / rate_hz)
    result = np.concatenate(pieces, axis=1)[:, :wanted]
    return np.pad(result, ((0, 0), (0, wanted - result.shape[1])), mode="edge")


def describe(error: Exception) -> str:
    """A decoder's words in one line: without PyAV's error numbers and decord's C++ stack."""
    words = str(getattr(error, "strerror", None) or error)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
