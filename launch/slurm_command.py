"""The command `parallelotope launch slurm`: check everything here and now, write a batch script, submit it."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
import yaml

from data_pipeline.settings import UserError, load_settings
from launch.command import ConfigPath, Overrides, make_folder
from launch.rendezvous import say
from launch.slurm import SlurmJob, parse_option, render_script, submit
from pretrain.config import RunConfig
from pretrain.preflight import Accept, check_run, with_accepted

CONFIG, SCRIPT = "job.yaml", "job.sbatch"  # in the run folder


def slurm(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes a machine; default: its GPUs, or 1.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs a machine; default: none.")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="Cores a machine, for ranks and decoding.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory a machine, as sbatch takes it: 64G; 0: all.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as sbatch takes it: 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="As sbatch.")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Any other option of sbatch: constraint=a100.")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="Shell line before the start: 'module load cuda'.")] = None,
    interface: Annotated[str | None, typer.Option(help="For gloo, where host names lead to 127.x.")] = None,
    signal_s: Annotated[int, typer.Option(min=10, help="Save and leave so many seconds before the limit.")] = 120,
    max_requeues: Annotated[int, typer.Option(min=0, help="Lives after the first.")] = 20,
    requeue: Annotated[bool, typer.Option(help="Whether the job may be requeued; some sites forbid it.")] = True,
    name: Annotated[str | None, typer.Option(help="Of the job; default: the run folder's.")] = None,
    accept: Accept = None,
    dry_run: Annotated[bool, typer.Option(help="Print the script and submit nothing.")] = False,
) -> None:
    """Train the towers of CONFIG as a Slurm job that requeues itself at its time limit and resumes.

    Everything that can be wrong with the config, the data and the ranks is found before anything is queued. The job
    reads RUN/job.yaml, the config as it is now: editing CONFIG while the job waits changes nothing.
    """
    settings = load_settings(RunConfig, config, with_accepted(overrides, accept))
    ranks = ranks_per_node or gpus_per_node or 1
    check_run(settings, nodes * ranks)
    run_dir = Path(settings.run_dir).absolute()
    command = [sys.executable, "-m", "pretrain.main", "launch", "node", str(run_dir / CONFIG)]
    command += ["--nodes", str(nodes), "--ranks-per-node", str(ranks)]
    command += ["--interface", interface] if interface is not None else []
    options = {"partition": partition, "account": account}
    job = SlurmJob(
        name=name or run_dir.name,
        command=tuple(command),
        python=sys.executable,
        run_dir=run_dir,
        work_dir=Path.cwd(),
        num_nodes=nodes,
        cpus_per_node=cpus_per_node,
        gpus_per_node=gpus_per_node,
        memory=mem,
        time_limit=time,
        signal_s=signal_s,
        max_requeues=max_requeues,
        requeue=requeue,
        options=(
            *((option, value) for option, value in options.items() if value is not None),
            *(parse_option(text) for text in sbatch or []),
        ),
        setup=tuple(setup or []),
    )
    script = render_script(job)
    if dry_run:
        print(script, end="")
        return
    job_id = _write_and_submit(run_dir, settings, script)
    say(f"job {job_id} submitted: {nodes} nodes x {ranks} ranks, script {run_dir / SCRIPT}")
    say(f"  log: {run_dir / 'logs' / f'slurm-{job_id}.log'}; every rank's: {run_dir / 'logs' / f'{job_id}.0'}")
    say(f"  queue: squeue -j {job_id}; stop for good: scancel {job_id}; save and leave: scancel -s USR1 {job_id}")
    print(job_id)


def _write_and_submit(run_dir: Path, settings: RunConfig, script: str) -> str:
    """Put config and script into the run folder and queue the script; returns the job's id.

    A job that is refused leaves the folder as it was: what an earlier job reads from it stays.
    """
    content = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    texts = {run_dir / CONFIG: content, run_dir / SCRIPT: script}
    before = {path: path.read_bytes() for path in texts if path.is_file()}
    made = [folder for folder in (run_dir / "logs", run_dir, *run_dir.parents) if not folder.exists()]
    make_folder(run_dir / "logs", settings.run_dir)
    try:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return submit(run_dir / SCRIPT)
    except UserError:
        for path in texts:
            if path in before:
                path.write_bytes(before[path])
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else has begun to use it
            for folder in made:
                folder.rmdir()
        raise
