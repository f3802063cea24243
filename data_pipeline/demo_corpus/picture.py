"""Frames of a clip of the demo corpus, drawn as planes of YUV 4:2:0, which is what the encoder takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_pipeline.demo_corpus.factors import Visual

WIDTH_PX, HEIGHT_PX, FPS, NUM_FRAMES = 320, 240, 25, 100
RGB = {
    "red": (225, 40, 35),
    "green": (40, 190, 60),
    "blue": (45, 80, 235),
    "yellow": (240, 220, 40),
    "white": (245, 245, 245),
    "magenta": (225, 50, 210),
}
DARK, BRIGHT = 45.0, 115.0  # luma of the backgrounds, which are grey

Plane = NDArray[np.uint8]


def frames(visual: Visual, generator: np.random.Generator) -> Iterator[Plane]:
    """The clip's frames, each uint8 [HEIGHT * 3 / 2, WIDTH]: the Y plane, then U and V as libav lays them out."""
    ground = _ground(visual.background, generator)
    luma, blue, red = _yuv(RGB[visual.colour], generator)
    half = int(generator.integers(20, 26)) * 2  # 16 to 20 of 64 pixels across once a loader has shrunk the frame
    mask = _shape(visual.shape, 2 * half, generator.uniform(-0.1, 0.1))
    path = _path(visual.motion, half, generator)
    for x, y, scale in path:
        yield _draw(ground, _scaled(mask, scale), int(x) // 2 * 2, int(y) // 2 * 2, luma, blue, red)


def _draw(ground: Plane, mask: NDArray[np.bool_], x: int, y: int, luma: int, blue: int, red: int) -> Plane:
    """The ground with the mask painted around (x, y), all even so that the chroma planes fit."""
    frame = ground.copy()
    size = mask.shape[0]
    left, top = x - size // 4 * 2, y - size // 4 * 2
    rows = slice(max(top, 0), min(top + size, HEIGHT_PX))
    columns = slice(max(left, 0), min(left + size, WIDTH_PX))
    part = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    frame[rows, columns][part] = luma
    chroma = frame[HEIGHT_PX:].reshape(2, HEIGHT_PX // 2, WIDTH_PX // 2)
    half_part = part[::2, ::2]
    half_rows = slice(rows.start // 2, rows.start // 2 + half_part.shape[0])
    half_columns = slice(columns.start // 2, columns.start // 2 + half_part.shape[1])
    chroma[0, half_rows, half_columns][half_part] = blue
    chroma[1, half_rows, half_columns][half_part] = red
    return frame


def _path(motion: str, half: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """[NUM_FRAMES, 3]: centre x, y and scale; even progress through the clip; reach is its speed."""
    share = np.linspace(0, 1, NUM_FRAMES)
    x = np.full(NUM_FRAMES, generator.uniform(half + 30, WIDTH_PX - half - 30))
    y = np.full(NUM_FRAMES, generator.uniform(half + 10, HEIGHT_PX - half - 10))
    scale = np.ones(NUM_FRAMES)
    reach, start = generator.uniform(0.7, 1.0), generator.random()
    if motion in ("left", "right"):
        room = WIDTH_PX - 2 * half - 8
        x = half + 4 + room * ((1 - reach) * start + reach * (share if motion == "right" else 1 - share))
    elif motion in ("up", "down"):
        room = HEIGHT_PX - 2 * half - 4
        y = half + 2 + room * ((1 - reach) * start + reach * (share if motion == "down" else 1 - share))
    else:
        scale = 0.35 + (1.3 * reach) * share
    return np.stack([x, y, scale], axis=1)


def _scaled(mask: NDArray[np.bool_], scale: float) -> NDArray[np.bool_]:
    if scale == 1:
        return mask
    size = max(4, int(mask.shape[0] * scale) // 2 * 2)
    index = (np.arange(size) * mask.shape[0]) // size
    return mask[np.ix_(index, index)]


def _shape(name: str, size: int, turn: float) -> NDArray[np.bool_]:
    """A filled shape in a square of `size` pixels, turned by `turn` radians."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    across, down = np.meshgrid(axis, axis)
    x = across * np.cos(turn) + down * np.sin(turn)
    y = down * np.cos(turn) - across * np.sin(turn)
    if name == "circle":
        return np.asarray(x * x + y * y < 0.9)
    if name == "square":
        return np.asarray(np.maximum(abs(x), abs(y)) < 0.88)
    if name == "triangle":
        return np.asarray((y < 0.8) & (y > 1.9 * abs(x) - 0.95))
    if name == "cross":
        return np.asarray((np.minimum(abs(x), abs(y)) < 0.24) & (np.maximum(abs(x), abs(y)) < 0.95))
    angle, radius = np.arctan2(x, -y), np.hypot(x, y)
    tip = abs((angle / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2  # 0 at a point of the star, 1 between two
    return np.asarray(radius < 1 - 0.68 * tip)


def _ground(name: str, generator: np.random.Generator) -> Plane:
    """A grey background with a little noise, as one frame."""
    rows, columns = np.mgrid[0:HEIGHT_PX, 0:WIDTH_PX]
    period = generator.uniform(36, 52)
    shift = generator.uniform(0, period)
    if name == "plain":
        luma = np.full(rows.shape, generator.uniform(DARK + 15, BRIGHT - 15))
    elif name == "stripes":
        luma = np.where((columns + shift) % period < period / 2, DARK, BRIGHT)
    elif name == "checks":
        odd = ((columns + shift) // (period / 2) + (rows + shift) // (period / 2)) % 2
        luma = np.where(odd == 0, DARK, BRIGHT)
    else:
        share = rows / HEIGHT_PX
        luma = 25 + 115 * (share if generator.random() < 0.5 else 1 - share)
    luma = luma + generator.normal(0, 3, rows.shape) + generator.uniform(-8, 8)
    frame = np.full((HEIGHT_PX * 3 // 2, WIDTH_PX), 128, np.uint8)
    frame[:HEIGHT_PX] = luma.clip(16, 235)
    return frame


def _yuv(rgb: tuple[int, int, int], generator: np.random.Generator) -> tuple[int, int, int]:
    """ITU-R BT.601 limited range, of the colour made a little brighter or darker."""
    r, g, b = np.clip(np.array(rgb) * generator.uniform(0.88, 1.0), 0, 255) / 255
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    return int(16 + 219 * luma), int(128 + 224 * (b - luma) / 1.772), int(128 + 224 * (r - luma) / 1.402)
