"""What can be seen and heard in the demo corpus, and which combinations are kept for the test grid.

A picture combines shape, colour, motion and background; a sound combines timbre, pitch contour and rhythm; the two vary
independently. 16 pictures and 16 sounds never occur in training (each of their single values does); paired every way
they are the 256 clips of the grid, where one modality alone leaves 16 candidates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "white", "magenta")
MOTIONS = ("left", "right", "up", "down", "growing")
BACKGROUNDS = ("plain", "stripes", "checks", "gradient")
TIMBRES = ("pure", "buzz", "metal", "wind")
CONTOURS = ("steady", "rising", "falling", "wavering")
RHYTHMS = ("continuous", "slow", "fast", "swelling")
GRID_SIDE = 16


@dataclass(frozen=True, kw_only=True, order=True)
class Visual:
    """What is seen."""

    shape: str
    colour: str
    motion: str
    background: str


@dataclass(frozen=True, kw_only=True, order=True)
class Sound:
    """What is heard."""

    timbre: str
    contour: str
    rhythm: str


def all_visuals() -> list[Visual]:
    """Every combination of visual values, in a fixed order."""
    values = itertools.product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)
    return [Visual(shape=s, colour=c, motion=m, background=b) for s, c, m, b in values]


def all_sounds() -> list[Sound]:
    """Every combination of audible values, in a fixed order."""
    values = itertools.product(TIMBRES, CONTOURS, RHYTHMS)
    return [Sound(timbre=t, contour=c, rhythm=r) for t, c, r in values]


def grid_visuals() -> list[Visual]:
    """The 16 pictures of the grid; any two differ in shape or colour, every value occurs."""
    return [
        Visual(
            shape=SHAPES[i % 5],
            colour=COLOURS[i % 6],
            motion=MOTIONS[(2 * i + i // 5) % 5],
            background=BACKGROUNDS[(i + i // 4) % 4],
        )
        for i in range(GRID_SIDE)
    ]


def grid_sounds() -> list[Sound]:
    """The 16 sounds of the grid: a Latin square, any two differ in at least two values."""
    return [
        Sound(timbre=TIMBRES[i % 4], contour=CONTOURS[i // 4], rhythm=RHYTHMS[(i + i // 4) % 4])
        for i in range(GRID_SIDE)
    ]


def training_visuals() -> list[Visual]:
    """Pictures outside of the grid."""
    held_out = set(grid_visuals())
    return [visual for visual in all_visuals() if visual not in held_out]


def training_sounds() -> list[Sound]:
    """Sounds outside of the grid."""
    held_out = set(grid_sounds())
    return [sound for sound in all_sounds() if sound not in held_out]
