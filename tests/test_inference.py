"""What a person gives an exported model, and what comes back: order, kinds of input, gaps, mistakes, scores."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.settings import UserError
from pretrain.inference import Frames, Model, UnreadableInput, Waveform, load_model
from pretrain.scoring import scores
from tests.media import write_clip, write_wav


@pytest.fixture(scope="module")
def model(export_folder: Path) -> Model:
    return load_model(export_folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three videos of different lengths and pictures; the last is silent."""
    home = tmp_path_factory.mktemp("clips of mine")
    sizes = ((1.0, 10, 64), (2.5, 12, 96), (1.5, 8, 48))
    return [
        write_clip(home / f"{n} ü.mp4", duration_s=s, fps=fps, width=w, height=48, sound=n != 2)
        for n, (s, fps, w) in enumerate(sizes)
    ]


def test_rows_come_in_the_order_given_whatever_the_batch(model: Model, clips: list[Path]) -> None:
    texts = ["a red square", "blue", "a loud slow tone"]
    together = model.encode(video=clips, text=texts, batch_size=2)
    assert list(together) == ["video", "text"]
    for name, rows in together.items():
        assert rows.dtype == torch.float32
        assert rows.shape == (3, model.config.embedding_dim)
        assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-6), name
    for index in range(3):
        alone = model.encode(video=[clips[index]], text=[texts[index]])
        assert (alone["video"][0] - together["video"][index]).abs().max() < 1e-6
        assert (alone["text"][0] - together["text"][index]).abs().max() < 1e-6
    assert (together["video"][0] - together["video"][1]).abs().max() > 1e-4  # and they differ


def test_paths_bytes_and_arrays_are_the_same_clip(model: Model, clips: list[Path]) -> None:
    with av.open(str(clips[0])) as container:
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    given = [str(clips[0]), clips[0], clips[0].read_bytes(), Frames(pixels=pixels, fps=10.0)]
    rows = model.encode(video=given)["video"]
    assert (rows - rows[0]).abs().max() < 1e-6


def test_sound_comes_from_files_videos_and_arrays(model: Model, clips: list[Path], tmp_path: Path) -> None:
    rate_hz = 16_000
    tone = (10_000 * np.sin(np.arange(rate_hz) / 20)).astype(np.int16)
    half = Waveform(samples=(tone / 32768).astype(np.float32), sample_rate_hz=rate_hz)
    rows = model.encode(audio=[Waveform(samples=tone, sample_rate_hz=rate_hz), half])["audio"]
    assert (rows[0] - rows[1]).abs().max() < 1e-5
    wav = write_wav(tmp_path / "a.wav", duration_s=1.0)
    assert model.encode(audio=[wav, clips[0]])["audio"].isfinite().all()


def test_what_a_sample_lacks_is_nan_and_changes_nothing_else(model: Model, clips: list[Path]) -> None:
    found = model.encode(video=clips, audio=[clips[0], None, None])
    assert found["audio"][1:].isnan().all()
    assert not found["audio"][0].isnan().any()
    assert not found["video"].isnan().any()
    scores = model.similarity(model.encode(text=["x", "y"]), found)
    assert scores.shape == (2, 3)
    assert scores.isfinite().all()


def test_an_unreadable_item_is_named(model: Model, clips: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"<html>not found</html>")
    cases: list[tuple[dict[str, list[object]], str, int]] = [
        ({"video": [clips[0], bad]}, "video", 1),
        ({"video": [tmp_path / "gone.mp4"]}, "video", 0),
        ({"audio": [clips[0], clips[1], clips[2]]}, "audio", 2),  # no sound track
        ({"text": ["a", " "]}, "text", 1),
    ]
    for given, modality, index in cases:
        with pytest.raises(UnreadableInput) as caught:
            model.encode(**given)  # type: ignore[arg-type]
        assert (caught.value.modality, caught.value.index) == (modality, index)
        assert f"{modality}[{index}]" in str(caught.value)
    with pytest.raises(UnreadableInput, match=r"2 ü.mp4: it has no sound track; expected None for what a sample lacks"):
        model.encode(audio=[clips[2]])
    errors: list[UnreadableInput] = []
    rows = model.encode(video=[bad, clips[0]], on_error=errors.append)["video"]
    assert [error.index for error in errors] == [0]
    assert rows[0].isnan().all()
    assert (rows[1] - model.encode(video=[clips[0]])["video"][0]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing given"),
        ({"text": "one text"}, "found one str, expected a list"),
        ({"text": ["a"], "video": []}, "expected equally many"),
        ({"video": [3]}, r"video\[0\]: found int, expected a path"),
        ({"text": ["a"], "batch_size": 0}, "batch_size 0"),
        ({"vidoe": ["a.mp4"]}, "encode: vidoe: unknown argument; did you mean 'video'"),
    ],
)
def test_mistakes_are_said(model: Model, given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        model.encode(**given)  # type: ignore[arg-type]


def unit(num: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(num, 12, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("others", [("video",), ("video", "audio")])
def test_scores_and_matches_are_those_of_the_run(model: Model, others: tuple[str, ...]) -> None:
    query = {"text": unit(4, 0)}
    candidates = {name: unit(5, number + 1) for number, name in enumerate(others)}
    candidates[others[-1]][2] = torch.nan
    assert model.config.score == "volume"
    assert torch.equal(model.similarity(query, candidates), scores(query, candidates, "volume"))
    for score in ("summed_cosine", "singular_value", "centroid", "volume"):
        matrix = model.similarity(query, candidates, score)
        assert torch.equal(matrix, scores(query, candidates, score))
        found = model.search(query, candidates, 3, score)
        assert torch.equal(found.scores, matrix.topk(3).values)
        assert torch.equal(matrix.gather(1, found.indices), found.scores)
    assert model.search(query, candidates, 1).indices.tolist() == found.indices[:, :1].tolist()  # by volume


def test_mistakes_of_a_score_are_said(model: Model) -> None:
    with pytest.raises(UserError, match="did you mean 'volume'"):
        model.similarity({"text": unit(2, 0)}, {"video": unit(2, 1)}, "volumes")
    with pytest.raises(UserError, match="top_k 0"):
        model.search({"text": unit(2, 0)}, {"video": unit(2, 1)}, 0)
