"""The sharding configuration: every key of a `shard` YAML file, its unit and its default."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data_pipeline.settings import Settings

OPUS_RATES_HZ = (8_000, 12_000, 16_000, 24_000, 48_000)  # RFC 6716, 2.1.3


class ClipConfig(Settings):
    """How a row becomes clips."""

    mode: Literal["whole", "fixed"] = "whole"  # whole: one clip a row; fixed: windows of length_s
    length_s: PositiveFloat = 10.0  # fixed only
    stride_s: PositiveFloat | None = None  # fixed only: from start to start; null: length_s, so that windows touch
    min_s: float = Field(0.5, ge=0)  # shorter clips (also the last window of a row) are rejected
    max_s: PositiveFloat | None = None  # longer clips are rejected; null: no limit


class VideoConfig(Settings):
    """Pictures: encoded anew as H.264, or the stream as it is."""

    mode: Literal["transcode", "copy"] = "transcode"  # copy cannot cut, and keeps size, rate and key frames
    short_side_px: PositiveInt | None = 224  # larger pictures are scaled down to it, none is enlarged; null keeps
    fps: PositiveFloat | None = None  # faster videos are thinned to it, slower ones keep their rate; null keeps
    gop_s: PositiveFloat = 1.0  # a key frame at least this often: training reads clips at random places
    crf: int = Field(23, ge=0, le=51)  # quality of x264: 0 lossless, 23 its default, 51 worst
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "veryfast"


class AudioConfig(Settings):
    """Sound: lossless FLAC, or Opus at about a fifth of the size."""

    codec: Literal["flac", "opus"] = "flac"
    sample_rate_hz: PositiveInt = 16_000
    channels: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _opus_rate(self) -> AudioConfig:
        if self.codec == "opus" and self.sample_rate_hz not in OPUS_RATES_HZ:
            raise ValueError(f"opus has the sample rates {OPUS_RATES_HZ}, found sample_rate_hz {self.sample_rate_hz}")
        return self


class RayConfig(Settings):
    """Who does the work."""

    address: str | None = None  # null: an own Ray on this machine; auto or HOST:PORT: a running cluster
    num_cpus: PositiveInt | None = None  # of the own Ray: tasks at a time; null: every core
    max_attempts: PositiveInt = 3  # of a task whose worker dies or that raises


class ShardConfig(Settings):
    """A whole sharding run."""

    manifest: str  # .parquet, .csv, .jsonl, or a folder of media files; its paths are relative to it
    out_dir: str
    # Shares of the rows that name no split, by split; ids alone decide which rows.
    hold_out: dict[str, float] = Field(default_factory=dict)
    rows_per_task: PositiveInt = 256  # the unit of work, of retry and of resumption; a task begins a new shard
    max_samples_per_shard: PositiveInt = 1000
    max_bytes_per_shard: PositiveInt = 1 << 30
    require: tuple[Literal["video", "audio", "captions"], ...] = ()  # clips that lack one of these are rejected
    clip: ClipConfig = ClipConfig()
    video: VideoConfig = VideoConfig()
    audio: AudioConfig = AudioConfig()
    ray: RayConfig = RayConfig()

    @field_validator("hold_out")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < share < 1 for share in value.values()) or sum(value.values()) >= 1:
            raise ValueError(f"expected shares between 0 and 1 that leave some rows for train, found {value}")
        return value

    @model_validator(mode="after")
    def _copy_cannot_cut(self) -> ShardConfig:
        if self.video.mode == "copy" and self.clip.mode != "whole":
            raise ValueError(
                f"video.mode copy cannot cut: expected clip.mode whole, found {self.clip.mode}; "
                "use video.mode transcode to cut clips"
            )
        return self

    def bytes_config(self) -> dict[str, Any]:
        """The part of the configuration that decides which bytes are written."""
        return self.model_dump(mode="json", exclude={"manifest", "out_dir", "ray"})


def digest_of(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
