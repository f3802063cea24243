"""The demo corpus: repeatable files, a grid that needs both modalities, and the truth about what is broken."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.demo_corpus import factors, picture, tone
from data_pipeline.demo_corpus.captions import WORDS
from data_pipeline.demo_corpus.command import write_corpus
from data_pipeline.demo_corpus.corpus import Clip, plan
from data_pipeline.manifest import read_manifest
from data_pipeline.settings import UserError

NUM_CLIPS, SEED = 1000, 3


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return plan(NUM_CLIPS, SEED)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything but the two test splits, drawn by two processes."""
    folder = tmp_path_factory.mktemp("corpus") / "two"
    write_corpus(folder, 20, SEED, workers=2, splits=("train", "val"))
    return folder


def of(clips: list[Clip], split: str) -> list[Clip]:
    return [clip for clip in clips if clip.split == split]


def names(clip: Clip) -> set[str]:
    """Values that the clip's first caption names."""
    words = {word: value for value, options in WORDS.items() for word in options}
    text = clip.captions[0]
    found = set()
    for word in sorted(words, key=len, reverse=True):
        if word in text:
            text = text.replace(word, "")
            found.add(words[word])
    return found


def test_grid_pairs_every_picture_with_every_sound_once(clips: list[Clip]) -> None:
    grid = of(clips, "test")
    assert len(grid) == 256
    pairs = Counter((clip.visual, clip.sound) for clip in grid)
    assert set(pairs) == set(itertools.product(factors.grid_visuals(), factors.grid_sounds()))
    assert len({clip.visual for clip in grid}) == len({clip.sound for clip in grid}) == 16


def test_nothing_of_the_grid_is_trained_but_every_value_is(clips: list[Clip]) -> None:
    trained = [clip for clip in clips if clip.split in ("train", "val")]
    assert not {clip.visual for clip in trained} & set(factors.grid_visuals())
    assert not {clip.sound for clip in trained} & set(factors.grid_sounds())
    seen = {value for clip in trained for value in vars(clip.visual).values()}
    heard = {value for clip in trained if clip.sound for value in vars(clip.sound).values()}
    assert seen == {*factors.SHAPES, *factors.COLOURS, *factors.MOTIONS, *factors.BACKGROUNDS}
    assert heard == {*factors.TIMBRES, *factors.CONTOURS, *factors.RHYTHMS}


def test_ordinary_clips_are_new_pairs_of_training_combinations(clips: list[Clip]) -> None:
    trained = {(clip.visual, clip.sound) for clip in clips if clip.split != "test-ordinary"}
    ordinary = of(clips, "test-ordinary")
    assert len(ordinary) == len({clip.visual for clip in ordinary}) == 200
    assert not {(clip.visual, clip.sound) for clip in ordinary} & trained
    assert not {clip.sound for clip in ordinary} & set(factors.grid_sounds())


def test_captions_of_the_tests_name_picture_and_sound_completely(clips: list[Clip]) -> None:
    for clip in of(clips, "test") + of(clips, "test-ordinary"):
        assert clip.sound is not None
        assert names(clip) == {*vars(clip.visual).values(), *vars(clip.sound).values()}, clip.captions


def test_no_two_captions_of_the_grid_say_the_same(clips: list[Clip]) -> None:
    assert len({frozenset(names(clip)) for clip in of(clips, "test")}) == 256


def test_clips_of_the_same_combination_differ() -> None:
    visual, sound = factors.training_visuals()[0], factors.training_sounds()[0]
    first, second = (np.random.default_rng(seed) for seed in (0, 1))
    assert not np.array_equal(next(picture.frames(visual, first)), next(picture.frames(visual, second)))
    assert not np.array_equal(tone.waveform(sound, first), tone.waveform(sound, second))


@pytest.mark.parametrize("timbre", factors.TIMBRES)
@pytest.mark.parametrize("contour", factors.CONTOURS)
def test_pitch_goes_where_its_name_says(timbre: str, contour: str) -> None:
    sound = factors.Sound(timbre=timbre, contour=contour, rhythm="continuous")
    wave = tone.waveform(sound, np.random.default_rng(0))
    size = int(0.1 * tone.RATE_HZ)
    power = abs(np.fft.rfft(wave.reshape(-1, size) * np.hanning(size), axis=1)) ** 2
    # Below 1.7 kHz, where the lowest partial is the loudest of every timbre.
    frequencies_hz = np.fft.rfftfreq(size, 1 / tone.RATE_HZ)
    low = frequencies_hz < 1700
    peaks_hz = frequencies_hz[low][power[:, low].argmax(axis=1)]
    octaves = np.log2(peaks_hz[[1, 2, -3, -2]])
    change, spread = octaves[2:].mean() - octaves[:2].mean(), np.log2(peaks_hz).std()
    if contour in ("rising", "falling"):
        assert (change if contour == "rising" else -change) > 1
    else:
        assert (spread > 0.5) == (contour == "wavering")


