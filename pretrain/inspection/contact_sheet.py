"""Many samples of a split on one picture: a frame, the sound, the caption of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipeline.decode import UndecodableMedia, read_frames, read_image, read_sound
from data_pipeline.shards import DamagedMember, ShardedDataset, sample_name
from pretrain.inspection.drawing import FAINT, PAPER, absent, fitted, spectrogram, write
from pretrain.towers.log_mel import LogMel, steps_in

TILE_PX, PICTURE_PX, SOUND_PX, TEXT_PX, GAP_PX, TITLE_PX = 224, 150, 40, 74, 14, 34
RATE_HZ, NUM_MELS, FFT_S, HOP_S = 16_000, 48, 0.032, 0.016


def spread_evenly(num_samples: int, wanted: int) -> list[int]:
    """`wanted` positions (or all there are) at equal distances over a split."""
    wanted = min(wanted, num_samples)
    return [(2 * i + 1) * num_samples // (2 * wanted) for i in range(wanted)]


def draw_contact_sheet(
    dataset: ShardedDataset, positions: list[int], columns: int = 6
) -> tuple[Image.Image, list[str]]:
    """The sheet, and a line for each member that could not be read."""
    columns = min(columns, max(1, len(positions)))
    rows = -(-len(positions) // columns)
    tile_height = PICTURE_PX + SOUND_PX + TEXT_PX
    width = GAP_PX + columns * (TILE_PX + GAP_PX)
    sheet = Image.new("RGB", (width, TITLE_PX + GAP_PX + rows * (tile_height + GAP_PX)), PAPER)
    title = f"{dataset.name}, split {dataset.split}: {len(positions)} of {len(dataset):,} samples"
    write(sheet, (GAP_PX, 12), title, 16, width - 2 * GAP_PX)
    problems: list[str] = []
    for place, position in enumerate(positions):
        x = GAP_PX + place % columns * (TILE_PX + GAP_PX)
        y = TITLE_PX + GAP_PX + place // columns * (tile_height + GAP_PX)
        sheet.paste(_tile(dataset, position, problems), (x, y))
    return sheet, problems


def _tile(dataset: ShardedDataset, position: int, problems: list[str]) -> Image.Image:
    row = dataset.row(position)
    tile = Image.new("RGB", (TILE_PX, PICTURE_PX + SOUND_PX + TEXT_PX), PAPER)
    for slot, height, y in (("video", PICTURE_PX, 0), ("audio", SOUND_PX, PICTURE_PX)):
        try:
            data = dataset.read_member(position, slot, row)
            draw = _picture if slot == "video" else _sound
            part = absent(TILE_PX, height, f"no {slot}") if data is None else draw(data, row)
        except (DamagedMember, UndecodableMedia) as error:
            problems.append(f"{sample_name(row)}: {slot} cannot be read: {error} (key {row['key']})")
            part = absent(TILE_PX, height, f"{slot} cannot be read")
        tile.paste(part, (0, y))
    write(tile, (0, PICTURE_PX + SOUND_PX + 4), f"{_length(row)}  {sample_name(row)}", 11, TILE_PX, 1, FAINT)
    captions = [caption["text"] for caption in row["captions"] if (caption["text"] or "").strip()]
    write(tile, (0, PICTURE_PX + SOUND_PX + 20), captions[0] if captions else "no caption", 12, TILE_PX, 3,
          *(() if captions else (FAINT,)))  # fmt: skip
    return tile


def _length(row: dict[str, Any]) -> str:
    return f"{row['end_s'] - row['start_s']:.1f} s"


def _picture(data: bytes, row: dict[str, Any]) -> Image.Image:
    """The picture in the middle of the clip."""
    if row["video_ext"] == "jpg":
        return fitted(read_image(data), TILE_PX, PICTURE_PX)
    return fitted(read_frames(data, [(row["video_duration_s"] or 0) / 2])[0], TILE_PX, PICTURE_PX)


def _sound(data: bytes, row: dict[str, Any]) -> Image.Image:
    """The log-mel spectrogram of the whole clip."""
    sound = torch.from_numpy(read_sound(data, 0.0, max(row["audio_duration_s"] or 0.0, FFT_S), RATE_HZ))
    num_steps = max(1, steps_in(len(sound) / RATE_HZ, FFT_S, HOP_S, RATE_HZ))
    log_mel = LogMel(RATE_HZ, NUM_MELS, FFT_S, HOP_S, num_steps)
    return spectrogram(log_mel(sound[None], torch.tensor([len(sound)]))[0], TILE_PX, SOUND_PX)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG under its name, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG", optimize=True)
    partial.replace(path)
