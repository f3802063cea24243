"""A manifest row becomes its outcomes: one sample or one rejection for every clip, or one rejection for the row."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.config import ShardConfig
from data_pipeline.filters import Reason, Rejected, Rejection, check_present, length_problem
from data_pipeline.manifest_row import ManifestRow
from data_pipeline.media import Media
from data_pipeline.picture import PictureClip, copy_pictures, encode_pictures, encode_still
from data_pipeline.segment import Clip, cut_clips
from data_pipeline.shards import Sample
from data_pipeline.sound import SoundClip, cut_sound
from data_pipeline.source import read_bytes
from data_pipeline.subtitles import Cue, cut_subtitles, parse_subtitles

BEYOND_END_S = 0.5  # an `end_s` this far behind the end of the medium means the end; farther is a mistake


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """What the columns of a row point to, opened."""

    picture: Media | None
    sound: Media | None  # an own handle, also when it is the picture's file: both are read at once
    still: PictureClip | None
    cues: tuple[Cue, ...]


def extract_row(row: ManifestRow, base: str, config: ShardConfig) -> Iterator[Sample | Rejection]:
    """Every clip of `row` as a sample or a rejection; each clip index appears once.

    Args:
        base: folder or URL that the row's relative paths start from.

    Raises:
        OSError: a failure of the machine or the network, which says nothing about the row.
    """
    clips: list[Clip] | None = None
    num_done = 0
    try:
        if row.problem is not None:
            raise Rejected(Reason(row.problem[0]), row.problem[1])
        with ExitStack() as stack:
            sources = _open_sources(row, base, config, stack)
            clips = _clips(row, sources, config)
            for outcome in _clip_outcomes(row, sources, clips, config):
                num_done += 1
                yield outcome
    except (OSError, MemoryError):
        raise
    except Exception as error:
        rejected = error if isinstance(error, Rejected) else _unexpected(error)
        remaining = [None] if clips is None else [clip.index for clip in clips[num_done:]]
        for index in remaining:
            yield Rejection(row_id=row.id, clip_index=index, reason=rejected.reason, detail=rejected.detail)


def _unexpected(error: Exception) -> Rejected:
    return Rejected(Reason.UNEXPECTED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _open_sources(row: ManifestRow, base: str, config: ShardConfig, stack: ExitStack) -> _Sources:
    if row.video is not None and row.image is not None:
        raise Rejected(Reason.BAD_ROW, "both a video and an image: expected at most one picture")
    if row.video is not None and config.video.mode == "copy" and (row.start_s is not None or row.end_s is not None):
        raise Rejected(Reason.CANNOT_COPY, "start_s or end_s given, but video.mode copy cannot cut")
    picture = sound = still = None
    if row.video is not None:
        picture = stack.enter_context(Media.open(base, row.video))
        if picture.picture is None:
            raise Rejected(Reason.NO_TRACK, f"{row.video}: no picture track")
    if row.audio is not None:
        sound = stack.enter_context(Media.open(base, row.audio))
        if not sound.has_sound:
            raise Rejected(Reason.NO_TRACK, f"{row.audio}: no sound track")
    elif picture is not None and picture.has_sound and row.video is not None:
        sound = stack.enter_context(Media.open(base, row.video))
    if row.image is not None:
        still = encode_still(read_bytes(base, row.image), row.image, config.video)
    return _Sources(picture=picture, sound=sound, still=still, cues=_read_cues(row, base))


def _read_cues(row: ManifestRow, base: str) -> tuple[Cue, ...]:
    if row.subtitles is None:
        return ()
    try:
        return parse_subtitles(read_bytes(base, row.subtitles).decode("utf-8"))
    except ValueError as error:
        raise Rejected(Reason.BAD_SUBTITLES, f"{row.subtitles}: {error}") from error


def _clips(row: ManifestRow, sources: _Sources, config: ShardConfig) -> list[Clip]:
    """The windows of the row, in the time of its picture, or of its sound when there is no moving picture."""
    medium = sources.picture or sources.sound
    if medium is None:
        if row.start_s is not None or row.end_s is not None:
            raise Rejected(Reason.BAD_TIMES, "start_s or end_s given, but neither a video nor a sound")
        return [Clip(index=0, start_s=0.0, end_s=0.0)]
    medium_end_s = medium.end_s()
    start_s = 0.0 if row.start_s is None else row.start_s
    if config.video.mode == "copy" and sources.picture is not None:
        start_s = sources.picture.first_picture_s
    end_s = medium_end_s if row.end_s is None else row.end_s
    if start_s < 0 or end_s <= start_s:
        raise Rejected(Reason.BAD_TIMES, f"from {start_s:.3f} s to {end_s:.3f} s: expected 0 <= start_s < end_s")
    if start_s >= medium_end_s or end_s > medium_end_s + BEYOND_END_S:
        raise Rejected(
            Reason.BAD_TIMES, f"from {start_s:.3f} s to {end_s:.3f} s: {medium.path} ends at {medium_end_s:.3f} s"
        )
    return cut_clips(start_s, min(end_s, medium_end_s), config.clip)


def _clip_outcomes(
    row: ManifestRow, sources: _Sources, clips: list[Clip], config: ShardConfig
) -> Iterator[Sample | Rejection]:
    timed = sources.picture is not None or sources.sound is not None
    problems = [length_problem(config.clip, clip.length_s) if timed else None for clip in clips]
    pictures = _pictures(sources, [clip for clip, problem in zip(clips, problems, strict=True) if not problem], config)
    for clip, problem in zip(clips, problems, strict=True):
        try:
            picture = problem or next(pictures)
            if isinstance(picture, Rejected):
                raise picture
            sound = None if sources.sound is None else cut_sound(sources.sound, clip, config.audio)
            cues = cut_subtitles(sources.cues, clip.start_s, clip.end_s)
            check_present(
                config,
                video=picture is not None,
                audio=sound is not None,
                captions=bool(row.captions),
                subtitles=bool(cues),
            )
            yield _sample(row, clip, picture, sound, cues)
        except Rejected as rejected:
            yield Rejection(row_id=row.id, clip_index=clip.index, reason=rejected.reason, detail=rejected.detail)


def _pictures(sources: _Sources, clips: list[Clip], config: ShardConfig) -> Iterator[PictureClip | Rejected | None]:
    """One result a clip, in order."""
    if sources.picture is None:
        yield from (sources.still for _ in clips)
    elif config.video.mode == "copy":
        yield from (copy_pictures(sources.picture) for _ in clips)
    elif clips:
        yield from encode_pictures(sources.picture, clips, config.video)


def sample_key(row_id: str, clip_index: int) -> str:
    """The name of a sample's members: readable where the id allows it, a hash of the id where not."""
    plain = re.fullmatch(r"[A-Za-z0-9_-]{1,64}", row_id)
    stem = row_id if plain else "x" + hashlib.sha256(row_id.encode()).hexdigest()[:31]
    return f"{stem}-{clip_index:04d}"


