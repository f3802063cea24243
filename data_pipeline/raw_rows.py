"""What stands in a manifest file or folder, row by row, before it is asked whether a row makes sense."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.location import is_url
from data_pipeline.settings import UserError

FOLDER_MEDIA = {
    "video": (".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv"),
    "audio": (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus"),
    "image": (".jpg", ".jpeg", ".png"),
    "subtitles": (".srt", ".vtt"),
}
MEDIA_ENDINGS = {ending for column in ("video", "audio", "image") for ending in FOLDER_MEDIA[column]}


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A line or group of files that is no row."""

    detail: str
    id: str | None = None


def read_rows(location: str) -> list[Any]:
    """One value a row of a manifest file (local path or URL) or folder: a dict of columns, or `Unusable`.

    Raises:
        UserError: it is not there, cannot be read, or has no rows.
    """
    if os.path.isdir(location):
        rows = _read_folder(Path(location))
        if not rows:
            endings = ", ".join(sorted(MEDIA_ENDINGS))
            raise UserError(f"manifest {location}: no rows; expected media in this folder: files that end in {endings}")
        return rows
    rows = _read_file(location)
    if not rows:
        raise UserError(f"manifest {location}: no rows; expected at least one")
    return rows


def _read_file(location: str) -> list[Any]:
    if not is_url(location) and not os.path.exists(location):
        raise UserError(f"manifest {location}: no such file or folder{_nearest_beside(Path(location))}")
    kind = location.rpartition(".")[2].lower()
    if kind not in ("parquet", "csv", "jsonl"):
        raise UserError(f"manifest {location}: expected a folder or a file that ends in .parquet, .csv or .jsonl")
    try:
        with fsspec.open(location, "rb") if is_url(location) else open(location, "rb") as stream:
            if kind == "parquet":
                return list(pq.read_table(stream).to_pylist())
            text = stream.read().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"manifest {location}: no such file") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"manifest {location}: not readable as {kind}: {' '.join(str(error).split())}") from error
    if kind == "csv":
        table = csv.DictReader(StringIO(text, newline=""))
        _check_separator(location, table.fieldnames or [])
        return [_check_csv(row) for row in table]
    return [_parse_json(line) for line in text.split("\n") if line.strip()]


def _nearest_beside(path: Path) -> str:
    """A clause that names the closest thing that does exist."""
    parent = path.parent
    if not parent.is_dir():
        return f"; there is no folder {parent} either"
    close = difflib.get_close_matches(path.name, os.listdir(parent), n=1, cutoff=0.6)
    return f"; did you mean '{parent / close[0]}'?" if close else ""


def _check_separator(location: str, columns: Sequence[str]) -> None:
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and separator in columns[0]:
            raise UserError(
                f"manifest {location}: one column, {columns[0]!r}; expected columns separated by commas, found {name}"
            )


def _check_csv(row: dict[str | None, Any]) -> Any:
    if None in row:
        return Unusable(detail=f"{len(row[None])} more values than columns")
    return {name: value for name, value in row.items() if value not in ("", None) or name == "id"}


def _parse_json(line: str) -> Any:
    try:
        values = json.loads(line)
    except ValueError as error:
        return Unusable(detail=f"not JSON: {error}")
    return values if isinstance(values, dict) else Unusable(detail="not a JSON object")


def _read_folder(folder: Path) -> list[Any]:
    """A row for every group of files that share a name without its ending: `x.mp4` + `x.txt|json|srt|vtt|wav`."""
    groups = _groups(folder)
    return [_folder_row(folder, stem, files) for stem, files in groups.items() if not _is_foreign(files)]


def foreign_files(folder: Path) -> list[str]:
    """Files of a folder that belong to no row: captions whose video is not there, endings that nobody knows."""
    foreign = [path for files in _groups(folder).values() if _is_foreign(files) for path in files.values()]
    return [path.relative_to(folder).as_posix() for path in foreign]


def _groups(folder: Path) -> dict[str, dict[str, Path]]:
    """Files by their name without its ending, then by their ending."""
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            groups.setdefault(stem, {})[path.suffix.lower()] = path
    return groups


def _is_foreign(files: dict[str, Path]) -> bool:
    """Whether none of the files is a medium: a README.txt is no row."""
    return not MEDIA_ENDINGS & set(files)


def _folder_row(folder: Path, stem: str, files: dict[str, Path]) -> Any:
    values: dict[str, Any] = {"id": stem}
    for column, endings in FOLDER_MEDIA.items():
        found = [files[ending].relative_to(folder).as_posix() for ending in endings if ending in files]
        if len(found) > 1:
            return Unusable(id=stem, detail=f"several files for {column}: {', '.join(found)}")
        if found:
            values[column] = found[0]
    try:
        if ".json" in files:
            more = json.loads(files[".json"].read_text(encoding="utf-8"))
            if not isinstance(more, dict):
                return Unusable(id=stem, detail=f"{stem}.json is not a JSON object")
            values = more | values
        if ".txt" in files:
            lines = files[".txt"].read_text(encoding="utf-8").splitlines()
            values["captions"] = [*as_list(values.get("captions")), *lines]
    except ValueError as error:  # also bytes that are not UTF-8
        return Unusable(id=stem, detail=f"{stem}: {error}")
    return values


def as_list(value: Any) -> list[Any]:
    """A caption cell as a list: one text, a list, or a list as JSON text (CSV has no other way)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            return [value]  # a text that begins with a bracket
        return parsed if isinstance(parsed, list) else [value]
    return value if isinstance(value, list) else [] if value is None else [value]
