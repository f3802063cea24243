"""One opened media file: its tracks, its time line, and the truth about what is wrong with it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Literal

import av

from data_pipeline.decode import describe
from data_pipeline.filters import Reason, Rejected, missing_bytes, unreadable_reason
from data_pipeline.source import open_binary

BITEXACT = {"fflags": "+bitexact"}  # of containers we write: no version of the library, no random serial number
GUESSED_DURATIONS = ("mp3", "aac")  # containers that state none: the reader guesses it from the bit rate
READ_BYTES = 1 << 18  # a read of the container reader; its default of 32 KiB is many calls into Python


@dataclass(frozen=True)
class _Reader:
    """What the container reader reads from. Damaged files make it seek to impossible places: that is the file's fault,
    while an error of the file system stays an error of the machine."""

    stream: BinaryIO

    def read(self, num_bytes: int) -> bytes:
        return self.stream.read(num_bytes)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        impossible = whence == os.SEEK_SET and not 0 <= offset < 1 << 62
        return -errno.EINVAL if impossible else self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()


@dataclass(kw_only=True)
class Media:
    """A file under the decoder. All times are seconds since `origin_s`, where the container's time line begins."""

    path: str  # as the manifest writes it
    stream: BinaryIO
    container: av.container.InputContainer

    @staticmethod
    def open(base: str, path: str) -> Media:
        """Open `path`, relative to `base`.

        Raises:
            Rejected: missing, empty, not a medium, truncated or damaged beyond opening.
        """
        stream = open_binary(base, path)
        try:
            _refuse_short_riff(stream, path)
            # A playlist that calls itself .mp4 must not make the reader open other files.
            options = {"protocol_whitelist": "pipe"}
            container = av.open(
                _Reader(stream), container_options=options, buffer_size=READ_BYTES, metadata_errors="replace"
            )
        except Rejected:
            stream.close()
            raise
        except (av.FFmpegError, ValueError) as error:
            with stream:
                rejected = unreadable_reason(stream, describe(error))
            raise Rejected(rejected.reason, f"{path}: {rejected.detail}") from error
        return Media(path=path, stream=stream, container=container)

    def __enter__(self) -> Media:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()
        self.stream.close()

    @property
    def origin_s(self) -> float:
        """Where the time line begins, in the container's own time."""
        start = self.container.start_time
        return 0.0 if start is None else start / av.time_base

    @property
    def picture(self) -> av.VideoStream | None:
        """The first moving picture; cover art is none."""
        moving = [s for s in self.container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        return moving[0] if moving else None

    @property
    def first_picture_s(self) -> float:
        """When the first picture is shown."""
        track = self.picture
        return 0.0 if track is None else float((track.start_time or 0) * track.time_base) - self.origin_s

    @property
    def has_sound(self) -> bool:
        """Whether there is a sound track."""
        return bool(self.container.streams.audio)

    def track_end_s(self, kind: Literal["video", "audio"]) -> float | None:
        """Where the picture or sound track says that it ends; None when it does not say."""
        track = self.picture if kind == "video" else self.container.streams.audio[0]
        if track is None or track.time_base is None:
            return None
        if track.duration is None:
            return _tagged_duration_s(track.metadata.get("DURATION"))
        return float(((track.start_time or 0) + track.duration) * track.time_base) - self.origin_s

    def end_s(self) -> float:
        """The end of the medium: of its picture, else of its sound; by reading through it where it is not stated.

        Raises:
            Rejected: it cannot be read through.
        """
        kind: Literal["video", "audio"] = "video" if self.picture is not None else "audio"
        stated_s = self.track_end_s(kind)
        if stated_s is not None and self.container.format.name not in GUESSED_DURATIONS:
            return stated_s
        track = self.picture or self.container.streams.audio[0]
        try:
            ends_s = [
                float((packet.pts + (packet.duration or 0)) * packet.time_base)
                for packet in self.container.demux(track)
                if packet.pts is not None
            ]
        except av.FFmpegError as error:
            raise self.broken(describe(error)) from error
        self.rewind()
        return max(ends_s, default=self.origin_s) - self.origin_s

    def rewind(self) -> None:
        """Go back to the beginning."""
        self.container.seek(self.container.start_time or 0)

    def broken(self, words: str) -> Rejected:
        """The reason for a failure in the middle: cut short if the container says so, otherwise damaged."""
        position = self.stream.tell()
        missing = missing_bytes(self.stream)
        self.stream.seek(position)
        if missing is not None:
            return Rejected(Reason.TRUNCATED, f"{self.path}: {missing}")
        return Rejected(Reason.DAMAGED, f"{self.path}: {words}")


def _refuse_short_riff(stream: BinaryIO, path: str) -> None:
    """Raises Rejected for a wav or avi file that is cut: it would be read as if it were shorter."""
    riff = stream.read(4) == b"RIFF"
    missing = missing_bytes(stream) if riff else None
    stream.seek(0)
    if missing is not None:
        raise Rejected(Reason.TRUNCATED, f"{path}: {missing}")


def _tagged_duration_s(tag: str | None) -> float | None:
    """Matroska's DURATION tag, "00:00:04.000000000"."""
    if tag is None:
        return None
    try:
        hours, minutes, seconds = (float(part) for part in tag.split(":"))
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds
