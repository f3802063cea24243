"""`parallelotope inspect`: figures against a dataset whose content is known, pictures looked at pixel by pixel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_pipeline.settings import UserError
from data_pipeline.shards import REJECTS_SCHEMA, ShardedDataset
from pretrain.data.reader import BatchReader
from pretrain.inspection.command import inspect
from pretrain.inspection.contact_sheet import draw_contact_sheet, spread_evenly
from pretrain.inspection.drawing import ELLIPSIS, MISSING, spectrogram, wrapped
from pretrain.inspection.sample_view import captions_cut, draw_sample, token_table
from pretrain.inspection.statistics import describe_dataset
from tests.tiny_dataset import CAPTION, NUM_SAMPLES, TOWERS, write_mixed_dataset

CUT = "captions that fill all 64 tokens, the rest cut: 0 of 14 looked at"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_mixed_dataset(tmp_path_factory.mktemp("inspected") / "mixed set")
    rejects = [("a", None, "truncated", "5 bytes of 9"), ("b", 2, "too_short", "0.1 s"), ("c", None, "truncated", "x")]
    rows = [
        {"row_id": row, "clip_index": clip, "split": "train", "reason": reason, "detail": detail, "task": 0}
        for row, clip, reason, detail in rejects
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA), folder / "rejects.parquet")
    return folder


def test_statistics_are_those_of_the_samples(mixed: Path) -> None:
    statistics = describe_dataset(mixed)
    (split,) = statistics.splits
    assert (split.split, split.num_samples) == ("train", NUM_SAMPLES)
    # Of 14: 1 lacks pictures, 3 is a still; 0 lacks sound; 2 lacks captions, 4 has two of them.
    assert (split.with_video, split.with_image, split.with_audio) == (12, 1, 13)
    assert (split.with_text, split.complete, split.with_subtitles) == (13, 11, 0)
    assert (split.num_captions, split.num_distinct_captions) == (14, 14)
    assert split.caption_sources == {"human": 14}
    assert split.caption_words is not None
    assert (split.caption_words.least, split.caption_words.most) == (2, 9)
    assert split.duration_s is not None
    assert (split.duration_s.least, split.duration_s.median) == (0.5, 1.6)
    assert split.total_s == pytest.approx(13 * 1.6 + 0.5)
    truncated, too_short = statistics.rejects
    assert (truncated.reason, truncated.num_rejects, truncated.by_split) == ("truncated", 2, {"train": 2})
    assert truncated.examples == ("a: 5 bytes of 9", "c: x")
    assert (too_short.reason, too_short.num_rejects) == ("too_short", 1)


def test_every_split_is_described(small_dataset: Path) -> None:
    train, held_out = describe_dataset(small_dataset).splits
    assert (train.split, train.num_samples, held_out.split, held_out.num_samples) == ("train", 23, "val", 12)
    assert train.with_audio == 23 - 3  # every 7th lacks sound
    assert (train.with_text, train.num_captions) == (23 - 2, 2 * (23 - 2))


def test_sheet_shows_frames_and_names_what_cannot_be_read(mixed: Path) -> None:
    dataset = ShardedDataset(mixed, "train")
    sheet, problems = draw_contact_sheet(dataset, list(range(NUM_SAMPLES)), columns=7)
    assert [line.split(" cannot")[0] for line in problems] == ["6: video", "6: audio"]
    assert problems[0].endswith("(key clip-0006)")
    pixels = np.asarray(sheet)
    tile = pixels.shape[1] / 7

    def box(place: int) -> np.ndarray:  # the middle of a tile's picture in the first row
        x = int((place + 0.5) * tile)
        return pixels[60:180, x - 60 : x + 60]

    assert box(0).std() > 30  # noise
    assert (box(1)[:20] == MISSING).all()  # no picture
    assert np.abs(box(3).mean() - 120) < 5  # the grey still
    assert (box(6)[:20] == MISSING).all()  # garbage


def test_sample_view_shows_what_the_model_gets(mixed: Path) -> None:
    dataset = ShardedDataset(mixed, "train")
    reader = BatchReader(dataset, TOWERS, 1.0, None, 0)
    row, batch = dataset.row(3), reader.read([3], [0], 0, 1)
    view = np.asarray(draw_sample(row, batch, TOWERS, 1.0))
    grey = (view == 120).all(axis=2)
    assert grey.sum() > 0.8 * 224 * 224  # one frame of the still; the other two are masked
    assert (view == MISSING).all(axis=2).sum() > 1.5 * 224 * 224
    tokens = token_table(row, batch, TOWERS)
    assert [number for number, _ in tokens] == batch.inputs["text"]["token_ids"][0].tolist()[: len(tokens)]
    assert "".join(piece for _, piece in tokens).replace("[CLS]", "").strip().startswith(f"3 {CAPTION}"[:12])


def test_spectrogram_has_low_bands_at_the_bottom_and_time_to_the_right() -> None:
    energies = torch.zeros(4, 8)
    energies[3, 0] = 1.0  # the last step, the lowest band
    image = np.asarray(spectrogram(energies, 40, 80)).sum(axis=2)
    brightest = np.unravel_index(image.argmax(), image.shape)
    assert brightest[0] > 70
    assert brightest[1] > 30


def test_text_is_wrapped_and_cut() -> None:
    assert wrapped("aa bb cc", len, 5, 2) == ["aa bb", "cc"]
    assert wrapped("aa bb cc dd", len, 5, 1) == [f"aa b{ELLIPSIS}"]
    assert wrapped("abcdefgh", len, 5, 2) == [f"abcd{ELLIPSIS}"]
    assert wrapped("", len, 5, 2) == []


def test_positions_are_spread_and_distinct() -> None:
    assert spread_evenly(100, 4) == [12, 37, 62, 87]
    assert spread_evenly(3, 24) == [0, 1, 2]


def test_command_writes_tables_and_pictures(mixed: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pretrain.main", "inspect", str(mixed), "--out", str(tmp_path / "out"), "--samples=2"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    for expected in (
        "14",
        "12 (86 %)",
        "truncated",
        "a: 5 bytes of 9",
        "6: video cannot be read",
        "(key clip-0006)",
        "tokens:",
        CUT,
    ):
        assert expected in done.stdout, done.stdout
    assert json.loads((tmp_path / "out" / "statistics.json").read_text())["splits"][0]["num_samples"] == NUM_SAMPLES
    for name in ("contact-sheet.png", "sample-1.png", "sample-2.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 200
    assert not list((tmp_path / "out").glob(".*"))


def test_captions_that_are_cut_are_counted() -> None:
    assert captions_cut(["one two", "one two three four five six seven eight nine ten", CAPTION], TOWERS) == 2


def test_mistakes_are_a_line(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        inspect(str(tmp_path / "nothing"), None, None, 1, 0, False, None)
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        inspect(str(mixed), None, "trian", 1, 0, False, tmp_path)
