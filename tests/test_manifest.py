"""Manifests: four forms give the same rows, mistakes are named, unusable rows are kept with their reason."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.filters import Reason
from data_pipeline.manifest import read_manifest
from data_pipeline.manifest_row import Caption, ManifestRow
from data_pipeline.settings import UserError

ROWS = [
    {
        "id": "a",
        "video": "a.mp4",
        "captions": ["one", "two"],
        "start_s": 1.5,
        "end_s": 3.0,
        "split": "test",
        "views": 7,
    },
    {"id": "b", "audio": "b.wav", "captions": ["[three] in brackets"], "weight": 0.5, "views": 8},
]


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_jsonl_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "m.jsonl", ROWS)
    columns = {name: [row.get(name) for row in ROWS] for name in {**ROWS[0], **ROWS[1]}}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    (tmp_path / "m.csv").write_text(
        "id,video,audio,captions,start_s,end_s,split,weight,views\n"
        'a,a.mp4,,"[""one"", ""two""]",1.5,3.0,test,,7\n'
        "b,,b.wav,[three] in brackets,,,,0.5,8\n"
    )
    rows = read_manifest(jsonl).rows
    assert rows[0] == ManifestRow(
        id="a", video="a.mp4", captions=(Caption(text="one"), Caption(text="two")), start_s=1.5, end_s=3.0,
        split="test", metadata={"views": 7},
    )  # fmt: skip
    assert (rows[1].split, rows[1].weight, rows[1].captions) == ("train", 0.5, (Caption(text="[three] in brackets"),))
    assert read_manifest(str(tmp_path / "m.parquet")).rows == rows
    csv_rows = read_manifest(str(tmp_path / "m.csv")).rows
    assert [row.to_json() | {"metadata": {}} for row in csv_rows] == [row.to_json() | {"metadata": {}} for row in rows]
    assert csv_rows[0].metadata == {"views": "7"}  # CSV has no types


def test_captions_name_their_source(tmp_path: Path) -> None:
    captions = [{"text": " said ", "source": "asr"}, "plain", ""]
    path = write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "captions": captions}, {"id": "b", "captions": "one text"}])
    rows = read_manifest(path).rows
    assert rows[0].captions == (Caption(text="said", source="asr"), Caption(text="plain"))
    assert rows[1].captions == (Caption(text="one text"),)


def test_a_folder_is_a_manifest(tmp_path: Path) -> None:
    for name in ("x.mp4", "sub/y.mp4", "sub/y.wav", "sub/y.srt", "z.mov", "z.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "x.txt").write_text("first\nsecond\n")
    (tmp_path / "x.json").write_text(json.dumps({"captions": ["zeroth"], "split": "test", "licence": "CC0"}))
    (tmp_path / "README.txt").write_text("no row")
    manifest = read_manifest(str(tmp_path))
    assert manifest.foreign_files == ("README.txt",)  # said, not hidden
    rows = {row.id: row for row in manifest.rows}
    assert set(rows) == {"x", "sub/y", "z"}
    assert [caption.text for caption in rows["x"].captions] == ["zeroth", "first", "second"]
    assert (rows["x"].split, rows["x"].metadata) == ("test", {"licence": "CC0"})
    assert (rows["sub/y"].video, rows["sub/y"].audio, rows["sub/y"].subtitles) == (
        "sub/y.mp4",
        "sub/y.wav",
        "sub/y.srt",
    )
    assert "bad_row" in str(rows["z"].problem)
    assert "z.webm, z.mov" in str(rows["z"].problem)


@pytest.mark.parametrize(
    ("column", "known"), [("captoin", "captions"), ("vidoe", "video"), ("end", "end_s"), ("Splits", "split")]
)
def test_a_nearly_known_column_is_an_error(tmp_path: Path, column: str, known: str) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"id": "a", column: "x"}])
    with pytest.raises(UserError, match=f"'{column}' is nearly '{known}'"):
        read_manifest(path)


def test_other_columns_are_metadata(tmp_path: Path) -> None:
    row = {
        "id": "a",
        "video": "v",
        "uid": 1,
        "video_id": "q",
        "problem": "x",
        "score": float("nan"),
        "tags": ["u", {"v": None}],
    }
    path = write_jsonl(tmp_path / "m.jsonl", [row])
    (read,) = read_manifest(path).rows
    assert read.problem is None
    assert read_manifest(path).metadata_columns == ["problem", "score", "tags", "uid", "video_id"]
    assert read.metadata == {"uid": 1, "video_id": "q", "problem": "x", "score": None, "tags": ["u", {"v": None}]}


def test_unusable_rows_stay_with_a_reason_and_an_id_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"id": "a"}, {"video": "b.mp4"}, {"id": "a", "split": "test"}, "{not json", {"id": "c", "start_s": "soon"},
        {"id": "d", "weight": -1}, {"id": "e", "captions": [3]}, {"id": "f", "video": 5}, {"id": " "}, '["list"]',
    ]  # fmt: skip
    read = read_manifest(write_jsonl(tmp_path / "m.jsonl", rows)).rows
    assert [row.problem and row.problem[0] for row in read] == [
        None, Reason.MISSING_ID, Reason.DUPLICATE_ID, Reason.BAD_ROW, Reason.BAD_ROW,
        Reason.BAD_ROW, Reason.BAD_ROW, Reason.BAD_ROW, Reason.MISSING_ID, Reason.BAD_ROW,
    ]  # fmt: skip
    assert len({row.id for row in read}) == len(read)
    assert read[2].problem == ("duplicate_id", "row 3: id 'a' is that of row 1")
    assert "start_s: expected a number, found 'soon'" in str(read[4].problem)


def test_a_row_survives_its_json_form(tmp_path: Path) -> None:
    for row in read_manifest(write_jsonl(tmp_path / "m.jsonl", [*ROWS, {"id": "a"}])).rows:
        again = ManifestRow.from_json(json.loads(json.dumps(row.to_json())))
        assert again == row
        assert again.digest == row.digest


def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "no_id.csv").write_text("video\na.mp4\n")
    (tmp_path / "caption.csv").write_text("id,video,caption\na,a.mp4,x\n")
    (tmp_path / "foreign.csv").write_text("id,path,text\na,a.mp4,x\n")
    (tmp_path / "semicolons.csv").write_text("id;video\na;a.mp4\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    (tmp_path / "my videos").mkdir()
    (tmp_path / "my videos" / "notes.txt").write_text("no media")
    (tmp_path / "list.txt").write_text("a.mp4")
    for name, words in (
        ("missing.jsonl", "no such file or folder"),
        ("emtpy.jsonl", "no such file or folder; did you mean '.*/empty.jsonl'?"),
        ("my-videos", "no such file or folder; did you mean '.*/my videos'?"),
        ("gone/m.csv", "no such file or folder; there is no folder .*/gone either"),
        ("empty.jsonl", "no rows"),
        ("my videos", "no rows; expected media in this folder: files that end in .aac"),
        ("bad.parquet", "not readable as parquet"),
        ("no_id.csv", "no column 'id'; found video"),
        ("semicolons.csv", "one column, 'id;video'; expected columns separated by commas"),
        ("caption.csv", "column 'caption' is nearly 'captions'"),
        ("foreign.csv", "expected one or more of video, audio, image, subtitles, captions, found id, path, text"),
        ("latin.jsonl", "not readable as jsonl"),
        ("list.txt", "expected a folder or a file that ends in"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_manifest(str(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_named(tmp_path: Path, separator: str, name: str) -> None:
    path = tmp_path / "m.csv"
    rows = (("id", "video", "captions"), ("a", "a.mp4", "a dog, running"))
    path.write_text("\n".join(separator.join(row) for row in rows))
    with pytest.raises(UserError, match=f"one column, .*; expected columns separated by commas, found {name}"):
        read_manifest(str(path))


def test_what_may_not_be_meant_is_remarked(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "captions": '["a dog",', "split": "train"}, {"id": "b", "captions": "['x', 'y']", "split": "Train"},
        {"id": "c", "captions": "[three] in brackets", "split": "val"}, {"id": "d", "captions": '["x", "y"]'},
    ]  # fmt: skip
    lists, splits = read_manifest(write_jsonl(tmp_path / "m.jsonl", rows)).remarks
    assert lists.startswith("2 rows with a caption that begins like a list and is none")
    assert """the first: row 'a': '["a dog",'""" in lists
    assert splits == "splits 'train' (2) and 'Train' (1) differ in case or spaces alone, and are different splits"
    assert read_manifest(write_jsonl(tmp_path / "n.jsonl", rows[2:])).remarks == ()


def test_a_column_nearly_known_is_an_error_with_both_ways_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "vidoe": "a.mp4"}])
    with pytest.raises(UserError, match="'vidoe' is nearly 'video'; rename it to 'video' if you mean that, else to"):
        read_manifest(path)
