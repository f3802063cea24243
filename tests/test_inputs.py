"""Every form of input becomes what an evaluation gives the towers: same window, same frames, same sound."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.decode import read_sound
from data_pipeline.shards import ShardedDataset
from pretrain.export import export_run
from pretrain.inference import Frames, Model, UnreadableInput, Waveform, load_model
from tests.finished_run import live_embeddings, write_run
from tests.media import decode_pictures, write_clip, write_wav
from tests.tiny_dataset import FPS, NUM_SAMPLES, SAMPLE_RATE_HZ, write_mixed_dataset

NAMES = ("video", "audio", "text")
BROKEN = 6  # of the mixed dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed_dataset(tmp_path_factory.mktemp("mixed") / "data")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """An export, and what an evaluation of its run computes: embeddings and presence."""
    folder = tmp_path_factory.mktemp("live")
    model = write_run(folder / "run", dataset)
    export_run(folder / "run", folder / "export", "last", force=False)
    return folder / "export", *live_embeddings(model, folder / "run", dataset)


@pytest.fixture(scope="module")
def model(live: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> Model:
    return load_model(live[0], "cpu")


@pytest.fixture(scope="module")
def members(dataset: Path) -> dict[str, list[Any]]:
    """What each sample of the dataset has: bytes, or the first caption; None where it has none."""
    data = ShardedDataset(dataset, "train")
    captions = [data.row(index)["captions"] for index in range(len(data))]
    return {
        "video": [data.read_member(index, "video") for index in range(len(data))],
        "audio": [data.read_member(index, "audio") for index in range(len(data))],
        "text": [found[0]["text"] if found else None for found in captions],
    }


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, equal_nan=True)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_samples_of_a_dataset_are_encoded_as_an_evaluation_does(
    model: Model, live: Any, members: dict[str, list[Any]], batch_size: int
) -> None:
    _, expected, present = live
    problems: list[UnreadableInput] = []
    found = model.encode(**members, batch_size=batch_size, on_error=problems.append)
    assert [(error.modality, error.index) for error in problems] == [("video", BROKEN), ("audio", BROKEN)]
    for name in NAMES:
        assert found[name].dtype == torch.float32
        assert found[name].shape == (NUM_SAMPLES, 12)
        assert torch.equal(~found[name].isnan().any(dim=1), present[name])
        close(found[name][present[name]], expected[name][present[name]])
        assert not torch.allclose(found[name][7], found[name][8], atol=1e-4), "samples must be told apart"


def test_files_and_arrays_give_the_same_as_bytes(model: Model, members: dict[str, list[Any]], tmp_path: Path) -> None:
    picture, sound = members["video"][7], members["audio"][7]
    (tmp_path / "a clip.mp4").write_bytes(picture)
    (tmp_path / "sound").write_bytes(sound)
    pixels = decode_pictures(picture)[1]
    pcm = read_sound(sound, 0.0, 100.0, SAMPLE_RATE_HZ)
    arrays = Frames(pixels=pixels, fps=float(FPS)), Waveform(samples=pcm, sample_rate_hz=SAMPLE_RATE_HZ)
    floats = Waveform(samples=(pcm / 32768).astype(np.float32), sample_rate_hz=SAMPLE_RATE_HZ)
    found = model.encode(
        video=[picture, tmp_path / "a clip.mp4", str(tmp_path / "a clip.mp4"), arrays[0]],
        audio=[sound, tmp_path / "sound", arrays[1], floats],
    )
    for rows in found.values():
        close(rows, rows[:1].expand(4, -1))


def test_a_picture_is_a_video_of_one_frame(model: Model, members: dict[str, list[Any]]) -> None:
    pixels = decode_pictures(members["video"][7])[1][:1]
    png = io.BytesIO()
    Image.fromarray(pixels[0]).save(png, format="PNG")
    assert members["video"][3].startswith(b"\xff\xd8"), "stills of the dataset are compared to an evaluation above"
    found = model.encode(video=[png.getvalue(), Frames(pixels=pixels, fps=30.0), members["video"][3]])["video"]
    close(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)


def test_one_window_in_the_middle_of_what_picture_and_sound_share(model: Model, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "with sound.mp4", duration_s=4.0, fps=10, silent_s=2.0)
    short = write_wav(tmp_path / "short.wav", duration_s=1.0, rate_hz=SAMPLE_RATE_HZ)
    pixels = decode_pictures(clip.read_bytes())[1]
    alone, start = model.encode(video=[clip])["video"], model.encode(video=[clip], audio=[short])["video"]
    close(alone, model.encode(video=[Frames(pixels=pixels[15:25], fps=10.0)])["video"])
    close(start, model.encode(video=[Frames(pixels=pixels[:10], fps=10.0)])["video"])
    assert not torch.allclose(alone, start, atol=1e-4)
    sound = read_sound(clip.read_bytes(), 0.0, 4.0, 48_000)[72_000:120_000]  # from second 1.5 to 2.5
    heard = model.encode(audio=[clip])["audio"]
    close(heard, model.encode(audio=[Waveform(samples=sound, sample_rate_hz=48_000)])["audio"], 1e-4)
    silence = Waveform(samples=np.zeros(8000, np.int16), sample_rate_hz=8000)
    assert not torch.allclose(heard, model.encode(audio=[silence])["audio"], atol=1e-2)


def test_what_cannot_be_read_says_why_in_one_line(model: Model, tmp_path: Path) -> None:
    mute = write_clip(tmp_path / "mute.mp4", duration_s=1.0, fps=10, sound=False)
    cases: list[tuple[dict[str, list[Any]], str]] = [
        ({"video": [mute, tmp_path / "none.mp4"]}, rf"video\[1\] {tmp_path}/none.mp4: no such file or directory"),
        ({"video": [mute, tmp_path]}, r"video\[1\] .*: is a directory"),
        ({"video": [b"<html>"]}, r"video\[0\] \(6 bytes\): cannot be decoded"),
        ({"audio": [mute]}, r"audio\[0\] .*mute.mp4: it has no sound track; expected None"),
        ({"video": [write_wav(tmp_path / "a.wav")]}, r"video\[0\] .*a.wav: it has no picture track; expected None"),
        ({"text": ["a", " \n"]}, r"text\[1\] ' \\n': blank"),
    ]
    for items, message in cases:
        with pytest.raises(UnreadableInput, match=message) as caught:
            model.encode(**items)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_arrays_of_another_form_are_refused() -> None:
    pixels, sound = np.zeros((1, 4, 4, 3), np.uint8), np.zeros(10, np.int16)
    for wrong in (pixels[0], pixels[:0], pixels[..., :1]):
        with pytest.raises(ValueError, match=r"expected uint8 \[T, H, W, 3\]"):
            Frames(pixels=wrong, fps=1.0)
    with pytest.raises(ValueError, match=r"Frames\.fps: found 0"):
        Frames(pixels=pixels, fps=0.0)
    for wrong in (sound[None], sound[:0]):
        with pytest.raises(ValueError, match=r"expected int16 or float32 \[n\], mono"):
            Waveform(samples=wrong, sample_rate_hz=8000)
    for value in (100.0, np.nan):
        with pytest.raises(ValueError, match="expected -1 to 1"):
            Waveform(samples=np.full(3, value, np.float32), sample_rate_hz=8000)


def test_no_samples_are_no_rows(model: Model) -> None:
    found = model.encode(text=[])
    assert found["text"].shape == (0, 12)
    assert model.similarity(found, model.encode(text=["a"])).shape == (0, 1)


def test_loading_leaves_the_callers_random_state_alone(live: Any) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    loaded = load_model(live[0], "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.requires_grad for p in loaded.towers.parameters())
    assert not loaded.towers.training
