"""Rows in: a Parquet, CSV or JSONL file, or a folder of media, becomes a list of typed rows.

A row that cannot be used stays in the list with its `problem`, so that it is counted and rejected like any other; a
manifest that cannot be read is an error of its author.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config import digest_of
from data_pipeline.filters import Reason, Rejected
from data_pipeline.settings import UserError
from data_pipeline.source import is_url

COLUMNS = ("id", "video", "audio", "image", "subtitles", "captions", "start_s", "end_s", "split", "weight")
FOLDER_MEDIA = {"video": (".mp4", ".mkv", ".webm", ".mov", ".avi"), "audio": (".wav", ".flac", ".mp3", ".m4a", ".opus"),
                "image": (".jpg", ".jpeg", ".png"), "subtitles": (".srt", ".vtt")}  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class _Unusable:
    """A line or group of files that is no row."""

    detail: str
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All rows in order; `base` is the folder or URL that relative paths start from."""

    rows: tuple[ManifestRow, ...]
    base: str


def read_manifest(location: str) -> Manifest:
    """Read a manifest file (local path or URL) or folder.

    Raises:
        UserError: it cannot be read, has no rows, no `id` column, or a column whose name is nearly a known one.
    """
    if os.path.isdir(location):
        raw, base = _read_folder(Path(location)), location
    else:
        raw, base = _read_file(location), location.rpartition("/")[0] if "/" in location else "."
    if not raw:
        raise UserError(f"manifest {location}: no rows; expected at least one")
    columns = {name for values in raw if isinstance(values, dict) for name in values}
    if "id" not in columns and columns:
        raise UserError(f"manifest {location}: no column 'id'; found {', '.join(sorted(columns))}")
    for name in sorted(columns - set(COLUMNS)):
        close = _nearly(name, columns)
        if close is not None:
            raise UserError(
                f"manifest {location}: column '{name}' is nearly '{close}'; rename it to that, or further away"
            )
    return Manifest(rows=tuple(_unique(_to_row(values, number) for number, values in enumerate(raw, 1))), base=base)


def _nearly(name: str, columns: set[str]) -> str | None:
    """The known column that `name` was probably meant to be."""
    if f"{name}_s" in COLUMNS:
        return f"{name}_s"
    close = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.8)
    short_and_taken = bool(close) and len(name) <= 3 and close[0] in columns  # uid beside id
    return close[0] if close and not short_and_taken else None


def _read_file(location: str) -> list[Any]:
    """One value a row: a dict of columns, or `_Unusable`."""
    kind = location.rpartition(".")[2].lower()
    if kind not in ("parquet", "csv", "jsonl"):
        raise UserError(f"manifest {location}: expected a folder or a file that ends in .parquet, .csv or .jsonl")
    try:
        with fsspec.open(location, "rb") if is_url(location) else open(location, "rb") as stream:
            if kind == "parquet":
                return list(pq.read_table(stream).to_pylist())
            text = stream.read().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"manifest {location}: no such file or folder") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"manifest {location}: not readable as {kind}: {' '.join(str(error).split())}") from error
    if kind == "csv":
        return [_check_csv(row) for row in csv.DictReader(StringIO(text, newline=""))]
    return [_parse_json(line) for line in text.split("\n") if line.strip()]


def _check_csv(row: dict[str | None, Any]) -> Any:
    if None in row:
        return _Unusable(detail=f"{len(row[None])} more values than columns")
    return {name: value for name, value in row.items() if value not in ("", None) or name == "id"}


def _parse_json(line: str) -> Any:
    try:
        values = json.loads(line)
    except ValueError as error:
        return _Unusable(detail=f"not JSON: {error}")
    return values if isinstance(values, dict) else _Unusable(detail="not a JSON object")


def _read_folder(folder: Path) -> list[Any]:
    """A row for every group of files that share a name without its ending: `x.mp4` + `x.txt|json|srt|vtt|wav`."""
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            groups.setdefault(stem, {})[path.suffix.lower()] = path
    return [_folder_row(folder, stem, files) for stem, files in groups.items() if not _is_foreign(files)]


def _is_foreign(files: dict[str, Path]) -> bool:
    """Whether none of the files is a medium: a README.txt is no row."""
    media = {ending for column in ("video", "audio", "image") for ending in FOLDER_MEDIA[column]}
    return not media & set(files)


