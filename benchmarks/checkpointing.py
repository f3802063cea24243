"""How long a step waits for a checkpoint: written while training goes on, against written on the spot.

    python -m benchmarks.checkpointing [--state-gb 1.2] [--rounds 5] [--folder DIR] [--device cpu]

The state is real: a model under DeepSpeed with AdamW's moments. Both ways write the same bytes, hash them, make them
durable (fsync) and commit them by one rename. `blocked` is what the step itself waits for; `lost` is what the save
costs in all: by how much a loop of updates that runs meanwhile takes longer than the same loop without a save.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import describe_machine
from pretrain.checkpoint import Progress, finished_checkpoints
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.collectives import World
from pretrain.config import RunConfig
from pretrain.engine import Engine
from pretrain.identity import Identity
from pretrain.ranks import join_ranks, leave_ranks

WIDTH = 2048
BYTES_PER_PARAMETER = 12  # a weight and two moments, fp32


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-gb", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="write the page about it here")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    world = join_ranks(threads=0, stage_timeout_s=600.0)
    if arguments.device != world.device.type:
        parser.error(f"--device {arguments.device}: this machine offers {world.device.type}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), world, arguments.state_gb, arguments.rounds, arguments.out)
    leave_ranks(world, 0)


def measure(folder: Path, world: World, state_gb: float, rounds: int, out: Path | None) -> None:
    """Interleave both ways, the same engine under both."""
    config = run_config(folder)
    engine = make_engine(config, world, state_gb)
    identity = Identity.of(config, "benchmark")
    writers = {}
    for asynchronous in (False, True):
        keep = config.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep_last": 1})
        own = config.model_copy(update={"checkpoint": keep, "run_dir": str(folder / str(asynchronous))})
        writers[asynchronous] = CheckpointWriter(own, engine, identity, world)
    found: dict[str, list[float]] = {"synchronous": [], "blocked": [], "first": [], "lost": [], "lost synchronous": []}
    for step in range(1, rounds + 2):
        blocked = {}
        for asynchronous, writer in writers.items():
            alone = updates(engine)
            started = time.perf_counter()
            writer.begin(Progress(step=step))
            blocked[asynchronous] = time.perf_counter() - started
            seconds = updates(engine)
            while asynchronous and not writer.written:
                seconds += updates(engine, 1)
            lost_s = blocked[asynchronous] + sum(seconds) - len(seconds) * statistics.mean(alone)
            writer.finish()
            if step > 1:
                found["lost" if asynchronous else "lost synchronous"].append(lost_s)
        if step == 1:
            found["first"].append(blocked[True])
        else:
            found["synchronous"].append(blocked[False])
            found["blocked"].append(blocked[True])
    size_bytes = sum(path.stat().st_size for path in finished_checkpoints(folder / "True")[-1].iterdir())
    report(found, size_bytes, rounds, out)


def updates(engine: Engine, count: int = 3) -> list[float]:
    """Seconds of each of `count` updates."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        with engine.coalesced():
            engine.backward(engine(torch.ones(4, WIDTH)).square().sum())
        engine.step(1e-9)
        seconds.append(time.perf_counter() - started)
    return seconds


def report(found: dict[str, list[float]], size_bytes: int, rounds: int, out: Path | None) -> None:
    """The table, and the ratio that matters; as a page, too, in `out`."""
    table = Table("", "seconds, median", "of the synchronous save")
    median = {name: statistics.median(values) for name, values in found.items()}
    whole = median["synchronous"]
    lines: list[tuple[str, str, str]] = []
    for name, label in (
        ("synchronous", "synchronous save: the step is blocked for"),
        ("blocked", "asynchronous save: the step is blocked for"),
        ("first", "the first one, which allocates the copy"),
        ("lost synchronous", "synchronous save: lost in all"),
        ("lost", "asynchronous save: lost in all, other cores being busy or not"),
    ):
        lines.append((label, f"{median[name]:.3f}", f"{100 * median[name] / whole:.1f} %"))
        table.add_row(*lines[-1])
    console = Console()
    console.print(f"{size_bytes / 1e9:.2f} GB of state, {rounds} rounds, {torch.get_num_threads()} threads")
    console.print(table)
    ratios = [b / s for b, s in zip(found["blocked"], found["synchronous"], strict=True)]
    share = f"{100 * statistics.median(ratios):.1f} % ({100 * min(ratios):.1f}-{100 * max(ratios):.1f})"
    console.print(f"median of the rounds' ratios blocked / synchronous: {share}")
    if out is not None:
        rows = "\n".join(f"| {label} | {seconds} | {part} |" for label, seconds, part in lines)
        out.write_text(
            f"# Checkpoints: what a step waits for\n\n{describe_machine()}\n\n`python -m benchmarks.checkpointing`: "
            f"{size_bytes / 1e9:.2f} GB of state (weights and AdamW's moments, fp32, ZeRO 1, one rank), {rounds} "
            "interleaved rounds; written, hashed, fsynced and committed by both.\n\n"
            f"Blocked over synchronous, median of the rounds (range): **{share}**; goal at most 10 %.\n\n"
            f"| | seconds, median | of the synchronous save |\n|---|---|---|\n{rows}\n",
            encoding="utf-8",
        )


def make_engine(config: RunConfig, world: World, state_gb: float) -> Engine:
    """Linear layers of 16 MB of weights each, under ZeRO."""
    layers = max(1, round(state_gb * 1e9 / BYTES_PER_PARAMETER / WIDTH**2))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))).to(world.device)
    return Engine(model, [{"params": list(model.parameters())}], config, world)


def run_config(folder: Path) -> RunConfig:
    """A config of which engine and writer read their own parts."""
    return RunConfig.model_validate(
        {
            "run_dir": str(folder),
            "data": {"train": {"path": "unused", "split": "train"}},
            "towers": {"video": {}, "audio": {}},
            "objective": [{"name": "infonce"}],
            "schedule": {"num_steps": 1},
            "train": {"global_batch": 4, "zero_stage": 1},
        }
    )


if __name__ == "__main__":
    main()