def test_captions_of_silent_clips_name_no_sound(clips: list[Clip]) -> None:
    silent = [clip for clip in of(clips, "train") if clip.sound is None and clip.captions]
    assert silent
    assert not any(names(clip) & {*factors.TIMBRES, *factors.CONTOURS, *factors.RHYTHMS} for clip in silent)


def test_shares_of_what_is_missing(clips: list[Clip]) -> None:
    train = [clip for clip in of(clips, "train") if clip.breakage is None]
    assert len(train) == NUM_CLIPS
    assert 0.03 < np.mean([clip.sound is None for clip in train]) < 0.07
    assert 0.03 < np.mean([not clip.captions for clip in train]) < 0.07
    assert np.mean([len(clip.captions) > 1 for clip in train]) > 0.8
    assert len(of(clips, "val")) == 50
    assert Counter(clip.breakage for clip in clips if clip.breakage) == dict.fromkeys(
        ("truncated", "empty", "web page", "missing"), 5
    )


def test_manifest_does_not_tell_what_is_broken(clips: list[Clip]) -> None:
    whole = [dataclasses.replace(clip, breakage=None) for clip in clips]
    assert [clip.manifest_row() for clip in clips] == [clip.manifest_row() for clip in whole]
    ids = [clip.id for clip in clips]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"(train|val)-\d{6}|(test|ordinary)-\d{3}", name) for name in ids)
    places = [place for place, clip in enumerate(clips) if clip.breakage]
    assert len(places) == 20
    assert places[0] < NUM_CLIPS / 4
    assert places[-1] > NUM_CLIPS * 3 / 4
    assert len(set(np.diff(places))) > 5  # nor does the distance from one to the next


def test_files_are_as_stated(corpus: Path) -> None:
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    broken = json.loads((corpus / "broken.json").read_text())
    for row in rows:
        if row["id"] in broken:
            continue
        with av.open(str(corpus / row["video"])) as container:
            video = container.streams.video[0]
            assert (video.codec_context.name, video.width, video.height) == ("h264", 320, 240)
            assert video.average_rate == picture.FPS
            assert sum(1 for _ in container.decode(video=0)) == picture.NUM_FRAMES
            assert bool(container.streams.audio) == (row["timbre"] is not None)
            if container.streams.audio:
                audio = container.streams.audio[0]
                assert (audio.codec_context.name, audio.rate) == ("aac", tone.RATE_HZ)
                assert abs(float(audio.duration * audio.time_base) - tone.DURATION_S) < 0.05


def test_broken_files_are_what_the_truth_says(corpus: Path) -> None:
    broken = json.loads((corpus / "broken.json").read_text())
    assert set(broken.values()) == {"truncated", "empty", "web page", "missing"}
    for clip, kind in broken.items():
        path = corpus / "clips" / f"{clip}.mp4"
        assert path.exists() == (kind != "missing")
        if kind == "empty":
            assert path.stat().st_size == 0
        if kind in ("truncated", "web page"):
            with pytest.raises(av.error.FFmpegError):
                av.open(str(path))


def test_sharding_reads_the_manifest(corpus: Path) -> None:
    rows = list(read_manifest(str(corpus / "manifest.jsonl")).rows)
    assert len(rows) == 25
    assert all(row.metadata["shape"] in factors.SHAPES for row in rows)


def test_seed_decides_every_byte_whatever_the_processes(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "one", 20, SEED, workers=1, splits=("train", "val"))
    paths = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert paths == sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    for path in paths:
        assert (corpus / path).read_bytes() == (tmp_path / "one" / path).read_bytes(), path


def test_a_second_run_keeps_files_and_another_corpus_is_refused(corpus: Path) -> None:
    victim = corpus / "clips" / "train-000001.mp4"
    content = victim.read_bytes()
    victim.unlink()
    times = {path: path.stat().st_mtime_ns for path in corpus.rglob("*") if path.is_file()}
    write_corpus(corpus, 20, SEED, workers=1, splits=("train", "val"))
    assert victim.read_bytes() == content
    times[victim] = victim.stat().st_mtime_ns
    write_corpus(corpus, 20, SEED, workers=1, splits=("train", "val"))
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*") if path.is_file()} == times
    with pytest.raises(UserError, match="use another folder or the same numbers"):
        write_corpus(corpus, 21, SEED, workers=1)


@pytest.mark.parametrize("motion", factors.MOTIONS)
def test_motion_goes_where_its_name_says(motion: str) -> None:
    visual = factors.Visual(shape="circle", colour="white", motion=motion, background="plain")
    drawn = list(picture.frames(visual, np.random.default_rng(0)))
    places = []
    for frame in (drawn[5], drawn[-5]):
        rows, columns = np.nonzero(frame[: picture.HEIGHT_PX] > 180)
        places.append((columns.mean(), rows.mean(), len(rows)))
    (x0, y0, size0), (x1, y1, size1) = places
    moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0, "growing": size1 - size0}
    assert moved[motion] > 50


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_corpus(tmp_path / "file", 20, SEED, workers=1)
    assert "\n" not in str(caught.value)
