"""A row's span of time becomes clips."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.config import ClipConfig

REMAINDER_S = 0.01  # containers state durations this inexactly: a shorter rest is no window of its own


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A window [start_s, end_s) in the time of its source; `index` counts the windows of a row."""

    index: int
    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Length of the window."""
        return self.end_s - self.start_s


def cut_clips(start_s: float, end_s: float, config: ClipConfig) -> list[Clip]:
    """The windows of a span: one, or one every `stride_s` until the end is reached; the last may be shorter."""
    if config.mode == "whole":
        return [Clip(index=0, start_s=start_s, end_s=end_s)]
    stride_s = config.stride_s or config.length_s
    clips: list[Clip] = []
    while not clips or clips[-1].end_s < end_s:
        begin_s = start_s + len(clips) * stride_s
        if clips and begin_s > end_s - REMAINDER_S:
            break
        finish_s = begin_s + config.length_s
        finish_s = end_s if finish_s > end_s - REMAINDER_S else finish_s
        clips.append(Clip(index=len(clips), start_s=begin_s, end_s=finish_s))
    return clips
