"""Ours against webdataset, mosaicml-streaming and litdata: speed, start, resume, and what is read twice or never.

    python -m benchmarks.loading            # writes benchmarks/loading.md
    python -m benchmarks.loading --num-samples 130 --repeats 1 --out /tmp/loading.md     # a quick look

Every round of a loader is a process of its own; rounds are interleaved over the loaders.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.loading_page import Results, write_page
from benchmarks.loading_trial import CONTENDERS, FROM_STOP

STEPS = (10, 1_000, 100_000)
REPLAYED_STEPS = (10, 1_000)  # by loaders without state; the rest is extrapolated
REPLAYING = "webdataset"  # has no state
RESAMPLED = "webdataset, resampled"
TIMEOUT_S = 300
Task = dict[str, Any]
Answer = dict[str, Any]


class Bench:
    """Runs trials on one corpus."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._folder = folder
        self._arguments = arguments

    def trial(self, name: str, tasks: list[Task], world: int = 1) -> list[list[Answer]]:
        """For each task the answers of all ranks; one that failed or hung has the key `error`."""
        with tempfile.TemporaryDirectory(dir=self._folder) as answers:
            outs = [Path(answers) / f"{rank}.json" for rank in range(world)]
            port = free_port()
            processes = [self._start(name, tasks, rank, world, port, out) for rank, out in enumerate(outs)]
            error = "the process failed"
            for process in processes:
                try:
                    process.wait(TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    error = f"hung for {TIMEOUT_S} s"
            for process in processes:
                process.kill()
                process.wait()
            found = [json.loads(out.read_text(encoding="utf-8")) if out.is_file() else [] for out in outs]
        missing = {"error": error}
        return [[rank[number] if number < len(rank) else missing for rank in found] for number in range(len(tasks))]

    def _start(
        self, name: str, tasks: list[Task], rank: int, world: int, port: int, out: Path
    ) -> subprocess.Popen[bytes]:
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOBAL_RANK": str(rank)}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        setting = {
            "folder": str(self._folder / (REPLAYING if name == RESAMPLED else name)),
            "num_samples": self._arguments.num_samples,
            "global_batch": self._arguments.global_batch,
            "num_workers": self._arguments.num_workers,
            "rank": rank,
            "world": world,
        }
        request = {"contender": name, "tasks": tasks, "setting": setting, "out": str(out)}
        command = [sys.executable, "-m", "benchmarks.loading_trial"]
        with open(self._folder / "trials.log", "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        return process

    def round(self, name: str) -> tuple[Answer, Answer, dict[int, float]]:
        """Speed raw and decoded, and seconds to resume by step; what is not replayed is on a line through two steps."""
        steps = REPLAYED_STEPS if name == REPLAYING else STEPS
        batches = self._arguments.num_batches
        tasks: list[Task] = [
            {"name": "speed", "num_batches": batches, "mode": "raw"},
            {"name": "speed", "num_batches": max(1, batches // 4), "mode": "decoded"},
            {"name": "resume", "steps": steps},
        ]
        raw, decoded, seconds = (answers[0] for answers in self.trial(name, tasks))
        for answer in (raw, decoded, seconds):
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']}")
        found = {int(step): value for step, value in seconds.items()}
        if name == REPLAYING:
            low, high = REPLAYED_STEPS
            found[STEPS[-1]] = found[high] + (found[high] - found[low]) / (high - low) * (STEPS[-1] - high)
        return raw, decoded, found

    def epochs(self, name: str) -> dict[tuple[int, int | None], str]:
        """What came twice or never in an epoch without a stop, and with one, by ranks before and after it."""
        stop_after = self._arguments.num_samples // self._arguments.global_batch // 2
        whole: Task = {"name": "epoch", "state": None, "stop_after": None}
        stop: Task = {"name": "epoch", "state": None, "stop_after": stop_after}
        rest: Task = {"name": "epoch", "state": FROM_STOP, "stop_after": None}
        one = self.trial(name, [whole, stop, rest])
        two = self.trial(name, [whole, stop, rest, {**rest, "state": one[1][0].get("state")}], world=2)
        after = self.trial(name, [{**rest, "state": two[1][0].get("state")}])
        num_samples = self._arguments.num_samples
        return {
            (1, None): losses([one[0]], None, num_samples),
            (2, None): losses([two[0]], None, num_samples),
            (1, 1): losses([one[1], one[2]], one[0], num_samples),
            (2, 2): losses([two[1], two[2]], two[0], num_samples),
            (2, 1): losses([two[1], after[0]], two[0], num_samples),
            (1, 2): losses([one[1], two[3]], one[0], num_samples),
        }


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return int(reserved.getsockname()[1])


def global_batches(ranks: list[Answer]) -> list[list[str]]:
    """The keys of each step over all ranks, sorted: loaders may give a batch's rows to other ranks."""
    steps = max(len(rank["keys"]) for rank in ranks)
    found = [
        sorted(key for rank in ranks for keys in rank["keys"][step : step + 1] for key in keys) for step in range(steps)
    ]
    return [keys for keys in found if keys]


def losses(parts: list[list[Answer]], uninterrupted: list[Answer] | None, num_samples: int) -> str:
    """How many samples of an epoch came again, how many never, and whether the batches are those without a stop."""
    for answer in itertools.chain(*parts, uninterrupted or []):
        if "error" in answer:
            return f"error: {answer['error']}"
    batches = [keys for part in parts for keys in global_batches(part)]
    counts = Counter(key for keys in batches for key in keys)
    text = f"{sum(counts.values()) - len(counts)} / {num_samples - len(counts)}"
    if uninterrupted is None:
        return text
    return f"{text}, {'same' if batches == global_batches(uninterrupted) else 'other'} batches"


def check_tensors(found: dict[str, Answer]) -> None:
    """All loaders must decode a sample to the same tensors, or their speeds say nothing.

    Raises:
        RuntimeError: they do not; or too few samples were seen by several loaders.
    """
    first: Answer = {}
    num_compared = 0
    for name, samples in found.items():
        for key, sums in samples.items():
            num_compared += key in first
            if first.setdefault(key, sums) != sums:
                raise RuntimeError(f"{name} decodes {key} differently: {sums}, others {first[key]}")
    if not num_compared:
        raise RuntimeError(f"nothing to compare among {found.keys()}")


def measure(bench: Bench, arguments: argparse.Namespace, progress: Progress) -> Results:
    """All trials."""
    names = [name for name in CONTENDERS if name != RESAMPLED]
    results = Results(
        facts={},
        starts_s=defaultdict(list),
        rates=defaultdict(list),
        cpus_ms=defaultdict(list),
        resumes_s=defaultdict(list),
    )
    bar = progress.add_task("writing", total=len(names) * (1 + arguments.repeats) + len(CONTENDERS))
    tensors = {}
    for name in names:
        num_batches = arguments.num_samples // arguments.global_batch // 4
        tasks: list[Task] = [
            {"name": "write"},
            {"name": "first_tensors", "num_batches": num_batches, "mode": "decoded"},
        ]
        (results.facts[name],), (tensors[name],) = bench.trial(name, tasks)
        progress.advance(bar)
    check_tensors(tensors)
    for repeat in range(arguments.repeats):
        start = repeat % len(names)
        for name in names[start:] + names[:start]:
            progress.update(bar, description=f"{name}, round {repeat + 1}")
            raw, decoded, seconds = bench.round(name)
            for mode, answer in (("raw", raw), ("decoded", decoded)):
                results.starts_s[name, mode].append(answer["start_s"])
                results.rates[name, mode].append(answer["samples_per_s"])
                results.cpus_ms[name, mode].append(answer["cpu_ms"])
            for step, value in seconds.items():
                results.resumes_s[name, step].append(value)
            progress.advance(bar)
    for name in CONTENDERS:
        progress.update(bar, description=f"{name}, stops")
        results.epochs |= {(name, *ranks): text for ranks, text in bench.epochs(name).items()}
        progress.advance(bar)
    return results


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1801,
        help="more than a timed round reads; a number that no batch divides, as in life",
    )
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--num-workers", type=int, default=2, help="processes a rank")
    parser.add_argument(
        "--num-batches", type=int, default=200, help="raw, of a measurement of speed; decoded a quarter"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("loading.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        results = measure(Bench(Path(folder), arguments), arguments, progress)
    write_page(results, arguments, arguments.out)


if __name__ == "__main__":
    main()
