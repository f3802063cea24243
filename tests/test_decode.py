"""Decoding: decord and PyAV agree, times mean what they say, bad bytes raise and nothing is printed."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.config import AudioConfig
from data_pipeline.decode import (
    UndecodableMedia,
    _read_frames_av,
    _read_frames_decord,
    read_frames,
    read_image,
    read_sound,
    resample,
)
from data_pipeline.sound import encode_sound
from tests.media import counting_picture, write_clip, write_wav


def encode_video(preset: str = "veryfast", first_pts: int = 0, colorspace: int = 2, color_range: int = 0) -> bytes:
    """40 pictures at 10 fps with B-frames, from `first_pts` on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10, options={"preset": preset, "mbtree": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.gop_size = 10
        stream.codec_context.thread_count = 1  # more threads or macroblock tree: other bytes
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        for number in range(40):
            picture = counting_picture(number, 40, 96, 64)
            picture[..., 0] = picture[..., 0] // 2  # coloured, so that a wrong matrix shows
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number + first_pts
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


TIMES_S = [0.0, 0.05, 0.1, 0.299, 0.35, 3.9, 99.0, -1.0, 2.0]


@pytest.mark.parametrize("colorspace", [1, 2, 5])
@pytest.mark.parametrize("color_range", [1, 2])
def test_decord_and_pyav_return_the_same_pixels(colorspace: int, color_range: int) -> None:
    data = encode_video(colorspace=colorspace, color_range=color_range)
    np.testing.assert_array_equal(_read_frames_decord(data, TIMES_S), _read_frames_av(data, TIMES_S))


def test_the_frame_shown_is_the_last_that_has_begun() -> None:
    for first_pts in (0, 7):  # time 0 is the first picture, wherever the container puts it
        data = encode_video(first_pts=first_pts)
        every = _read_frames_av(data, [number / 10 for number in range(40)])
        assert len({int(picture.mean() * 10) for picture in every}) == 40
        expected = every[[0, 0, 1, 2, 3, 39, 39, 0, 20]]
        for read in (read_frames, _read_frames_av, _read_frames_decord):
            np.testing.assert_array_equal(read(data, TIMES_S), expected)


def bad_videos(folder: Path) -> dict[str, bytes]:
    data = encode_video()
    start = data.index(b"mdat")
    noise = np.random.default_rng(0).integers(0, 255, 1500, dtype=np.uint8).tobytes()
    sound_only = write_clip(folder / "s.mp4", picture=False).read_bytes()
    return {
        "empty": b"", "web page": b"<!DOCTYPE html><html></html>" * 20, "cut": data[: len(data) // 2],
        "damaged": data[: start + 900] + noise + data[start + 2400 :], "no pictures": sound_only,
    }  # fmt: skip


def test_bad_videos_raise_one_line_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, data in bad_videos(tmp_path).items():
        with pytest.raises(UndecodableMedia) as error:
            read_frames(data, [0.0, 1.0, 3.9])
        assert str(error.value), name
        assert "\n" not in str(error.value)
    for data in (b"", b"GIF89a", b"<html>"):
        with pytest.raises(UndecodableMedia):
            read_image(data)
    for data in (b"", encode_video(), b"RIFF\0\0\0\0WAVE"):
        with pytest.raises(UndecodableMedia):
            read_sound(data, 0.0, 1.0, 16_000)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_pyav_reads_what_decord_does_not(tmp_path: Path) -> None:
    with av.open(io.BytesIO(encode_video())) as source, av.open(str(tmp_path / "v.mkv"), "w") as out:
        track = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = track
                out.mux(packet)
    data = (tmp_path / "v.mkv").read_bytes()
    np.testing.assert_array_equal(read_frames(data, TIMES_S), read_frames(encode_video(), TIMES_S))


def test_stills_become_rgb() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), 77, dtype=np.uint8)).save(buffer, "PNG")
    image = read_image(buffer.getvalue())
    assert (image.shape, image.dtype) == ((4, 6, 3), np.uint8)
    assert (image == 77).all()


def noise(num_samples: int) -> NDArray[np.int16]:
    """Band-limited noise: what a lossy codec keeps, and whose correlation shows a shift of one sample."""
    spectrum = np.fft.rfft(np.random.default_rng(3).standard_normal(num_samples))
    spectrum[num_samples // 6 :] = 0
    sound = np.fft.irfft(spectrum, num_samples)
    return (8000 * sound / np.abs(sound).max()).astype(np.int16)


def lag_of(found: NDArray[np.int16], expected: NDArray[np.int16]) -> int:
    """By how many samples `found` comes later than `expected`."""
    length = 2 * max(len(found), len(expected))
    product = np.fft.irfft(np.fft.rfft(found, length) * np.conj(np.fft.rfft(expected, length)))
    lag = int(product.argmax())
    return lag if lag < length // 2 else lag - length


@pytest.mark.parametrize("codec", ["flac", "opus"])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_keeps_its_place_in_time(codec: str, channels: int) -> None:
    sound = noise(48_000 * 3)
    config = AudioConfig(codec=codec, sample_rate_hz=48_000, channels=channels)
    data = encode_sound(np.repeat(sound[None], channels, axis=0), config)
    for start_s, length_s in ((0.0, 3.0), (1.25, 1.0), (2.5, 2.0)):
        begin, end = round(start_s * 48_000), round((start_s + length_s) * 48_000)
        found = read_sound(data, start_s, length_s, 48_000)
        assert len(found) == len(sound[begin:end])
        assert lag_of(found, sound[begin:end]) == 0
        if codec == "flac":
            np.testing.assert_array_equal(found, sound[begin:end])
        thirds = read_sound(data, start_s, length_s, 16_000)
        assert len(thirds) == len(sound[begin:end]) // 3
        assert lag_of(thirds, resample(sound[None, begin:end], 48_000, 16_000)[0]) == 0


def test_sound_is_found_far_into_a_file(tmp_path: Path) -> None:
    sound = noise(8_000 * 40)
    data = encode_sound(sound[None], AudioConfig(sample_rate_hz=8_000))
    np.testing.assert_array_equal(read_sound(data, 31.5, 1.0, 8_000), sound[252_000:260_000])


def test_sound_of_a_video_begins_with_it(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "v.mp4", silent_s=1.0).read_bytes()
    found = np.abs(read_sound(data, 0.5, 1.0, 16_000).astype(np.int32))
    assert found[:7_500].max() < 300 < 8_000 < found[8_500:].max()  # the tone begins at 0.5 s of the window
    assert len(read_sound(write_wav(tmp_path / "w.wav").read_bytes(), 1.5, 2.0, 16_000)) == 8_000
    assert len(read_sound(write_wav(tmp_path / "w.wav").read_bytes(), 5.0, 2.0, 16_000)) == 0
