"""A row becomes clips whose pictures, sound and subtitles cover the same window, or a truthful reason."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import ShardConfig
from data_pipeline.decode import read_frames, read_image, read_sound
from data_pipeline.extract import extract_row, sample_key
from data_pipeline.filters import Reason, Rejection
from data_pipeline.manifest_row import Caption, ManifestRow
from data_pipeline.settings import check_settings
from data_pipeline.shards import Sample
from tests.media import decode_pictures, write_clip, write_panning, write_wav

FPS, SECONDS = 25, 4.0
CONFIG = ShardConfig(manifest="m", out_dir="o")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole media files: v.mp4 (tone from 1.0 s on), mute.mp4, panning.mp4, sound.wav, still.png."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "v.mp4", duration_s=SECONDS, fps=FPS, silent_s=1.0)
    write_clip(folder / "mute.mp4", duration_s=SECONDS, sound=False)
    write_panning(folder / "panning.mp4")
    write_wav(folder / "sound.wav", duration_s=3.0, silent_s=2.0)
    Image.fromarray(np.full((90, 120, 3), (200, 40, 40), dtype=np.uint8)).save(folder / "still.png")
    (folder / "s.srt").write_text(
        "1\n00:00:00,500 --> 00:00:01,200\n<i>Early</i>\nwords\n\n2\n00:00:03,000 --> 00:00:09,000\nLate\n"
    )
    return folder


def extract(folder: Path, row: dict[str, Any], **changes: Any) -> list[Sample | Rejection]:
    config = check_settings(ShardConfig, {"manifest": "m", "out_dir": "o", **changes}, "test")
    return list(extract_row(ManifestRow(**{"id": "a", **row}), str(folder), config))


def samples(outcomes: list[Sample | Rejection]) -> list[Sample]:
    assert all(isinstance(outcome, Sample) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Sample)]


def brightness(data: bytes) -> np.ndarray:
    """Mean of each picture: `counting_picture` k of 100 has 50 + 150 k / 99."""
    return decode_pictures(data)[1].mean(axis=(1, 2, 3))


def expected_brightness(times_s: np.ndarray) -> np.ndarray:
    return 50 + 150 * np.floor(times_s * FPS + 1e-6) / (SECONDS * FPS - 1)


def test_a_whole_row_is_one_clip(folder: Path) -> None:
    row = {
        "video": "v.mp4",
        "captions": (Caption(text="rising", source="human"),),
        "metadata": {"x": [1]},
        "weight": 2.0,
    }
    (sample,) = samples(extract(folder, row, video={"short_side_px": 60, "fps": 10.0}))
    assert sample.key == "a-0000"
    times_s, pictures = decode_pictures(sample.members["video"][1])
    np.testing.assert_allclose(times_s, np.arange(40) / 10, atol=1e-6)
    assert pictures.shape == (40, 60, 80, 3)
    np.testing.assert_allclose(pictures.mean(axis=(1, 2, 3)), expected_brightness(np.arange(40) / 10), atol=2.0)
    assert {name: sample.index[name] for name in sample.index if name.startswith(("video", "audio"))} == {
        "video_num_frames": 40, "video_fps": 10.0, "video_width_px": 80, "video_height_px": 60,
        "video_duration_s": 4.0, "audio_sample_rate_hz": 16_000, "audio_duration_s": 4.0,
    }  # fmt: skip
    assert json.loads(sample.members["json"][1]) == {
        "id": "a", "clip_index": 0, "split": "train", "weight": 2.0, "start_s": 0.0, "end_s": 4.0, "subtitles": [],
        "captions": [{"text": "rising", "source": "human"}], "metadata": {"x": [1]},
    }  # fmt: skip


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_pictures_sound_and_subtitles_cover_the_same_window(folder: Path, codec: str) -> None:
    row = {"video": "v.mp4", "start_s": 0.5, "subtitles": "s.srt"}
    clips = samples(
        extract(folder, row, clip={"mode": "fixed", "length_s": 1.5}, video={"fps": 10.0}, audio={"codec": codec})
    )
    assert [(clip.index["start_s"], clip.index["end_s"]) for clip in clips] == [(0.5, 2.0), (2.0, 3.5), (3.5, 4.0)]
    for clip in clips:
        start_s, length_s = clip.index["start_s"], clip.index["end_s"] - clip.index["start_s"]
        found = brightness(clip.members["video"][1])
        assert len(found) == round(length_s * 10)
        np.testing.assert_allclose(found, expected_brightness(start_s + np.arange(len(found)) / 10), atol=2.0)
        sound = read_sound(clip.members["audio"][1], 0.0, 9.0, 16_000)
        assert abs(len(sound) - round(length_s * 16_000)) <= 1
    first = np.abs(read_sound(clips[0].members["audio"][1], 0.0, 1.5, 16_000).astype(np.int32))
    assert first[:7_500].max() < 500 < 8_000 < first[8_500:].max()  # the tone begins at 1.0 s, 0.5 s into the clip
    assert clips[0].index["subtitles"] == [{"start_s": 0.0, "end_s": 0.7, "text": "Early words"}]
    assert clips[1].index["subtitles"] == [{"start_s": 1.0, "end_s": 1.5, "text": "Late"}]
    assert clips[2].index["subtitles"] == [{"start_s": 0.0, "end_s": 0.5, "text": "Late"}]


def test_windows_may_overlap_and_keep_every_picture(folder: Path) -> None:
    clips = samples(extract(folder, {"video": "v.mp4"}, clip={"mode": "fixed", "length_s": 2.0, "stride_s": 1.0}))
    assert [clip.index["start_s"] for clip in clips] == [0.0, 1.0, 2.0]
    for clip in clips:
        found = brightness(clip.members["video"][1])
        assert len(found) == 50
        np.testing.assert_allclose(found, expected_brightness(clip.index["start_s"] + np.arange(50) / FPS), atol=2.0)


def test_slow_videos_keep_their_rate_and_small_ones_their_size(folder: Path) -> None:
    (sample,) = samples(extract(folder, {"video": "mute.mp4"}, video={"fps": 60.0, "short_side_px": 1000}))
    times_s, pictures = decode_pictures(sample.members["video"][1])
    np.testing.assert_allclose(times_s, np.arange(100) / FPS, atol=1e-4)
    assert pictures.shape[1:] == (120, 160, 3)
    assert set(sample.members) == {"video", "json"}


def test_key_frames_are_never_far(folder: Path) -> None:
    import av

    (sample,) = samples(extract(folder, {"video": "v.mp4"}, video={"gop_s": 0.5}))
    with av.open(io.BytesIO(sample.members["video"][1])) as container:
        keys_s = [float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.is_keyframe]
    assert max(np.diff([*keys_s, SECONDS])) <= 0.5 + 1 / FPS


def test_an_audio_column_replaces_the_sound_track(folder: Path) -> None:
    (sample,) = samples(extract(folder, {"video": "v.mp4", "audio": "sound.wav"}))
    sound = np.abs(read_sound(sample.members["audio"][1], 0.0, 4.0, 16_000).astype(np.int32))
    assert len(sound) == 48_000  # the wav ends at 3 s
    assert sound[:31_000].max() < 500 < 8_000 < sound[33_000:].max()
    (alone,) = samples(extract(folder, {"audio": "sound.wav", "end_s": 2.5}, audio={"channels": 2}))
    assert set(alone.members) == {"audio", "json"}
    assert alone.index["audio_duration_s"] == 2.5


def test_paths_may_be_urls(folder: Path) -> None:
    (by_url,) = samples(extract(folder, {"video": f"file://{folder}/v.mp4"}))
    (by_base,) = samples(list(extract_row(ManifestRow(id="a", video="v.mp4"), f"file://{folder}", CONFIG)))
    assert by_url == by_base == samples(extract(folder, {"video": "v.mp4"}))[0]
    (gone,) = extract(folder, {"video": f"file://{folder}/gone.mp4"})
    assert isinstance(gone, Rejection)
    assert gone.reason is Reason.MISSING_FILE


def test_an_image_is_a_picture(folder: Path) -> None:
    (sample,) = samples(extract(folder, {"image": "still.png"}, video={"short_side_px": 30}))
    extension, data = sample.members["video"]
    assert (extension, read_image(data).shape) == ("jpg", (30, 40, 3))
    np.testing.assert_allclose(read_image(data).mean(axis=(0, 1)), (200, 40, 40), atol=4)
    assert (sample.index["start_s"], sample.index["end_s"]) == (0.0, 0.0)


def test_copy_leaves_the_pictures_as_they_are(folder: Path) -> None:
    source = (folder / "v.mp4").read_bytes()
    (sample,) = samples(extract(folder, {"video": "v.mp4"}, video={"mode": "copy"}))
    times_s = [0.0, 1.23, 3.96]
    np.testing.assert_array_equal(read_frames(sample.members["video"][1], times_s), read_frames(source, times_s))
    assert (sample.index["video_num_frames"], sample.index["video_duration_s"]) == (100, 4.0)
    assert sample.index["audio_duration_s"] == 4.0


def turn_lying_down(data: bytes) -> bytes:
    """`data` with a display matrix that turns it by a quarter clockwise, as phones write it (ISO 14496-12, 8.3.2)."""
    upright = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    turned = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    place = data.index(upright, data.index(b"tkhd"))
    return data[:place] + turned + data[place + len(upright) :]


def test_a_picture_that_lies_down_is_turned_upright(folder: Path) -> None:
    (folder / "phone.mp4").write_bytes(turn_lying_down((folder / "mute.mp4").read_bytes()))
    (sample,) = samples(extract(folder, {"video": "phone.mp4"}, video={"short_side_px": 60}))
    picture = read_frames(sample.members["video"][1], [0.0])[0].astype(np.int32)
    assert picture.shape == (80, 60, 3)
    assert (sample.index["video_width_px"], sample.index["video_height_px"]) == (60, 80)
    # The slope went up from left to right; turned clockwise it goes up from top to bottom.
    np.testing.assert_allclose(picture[-2].mean() - picture[1].mean(), 57, atol=4)


def fill_free_memory(seed: int) -> None:
    """Leave other bytes in the memory that is handed out next."""
    sizes = (100, 1_000, 3_000, 8_000, 20_000, 50_000, 200_000)
    arrays = [np.full(size, seed * 37 % 256, dtype=np.uint8) for size in sizes * 40]
    del arrays


@pytest.mark.parametrize(
    "changes",
    [{}, {"video": {"preset": "medium", "fps": 7.3}}, {"video": {"mode": "copy"}}, {"audio": {"codec": "opus"}}],
)
def test_equal_rows_give_equal_bytes_whatever_is_in_memory(folder: Path, changes: dict[str, Any]) -> None:
    first = extract(folder, {"video": "panning.mp4", "audio": "v.mp4"}, **changes)
    for seed in range(5):
        fill_free_memory(seed)
        assert extract(folder, {"video": "panning.mp4", "audio": "v.mp4"}, **changes) == first


def test_ids_that_make_no_file_name_are_hashed() -> None:
    assert sample_key("clip_1-b", 12) == "clip_1-b-0012"
    for odd in ("a.b", "a/b", "ü", "x" * 65, "a b"):
        key = sample_key(odd, 0)
        assert key.replace("-", "").isalnum()
        assert key != sample_key(odd + "2", 0)
    assert len({sample_key(name, 0) for name in ("a.b", "a/b", "a b")}) == 3


def broken_files(folder: Path) -> None:
    """Files that are broken in different ways, beside the whole ones."""
    whole = (folder / "v.mp4").read_bytes()
    fast = write_clip(folder / "fast.mp4", duration_s=SECONDS, faststart=True).read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, 3000, dtype=np.uint8).tobytes()
    begin = whole.index(b"mdat") + 2000
    wav = (folder / "sound.wav").read_bytes()
    for name, data in {
        "empty.mp4": b"", "page.mp4": b"<!DOCTYPE html><html><body>Not found</body></html>" * 9,
        "cut.mp4": whole[: len(whole) // 2], "fast_cut.mp4": fast[: int(len(fast) * 0.7)],
        "damaged.mp4": whole[:begin] + noise + whole[begin + len(noise) :], "page.jpg": b"<html>" * 20,
        "cut.png": (folder / "still.png").read_bytes()[:150], "cut.wav": wav[: len(wav) // 2], "bad.srt": b"no times",
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    write_clip(folder / "sound_only.mp4", picture=False)
    (folder / "folder.mp4").mkdir(exist_ok=True)


COPY = {"video": {"mode": "copy"}}
BROKEN: list[tuple[dict[str, Any], dict[str, Any], Reason, str]] = [
    ({"video": "gone.mp4"}, {}, Reason.MISSING_FILE, "gone.mp4: no such file"),
    ({"video": "v.mp4", "audio": "gone.wav"}, {}, Reason.MISSING_FILE, "gone.wav: no such file"),
    ({"video": "folder.mp4"}, {}, Reason.UNREADABLE_FILE, "Is a directory"),
    ({"video": "empty.mp4"}, {}, Reason.EMPTY_FILE, "empty.mp4: 0 bytes"),
    ({"image": "empty.mp4"}, {}, Reason.EMPTY_FILE, "0 bytes"),
    ({"video": "page.mp4"}, {}, Reason.NOT_MEDIA, "begins with b'<!DOCTYPE html>"),
    ({"image": "page.jpg"}, {}, Reason.NOT_MEDIA, "cannot identify"),
    ({"video": "cut.mp4"}, {}, Reason.TRUNCATED, "bytes of"),
    ({"video": "fast_cut.mp4"}, {}, Reason.TRUNCATED, "of 100 pictures"),
    ({"video": "fast_cut.mp4"}, COPY, Reason.TRUNCATED, ""),
    ({"image": "cut.png"}, {}, Reason.TRUNCATED, ""),
    ({"audio": "cut.wav"}, {}, Reason.TRUNCATED, "bytes of"),
    ({"video": "damaged.mp4"}, {}, Reason.DAMAGED, "damaged.mp4"),
    ({"video": "sound_only.mp4"}, {}, Reason.NO_TRACK, "no picture track"),
    ({"audio": "mute.mp4"}, {}, Reason.NO_TRACK, "no sound track"),
    ({}, {}, Reason.NOTHING, "no picture, no sound, no caption"),
    ({"video": "v.mp4", "image": "still.png"}, {}, Reason.BAD_ROW, "both a video and an image"),
    ({"video": "v.mp4", "subtitles": "bad.srt"}, {}, Reason.BAD_SUBTITLES, "bad.srt"),
    ({"video": "v.mp4", "start_s": -1.0}, {}, Reason.BAD_TIMES, "expected 0 <= start_s < end_s"),
    ({"video": "v.mp4", "start_s": 2.0, "end_s": 1.0}, {}, Reason.BAD_TIMES, "from 2.000 s to 1.000 s"),
    ({"video": "v.mp4", "end_s": 9.0}, {}, Reason.BAD_TIMES, "v.mp4 ends at 4.000 s"),
    ({"video": "v.mp4", "start_s": 5.0, "end_s": 6.0}, {}, Reason.BAD_TIMES, "v.mp4 ends at 4.000 s"),
    ({"image": "still.png", "end_s": 1.0}, {}, Reason.BAD_TIMES, "neither a video nor a sound"),
    ({"video": "v.mp4", "end_s": 0.3}, {}, Reason.TOO_SHORT, "0.300 s"),
    ({"video": "v.mp4"}, {"clip": {"max_s": 2.0}}, Reason.TOO_LONG, "4.000 s"),
    ({"video": "mute.mp4"}, {"require": ["audio"]}, Reason.LACKS_AUDIO, "requires audio"),
    ({"audio": "sound.wav"}, {"require": ["video"]}, Reason.LACKS_VIDEO, "requires video"),
    ({"video": "v.mp4"}, {"require": ["captions"]}, Reason.LACKS_CAPTIONS, "requires captions"),
    ({"video": "v.mp4", "start_s": 1.0}, COPY, Reason.CANNOT_COPY, "cannot cut"),
    ({"problem": ("duplicate_id", "row 3")}, {}, Reason.DUPLICATE_ID, "row 3"),
]  # fmt: skip


def test_every_broken_input_has_its_reason(folder: Path) -> None:
    broken_files(folder)
    wrong = []
    for row, changes, reason, words in BROKEN:
        outcomes = extract(folder, row, **changes)
        (outcome,) = outcomes
        if not (isinstance(outcome, Rejection) and outcome.reason is reason and words in outcome.detail):
            wrong.append((row, reason, outcome))
    assert not wrong
    produced = {reason for _, _, reason, _ in BROKEN}
    assert set(Reason) - produced == {Reason.MISSING_ID, Reason.UNEXPECTED}  # the first is the manifest's


def test_clips_before_the_damage_are_kept(folder: Path) -> None:
    broken_files(folder)
    outcomes = extract(folder, {"video": "fast_cut.mp4"}, clip={"mode": "fixed", "length_s": 1.0})
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds == sorted(kinds, reverse=True)  # samples, then rejections
    assert len(outcomes) == 4
    assert {"Sample", "Rejection"} == set(kinds)
    assert [o.index["clip_index"] if isinstance(o, Sample) else o.clip_index for o in outcomes] == [0, 1, 2, 3]


def test_a_row_that_is_only_text_is_a_sample(folder: Path) -> None:
    (sample,) = samples(extract(folder, {"captions": (Caption(text="only words"),)}))
    assert set(sample.members) == {"json"}
