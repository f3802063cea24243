"""Why a row or a clip is in no shard: an enumerated set of reasons, and the checks that need no decoder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from data_pipeline.config import ClipConfig, ShardConfig


class Reason(StrEnum):
    """Every reason there is; the text stands in `rejects.parquet`."""

    MISSING_ID = "missing_id"
    DUPLICATE_ID = "duplicate_id"
    BAD_ROW = "bad_row"  # a value that does not fit its column
    BAD_TIMES = "bad_times"  # negative, reversed, or outside the medium
    NOTHING = "nothing"  # no picture, no sound, no caption
    MISSING_FILE = "missing_file"
    UNREADABLE_FILE = "unreadable_file"  # it is there, but may not be read, or is a folder
    EMPTY_FILE = "empty_file"
    NOT_MEDIA = "not_media"  # the content is no picture, sound or video, whatever the name says
    NO_TRACK = "no_track"  # a medium, but without the picture or sound that its column promises
    TRUNCATED = "truncated"  # less is there than the container declares
    DAMAGED = "damaged"  # the decoder gave up on it
    BAD_SUBTITLES = "bad_subtitles"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    LACKS_VIDEO = "lacks_video"  # `require` names it
    LACKS_AUDIO = "lacks_audio"
    LACKS_CAPTIONS = "lacks_captions"
    CANNOT_COPY = "cannot_copy"  # video.mode copy, and times to cut at or a codec that mp4 cannot hold
    UNEXPECTED = "unexpected"  # an error of this program on this row


class Rejected(Exception):
    """A row or a clip is not used; raised where that is found out, recorded by the task."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """The outcome of a row (`clip_index` None) or of one of its clips that is in no shard."""

    row_id: str
    clip_index: int | None
    reason: Reason
    detail: str


def check_present(config: ShardConfig, *, video: bool, audio: bool, captions: bool, subtitles: bool) -> None:
    """Raises Rejected when a clip has nothing, or lacks what `require` names."""
    present = {"video": video, "audio": audio, "captions": captions}
    if not any(present.values()) and not subtitles:
        raise Rejected(Reason.NOTHING, "no picture, no sound, no caption")
    for name in config.require:
        if not present[name]:
            raise Rejected(Reason(f"lacks_{name}"), f"the configuration requires {name}")


def length_problem(config: ClipConfig, length_s: float) -> Rejected | None:
    """The reason when a clip is shorter than `min_s` or longer than `max_s`."""
    if length_s < config.min_s:
        return Rejected(Reason.TOO_SHORT, f"{length_s:.3f} s, clip.min_s is {config.min_s} s")
    if config.max_s is not None and length_s > config.max_s:
        return Rejected(Reason.TOO_LONG, f"{length_s:.3f} s, clip.max_s is {config.max_s} s")
    return None


def unreadable_reason(stream: BinaryIO, error: str) -> Rejected:
    """The truth about a file that no decoder opens, from its first bytes and, for mp4, its boxes."""
    stream.seek(0)
    head = stream.read(64)
    if not head:
        return Rejected(Reason.EMPTY_FILE, "0 bytes")
    missing = missing_bytes(stream)
    if missing is not None:
        return Rejected(Reason.TRUNCATED, missing)
    if _looks_like_media(head):
        return Rejected(Reason.DAMAGED, error)
    return Rejected(Reason.NOT_MEDIA, f"begins with {bytes(head[:24])!r}")


def _looks_like_media(head: bytes) -> bool:
    if head[4:8] == b"ftyp":
        return True
    starts = (b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"fLaC", b"ID3", b"FLV", b"\xff\xd8\xff", b"\x89PNG", b"GIF8")
    return head.startswith(starts) or head[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf1", b"\xff\xf9")


def missing_bytes(stream: BinaryIO) -> str | None:
    """What an mp4 or RIFF (wav, avi) file says about its own length that is not there; None when it is whole.

    Other containers do not say, and None is returned for them.
    """
    length = stream.seek(0, 2)
    stream.seek(0)
    head = stream.read(12)
    if head[4:8] == b"ftyp":
        return _missing_boxes(stream, length)
    stated = int.from_bytes(head[4:8], "little") + 8
    if head[:4] == b"RIFF" and length < stated < 0xFFFFFFFF:  # all ones: a stream of unknown length
        return f"{length} bytes of {stated}"
    return None


def _missing_boxes(stream: BinaryIO, length: int) -> str | None:
    """What the outermost boxes of an mp4 file (ISO 14496-12, 4.2) state and `length` does not hold."""
    position, kinds = 0, []
    while position + 8 <= length:
        stream.seek(position)
        header = stream.read(16)
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        elif size == 0:  # up to the end of the file
            size = length - position
        if size < 8:
            break
        kinds.append(kind)
        position += size
    if position > length:
        return f"{length} bytes of {position}"
    return None if b"moov" in kinds else f"{length} bytes, the table of contents is missing"
