"""Small real media and small real datasets, written in the test that reads them."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.shards import SCHEMA_VERSION, Sample, ShardWriter, write_json

FPS = 10
SAMPLE_RATE_HZ = 8000
CAPTION = "a red circle moves while a flute plays"


def video_bytes(pictures: NDArray[np.uint8], fps: int = FPS) -> bytes:
    """An mp4 of `pictures` uint8 [T, H, W, 3] with a key frame each second."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=fps, options={"g": str(fps), "crf": "10", "threads": "1"})
        track.height, track.width, track.pix_fmt = pictures.shape[1], pictures.shape[2], "yuv420p"
        for picture in pictures:
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


def sound_bytes(sound: NDArray[np.int16], sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """A FLAC of mono `sound` int16 [n]."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="flac") as container:
        track = container.add_stream("flac", rate=sample_rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        frame.sample_rate = sample_rate_hz
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return stream.getvalue()


def image_bytes(picture: NDArray[np.uint8]) -> bytes:
    """A JPEG of `picture` uint8 [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG")
    return stream.getvalue()


def make_sample(
    number: int, members: dict[str, tuple[str, bytes]], length_s: float, captions: tuple[str, ...] = (CAPTION,)
) -> Sample:
    """Sample `clip-NNNN` with `members` {slot: (extension, bytes)}, each `length_s` long."""
    index: dict[str, Any] = {
        "row_id": str(number), "clip_index": 0, "weight": 1.0, "start_s": 0.0, "end_s": length_s,
        "video_duration_s": length_s if members.get("video", ("", b""))[0] == "mp4" else None,
        "audio_duration_s": length_s if "audio" in members else None,
        "captions": [{"text": text, "source": "human"} for text in captions], "subtitles": [], "metadata": "{}",
    }  # fmt: skip
    return Sample(key=f"clip-{number:04d}", members=members, index=index)


def noisy_members(number: int, length_s: float) -> dict[str, tuple[str, bytes]]:
    """Picture and sound that differ from those of every other number and change in time."""
    random = np.random.default_rng(number)
    pictures = random.integers(0, 255, (round(length_s * FPS), 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    sound = random.normal(0, 3000, round(length_s * SAMPLE_RATE_HZ)).astype(np.int16)
    return {"video": ("mp4", video_bytes(pictures)), "audio": ("flac", sound_bytes(sound))}


def write_dataset(folder: Path, samples: list[Sample], samples_per_shard: int, split: str = "train") -> Path:
    """A finished dataset of one split in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(samples), samples_per_shard)):
        writer = ShardWriter(folder=folder, name=f"shard-{number:06d}", split=split)
        for sample in samples[start : start + samples_per_shard]:
            writer.write(sample)
        shards.append(asdict(writer.close()))
    description = {"schema_version": SCHEMA_VERSION, "splits": {split: len(samples)}, "shards": shards}
    write_json(folder / "dataset.json", description)
    return folder


def write_tokenizer(path: Path) -> Path:
    """A byte-level BPE with [PAD] = 0, trained on one caption."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[PAD]"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([CAPTION] * 4, trainer)
    tokenizer.save(str(path))
    return path
