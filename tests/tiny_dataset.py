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
from pretrain.config import AugmentConfig, DataConfig, TowersConfig

FPS = 10
SAMPLE_RATE_HZ = 8000
CLIP_S = 6.0  # of switching_members
SWITCH_S = 3.0
CAPTION = "a red circle moves while a flute plays"
NUM_SAMPLES = 14  # of write_mixed_dataset
TOWERS = TowersConfig.model_validate(
    {
        "video": {"num_frames": 3, "size_px": 16},
        "audio": {"sample_rate_hz": SAMPLE_RATE_HZ},
        "text": {"max_tokens": 8},
    }
)


def video_bytes(pictures: NDArray[np.uint8], fps: int = FPS) -> bytes:
    """An mp4 of `pictures` uint8 [T, H, W, 3] with a key frame each second."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        options = {"g": str(fps), "crf": "10", "threads": "1", "mbtree": "0"}
        track = container.add_stream("libx264", rate=fps, options=options)
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


def switching_members() -> dict[str, tuple[str, bytes]]:
    """Six seconds: dark and silent, then, from second 3 on, bright and loud."""
    late = np.arange(round(CLIP_S * FPS)) >= SWITCH_S * FPS
    pictures = np.where(late, 220, 20).astype(np.uint8)[:, None, None, None].repeat(48, 1).repeat(64, 2).repeat(3, 3)
    noise = np.random.default_rng(0).normal(0, 6000, round(CLIP_S * SAMPLE_RATE_HZ)).astype(np.int16)
    noise[: round(SWITCH_S * SAMPLE_RATE_HZ)] = 0
    return {"video": ("mp4", video_bytes(pictures)), "audio": ("flac", sound_bytes(noise))}


def write_dataset(folder: Path, samples: list[Sample], samples_per_shard: int, split: str = "train") -> Path:
    """A finished dataset of one split in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(samples), samples_per_shard)):
        writer = ShardWriter(folder=folder, name=f"shard-{number:06d}", split=split)
        for sample in samples[start : start + samples_per_shard]:
            writer.write(sample)
        shards.append(asdict(writer.close()))
    description = {"schema_version": SCHEMA_VERSION, "shards": shards}
    write_json(folder / "dataset.json", description)
    return folder


def write_mixed_dataset(folder: Path) -> Path:
    """14 samples in 4 shards: 0 lacks sound, 1 lacks pictures, 2 lacks captions, 3 is a still, 4 has two captions,
    5 is shorter than the window, 6 has garbage for pictures and sound; the others are whole and longer than it."""
    samples = []
    for number in range(NUM_SAMPLES):
        length_s = 0.5 if number == 5 else 1.6
        members = noisy_members(number, length_s)
        captions: tuple[str, ...] = (f"{number} {CAPTION}",)
        if number == 0:
            del members["audio"]
        elif number == 1:
            del members["video"]
        elif number == 2:
            captions = ()
        elif number == 3:
            members["video"] = ("jpg", image_bytes(np.full((20, 30, 3), 120, dtype=np.uint8)))
        elif number == 4:
            captions = ("a square", CAPTION)
        elif number == 6:
            members = {"video": ("mp4", b"<html>not found</html>"), "audio": ("flac", b"<html>not found</html>")}
        samples.append(make_sample(number, members, length_s, captions))
    return write_dataset(folder, samples, samples_per_shard=4)


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


def data_config(**changes: object) -> DataConfig:
    """One second of each clip, everything random on, decoding in this process."""
    augment = AugmentConfig(crop_scale=(0.5, 0.9), flip=True)
    base = {"train": {"path": "unused", "split": "train"}, "window_s": 1.0, "num_workers": 0, "block_shards": 2}
    return DataConfig.model_validate({**base, "augment": augment.model_dump(), **changes})
