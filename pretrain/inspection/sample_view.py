"""Everything the model sees of one sample, on one picture: frames after transforms, log-mel energies, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from data_pipeline.shards import sample_name
from pretrain.config import TowersConfig
from pretrain.data.batch import Batch
from pretrain.data.tokenize import Tokenizer
from pretrain.inspection.drawing import FAINT, PAPER, absent, fitted, spectrogram, write
from pretrain.towers.log_mel import LogMel, steps_in

WIDTH_PX, MARGIN_PX, FRAME_PX, SOUND_PX = 1200, 20, 224, 180
MAX_CAPTIONS = 6


def draw_sample(row: dict[str, Any], batch: Batch, towers: TowersConfig, window_s: float) -> Image.Image:
    """`batch`: the one sample of index row `row`, as `BatchReader` reads it."""
    inner = WIDTH_PX - 2 * MARGIN_PX
    parts = [_heading(row, batch, inner)]
    if towers.video is not None:
        parts.append(_frames(batch, inner, window_s))
    if towers.audio is not None:
        parts.append(_log_mel(batch, towers, inner, window_s))
    if towers.text is not None:
        parts.append(_tokens(row, batch, towers, inner))
    view = Image.new("RGB", (WIDTH_PX, sum(part.height for part in parts) + MARGIN_PX * (len(parts) + 1)), PAPER)
    y = MARGIN_PX
    for part in parts:
        view.paste(part, (MARGIN_PX, y))
        y += part.height + MARGIN_PX
    return view


def token_table(row: dict[str, Any], batch: Batch, towers: TowersConfig) -> list[tuple[int, str]]:
    """Ids and texts of the tokens of the batch's only sample, without padding."""
    if towers.text is None or not bool(batch.present["text"][0]):
        return []
    kept = batch.inputs["text"]["token_mask"][0]
    ids = batch.inputs["text"]["token_ids"][0][kept].tolist()
    return list(zip(ids, Tokenizer(towers.text.tokenizer, towers.text.max_tokens).pieces(ids), strict=True))


def captions_cut(texts: Sequence[str], towers: TowersConfig) -> int:
    """How many of `texts` fill every token of the text tower: what follows is not seen."""
    if towers.text is None:
        return 0
    tokenizer = Tokenizer(towers.text.tokenizer, towers.text.max_tokens)
    return sum(bool(tokenizer.encode(text)[1].all()) for text in texts)


def _heading(row: dict[str, Any], batch: Batch, width: int) -> Image.Image:
    captions = [f"caption: {caption['text']}" for caption in row["captions"]] or ["no caption"]
    hidden = [f"and {len(captions) - MAX_CAPTIONS} more captions"] if len(captions) > MAX_CAPTIONS else []
    problems = [f"{event.modality} cannot be read: {event.reason}" for event in batch.events]
    lines = [*captions[:MAX_CAPTIONS], *hidden, *problems]
    part = Image.new("RGB", (width, 34 + 22 * len(lines)), PAPER)
    times = f"{row['start_s']:.2f} to {row['end_s']:.2f} s of its source"
    source = f"{sample_name(row)}   {times}   key {row['key']}"
    write(part, (0, 0), source, 18, width)
    for number, line in enumerate(lines):
        write(part, (0, 32 + 22 * number), line, 14, width)
    return part


def _titled(title: str, body: Image.Image) -> Image.Image:
    part = Image.new("RGB", (body.width, body.height + 22), PAPER)
    write(part, (0, 0), title, 13, body.width, 1, FAINT)
    part.paste(body, (0, 22))
    return part


def _frames(batch: Batch, width: int, window_s: float) -> Image.Image:
    frames, mask = batch.inputs["video"]["frames"][0], batch.inputs["video"]["frame_mask"][0]
    num_frames, size_px = frames.shape[0], frames.shape[1]
    if not bool(batch.present["video"][0]):
        return _titled("video: absent", absent(width, 60, "this sample has no picture the model could see"))
    side = min(FRAME_PX, (width - 4 * (num_frames - 1)) // num_frames)
    strip = Image.new("RGB", (width, side), PAPER)
    for place in range(num_frames):
        known = bool(mask[place])
        frame = fitted(frames[place].numpy(), side, side) if known else absent(side, side, "masked")
        strip.paste(frame, (place * (side + 4), 0))
    title = f"video: {int(mask.sum())} of {num_frames} frames of {size_px} px from a window of {window_s:g} s"
    return _titled(title, strip)


def _log_mel(batch: Batch, towers: TowersConfig, width: int, window_s: float) -> Image.Image:
    audio = towers.audio
    assert audio is not None
    if not bool(batch.present["audio"][0]):
        return _titled("audio: absent", absent(width, 60, "this sample has no sound the model could hear"))
    num_steps = steps_in(window_s, audio.fft_s, audio.hop_s, audio.sample_rate_hz)
    log_mel = LogMel(audio.sample_rate_hz, audio.num_mels, audio.fft_s, audio.hop_s, num_steps)
    with torch.no_grad():
        energies = log_mel(batch.inputs["audio"]["waveform"], batch.inputs["audio"]["num_samples"])[0]
    sound_s = int(batch.inputs["audio"]["num_samples"][0]) / audio.sample_rate_hz
    title = (
        f"audio: log-mel energies, {num_steps} steps of {1000 * audio.hop_s:g} ms x {audio.num_mels} bands to "
        f"{audio.sample_rate_hz / 2000:g} kHz; {sound_s:.2f} s of sound, values {float(energies.min()):+.2f} to "
        f"{float(energies.max()):+.2f}"
    )
    return _titled(title, spectrogram(energies, width, SOUND_PX))


def _tokens(row: dict[str, Any], batch: Batch, towers: TowersConfig, width: int) -> Image.Image:
    assert towers.text is not None
    tokens = token_table(row, batch, towers)
    if not tokens:
        return _titled("text: absent", absent(width, 60, "this sample has no caption"))
    text = "  ".join(f"{piece.strip() or repr(piece)}·{number}" for number, piece in tokens)
    body = Image.new("RGB", (width, 66), PAPER)
    write(body, (0, 0), text, 14, width, 3)
    return _titled(f"text: {len(tokens)} of {towers.text.max_tokens} tokens (piece·id)", body)
