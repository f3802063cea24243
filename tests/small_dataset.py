"""A small sharded dataset of real mp4 and flac members, written without Ray in about a second."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipeline.shards import SCHEMA_VERSION, Sample, ShardWriter, write_json
from tests.tiny_dataset import sound_bytes, video_bytes

FPS, SIDE_PX, RATE_HZ, DURATION_S = 8, 48, 16_000, 1.0


def moving_square(generator: np.random.Generator) -> bytes:
    """One second of a coloured square on a coloured ground, as mp4."""
    ground, square = generator.integers(0, 255, (2, 3), dtype=np.uint8)
    pictures = np.empty((int(FPS * DURATION_S), SIDE_PX, SIDE_PX, 3), np.uint8)
    pictures[:] = ground
    for number, picture in enumerate(pictures):
        picture[8:24, 3 * number : 3 * number + 16] = square
    return video_bytes(pictures, FPS)


def tone(generator: np.random.Generator) -> bytes:
    """One second of a tone, as flac."""
    times = np.arange(int(RATE_HZ * DURATION_S)) / RATE_HZ
    return sound_bytes((8000 * np.sin(2 * np.pi * generator.uniform(200, 3000) * times)).astype(np.int16), RATE_HZ)


def write_dataset(folder: Path, sizes: dict[str, int], samples_per_shard: int = 5, complete: bool = False) -> Path:
    """`sizes[split]` samples; unless complete, every 7th lacks sound, every 9th a caption, every 11th a picture."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    words = ["red", "blue", "slow", "loud", "square", "tone", "left", "quiet", "ground", "moving"]
    shards, number = [], 0
    for split, size in sizes.items():
        for first in range(0, size, samples_per_shard):
            writer = ShardWriter(folder=folder, name=f"shard-{number:06d}", split=split)
            for index in range(first, min(first + samples_per_shard, size)):
                key = f"{split}{index}-0000"
                members = {"json": ("json", json.dumps({"key": key}).encode())}
                row = {"row_id": f"{split}{index}", "clip_index": 0, "weight": 1.0, "start_s": 0.0, "end_s": DURATION_S}
                row |= {"subtitles": [], "metadata": "{}", "captions": []}
                if complete or index % 11 != 10:
                    members["video"] = ("mp4", moving_square(generator))
                    row |= {"video_num_frames": int(FPS * DURATION_S), "video_fps": float(FPS)}
                    row |= {"video_width_px": SIDE_PX, "video_height_px": SIDE_PX, "video_duration_s": DURATION_S}
                if complete or index % 7 != 6:
                    members["audio"] = ("flac", tone(generator))
                    row |= {"audio_sample_rate_hz": RATE_HZ, "audio_duration_s": DURATION_S}
                if complete or index % 9 != 8:
                    texts = [" ".join(generator.choice(words, 5)) for _ in range(2)]
                    row["captions"] = [{"text": text, "source": "human"} for text in texts]
                writer.write(Sample(key=key, members=members, index=row))
            shards.append(asdict(writer.close()))
            number += 1
    description = {"schema_version": SCHEMA_VERSION, "shards": shards}
    write_json(folder / "dataset.json", description)
    return folder
