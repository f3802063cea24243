"""Ours against webdataset, mosaicml-streaming and litdata: speed, start, resume, and what is read twice or never.

    python -m benchmarks.loading            # writes benchmarks/loading.md
    python -m benchmarks.loading --num-samples 130 --repeats 1 --out /tmp/loading.md     # a quick look

Every measurement is a process of its own; repetitions are interleaved over the loaders.
"""

from __future__ import annotations

import argparse
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
from benchmarks.loading_trial import CONTENDERS

STEPS = (10, 1_000, 100_000)
REPLAYED_STEPS = (10, 1_000)  # by loaders without state; the rest is extrapolated
SCENARIOS = ((1, None), (2, None), (1, 1), (2, 2), (2, 1), (1, 2))  # ranks until the stop, and after it
REPLAYING = "webdataset"  # has no state
RESAMPLED = "webdataset, resampled"
TIMEOUT_S = 300


class Bench:
    """Runs trials on one corpus."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._folder = folder
        self._arguments = arguments

    def setting(self, name: str, mode: str = "raw", world: int = 1) -> dict[str, Any]:
        """A trial's `Setting` as JSON."""
        stored = REPLAYING if name == RESAMPLED else name
        return {
            "folder": str(self._folder / stored),
            "mode": mode,
            "num_samples": self._arguments.num_samples,
            "global_batch": self._arguments.global_batch,
            "num_workers": self._arguments.num_workers,
            "world": world,
        }

    def trial(self, name: str, task: dict[str, Any], setting: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers of all ranks.

        Raises:
            RuntimeError: a rank failed or took too long; its last line.
        """
        world = setting["world"]
        with tempfile.TemporaryDirectory(dir=self._folder) as answers, socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]
            reserved.close()
            outs = [Path(answers) / f"{rank}.json" for rank in range(world)]
            processes = [self._start(name, task, setting, rank, port, outs[rank]) for rank in range(world)]
            try:
                for process in processes:
                    _, errors = process.communicate(timeout=TIMEOUT_S)
                    if process.returncode:
                        raise RuntimeError((errors.strip().splitlines() or ["no message"])[-1])
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"hung for {TIMEOUT_S} s") from error
            finally:
                for process in processes:
                    process.kill()
            return [json.loads(out.read_text(encoding="utf-8")) for out in outs]

    def _start(
        self, name: str, task: dict[str, Any], setting: dict[str, Any], rank: int, port: int, out: Path
    ) -> subprocess.Popen[str]:
        world = str(setting["world"])
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOBAL_RANK": str(rank)}
        environment |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        request = {"contender": name, "task": task, "setting": {**setting, "rank": rank}, "out": str(out)}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.loading_trial"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        process.stdin = None  # communicate would flush it
        return process

    def check_tensors(self, names: list[str]) -> None:
        """All loaders must decode every sample to the same tensors, or their speeds say nothing."""
        task = {"name": "first_tensors", "num_batches": 8}
        found: dict[str, Any] = {}
        for name in names:
            for key, sums in self.trial(name, task, self.setting(name, "decoded"))[0].items():
                if found.setdefault(key, sums) != sums:
                    raise RuntimeError(f"{name} decodes {key} differently: {sums}, others {found[key]}")

    def resume_s(self, name: str) -> dict[str, float]:
        """Seconds by step; what was not measured is a line through two steps."""
        steps = REPLAYED_STEPS if name == REPLAYING else STEPS
        found = self.trial(name, {"name": "resume", "steps": steps}, self.setting(name))[0]
        if name == REPLAYING:
            (low, low_s), (high, high_s) = ((step, found[str(step)]) for step in REPLAYED_STEPS)
            found[str(STEPS[-1])] = high_s + (high_s - low_s) / (high - low) * (STEPS[-1] - high)
        return found

    def seen(self, name: str, before: int, after: int | None) -> list[list[str]]:
        """The keys of each global batch of an epoch, stopped in its middle on `before` ranks, resumed on `after`."""
        stop = None if after is None else self._arguments.num_samples // self._arguments.global_batch // 2
        setting = self.setting(name, world=before)
        ranks = self.trial(name, {"name": "epoch", "state": None, "stop_after": stop}, setting)
        batches = _global_batches(ranks)
        if after is not None:
            task = {"name": "epoch", "state": ranks[0]["state"], "stop_after": None}
            batches += _global_batches(self.trial(name, task, self.setting(name, world=after)))
        return batches


def _global_batches(ranks: list[dict[str, Any]]) -> list[list[str]]:
    steps = max(len(rank["keys"]) for rank in ranks)
    return [[key for rank in ranks for key in (rank["keys"][step : step + 1] or [[]])[0]] for step in range(steps)]


def losses(batches: list[list[str]], num_samples: int) -> dict[str, int]:
    """Samples of an epoch that came again, and those that never came."""
    counts = Counter(key for batch in batches for key in batch)
    return {"twice": sum(counts.values()) - len(counts), "missing": num_samples - len(counts)}


def same_order(found: list[list[str]], wanted: list[list[str]]) -> bool:
    """Whether the global batches hold the same samples, one after the other."""
    return [sorted(batch) for batch in found if batch] == [sorted(batch) for batch in wanted if batch]


def measure(bench: Bench, arguments: argparse.Namespace, progress: Progress) -> Results:
    """All trials."""
    names = [name for name in CONTENDERS if name != RESAMPLED]
    results = Results(facts={}, starts_s=defaultdict(list), rates=defaultdict(list), resumes_s=defaultdict(list))
    total = len(names) * (1 + 3 * arguments.repeats) + len(CONTENDERS) * len(SCENARIOS)
    bar = progress.add_task("writing", total=total)
    for name in names:
        results.facts[name] = bench.trial(name, {"name": "write"}, bench.setting(name))[0]
        progress.advance(bar)
    bench.check_tensors(names)
    task = {"name": "speed", "num_batches": arguments.num_batches}
    for repeat in range(arguments.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            progress.update(bar, description=f"{name}, round {repeat + 1}")
            for mode in ("raw", "decoded"):
                answer = bench.trial(name, task, bench.setting(name, mode))[0]
                results.starts_s[name, mode].append(answer["start_s"])
                results.rates[name, mode].append(answer["samples_per_s"])
                progress.advance(bar)
            for step, seconds in bench.resume_s(name).items():
                results.resumes_s[name, int(step)].append(seconds)
            progress.advance(bar)
    for name in CONTENDERS:
        whole: dict[int, list[list[str]]] = {}
        for before, after in SCENARIOS:
            progress.update(bar, description=f"{name}: {before} -> {after}")
            results.epochs[name, before, after] = _epoch(bench, arguments.num_samples, whole, name, before, after)
            progress.advance(bar)
    return results


def _epoch(
    bench: Bench, num_samples: int, whole: dict[int, list[list[str]]], name: str, before: int, after: int | None
) -> str:
    try:
        batches = bench.seen(name, before, after)
    except RuntimeError as error:
        return f"error: {error}"
    found = losses(batches, num_samples)
    text = f"{found['twice']} / {found['missing']}"
    if after is None:
        whole[before] = batches
        return text
    return text + (", same batches" if before in whole and same_order(batches, whole[before]) else ", other batches")


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=1001, help="a number that no batch divides, as in life")
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=2, help="processes a rank")
    parser.add_argument("--num-batches", type=int, default=150, help="of a measurement of speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("loading.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        results = measure(Bench(Path(folder), arguments), arguments, progress)
    write_page(results, arguments, arguments.out)


if __name__ == "__main__":
    main()
