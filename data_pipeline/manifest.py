"""Rows in: a Parquet, CSV or JSONL file, or a folder of media, becomes a list of typed rows.

A row that cannot be used stays in the list with its `problem`, so that it is counted and rejected like any other; a
manifest that cannot be read is an error of its author.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.filters import Reason, Rejected
from data_pipeline.hold_out import held_out_split
from data_pipeline.manifest_remarks import remarks_on
from data_pipeline.manifest_row import Caption, ManifestRow
from data_pipeline.raw_rows import Unusable, as_list, foreign_files, read_rows
from data_pipeline.settings import UserError

CONTENT = ("video", "audio", "image", "subtitles", "captions")
COLUMNS = ("id", *CONTENT, "start_s", "end_s", "split", "weight")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All rows in order; `base` is the folder or URL that relative paths start from."""

    rows: tuple[ManifestRow, ...]
    base: str
    foreign_files: tuple[str, ...] = ()  # of a folder: those that belong to no row
    remarks: tuple[str, ...] = ()  # a line each: what may not be meant as it is read

    @property
    def metadata_columns(self) -> list[str]:
        """Columns that are not known, and so are carried along."""
        return sorted({name for row in self.rows for name in row.metadata})


def read_manifest(location: str, hold_out: Mapping[str, float] | None = None) -> Manifest:
    """Read a manifest file (local path or URL) or folder; `hold_out` deals out the rows that name no split.

    Raises:
        UserError: it cannot be read, has no rows, no `id` column, no content, or a column that is nearly a known one.
    """
    raw = read_rows(location)
    base = location if os.path.isdir(location) else location.rpartition("/")[0] if "/" in location else "."
    columns = {name for values in raw if isinstance(values, dict) for name in values}
    if "id" not in columns and columns:
        raise UserError(f"manifest {location}: no column 'id'; found {', '.join(sorted(columns))}")
    for name in sorted(columns - set(COLUMNS)):
        close = _nearly(name, columns)
        if close is not None:
            raise UserError(
                f"manifest {location}: column '{name}' is nearly '{close}'; rename it to '{close}' if you mean that, "
                "else to something less like it"
            )
    if columns and not columns & set(CONTENT):
        raise UserError(
            f"manifest {location}: no column that says what a row holds; expected one or more of {', '.join(CONTENT)}, "
            f"found {', '.join(sorted(columns))}"
        )
    rows = (_to_row(values, number, hold_out or {}) for number, values in enumerate(raw, 1))
    foreign = tuple(foreign_files(Path(location))) if os.path.isdir(location) else ()
    unique = tuple(_unique(rows))
    return Manifest(rows=unique, base=base, foreign_files=foreign, remarks=tuple(remarks_on(unique)))


def _nearly(name: str, columns: set[str]) -> str | None:
    """The known column that `name` was probably meant to be."""
    if f"{name}_s" in COLUMNS:
        return f"{name}_s"
    close = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.8)
    short_and_taken = bool(close) and len(name) <= 3 and close[0] in columns  # uid beside id
    return close[0] if close and not short_and_taken else None


def _unique(rows: Iterator[ManifestRow]) -> Iterator[ManifestRow]:
    """The rows with unique ids: the second and later uses of an id become rejects with ids of their own."""
    first_use: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row.id in first_use:
            problem = (Reason.DUPLICATE_ID.value, f"row {number}: id '{row.id}' is that of row {first_use[row.id]}")
            row = ManifestRow(id=f"{row.id} (row {number})", split=row.split, problem=problem)
        first_use[row.id] = number
        yield row


def _to_row(values: Any, number: int, hold_out: Mapping[str, float]) -> ManifestRow:
    if isinstance(values, Unusable):
        problem = (Reason.BAD_ROW.value, f"row {number}: {values.detail}")
        return ManifestRow(id=values.id or f"(row {number})", problem=problem)
    known = {name: values.get(name) for name in COLUMNS if not _is_missing(values.get(name))}
    split = str(known["split"] if "split" in known else held_out_split(str(known.get("id", "")), hold_out))
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
    captions = [_caption(item) for item in as_list(value)]
    return tuple(caption for caption in captions if caption.text)


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
