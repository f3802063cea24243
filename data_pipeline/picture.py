"""The pictures of a window: encoded anew as H.264, the stream as it is, or one still."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from data_pipeline.config import VideoConfig
from data_pipeline.decode import SEEK_BEYOND_S, TIME_TOLERANCE_S, describe
from data_pipeline.filters import Reason, Rejected
from data_pipeline.media import BITEXACT, Media
from data_pipeline.segment import Clip

COPYABLE = ("h264", "hevc", "av1", "vp9", "mpeg4")  # codecs that both mp4 and common decoders know
JPEG_QUALITY = 92


@dataclass(frozen=True, kw_only=True)
class PictureClip:
    """An encoded picture track (or still: `fps` and `duration_s` None) and what the index says of it."""

    extension: str
    data: bytes
    num_frames: int
    fps: float | None
    width_px: int
    height_px: int
    duration_s: float | None


def encode_pictures(
    media: Media, clips: Sequence[Clip], config: VideoConfig
) -> Iterator[PictureClip | Rejected | None]:
    """The pictures of each of `clips`, in their order, in one pass over the file.

    None: the track shows nothing in that window. Rejected: the file is damaged or ends before the clip does.
    """
    encoders = [_ClipEncoder(clip, media, config) for clip in clips]
    num_frames, decoded_s = 0, 0.0
    broken: Rejected | None = None
    try:
        for frame, from_s, until_s in _shown(media, clips[0].start_s):
            for encoder in encoders:
                if from_s < encoder.clip.end_s and until_s > encoder.clip.start_s:
                    encoder.show(frame, from_s, until_s)
            num_frames, decoded_s = num_frames + 1, until_s
            while encoders and encoders[0].clip.end_s <= until_s + TIME_TOLERANCE_S:
                yield encoders.pop(0).finish()
            if not encoders:
                return
        broken = _missing_pictures(media, num_frames, decoded_s, from_start=clips[0].start_s <= SEEK_BEYOND_S)
    except av.FFmpegError as error:
        broken = media.broken(describe(error))
    except Rejected as rejected:
        broken = rejected
    for encoder in encoders:
        yield encoder.finish() if broken is None else broken


def _shown(media: Media, start_s: float) -> Iterator[tuple[av.VideoFrame, float, float]]:
    """Each decoded picture with the times from which and until which it is shown."""
    stream, origin_s = _picture_stream(media), media.origin_s
    stream.thread_count = 1
    if start_s > SEEK_BEYOND_S:
        media.container.seek(int((start_s + origin_s) * av.time_base))
    last: av.VideoFrame | None = None
    from_s = 0.0
    for frame in media.container.decode(stream):
        if frame.time is None:
            raise Rejected(Reason.DAMAGED, f"{media.path}: a picture without a time")
        time_s = frame.time - origin_s
        if frame.is_corrupt and time_s >= start_s:
            raise media.broken(f"the picture at {time_s:.3f} s is damaged")
        if last is not None and time_s > from_s:
            yield last, from_s, time_s
        last, from_s = frame, time_s
    if last is not None:
        rate = stream.average_rate or Fraction(25)
        yield last, from_s, from_s + (float(last.duration * last.time_base) if last.duration else float(1 / rate))


def _picture_stream(media: Media) -> av.VideoStream:
    stream = media.picture
    if stream is None:
        raise Rejected(Reason.NO_TRACK, f"{media.path}: no picture track")
    return stream


def _missing_pictures(media: Media, num_frames: int, decoded_s: float, *, from_start: bool) -> Rejected | None:
    """The reason when pictures end before the container says so. Files with edit lists declare more than they show."""
    stream, declared_s = _picture_stream(media), media.track_end_s("video")
    if num_frames == 0:
        return media.broken("no picture could be decoded")
    frame_s = float(1 / (stream.average_rate or Fraction(25)))
    counted = from_start and stream.frames > 0
    if (counted and num_frames >= stream.frames) or declared_s is None:
        return None
    if decoded_s > declared_s - (0.5 if counted else 1.5) * frame_s:
        return None
    frames = f"{num_frames} of {stream.frames} pictures, " if counted else ""
    return Rejected(Reason.TRUNCATED, f"{media.path}: {frames}{decoded_s:.2f} s of {declared_s:.2f} s")


class _ClipEncoder:
    """Encodes the pictures shown in one window; the first of them is shown from the window's start."""

    def __init__(self, clip: Clip, media: Media, config: VideoConfig) -> None:
        self.clip = clip
        self._config = config
        stream = _picture_stream(media)
        source_rate = stream.average_rate or Fraction(25)
        wanted = None if config.fps is None else Fraction(config.fps).limit_denominator(1001)
        self._thinned = wanted is not None and wanted < source_rate
        self._rate = wanted if wanted is not None and self._thinned else source_rate
        self._time_base = 1 / self._rate if self._thinned else Fraction(1, 90_000)
        self._size = _target_size(stream, config.short_side_px)
        self._scaler = VideoReformatter()
        self._buffer = io.BytesIO()
        self._out: av.container.OutputContainer | None = None
        self._num_frames, self._last_pts, self._until_s = 0, -1, clip.start_s

    def show(self, frame: av.VideoFrame, from_s: float, until_s: float) -> None:
        """`frame` is what is seen from `from_s` until `until_s`."""
        until_s = min(until_s, self.clip.end_s)
        if not self._thinned:
            since_s = max(from_s - self.clip.start_s, 0.0) if self._num_frames else 0.0
            self._encode(frame, round(since_s / self._time_base))
        else:
            while float((self._last_pts + 1) * self._time_base) + TIME_TOLERANCE_S < until_s - self.clip.start_s:
                self._encode(frame, self._last_pts + 1)
        self._until_s = until_s

    def _encode(self, frame: av.VideoFrame, pts: int) -> None:
        if pts <= self._last_pts:  # shown for less than a tick
            return
        picture = self._scale(frame)
        if self._out is None:
            self._out = self._open(picture.width, picture.height)
        picture.pts, picture.time_base = pts, self._time_base
        picture.pict_type = 0  # else x264 repeats the source's choice of key frames
        self._out.mux(self._track.encode(picture))
        self._num_frames, self._last_pts = self._num_frames + 1, pts

    def _scale(self, frame: av.VideoFrame) -> av.VideoFrame:
        """`frame` at its target size in BT.601, limited range: what every decoder assumes of small pictures."""
        source_space = Colorspace.ITU601 if frame.colorspace in (0, 2) else frame.colorspace  # RGB, or unstated
        width, height = self._size
        turns = round(frame.rotation / 90) % 4  # phones store pictures lying down
        picture = self._scaler.reformat(
            frame, width, height, "yuv420p", src_colorspace=source_space, dst_colorspace=Colorspace.ITU601,
            src_color_range=frame.color_range, dst_color_range=ColorRange.MPEG, interpolation=Interpolation.AREA,
        )  # fmt: skip
        if turns:
            turned = np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), turns))
            picture = av.VideoFrame.from_ndarray(turned, format="rgb24").reformat(format="yuv420p")
        return picture

    def _open(self, width: int, height: int) -> av.container.OutputContainer:
        out = av.open(self._buffer, "w", format="mp4", container_options=BITEXACT)
        # x264's macroblock tree reads memory that nobody wrote: with it, equal pictures give different bytes.
        options = {"preset": self._config.preset, "crf": str(self._config.crf), "mbtree": "0"}
        self._track: Any = out.add_stream("libx264", rate=self._rate, options=options)
        self._track.width, self._track.height, self._track.pix_fmt = width, height, "yuv420p"
        context = self._track.codec_context
        context.thread_count = 1  # more threads, other bytes
        context.time_base = self._time_base
        context.gop_size = max(1, round(self._config.gop_s * self._rate))
        context.colorspace, context.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        return out

    def finish(self) -> PictureClip | None:
        """The finished file; None when nothing was shown."""
        if self._out is None:
            return None
        self._out.mux(self._track.encode(None))
        width, height = self._track.width, self._track.height
        self._out.close()
        num_frames, rate = self._num_frames, float(self._rate)
        duration_s = num_frames / rate if self._thinned else self._until_s - self.clip.start_s
        return PictureClip(extension="mp4", data=self._buffer.getvalue(), num_frames=num_frames, fps=rate,
                           width_px=width, height_px=height, duration_s=duration_s)  # fmt: skip


