"""Bytes to arrays: one window for picture and sound, one crop for all frames, random changes keyed by the sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.decode import UndecodableMedia
from pretrain.config import AugmentConfig
from pretrain.data.transforms import (
    Augmentation,
    chosen_caption,
    draw_augmentation,
    frame_times_s,
    image_frames,
    resized_crop,
    sound_window,
    video_frames,
    window_start_s,
)
from tests.tiny_dataset import (
    CLIP_S,
    FPS,
    SAMPLE_RATE_HZ,
    SWITCH_S,
    image_bytes,
    make_sample,
    sound_bytes,
    switching_members,
    video_bytes,
)

PLAIN = Augmentation()
ALL = AugmentConfig(crop_scale=(0.5, 0.9), flip=True, brightness=0.3, gain_db=6.0)


@pytest.fixture(scope="module")
def switching_clip() -> tuple[bytes, bytes]:
    """Picture and sound of six seconds; both switch on at second 3."""
    members = switching_members()
    return members["video"][1], members["audio"][1]


@pytest.mark.parametrize("place", [0.3, 0.5, 0.613, 0.7])
@pytest.mark.parametrize("rate_hz", [8000, 16000])
def test_picture_and_sound_come_from_the_same_window(
    switching_clip: tuple[bytes, bytes], place: float, rate_hz: int
) -> None:
    video, audio = switching_clip
    window_s, num_frames = 2.0, 16
    row = make_sample(0, {"video": ("mp4", video), "audio": ("flac", audio)}, CLIP_S).index
    row |= {"video_ext": "mp4", "audio_ext": "flac"}
    start_s = window_start_s(row, ("video", "audio"), window_s, place)
    assert start_s == pytest.approx(place * 4)
    times_s = frame_times_s(start_s, window_s, num_frames)
    frames, mask = video_frames(video, CLIP_S, times_s, 8, PLAIN)
    waveform, num_samples = sound_window(audio, start_s, window_s, rate_hz, PLAIN)
    assert mask.all()
    assert num_samples == len(waveform) == window_s * rate_hz
    onset_s = start_s + int(np.argmax(np.abs(waveform.astype(int)) > 1000)) / rate_hz
    assert onset_s == pytest.approx(SWITCH_S, abs=0.005)
    bright = frames.mean(axis=(1, 2, 3)) > 120
    assert bright.tolist() == (times_s >= onset_s - 0.005).tolist()
    assert 0 < bright.sum() < num_frames  # the switch is in sight


def test_the_window_lies_where_picture_and_sound_both_are() -> None:
    row = {"video_ext": "mp4", "audio_ext": "flac", "video_duration_s": 9.0, "audio_duration_s": 6.0}
    assert window_start_s(row, ("video", "audio"), 4.0, 1.0) == pytest.approx(2.0)
    assert window_start_s(row, ("video",), 4.0, 1.0) == pytest.approx(5.0)
    assert window_start_s(row, ("video", "audio"), 8.0, 1.0) == 0
    assert window_start_s(row, (), 4.0, 1.0) == 0
    still = {**row, "video_ext": "jpg", "video_duration_s": None}
    assert window_start_s(still, ("video", "audio"), 4.0, 0.5) == pytest.approx(1.0)
    silent = {**row, "audio_ext": None, "audio_duration_s": None}
    assert window_start_s(silent, ("video", "audio"), 4.0, 0.5) == pytest.approx(2.5)


def test_what_a_short_clip_lacks_is_zero_and_masked(switching_clip: tuple[bytes, bytes]) -> None:
    pictures = np.full((FPS, 48, 64, 3), 200, dtype=np.uint8)  # one second
    how = replace(PLAIN, brightness=1.2, gain=0.5)
    frames, mask = video_frames(video_bytes(pictures), 1.0, frame_times_s(0.0, 2.0, 4), 16, how)
    assert mask.tolist() == [True, True, False, False]
    assert np.abs(frames[:2].astype(int) - 240).max() <= 4
    assert not frames[2:].any()
    sound = np.full(SAMPLE_RATE_HZ, 1000, dtype=np.int16)
    waveform, num_samples = sound_window(sound_bytes(sound), 0.0, 2.0, SAMPLE_RATE_HZ, how)
    assert num_samples == SAMPLE_RATE_HZ
    assert (waveform[:num_samples] == 500).all()
    assert not waveform[num_samples:].any()
    with pytest.raises(UndecodableMedia, match=r"no sound after 5.000 s"):
        sound_window(sound_bytes(sound), 5.0, 2.0, SAMPLE_RATE_HZ, PLAIN)


def test_a_clip_shorter_than_the_first_frame_time_gives_its_middle() -> None:
    pictures = np.arange(0, 200, 50, dtype=np.uint8)[:, None, None, None].repeat(48, 1).repeat(64, 2).repeat(3, 3)
    frames, mask = video_frames(video_bytes(pictures), 0.4, frame_times_s(0.0, 4.0, 2), 8, PLAIN)
    assert mask.tolist() == [True, False]
    assert frames[0].mean() == pytest.approx(100, abs=4)


def test_a_still_picture_is_one_frame() -> None:
    frames, mask = image_frames(image_bytes(np.full((30, 50, 3), 90, dtype=np.uint8)), 3, 8, PLAIN)
    assert mask.tolist() == [True, False, False]
    assert np.abs(frames[0].astype(int) - 90).max() <= 3
    assert not frames[1:].any()


def test_all_frames_of_a_clip_are_cropped_alike() -> None:
    picture = np.random.default_rng(1).integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    data = video_bytes(np.stack([picture] * FPS))
    how = draw_augmentation(ALL, seed=0, epoch=0, key="clip")
    frames, _ = video_frames(data, 1.0, frame_times_s(0.0, 1.0, 4), 16, how)
    assert np.abs(frames.astype(int) - frames[:1].astype(int)).max() <= 12  # the codec's own changes
    plain, _ = video_frames(data, 1.0, frame_times_s(0.0, 1.0, 4), 16, PLAIN)
    assert np.abs(frames.astype(int) - plain.astype(int)).max() > 40


def coordinates(height: int, width: int) -> NDArray[np.uint8]:
    """A picture whose red is its column and whose green is its row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=2).astype(np.uint8)


