"""The demo corpus as data: which clips there are, and how one becomes a file. All of it follows from the seed."""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_pipeline.demo_corpus import captions, factors, picture, tone
from data_pipeline.demo_corpus.factors import Sound, Visual

SPLITS = ("train", "val", "test", "test-ordinary")
NUM_ORDINARY = 200
VERSION = 2  # raised when the same seed gives other clips
SHARE_VAL, SHARE_SILENT, SHARE_UNCAPTIONED, SHARE_BROKEN = 0.05, 0.05, 0.05, 0.02
MAX_CAPTIONS = 4
ONE_THREAD = {"threads": "1"}
AAC = {"aac_coder": "fast", **ONE_THREAD}
X264 = {"preset": "ultrafast", "crf": "28", **ONE_THREAD}
BREAKAGES = ("truncated", "empty", "web page", "missing")
WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip before it is drawn. `split` is one of SPLITS; `breakage`, of train clips only, one of BREAKAGES."""

    id: str
    split: str
    index: int
    visual: Visual
    sound: Sound | None
    captions: tuple[str, ...]
    breakage: str | None = None

    @property
    def video(self) -> str:
        """Path relative to the corpus."""
        return f"clips/{self.id}.mp4"

    def manifest_row(self) -> dict[str, Any]:
        """The line of the manifest; it does not tell what is broken."""
        sound = dict.fromkeys(Sound.__annotations__) if self.sound is None else asdict(self.sound)
        return {
            "id": self.id,
            "video": self.video,
            "captions": [{"text": text, "source": "procedural"} for text in self.captions],
            "split": self.split,
            **asdict(self.visual),
            **sound,
        }


def plan(num_clips: int, seed: int) -> list[Clip]:
    """All clips of a corpus with `num_clips` whole ones for training, in the order of the manifest.

    The broken ones come on top and are drawn like any other training clip, so that neither name, place nor metadata
    tells them apart.
    """
    num_broken = max(len(BREAKAGES), round(num_clips * SHARE_BROKEN))
    num_train = num_clips + num_broken
    chosen = np.random.default_rng([seed, num_clips]).permutation(num_train)[:num_broken]
    breakages = {int(index): BREAKAGES[place % len(BREAKAGES)] for place, index in enumerate(chosen)}
    visuals, sounds = factors.training_visuals(), factors.training_sounds()
    trained = [("train", index) for index in range(num_train)]
    trained += [("val", index) for index in range(round(num_clips * SHARE_VAL))]
    clips = []
    for split, index in trained:
        generator = _generator(seed, split, index, 0)
        visual = visuals[int(generator.integers(len(visuals)))]
        sound = sounds[int(generator.integers(len(sounds)))]
        breakage = breakages.get(index) if split == "train" else None
        clips.append(_trained(split, index, visual, sound, breakage, generator))
    used = {(clip.visual, clip.sound) for clip in clips}
    return clips + _grid(seed) + _ordinary(seed, used)


def _generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def _trained(
    split: str, index: int, visual: Visual, sound: Sound, breakage: str | None, generator: np.random.Generator
) -> Clip:
    """A clip of train or val; some of train lack their sound, some their captions, never both."""
    number = int(generator.choice([1, 2, 3, MAX_CAPTIONS], p=[0.05, 0.05, 0.1, 0.8]))
    draw = generator.random() if split == "train" else 1.0
    silent, uncaptioned = draw < SHARE_SILENT, SHARE_SILENT <= draw < SHARE_SILENT + SHARE_UNCAPTIONED
    audible = None if silent else sound
    number = 0 if uncaptioned else number
    texts = tuple(captions.caption(visual, audible, generator, complete=split == "val") for _ in range(number))
    name = f"{split}-{index:06d}"
    return Clip(
        id=name, split=split, index=index, visual=visual, sound=audible, captions=texts, breakage=breakage
    )  # fmt: skip


def _grid(seed: int) -> list[Clip]:
    clips: list[Clip] = []
    for visual in factors.grid_visuals():
        for sound in factors.grid_sounds():
            index = len(clips)
            text = captions.caption(visual, sound, _generator(seed, "test", index, 0), complete=True)
            name = f"test-{index:03d}"
            clips.append(Clip(id=name, split="test", index=index, visual=visual, sound=sound, captions=(text,)))
    return clips


def _ordinary(seed: int, used: set[tuple[Visual, Sound | None]]) -> list[Clip]:
    """Clips of training pictures, all different, each with a sound it has nowhere in `used` (where one is left)."""
    generator = _generator(seed, "test-ordinary", 0, 0)
    visuals, sounds = factors.training_visuals(), factors.training_sounds()
    clips = []
    for index, place in enumerate(generator.permutation(len(visuals))[:NUM_ORDINARY]):
        visual = visuals[place]
        free = [sound for sound in sounds if (visual, sound) not in used] or sounds
        sound = free[int(generator.integers(len(free)))]
        text = captions.caption(visual, sound, generator, complete=True)
        name = f"ordinary-{index:03d}"
        clips.append(Clip(id=name, split="test-ordinary", index=index, visual=visual, sound=sound, captions=(text,)))
    return clips


def write_clip(folder: Path, clip: Clip, seed: int) -> None:
    """Write the clip's file under a temporary name, then rename it. A clip that breaks by missing has none."""
    target = folder / clip.video
    if clip.breakage == "missing":
        return
    if clip.breakage in ("empty", "web page"):
        content = b"" if clip.breakage == "empty" else WEB_PAGE
    else:
        content = encode(clip, seed)
        if clip.breakage == "truncated":
            content = content[: len(content) * 3 // 5]
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, target)


def encode(clip: Clip, seed: int) -> bytes:
    """The clip as mp4: h264, and aac unless it is silent. One thread, no dates: equal clips give equal bytes."""
    generator = _generator(seed, clip.split, clip.index, 1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=picture.FPS, options=X264)
        video.width, video.height, video.pix_fmt = picture.WIDTH_PX, picture.HEIGHT_PX, "yuv420p"
        audio = container.add_stream("aac", rate=tone.RATE_HZ, layout="mono", options=AAC) if clip.sound else None
        for drawn in picture.frames(clip.visual, generator):
            container.mux(video.encode(av.VideoFrame.from_ndarray(drawn, format="yuv420p")))
        container.mux(video.encode(None))
        if audio is not None and clip.sound is not None:
            frame = av.AudioFrame.from_ndarray(tone.waveform(clip.sound, generator)[None], format="fltp", layout="mono")
            frame.sample_rate = tone.RATE_HZ
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return buffer.getvalue()
