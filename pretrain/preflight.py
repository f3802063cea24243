"""What can be checked of a run before torch is imported and a process is started."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.settings import UserError, nearest
from data_pipeline.shards import read_dataset_json
from data_pipeline.target_folder import check_target_folder
from pretrain.config import RunConfig, SplitConfig
from pretrain.data.mixture import positions_a_window

# Written first into a run folder: by rank 0, by a launcher or by `launch slurm`.
RUN_FILES = (".lock", "config.yaml", "checkpoints", "logs", "job.yaml", "job.sbatch")

Accept = Annotated[
    list[str] | None,
    typer.Option(help="In what the checkpoint to go on from may differ: dataset, objective, ... (config key `accept`)"),
]


def with_accepted(overrides: Sequence[str] | None, accept: Sequence[str] | None) -> list[str]:
    """The overrides of a command line, with its `--accept` options as one more."""
    return [*(overrides or []), *([f"accept=[{','.join(accept)}]"] if accept else [])]


def check_run(config: RunConfig, ranks: int) -> None:
    """Refuse what cannot run: data that is not there, ranks that do not divide the global batch, a folder of others.

    Raises:
        UserError: one line: what was found, what was expected.
    """
    check_data(config, ranks)
    check_ranks(config, ranks)
    check_target_folder(Path(config.run_dir), "run_dir", RUN_FILES, "one of an earlier start of this run")


def check_data(config: RunConfig, ranks: int) -> None:
    """Refuse datasets that are not there, or have too few samples in the split that is asked for.

    Raises:
        UserError: one line: what was found, what was expected.
    """
    train, held_out = config.data.train, config.data.validation
    sizes = [_num_samples("data.train", part, needed=1) for part in train]
    positions_a_window([part.weight for part in train], sizes, [part.path for part in train])
    if held_out is not None:
        _num_samples("data.validation", held_out, needed=ranks)


def _num_samples(place: str, part: SplitConfig, needed: int) -> int:
    """Samples of a split, at least `needed`."""
    place = f"{place}: dataset {part.path}"
    shards = read_dataset_json(part.path)["shards"]
    splits = {shard["split"] for shard in shards}
    if not splits:
        raise UserError(f"{place} holds no sample: every row was rejected, see its rejects.parquet")
    if part.split not in splits:
        raise UserError(f"{place} has no split '{part.split}'; {nearest(part.split, splits)}")
    num_samples = sum(shard["num_samples"] for shard in shards if shard["split"] == part.split)
    if num_samples < needed:
        raise UserError(f"{place} has {num_samples} samples in split '{part.split}'; expected at least {needed}")
    return int(num_samples)


def check_ranks(config: RunConfig, ranks: int) -> None:
    """Refuse ranks that do not divide the global batch. Looks at no file.

    Raises:
        UserError: one line: what was found, what was expected.
    """
    if config.train.global_batch % ranks:
        divisors = [str(n) for n in range(1, config.train.global_batch + 1) if config.train.global_batch % n == 0]
        raise UserError(
            f"train.global_batch {config.train.global_batch} is not divisible by {ranks} ranks; "
            f"expected one of {', '.join(divisors[:16])}{' ...' if len(divisors) > 16 else ''} ranks"
        )


def num_ranks() -> int:
    """Ranks of this run, from the environment; 1 when nobody set it. Needs no process group."""
    return int(os.environ.get("WORLD_SIZE") or slurm_variable("SLURM_NTASKS") or 1)


def slurm_variable(name: str) -> str | None:
    """A variable of srun; None outside of a job step (a batch script has SLURM_* too, but is no rank)."""
    return os.environ.get(name) if "SLURM_STEP_ID" in os.environ and "SLURM_STEP_NODELIST" in os.environ else None


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list: "gpu[07-09,12],login1" -> "gpu07"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST '{nodelist}': expected a list of hosts")
    return match.group(1) + (match.group(2) or "")


def slurm_port(job_id: str) -> int:
    """The port where a job's ranks meet: from its number, so that two jobs on a node differ.

    Below 32768, where ephemeral ports begin.
    """
    return 20_000 + int(job_id) % 12_000


def run_folder(run: Path, which: str) -> Path:
    """The run folder that `run` is, or that it is a checkpoint of; `which` checkpoint is meant: best or last.

    Raises:
        UserError: neither, or another word.
    """
    if which not in ("best", "last"):
        raise UserError(f"--checkpoint {which}: {nearest(which, ['best', 'last'])}")
    if not run.is_dir():
        raise UserError(f"run {run}: no such folder; expected a run_dir of 'parallelotope pretrain'")
    folder = run.resolve().parent.parent if (run / "checkpoint.json").is_file() else run
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run {run}: no config.yaml in it; expected a run_dir of 'parallelotope pretrain'")
    return folder