def test_evaluation_takes_the_centred_square() -> None:
    square = resized_crop(coordinates(60, 100), 60, PLAIN)
    assert (square == coordinates(60, 100)[:, 20:80]).all()


def test_training_takes_a_square_of_the_drawn_area_anywhere_in_the_picture() -> None:
    areas, lefts, rights = [], [], []
    for epoch in range(300):
        how = draw_augmentation(AugmentConfig(crop_scale=(0.25, 0.64)), 0, epoch, "clip")
        square = resized_crop(coordinates(100, 200), 50, how).astype(int)
        width, height = (int(np.ptp(square[..., channel])) + 2 for channel in (0, 1))
        assert abs(width - height) <= 2  # proportions are kept
        areas.append(how.crop_side**2)
        lefts.append(square[..., 0].min())
        rights.append(square[..., 0].max())
        assert height / 100 == pytest.approx(how.crop_side, abs=0.03)
    assert 0.25 <= min(areas) < 0.27
    assert 0.62 < max(areas) <= 0.64
    assert min(lefts) <= 3
    assert max(rights) >= 196


def test_random_changes_depend_on_seed_epoch_and_key_and_nothing_else() -> None:
    assert draw_augmentation(ALL, 1, 2, "a") == draw_augmentation(ALL, 1, 2, "a")
    drawn = {
        draw_augmentation(ALL, *place) for place in [(1, 2, "a"), (0, 2, "a"), (1, 3, "a"), (1, 2, "b"), (1, 22, "")]
    }
    assert len(drawn) == 5


def test_a_setting_changes_its_own_draw_only() -> None:
    flips = 0
    for epoch in range(200):
        mirrored = draw_augmentation(ALL, 0, epoch, "a")
        straight = draw_augmentation(ALL.model_copy(update={"flip": False}), 0, epoch, "a")
        flips += mirrored.flip
        assert not straight.flip
        assert replace(mirrored, flip=False) == straight
        assert 0.7 <= straight.brightness <= 1.3
        assert 10 ** (-6 / 20) <= straight.gain <= 10 ** (6 / 20)
    assert 60 < flips < 140
    still = AugmentConfig(crop_scale=(1, 1), brightness=0, gain_db=0)
    fixed = draw_augmentation(still, 0, 0, "a")
    assert (fixed.crop_side, fixed.brightness, fixed.gain, fixed.flip) == (1, 1, 1, False)


def test_flip_mirrors_and_extremes_saturate() -> None:
    left = np.zeros((48, 48, 3), dtype=np.uint8)
    left[:, :24] = 240
    frames, _ = image_frames(image_bytes(left), 1, 16, replace(PLAIN, flip=True, brightness=1.3))
    assert frames[0, :, -6:].min() == 255
    assert frames[0, :, :6].max() < 10
    loud = np.full(SAMPLE_RATE_HZ, 30000, dtype=np.int16)
    waveform, _ = sound_window(sound_bytes(loud), 0.0, 1.0, SAMPLE_RATE_HZ, replace(PLAIN, gain=2.0))
    assert (waveform == 32767).all()


def test_captions_are_equally_likely_and_evaluation_takes_the_first() -> None:
    texts = ("one", "two", " ", "three")
    row = make_sample(0, {}, 1.0, captions=texts).index
    assert chosen_caption(row, PLAIN) == "one"
    counts = Counter(chosen_caption(row, draw_augmentation(ALL, 0, epoch, "a")) for epoch in range(600))
    assert set(counts) == {"one", "two", "three"}
    assert min(counts.values()) > 150
    assert chosen_caption({"captions": [{"text": "  "}]}, PLAIN) is None
