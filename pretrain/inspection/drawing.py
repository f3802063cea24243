"""Pieces of pictures that inspection puts together: fonts, fitted text, letterboxed frames, spectrograms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling
from torch import Tensor

PAPER, INK, FAINT, MISSING = (255, 255, 255), (28, 32, 38), (110, 118, 129), (236, 238, 241)
ELLIPSIS = "…"
# Anchors of a dark-to-bright scale whose lightness rises evenly, after matplotlib's "magma".
SCALE = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], dtype=np.float64)
FONT_FILES = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")  # more letters than Pillow's own font has


def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of the system that knows many alphabets, else Pillow's own."""
    for name in FONT_FILES:
        try:
            return ImageFont.truetype(name, size_px)
        except OSError:
            continue
    return ImageFont.load_default(size_px)


def write(
    canvas: Image.Image, xy: tuple[int, int], text: str, size_px: int, width_px: int,
    num_lines: int = 1, colour: tuple[int, int, int] = INK,
) -> None:  # fmt: skip
    """`text` wrapped to `width_px` in at most `num_lines` lines; what does not fit ends in an ellipsis."""
    draw, face = ImageDraw.Draw(canvas), font(size_px)
    lines = wrapped(text, lambda part: draw.textlength(part, font=face), width_px, num_lines)
    draw.multiline_text(xy, "\n".join(lines), font=face, fill=colour, spacing=3)


def wrapped(text: str, length_of: Callable[[str], float], width: int, num_lines: int) -> list[str]:
    """Greedy lines of words no longer than `width` by `length_of`; a longer word is cut."""
    lines: list[str] = []
    rest = text.split()
    while rest and len(lines) < num_lines:
        taken = 1
        while taken < len(rest) and length_of(" ".join(rest[: taken + 1])) <= width:
            taken += 1
        line, rest = " ".join(rest[:taken]), rest[taken:]
        cut = rest and len(lines) == num_lines - 1
        if cut or length_of(line) > width:
            while line and length_of(line + ELLIPSIS) > width:
                line = line[:-1]
            line += ELLIPSIS
        lines.append(line)
    return lines


def fitted(picture: NDArray[np.uint8], width_px: int, height_px: int) -> Image.Image:
    """A picture [H, W, 3] scaled to fit, in the middle of a dark box."""
    image = Image.fromarray(picture)
    scale = min(width_px / image.width, height_px / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    box = Image.new("RGB", (width_px, height_px), INK)
    box.paste(image.resize(size, Resampling.LANCZOS), ((width_px - size[0]) // 2, (height_px - size[1]) // 2))
    return box


def absent(width_px: int, height_px: int, text: str) -> Image.Image:
    """A box that says why nothing is shown."""
    box = Image.new("RGB", (width_px, height_px), MISSING)
    write(box, (8, max(0, height_px // 2 - 8)), text, 12, width_px - 16, 2, FAINT)
    return box


def spectrogram(energies: Float[Tensor, "steps mels"], width_px: int, height_px: int) -> Image.Image:
    """Energies as a picture: time to the right, low bands at the bottom, dark to bright over the range of this one."""
    values = energies.T.flip(0).double().numpy()
    low, high = float(values.min()), float(values.max())
    place = (values - low) / max(high - low, 1e-9) * (len(SCALE) - 1)
    below = np.minimum(place.astype(int), len(SCALE) - 2)
    part = (place - below)[..., None]
    colours = SCALE[below] * (1 - part) + SCALE[below + 1] * part
    return Image.fromarray(colours.round().astype(np.uint8)).resize((width_px, height_px), Resampling.BILINEAR)