def _target_size(stream: av.VideoStream, short_side_px: int | None) -> tuple[int, int]:
    """Width and height, both even, of square pixels with the shorter side at most `short_side_px`."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = float(stream.width * aspect), float(stream.height)
    factor = 1.0 if short_side_px is None else min(1.0, short_side_px / min(width, height))
    return max(2, 2 * round(width * factor / 2)), max(2, 2 * round(height * factor / 2))


def copy_pictures(media: Media) -> PictureClip:
    """The whole picture track, not encoded anew; time 0 is its first picture.

    Raises:
        Rejected: a codec that mp4 does not hold, or pictures are missing or marked damaged.
    """
    stream = _picture_stream(media)
    if stream.codec_context.name.removeprefix("lib").split("-")[0] not in (*COPYABLE, "dav1d"):
        raise Rejected(Reason.CANNOT_COPY, f"{media.path}: codec {stream.codec_context.name}; mp4 takes {COPYABLE}")
    buffer, num_frames, first, end = io.BytesIO(), 0, stream.start_time or 0, 0
    try:
        with av.open(buffer, "w", format="mp4", container_options=BITEXACT) as out:
            track = out.add_stream_from_template(stream)
            for packet in media.container.demux(stream):
                if packet.dts is None or packet.pts is None:
                    continue  # the mark of the end
                if packet.is_corrupt:
                    raise media.broken(f"picture {num_frames} is damaged")
                end, num_frames = max(end, packet.pts + (packet.duration or 0)), num_frames + 1
                packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, track
                out.mux(packet)
    except av.FFmpegError as error:
        raise media.broken(describe(error)) from error
    missing = _missing_pictures(media, num_frames, float(end * stream.time_base) - media.origin_s, from_start=True)
    if missing is not None:
        raise missing
    return PictureClip(extension="mp4", data=buffer.getvalue(), num_frames=num_frames,
                       fps=float(stream.average_rate or 0) or None, width_px=stream.width, height_px=stream.height,
                       duration_s=float((end - first) * stream.time_base))  # fmt: skip


def encode_still(data: bytes, path: str, config: VideoConfig) -> PictureClip:
    """A still picture as JPEG, upright and scaled; with `copy`, a JPEG file stays as it is.

    Raises:
        Rejected: Pillow cannot read it.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            untouched = config.mode == "copy" and image.format == "JPEG"
            picture = image.copy() if untouched else ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        known = data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*"))
        short = known and "truncated" in str(error)
        reason = Reason.TRUNCATED if short else Reason.DAMAGED if known else Reason.NOT_MEDIA
        raise Rejected(reason, f"{path}: {describe(error)}") from error
    if not untouched:
        if config.short_side_px is not None and config.mode == "transcode":
            factor = min(1.0, config.short_side_px / min(picture.size))
            size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        data = buffer.getvalue()
    return PictureClip(extension="jpg", data=data, num_frames=1, fps=None, width_px=picture.width,
                       height_px=picture.height, duration_s=None)  # fmt: skip
