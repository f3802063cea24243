"""The demo: the commands a person would type, one after the other, with a kill in the middle of the training."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.settings import UserError, load_settings
from pretrain.config import RunConfig
from pretrain.leash import leashed

CONFIGS = Path("configs/demo")
SPLITS = ("test", "test-ordinary")
NUM_STAGES = 7
NUM_RANKS = 2
POLL_S = 0.2
RESUMED = re.compile(r"resumed from .*step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the demo keeps what it makes."""

    folder: Path

    @property
    def corpus(self) -> Path:
        """Clips and their manifest."""
        return self.folder / "corpus"

    @property
    def data(self) -> Path:
        """Shards."""
        return self.folder / "data"

    @property
    def run(self) -> Path:
        """The training run."""
        return self.folder / "run"

    @property
    def metrics(self) -> Path:
        """A JSON object a step."""
        return self.run / "metrics.jsonl"


@dataclass(kw_only=True)
class Stages:
    """Headings, times, and the end at the first failure."""

    console: Console
    times: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, title: str, what: str) -> Iterator[None]:
        """Say what happens inside, and afterwards how long it took."""
        self.console.print()
        self.console.rule(f"[bold]{len(self.times) + 1}/{NUM_STAGES}  {title}", align="left")
        self.say(what)
        started = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - started))
        self.say(f"{title}: {self.times[-1][1]:.0f} s")

    def say(self, line: str) -> None:
        """A line of the demo itself."""
        self.console.print(line, style="cyan", markup=False, highlight=False, soft_wrap=True)

    def command(self, arguments: Sequence[str]) -> None:
        """Run `parallelotope ARGUMENTS...` to its end; a failure ends the demo with its exit code."""
        self.show(arguments)
        self.check(subprocess.run(command_line(arguments), check=False).returncode)

    def show(self, arguments: Sequence[str]) -> None:
        """Print a command as a person would type it."""
        line = f"$ parallelotope {shlex.join(arguments)}"
        self.console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)

    def check(self, code: int) -> None:
        """End the demo when `code` is not 0."""
        if code != 0:
            self.console.print(f"the demo ends here: exit code {code}", style="red", highlight=False)
            raise typer.Exit(code if code > 0 else 128 - code)


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the training config to change.")] = None,
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    clips: Annotated[int, typer.Option(help="Training clips to make.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the clips.")] = 0,
) -> None:
    """Corpus, shards, training on two ranks (killed once and resumed), evaluation. Finished parts are reused."""
    places = Places(folder=folder)
    paths = [f"run_dir={places.run}", f"data.train.path={places.data}", f"data.validation.path={places.data}"]
    changes = [*paths, *(overrides or [])]
    for path in (CONFIGS / "shard.yaml", CONFIGS / "pretrain.yaml"):
        if not path.is_file():
            raise UserError(f"demo: no {path} in {Path.cwd()}; expected to run in a clone of the repository")
    config = load_settings(RunConfig, CONFIGS / "pretrain.yaml", changes)
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(console=Console())
    make_data(stages, places, clips, seed)
    train(stages, places, config, changes)
    for split, what in zip(SPLITS, ("a grid of pictures and sounds never trained", "ordinary clips"), strict=True):
        with stages.stage(f"Evaluation on {split}", f"Can a text find its clip among {what}? Ties count as misses."):
            stages.command(["evaluate", str(places.run), "--data", str(places.data), "--split", split])
    summarise(stages, places)


def make_data(stages: Stages, places: Places, clips: int, seed: int) -> None:
    """Corpus, shards, verification."""
    what = "Procedural clips as real mp4 files: what is seen and what is heard vary independently; captions name both."
    with stages.stage("Corpus", what):
        stages.command(["demo-corpus", str(places.corpus), "--clips", str(clips), "--seed", str(seed)])
    what = "Ray workers decode, check and pack the clips; what is broken is listed with a reason."
    with stages.stage("Shards", what):
        manifest = f"manifest={places.corpus / 'manifest.jsonl'}"
        stages.command(["shard", str(CONFIGS / "shard.yaml"), manifest, f"out_dir={places.data}"])
    with stages.stage("Verification", "Every byte is read again; every row of the manifest is accounted for."):
        stages.command(["verify", str(places.data)])


