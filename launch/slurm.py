"""A training run as a Slurm job: rendering the batch script is a pure function; submitting it is one call of sbatch.

One task of srun a node starts that node's ranks (`parallelotope launch node`), so a rank killed by a signal is seen and
named at once. The job's life ends in one of three ways:

    0      the run has finished
    75     stopped with a checkpoint on a signal (time limit, preemption): the script requeues its own job
    else   a rank failed: the job fails with its code, and its log ends with its name
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.settings import UserError
from launch.failures import LIFE
from launch.plan import EXIT_RUN_AGAIN

WAIT_S = 60  # for other nodes once one has ended; NCCL does not notice a lost peer by itself
SUBMISSION_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "PMI_", "PMIX_")
OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """Everything a batch script says. Paths are absolute; `command` starts the ranks of one node."""

    name: str
    command: tuple[str, ...]
    python: str
    run_dir: Path
    work_dir: Path
    num_nodes: int
    cpus_per_node: int | None
    gpus_per_node: int | None
    memory: str | None  # of a node, as sbatch takes it
    time_limit: str | None
    signal_s: int  # this long before the time limit the ranks are told to save and leave
    max_requeues: int
    requeue: bool
    options: tuple[tuple[str, str | None], ...] = ()  # further options of sbatch: (name, value)
    setup: tuple[str, ...] = ()  # shell lines before the ranks start, as the site needs them


def render_script(job: SlurmJob) -> str:
    """The batch script as text."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(job)), "", "set -uo pipefail"]
    lines += [
        f"cd -- {shlex.quote(str(job.work_dir))} || exit",
        "export PYTHONUNBUFFERED=1",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun does not take it over by itself',
        f'export {LIFE}="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"',
        'echo "parallelotope: life $' + LIFE + ' on $SLURM_JOB_NODELIST"',
        "trap : TERM  # the ranks get it too; this script has to outlive them",
    ]
    if job.gpus_per_node is None:
        lines.append("export DS_ACCELERATOR=cpu")
    lines += ["", *job.setup] if job.setup else []
    lines += ["", *_run_lines(job), "", *_end_lines(job)]
    return "\n".join(lines) + "\n"


def _options(job: SlurmJob) -> list[str]:
    """Options of sbatch in quotes that Slurm's own parser of #SBATCH lines takes off again."""
    log = str(job.run_dir / "logs" / "slurm-").replace("%", "%%") + "%j.log"
    known: list[tuple[str, str | None]] = [
        ("job-name", job.name),
        ("nodes", str(job.num_nodes)),
        ("ntasks-per-node", "1"),
        ("output", log),
        ("open-mode", "append"),
        ("requeue" if job.requeue else "no-requeue", None),
    ]
    optional = {
        "cpus-per-task": job.cpus_per_node, "gpus-per-node": job.gpus_per_node, "mem": job.memory,
        "time": job.time_limit, "signal": f"USR1@{job.signal_s}" if job.time_limit else None,
    }  # fmt: skip
    known += [(name, str(value)) for name, value in optional.items() if value is not None]
    return [f"--{name}" if value is None else f"--{name}={_quoted(value)}" for name, value in [*known, *job.options]]


def _quoted(value: str) -> str:
    """A value as #SBATCH lines take it: in double quotes where it is not plain."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _run_lines(job: SlurmJob) -> list[str]:
    # Not --kill-on-bad-exit: ranks that leave with 75 after a checkpoint would be killed by the first of them.
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={WAIT_S}", "--unbuffered"]
    return [f"{shlex.join(srun)} {shlex.join(job.command)}", "code=$?"]


def _end_lines(job: SlurmJob) -> list[str]:
    run_dir = shlex.quote(str(job.run_dir))
    lines = [f'{shlex.quote(job.python)} -m launch.failures {run_dir} "${LIFE}" "$code"', "code=$?"]
    if not job.requeue:
        return [*lines, 'exit "$code"']
    return [
        *lines,
        f'if [ "$code" -eq {EXIT_RUN_AGAIN} ]; then',
        '    if ! scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then  # scancel: Slurm is ending it',
        '        echo "parallelotope: the job is being ended, not requeued"',
        f'    elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.max_requeues} ]; then',
        f'        echo "parallelotope: not requeued again after {job.max_requeues} times"',
        '    elif scontrol requeue "$SLURM_JOB_ID"; then',
        "        sleep 120  # Slurm ends this script; one that ends by itself ends the job",
        "    fi",
        "fi",
        'exit "$code"',
    ]


def parse_option(text: str) -> tuple[str, str | None]:
    """ "constraint=a100" -> ("constraint", "a100"), "exclusive" -> ("exclusive", None).

    Raises:
        UserError: not the name of an option of sbatch.
    """
    name, equals, value = text.removeprefix("--").partition("=")
    if not OPTION_NAME.fullmatch(name) or "\n" in value:
        raise UserError(f"--sbatch '{text}': expected NAME=VALUE or NAME, as in --sbatch constraint=a100")
    return name, value if equals else None


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what a surrounding Slurm job put there, which would change the options of the new one.

    SLURM_CONF stays: it says where the cluster is.
    """
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not name.startswith(SUBMISSION_PREFIXES)
    }


def submit(script: Path) -> str:
    """Give a script to sbatch; returns the job's id.

    Raises:
        UserError: no sbatch, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("launch slurm: no sbatch on PATH; expected a login node of a Slurm cluster, or --dry-run")
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=clean_environment(os.environ)
    )
    if done.returncode != 0:
        raise UserError(f"launch slurm: sbatch refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
