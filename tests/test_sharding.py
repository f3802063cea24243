"""`parallelotope shard` as a person runs it: killed, run again, grown, failing.

Seven runs start a Ray each, which takes about six seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.media import write_clip

NUM_ROWS = 36
SETTINGS = """
manifest: {corpus}/manifest.jsonl
out_dir: unset
rows_per_task: 4
clip: {{mode: fixed, length_s: 4.0}}
video: {{preset: veryfast, crf: 12, short_side_px: 200}}
ray: {{num_cpus: 1}}
"""


def row(number: int) -> dict[str, object]:
    video = {3: "gone.mp4", 8: "page.mp4", 13: "cut.mp4"}.get(number, "v.mp4")
    return {"id": f"r{number % 30}" if number == 31 else f"r{number}", "video": video, "captions": f"caption {number}",
            "split": "test" if number % 6 == 0 else "train"}  # fmt: skip


def write_manifest(corpus: Path, num_rows: int) -> None:
    lines = [json.dumps(row(number)) for number in range(num_rows)]
    (corpus / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of real videos, some broken, one id used twice, and `shard.yaml`."""
    corpus = tmp_path_factory.mktemp("corpus with 'odd' name")
    whole = write_clip(corpus / "v.mp4", duration_s=8.0, width=320, height=240).read_bytes()
    (corpus / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (corpus / "page.mp4").write_text("<!DOCTYPE html>")
    write_manifest(corpus, NUM_ROWS)
    (corpus / "shard.yaml").write_text(SETTINGS.format(corpus=json.dumps(str(corpus))[1:-1]), encoding="utf-8")
    return corpus


def command(corpus: Path, out: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pretrain.main", "shard", str(corpus / "shard.yaml"), f"out_dir='{out}'", *overrides]


def shard(
    corpus: Path, out: Path, *overrides: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(corpus, out, *overrides), capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | (environment or {}),
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a run leaves, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def records(folder: Path) -> list[Path]:
    return sorted((folder / "tasks").glob("task-*.json"))


def wait_for_records(folder: Path, number: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 120
    while len(records(folder)) < number:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def workers_of(session: int) -> list[int]:
    """Process ids of the Ray workers of a session that are at work on a task."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if path.read_bytes().startswith(b"ray::_run") and os.getsid(int(path.parent.name)) == session:
                found.append(int(path.parent.name))
    return found


def wait_for_worker(session: int) -> int:
    """Process id of a worker at work; between two tasks there is none for a moment."""
    deadline_s = time.monotonic() + 60
    while not (found := workers_of(session)):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return found[0]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as two workers write it in one go."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    run = shard(corpus, out, "ray.num_cpus=2")
    assert run.returncode == 0, run.stderr
    assert "36/36 rows" in run.stdout
    assert "missing_file 1, not_media 1" in run.stdout
    assert "36 rows in" in run.stdout
    assert "done: 64 clips in 10 shards" in run.stdout
    assert "of 64 clips have video 64, audio 64, captions 64, subtitles 0" in run.stdout
    assert f"every reject with its reason: {out}/rejects.parquet" in run.stdout
    assert run.stderr == ""
    return out


def test_every_row_and_clip_has_one_outcome(uninterrupted: Path) -> None:
    outcomes: Counter[tuple[str, int | None]] = Counter()
    for path in records(uninterrupted):
        record = json.loads(path.read_text())
        outcomes.update((o["row_id"], o["clip_index"]) for o in (*record["samples"], *record["rejects"]))
    expected: dict[tuple[str, int | None], int] = {}
    for number in range(NUM_ROWS):
        row_id = "r1 (row 32)" if number == 31 else f"r{number}"
        clips = (None,) if number in (3, 8, 13, 31) else (0, 1)
        expected |= {(row_id, clip): 1 for clip in clips}
    assert outcomes == expected
    rejects = {row["row_id"]: row["reason"] for row in pq.read_table(uninterrupted / "rejects.parquet").to_pylist()}
    assert rejects == {"r3": "missing_file", "r8": "not_media", "r13": "truncated", "r1 (row 32)": "duplicate_id"}
    verify = [sys.executable, "-m", "pretrain.main", "verify", str(uninterrupted)]
    verified = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    assert " ".join(verified.stdout.split()).endswith("problems 0")


@pytest.mark.slow
def test_killed_runs_and_killed_workers_change_no_byte(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(command(corpus, out), stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for_records(out, 2, process)
        os.killpg(process.pid, signal.SIGKILL)
    assert len(records(out)) < len(records(uninterrupted))
    assert not (out / "dataset.json").exists()
    done = len(records(out))

    with subprocess.Popen(
        command(corpus, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for_records(out, done + 1, process)
        os.kill(wait_for_worker(process.pid), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    found = re.search(r"10 tasks, (\d+) done", stdout)
    assert found is not None, stdout
    assert done <= int(found.group(1)) < 10  # a worker of the killed run may have ended its task before it noticed
    assert contents(out) == contents(uninterrupted)
    assert not list(out.rglob("*.partial"))


def test_a_second_run_does_nothing(corpus: Path, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name != ".lock"}
    run = shard(corpus, uninterrupted)
    assert run.returncode == 0, run.stderr
    assert "nothing to do: 64 clips" in run.stdout
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name != ".lock"} == before


def test_another_run_in_the_same_folder_is_refused(corpus: Path, uninterrupted: Path) -> None:
    import fcntl

    with open(uninterrupted / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = shard(corpus, uninterrupted)
    assert run.returncode == 2
    assert "another 'parallelotope shard' is writing there" in run.stderr


@pytest.mark.slow
def test_a_failing_task_is_named_and_growth_moves_nothing(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out, grown = tmp_path / "out", tmp_path / "grown"
    shutil.copytree(uninterrupted, out)
    shutil.copytree(corpus, grown)
    write_manifest(grown, NUM_ROWS + 3)
    before = contents(out)
    blocked = out / "shard-000010.tar"  # where the first new task wants to write: its split is test
    blocked.mkdir()
    manifest = f"manifest='{grown}/manifest.jsonl'"

    run = shard(corpus, out, manifest, "ray.max_attempts=2")
    assert run.returncode == 1
    assert "task-000010 failed: IsADirectoryError" in run.stderr
    assert "(2 attempts)" in run.stderr
    assert "1 of 12 tasks failed" in run.stderr
    after = contents(out)
    assert {name: after[name] for name in before} == before  # also the finished dataset.json
    assert "tasks/task-000011.json" in after  # the other task is kept

    blocked.rmdir()
    run = shard(corpus, out, manifest)
    assert run.returncode == 0, run.stderr
    assert "12 tasks, 11 done" in run.stdout
    final = contents(out)
    changed = {name for name in before if final[name] != before[name]}
    assert changed == {"dataset.json"}
    assert {name: final[name] for name in after if "000011" in name} == {n: after[n] for n in after if "000011" in n}
    assert json.loads(final["dataset.json"])["num_samples"] == 64 + 6


def test_odd_names_silent_videos_no_ffmpeg_and_taken_ports(corpus: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    names = [
        "with space",
        "quote'and\"another",
        "ünïcödé 視頻",
        "100%41#1?x=[1]&*",
        "dots.in.name",
        "-dash",
        "a\\b;$HOME",
    ]
    for number, name in enumerate(names):
        write_clip(media / f"{name}.mp4", duration_s=1.0, width=64, height=48, sound=number > 0)
        (media / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    out = tmp_path / "out"
    with ExitStack() as stack:
        for port in (6379, 8265, 10001):  # which Ray takes when it is not told otherwise
            taken = stack.enter_context(socket.socket())
            with suppress(OSError):  # somebody else's: as good
                taken.bind(("127.0.0.1", port))
                taken.listen()
        run = shard(corpus, out, f"manifest='{media}'", environment={"PATH": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert "7 rows in" in run.stdout
    assert "2 tasks, 0 done" in run.stdout
    assert "done: 7 clips in 2 shards" in run.stdout
    assert "rejects: none" in run.stdout
    assert "of 7 clips have video 7, audio 6, captions 7, subtitles 0" in run.stdout
    rows = [row for path in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {row["row_id"]: row["captions"][0]["text"] for row in rows} == {name: f"caption of {name}" for name in names}


def test_no_usable_clip_is_said_at_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,video\na,gone.mp4\n")
    out = tmp_path / "out"
    for _ in range(2):
        run = shard(corpus, out, f"manifest='{tmp_path}/m.csv'")
        assert run.returncode == 2
        assert "1 row in" in run.stdout
        assert "1 task, " in run.stdout
        assert run.stderr == (
            f"error: manifest {tmp_path}/m.csv: no clip can be used: missing_file 1; the first: row 'a', gone.mp4: "
            f"no such file; correct them and remove {out}, where rejects.parquet has the others\n"
        )
        assert pq.read_table(out / "rejects.parquet").num_rows == 1


def test_mistakes_are_one_line(corpus: Path, tmp_path: Path, uninterrupted: Path) -> None:
    for out, override, words in (
        (tmp_path / "out", "video.crff=3", "video.crff: unknown key; did you mean 'crf'?"),
        (tmp_path / "out", "manifest=nowhere.jsonl", "manifest nowhere.jsonl: no such file or folder"),
        (tmp_path / "out", "ray.address='127.0.0.1:9'", "ray.address 127.0.0.1:9: no Ray cluster can be reached there"),
        (uninterrupted, "video.crf=30", "was sharded with video.crf 12, the configuration says 30"),
    ):
        run = shard(corpus, out, override)
        assert run.returncode == 2
        assert words in run.stderr
        assert len(run.stderr.splitlines()) == 1
