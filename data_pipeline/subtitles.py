"""SubRip (.srt) and WebVTT (.vtt) cues, cut to a clip's window."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{3})"
_TIMING = re.compile(rf"^\s*{_TIME}\s+-->\s+{_TIME}")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True, kw_only=True)
class Cue:
    """One subtitle: what is said or shown from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    text: str


def parse_subtitles(text: str) -> tuple[Cue, ...]:
    """The cues of a .srt or .vtt file in order of time, markup removed.

    Raises:
        ValueError: there is text, but no cue.
    """
    cues = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").removeprefix("\ufeff")):
        lines = block.strip().split("\n")
        timings = [(number, match) for number, line in enumerate(lines) if (match := _TIMING.match(line))]
        if not timings:
            continue  # the WEBVTT header, NOTE and STYLE blocks
        number, match = timings[0]
        words = " ".join(_MARKUP.sub("", line).strip() for line in lines[number + 1 :]).strip()
        if words:
            cues.append(Cue(start_s=_seconds(match.groups()[:4]), end_s=_seconds(match.groups()[4:]), text=words))
    if text.strip() and not cues and not text.removeprefix("\ufeff").startswith("WEBVTT"):
        raise ValueError("no line of the form 00:00:01.000 --> 00:00:02.000")
    return tuple(sorted(cues, key=lambda cue: (cue.start_s, cue.end_s)))


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, milliseconds = (int(part or 0) for part in parts)
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def cut_subtitles(cues: Sequence[Cue], start_s: float, end_s: float) -> list[Cue]:
    """The cues that overlap the window, in time since its start, cut at its ends."""
    return [
        Cue(
            start_s=round(max(cue.start_s - start_s, 0.0), 3),
            end_s=round(min(cue.end_s, end_s) - start_s, 3),
            text=cue.text,
        )
        for cue in cues
        if cue.start_s < end_s and cue.end_s > start_s
    ]