def _folder_row(folder: Path, stem: str, files: dict[str, Path]) -> Any:
    values: dict[str, Any] = {"id": stem}
    for column, endings in FOLDER_MEDIA.items():
        found = [files[ending].relative_to(folder).as_posix() for ending in endings if ending in files]
        if len(found) > 1:
            return _Unusable(id=stem, detail=f"several files for {column}: {', '.join(found)}")
        if found:
            values[column] = found[0]
    try:
        if ".json" in files:
            more = json.loads(files[".json"].read_text(encoding="utf-8"))
            if not isinstance(more, dict):
                return _Unusable(id=stem, detail=f"{stem}.json is not a JSON object")
            values = more | values
        if ".txt" in files:
            lines = files[".txt"].read_text(encoding="utf-8").splitlines()
            values["captions"] = [*_as_list(values.get("captions")), *lines]
    except ValueError as error:  # also bytes that are not UTF-8
        return _Unusable(id=stem, detail=f"{stem}: {error}")
    return values


def _unique(rows: Iterator[ManifestRow]) -> Iterator[ManifestRow]:
    """The rows with unique ids: the second and later uses of an id become rejects with ids of their own."""
    first_use: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row.id in first_use:
            problem = (Reason.DUPLICATE_ID.value, f"row {number}: id '{row.id}' is that of row {first_use[row.id]}")
            row = ManifestRow(id=f"{row.id} (row {number})", split=row.split, problem=problem)
        first_use[row.id] = number
        yield row


def _to_row(values: Any, number: int) -> ManifestRow:
    if isinstance(values, _Unusable):
        problem = (Reason.BAD_ROW.value, f"row {number}: {values.detail}")
        return ManifestRow(id=values.id or f"(row {number})", problem=problem)
    known = {name: values.get(name) for name in COLUMNS if not _is_missing(values.get(name))}
    split = str(known.get("split", "train"))
    if "id" not in known or not str(known["id"]).strip():
        return ManifestRow(
            id=f"(row {number})", split=split, problem=(Reason.MISSING_ID.value, f"row {number} has no id")
        )
    row_id = str(known["id"])
    try:
        return ManifestRow(
            id=row_id,
            split=split,
            video=_path(known, "video"),
            audio=_path(known, "audio"),
            image=_path(known, "image"),
            subtitles=_path(known, "subtitles"),
            captions=_captions(known.get("captions")),
            start_s=_number(known, "start_s"),
            end_s=_number(known, "end_s"),
            weight=_weight(known),
            metadata={name: _plain(value) for name, value in values.items() if name not in COLUMNS},
        )
    except Rejected as rejected:
        return ManifestRow(id=row_id, split=split, problem=(rejected.reason.value, f"row {number}: {rejected.detail}"))


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _path(known: dict[str, Any], name: str) -> str | None:
    value = known.get(name)
    if value is not None and not isinstance(value, str):
        raise Rejected(Reason.BAD_ROW, f"{name}: expected a path, found {value!r}")
    return value


def _number(known: dict[str, Any], name: str) -> float | None:
    if name not in known:
        return None
    try:
        value = float(known[name])
    except (TypeError, ValueError) as error:
        raise Rejected(Reason.BAD_ROW, f"{name}: expected a number, found {known[name]!r}") from error
    if not math.isfinite(value):
        raise Rejected(Reason.BAD_ROW, f"{name}: expected a finite number, found {value}")
    return value


def _weight(known: dict[str, Any]) -> float:
    weight = _number(known, "weight")
    if weight is not None and weight < 0:
        raise Rejected(Reason.BAD_ROW, f"weight: expected at least 0, found {weight}")
    return 1.0 if weight is None else weight


def _captions(value: Any) -> tuple[Caption, ...]:
    captions = [_caption(item) for item in _as_list(value)]
    return tuple(caption for caption in captions if caption.text)


def _as_list(value: Any) -> list[Any]:
    """A caption cell as a list: one text, a list, or a list as JSON text (CSV has no other way)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            return [value]  # a text that begins with a bracket
        return parsed if isinstance(parsed, list) else [value]
    return value if isinstance(value, list) else [] if value is None else [value]


def _caption(value: Any) -> Caption:
    text, source = (value.get("text"), value.get("source")) if isinstance(value, dict) else (value, None)
    if not isinstance(text, str) or not isinstance(source, str | None):
        raise Rejected(Reason.BAD_ROW, f"captions: expected text or {{text, source}}, found {value!r}")
    return Caption(text=text.strip(), source=source)


def _plain(value: Any) -> Any:
    """A metadata value as JSON knows it: NaN becomes null, dates and bytes become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
