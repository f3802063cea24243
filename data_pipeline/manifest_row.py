"""One row of a manifest, whatever file it stood in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline.config import digest_of


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text about a clip, and who made it (human, asr, ...) when that is known."""

    text: str
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One line of a manifest; paths as written there. `problem` is (reason, detail) of a row that cannot be used."""

    id: str
    video: str | None = None
    audio: str | None = None
    image: str | None = None
    subtitles: str | None = None
    captions: tuple[Caption, ...] = ()
    start_s: float | None = None
    end_s: float | None = None
    split: str = "train"
    weight: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as plain values; `from_json` reads it."""
        values = json.loads(json.dumps(asdict(self)))
        assert isinstance(values, dict)
        return values

    @staticmethod
    def from_json(values: dict[str, Any]) -> ManifestRow:
        """The inverse of `to_json`."""
        captions = tuple(Caption(**caption) for caption in values["captions"])
        problem = tuple(values["problem"]) if values["problem"] else None
        return ManifestRow(**{**values, "captions": captions, "problem": problem})

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the row."""
        return digest_of(self.to_json())
