"""The page and the tables of the comparison of loaders."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine

OURS = "parallelotope"
NOT_MEASURED = 100_000  # where a loader without state is extrapolated to
Rows = list[list[str]]


@dataclass(kw_only=True)
class Results:
    """What was measured.

    facts: by loader. starts_s, rates, cpus_ms: by loader and mode: seconds to the first batch, samples/s, processor
    milliseconds a sample. resumes_s: by loader and step. epochs: by loader and ranks before and after a stop: what was
    read twice and never.
    """

    facts: dict[str, dict[str, Any]]
    starts_s: defaultdict[tuple[str, str], list[float]]
    rates: defaultdict[tuple[str, str], list[float]]
    cpus_ms: defaultdict[tuple[str, str], list[float]]
    resumes_s: defaultdict[tuple[str, int], list[float]]
    epochs: dict[tuple[str, int, int | None], str] = field(default_factory=dict)


def ratio(results: Results, name: str, mode: str) -> str:
    """Median and range of the ratio of rates in the same round, ours over another's."""
    pairs = zip(results.rates[OURS, mode], results.rates[name, mode], strict=True)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def speed_rows(results: Results) -> Rows:
    """Loader, then for raw and decoded: samples/s, ours over it, processor time, seconds to the first batch."""
    rows = []
    for name in results.facts:
        row = [f"{name} {results.facts[name]['version']}"]
        for mode in ("raw", "decoded"):
            row += [f"{statistics.median(results.rates[name, mode]):.0f}"]
            row += ["" if name == OURS else ratio(results, name, mode)]
            row += [f"{statistics.median(results.cpus_ms[name, mode]):.2f}"]
            row += [f"{statistics.median(results.starts_s[name, mode]):.2f}"]
        rows.append(row)
    return rows


def resume_rows(results: Results) -> Rows:
    """Loader, what it offers, seconds by step."""
    rows = []
    steps = sorted({step for _, step in results.resumes_s})
    for name, facts in results.facts.items():
        replays = facts["resume"].startswith("no state")
        seconds = [
            f"{'~ ' if replays and step == NOT_MEASURED else ''}{statistics.median(results.resumes_s[name, step]):.2f}"
            for step in steps
        ]
        rows.append([name, facts["resume"], *seconds])
    return rows


def epoch_rows(results: Results) -> tuple[list[str], Rows]:
    """Columns, and for each loader what came twice and never in an epoch."""
    scenarios = sorted({key[1:] for key in results.epochs}, key=lambda pair: (pair[1] is not None, pair))
    titles = [f"{a} rank{'s' * (a > 1)}, no stop" if b is None else f"{a} -> {b}" for a, b in scenarios]
    names = list(dict.fromkeys(key[0] for key in results.epochs))
    return ["loader", *titles], [[name, *(results.epochs[name, *pair] for pair in scenarios)] for name in names]


def write_page(results: Results, arguments: argparse.Namespace, out: Path) -> None:
    """Print the tables and write them to `out`."""
    sample_bytes = next(iter(results.facts.values()))["sample_bytes"]
    speed_titles = ["loader"]
    for mode in ("raw", "decoded"):
        speed_titles += [f"{mode} samples/s", "ours / it", "processor ms", "start s"]
    epoch_titles, epochs = epoch_rows(results)
    resume_titles = ["loader", "offers", "step 10", "step 1,000", "step 100,000"]
    parts = [
        "# Loaders on the same samples",
        describe_machine(),
        f"`python -m benchmarks.loading`: {arguments.num_samples} clips of {sample_bytes / 1000:.0f} kB (h264, FLAC, "
        f"JSON) on a local disk, in the page cache; global batch {arguments.global_batch}, {arguments.num_workers} "
        f"worker processes a rank, 2 batches ahead each; medians of {arguments.repeats} interleaved rounds, "
        f"each a fresh process, over {arguments.num_batches} raw and {arguments.num_batches // 4} decoded batches. "
        "Imports are not counted.",
        "\n".join(f"- **{name}** {facts['version']}: {facts['how']}" for name, facts in results.facts.items()),
        "## Speed",
        "Raw: the bytes of all members, one tensor a batch. Decoded: four frames, 1.5 s of sound and tokens, by the "
        "same functions for all; the tensors were compared and are equal. Ratios are of the same round: "
        "median (range). Processor: milliseconds a sample of the process and its workers, start included; other work "
        "on the machine disturbs it least. Start: construction to first batch.",
        _markdown(speed_titles, speed_rows(results)),
        "## Resume",
        "Seconds from the construction of a loader at the state of a step to its first batch, raw. A state is epoch "
        "and samples seen, and was moved to the step without reading up to it. `~`: extrapolated on a line "
        "through the two steps before it; whoever seeds each epoch and counts epochs replays at most one epoch.",
        _markdown(resume_titles, resume_rows(results)),
        "## Samples of an epoch that came twice / never",
        f"Stopped in the middle of the first epoch ({arguments.num_samples} samples, which neither batch nor ranks "
        "divide) on the ranks before the arrow, resumed on those behind it, at the same global batch; counted by "
        "key. Same batches: the global batches hold the samples that they hold without a stop.",
        _markdown(epoch_titles, epochs),
    ]
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    console = Console()
    for title, titles, rows in (
        ("speed", speed_titles, speed_rows(results)),
        ("resume, s", resume_titles, resume_rows(results)),
        ("twice / never", epoch_titles, epochs),
    ):
        table = Table(*titles, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"written: {out}")


def _markdown(titles: list[str], rows: Rows) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