def train(stages: Stages, places: Places, config: RunConfig, changes: Sequence[str]) -> None:
    """Training on two ranks, killed between two checkpoints, and the same command again."""
    arguments = ["launch", "local", str(CONFIGS / "pretrain.yaml"), "--ranks", str(NUM_RANKS), *changes]
    last = config.schedule.num_steps
    kill_at = min(last // 2 + config.checkpoint.every_steps // 2, last - 1)
    what = f"{NUM_RANKS} ranks, ZeRO stage {config.train.zero_stage}; after step {kill_at} of {last} all get SIGKILL."
    with stages.stage("Training, killed in the middle", what):
        before = last_step(places.metrics)
        if before >= kill_at:
            stages.say(f"an earlier demo got to step {before} of {last}: nothing is killed this time")
        else:
            stages.show(arguments)
            killed = run_and_kill(command_line(arguments), places.metrics, kill_at)
            stages.check(killed)
            stages.say(f"killed after step {last_step(places.metrics)}: no warning, nothing saved on the way out")
    with stages.stage("Training, resumed", "The same command again: it goes on from the newest whole checkpoint."):
        logs = {path: path.stat().st_size for path in log_paths(places)}
        stages.command(arguments)
        stages.say(resumption(places, logs, last))


def run_and_kill(command: Sequence[str], metrics: Path, kill_at: int) -> int:
    """Run `command` and SIGKILL its process group once `metrics` has a line of step `kill_at`.

    Returns:
        0 when it was killed; its exit code (1 for 0) when it left before that.
    """
    process = subprocess.Popen(leashed(command), start_new_session=True)
    try:
        while process.poll() is None:
            if last_step(metrics) >= kill_at:
                return 0
            time.sleep(POLL_S)
        return process.returncode or 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_step(metrics: Path) -> int:
    """Step of the last whole line of a metrics file; 0 without one."""
    return max(steps(metrics), default=0)


def steps(metrics: Path) -> list[int]:
    """Steps of all whole lines of a metrics file."""
    if not metrics.is_file():
        return []
    return [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").split("\n")[:-1]]


def log_paths(places: Places) -> list[Path]:
    """Logs of rank 0, of every host that it has run on."""
    return sorted((places.run / "logs").glob("*-0.log"))


def resumption(places: Places, log_sizes: dict[Path, int], last: int) -> str:
    """Where the last life began, as its own output says; and that the metrics are those of one uninterrupted run.

    Raises:
        UserError: it did not resume, or a step is missing or there twice.
    """
    said = "".join(path.read_bytes()[log_sizes.get(path, 0) :].decode(errors="replace") for path in log_paths(places))
    found = RESUMED.findall(said)
    if not found:
        raise UserError(f"demo: the log of rank 0 in {places.run / 'logs'} names no checkpoint that it resumed from")
    if steps(places.metrics) != list(range(1, last + 1)):
        raise UserError(f"demo: {places.metrics}: expected every step from 1 to {last} once")
    return f"resumed from step {int(found[-1])}; metrics.jsonl has every step from 1 to {last} exactly once"


def summarise(stages: Stages, places: Places) -> None:
    """What came out, where it is and how long it took."""
    console = stages.console
    console.print()
    console.rule("[bold]What came out", align="left")
    report = json.loads((places.run / f"evaluation-{SPLITS[0]}.json").read_text(encoding="utf-8"))
    for row in report["metrics"]:
        if row["query"] == "text":
            stages.say(headline(row))
    table = Table(title="time", title_justify="left", show_header=False)
    for title, seconds in stages.times:
        table.add_row(title, f"{seconds:.0f} s")
    table.add_row("all", f"{sum(seconds for _, seconds in stages.times):.0f} s")
    console.print(table)
    for name, path in (("clips", places.corpus), ("shards", places.data), ("run", places.run)):
        stages.say(f"{name}: {path}")
    stages.say(f"curves: tensorboard --logdir {places.run}")
    page = places.run / "report.html"
    if page.is_file():  # else the evaluation has said why
        console.print()
        console.print("Look at it, in a browser:", style="bold")
        console.print(f"    {page.resolve()}", style="bold", markup=False, highlight=False, soft_wrap=True)


def headline(row: dict[str, Any]) -> str:
    """One direction of retrieval in words."""
    interval = f"{100 * row['recall_at_1_low']:.1f} to {100 * row['recall_at_1_high']:.1f}"
    found = f"{100 * row['recall_at_1']:.1f} % of {row['num_queries']} queries"
    return (
        f"text -> {row['candidates']} by {row['score']}: the right one of {row['num_candidates']} is found first in "
        f"{found} ({interval}; chance {100 * row['chance_recall_at_1']:.1f} %)"
    )


def command_line(arguments: Sequence[str]) -> list[str]:
    """`parallelotope ARGUMENTS...` with this interpreter."""
    return [sys.executable, "-m", "pretrain.main", *arguments]