def _sample(
    row: ManifestRow, clip: Clip, picture: PictureClip | None, sound: SoundClip | None, cues: list[Cue]
) -> Sample:
    description: dict[str, Any] = {
        "clip_index": clip.index,
        "start_s": round(clip.start_s, 6),
        "end_s": round(clip.end_s, 6),
        "weight": row.weight,
        "captions": [asdict(caption) for caption in row.captions],
        "subtitles": [asdict(cue) for cue in cues],
    }
    text = json.dumps(
        {"id": row.id, "split": row.split, "metadata": row.metadata, **description}, sort_keys=True, ensure_ascii=False
    )
    members = {"json": ("json", text.encode())}
    index = {
        "row_id": row.id,
        "metadata": json.dumps(row.metadata, sort_keys=True, ensure_ascii=False),
        **description,
    }
    if picture is not None:
        members["video"] = (picture.extension, picture.data)
        index |= {
            "video_num_frames": picture.num_frames,
            "video_fps": picture.fps,
            "video_width_px": picture.width_px,
            "video_height_px": picture.height_px,
            "video_duration_s": picture.duration_s,
        }
    if sound is not None:
        members["audio"] = (sound.extension, sound.data)
        index |= {"audio_sample_rate_hz": sound.sample_rate_hz, "audio_duration_s": sound.duration_s}
    return Sample(key=sample_key(row.id, clip.index), members=members, index=index)
