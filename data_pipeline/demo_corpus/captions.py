"""Captions of the demo corpus: many wordings that name what is seen and what is heard."""

from __future__ import annotations

import numpy as np

from data_pipeline.demo_corpus.factors import Sound, Visual

WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "red": ("red",),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "white": ("white",),
    "magenta": ("magenta", "pink"),
    "left": ("moves left", "slides to the left"),
    "right": ("moves right", "slides to the right"),
    "up": ("rises", "moves up"),
    "down": ("falls", "moves down"),
    "growing": ("grows", "gets bigger"),
    "plain": ("on a plain background", "before a plain wall"),
    "stripes": ("on stripes", "on a striped background"),
    "checks": ("on a checkered background", "on a chessboard"),
    "gradient": ("on a fading background", "on a gradient"),
    "pure": ("a pure tone", "a clean whistle"),
    "buzz": ("a buzz", "a buzzing sound"),
    "metal": ("a metallic ring", "a bell-like sound"),
    "wind": ("a windy noise", "a hiss"),
    "steady": ("holding its pitch", "of steady pitch"),
    "rising": ("rising in pitch", "going up in pitch"),
    "falling": ("falling in pitch", "going down in pitch"),
    "wavering": ("wavering in pitch", "of wobbling pitch"),
    "continuous": ("without a pause", "all the time"),
    "slow": ("in slow beats", "pulsing slowly"),
    "fast": ("in fast beats", "pulsing quickly"),
    "swelling": ("swelling from silence", "getting louder"),
}
BOTH = (
    "{seen} while {heard} is heard",
    "{heard}, and {seen}",
    "{seen}; the sound is {heard}",
    "with {heard}, {seen}",
    "we see how {seen} and hear {heard}",
    "{seen}, accompanied by {heard}",
)
SEEN_ONLY = ("{seen}", "a silent clip where {seen}")
SHARE_BRIEF = 0.15  # of training captions that leave out the background and the rhythm


def seen(visual: Visual, generator: np.random.Generator, brief: bool = False) -> str:
    """ "a red circle moves left on stripes"; brief: without the background."""
    parts = [visual.colour, visual.shape, visual.motion, *([] if brief else [visual.background])]
    return "a " + " ".join(_word(part, generator) for part in parts)


def heard(sound: Sound, generator: np.random.Generator, brief: bool = False) -> str:
    """ "a buzz rising in pitch in slow beats"; brief: without the rhythm."""
    parts = [sound.timbre, sound.contour, *([] if brief else [sound.rhythm])]
    return " ".join(_word(part, generator) for part in parts)


def caption(visual: Visual, sound: Sound | None, generator: np.random.Generator, complete: bool) -> str:
    """One caption; it names picture and sound, or the picture alone where there is no sound.

    complete: all seven values are named, as in the test splits.
    """
    brief = not complete and generator.random() < SHARE_BRIEF
    picture = seen(visual, generator, brief)
    if sound is None:
        return _choose(SEEN_ONLY, generator).format(seen=picture)
    return _choose(BOTH, generator).format(seen=picture, heard=heard(sound, generator, brief))


def _word(value: str, generator: np.random.Generator) -> str:
    return _choose(WORDS[value], generator)


def _choose(options: tuple[str, ...], generator: np.random.Generator) -> str:
    return options[int(generator.integers(len(options)))]
