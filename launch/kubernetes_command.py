"""The command `parallelotope launch kubernetes`: check what can be checked here, print a JobSet or create it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
import yaml

from data_pipeline.settings import UserError, load_settings
from launch.command import ConfigPath, Overrides
from launch.delivery import check_size, with_config
from launch.kubernetes import (
    KubernetesJob,
    Volume,
    check_name,
    check_quantity,
    create,
    dns_name,
    node_command,
    parse_secret,
    parse_variable,
    parse_volume,
    render,
)
from launch.rendezvous import say
from pretrain.config import RunConfig
from pretrain.preflight import Accept, check_data, check_ranks, with_accepted


def kubernetes(
    config: ConfigPath,
    image: Annotated[str, typer.Option(help="Container image with parallelotope installed.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Pods, each on a machine of its own or a share of one.")] = 1,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Processes a pod; default: its GPUs, or 1.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs a pod; default: none.")] = None,
    cpu: Annotated[str | None, typer.Option(help="Cores a pod: 8.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory a pod: 64Gi.")] = None,
    pvc: Annotated[list[str] | None, typer.Option(help="Volume of every pod: CLAIM:/FOLDER[:ro].")] = None,
    work_dir: Annotated[str | None, typer.Option(help="Where relative paths of CONFIG start, inside a volume.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="Variable of every pod: NCCL_DEBUG=INFO.")] = None,
    secret: Annotated[list[str] | None, typer.Option(help="Variable from a Secret: WANDB_API_KEY=SECRET:KEY.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Default: that of kubectl's context.")] = None,
    queue: Annotated[str | None, typer.Option(help="LocalQueue of Kueue.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="After failures; a stop with a checkpoint is none.")] = 10,
    grace_s: Annotated[int, typer.Option(min=30, help="Time to finish a step and save when a pod must go.")] = 300,
    name: Annotated[str | None, typer.Option(help="Of the JobSet; default: the run folder's.")] = None,
    accept: Accept = None,
    dry_run: Annotated[bool, typer.Option(help="Print the manifest and create nothing.")] = False,
) -> None:
    """Train the towers of CONFIG in pods, as a JobSet that restarts and resumes.

    CONFIG, overrides applied, is part of the manifest; nothing has to be copied to the cluster but the data.
    """
    settings = load_settings(RunConfig, config, with_accepted(overrides, accept))
    ranks = ranks_per_node or gpus_per_node or 1
    check_ranks(settings, nodes * ranks)
    volumes = tuple(parse_volume(text) for text in pvc or [])
    check_places(settings, volumes, work_dir)
    job_name = check_name(name) if name is not None else dns_name(PurePosixPath(settings.run_dir).name)
    job = KubernetesJob(
        name=job_name,
        image=image,
        config=check_size(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)),
        command=with_config(node_command(job_name, nodes, ranks)),
        num_nodes=nodes,
        ranks_per_node=ranks,
        gpus_per_node=gpus_per_node,
        cpu=check_quantity("--cpu", cpu),
        memory=check_quantity("--memory", memory),
        volumes=volumes,
        secrets=tuple(parse_secret(text) for text in secret or []),
        env=tuple(parse_variable(text) for text in env or []),
        work_dir=work_dir,
        namespace=namespace,
        queue=queue,
        max_restarts=max_restarts,
        grace_s=grace_s,
    )
    _check_data_here(settings, nodes * ranks)
    if dry_run:
        print(render(job), end="")
        return
    create(render(job))
    where = f" -n {namespace}" if namespace else ""
    pods = f"jobset.sigs.k8s.io/jobset-name={job_name}"
    say(f"jobset {job_name} created: {nodes} pods x {ranks} ranks; every rank's log: {settings.run_dir}/logs")
    say(f"  rank 0: kubectl logs{where} -f -l {pods},batch.kubernetes.io/job-completion-index=0")
    say(f"  pods: kubectl get pods{where} -l {pods}; stop for good: kubectl delete jobset{where} {job_name}")
    print(job_name)


def check_places(settings: RunConfig, volumes: tuple[Volume, ...], work_dir: str | None) -> None:
    """Refuse a run folder that would be lost with its pod.

    Raises:
        UserError: `run_dir` is in no volume that can be written.
    """
    writable = [volume.mount for volume in volumes if not volume.read_only]
    place = PurePosixPath(work_dir or "", settings.run_dir)
    if any(place.is_relative_to(mount) for mount in writable):
        return
    if not place.is_absolute():
        raise UserError(
            f"run_dir {settings.run_dir}: relative, and pods have no current folder of yours; expected an absolute "
            "path, or --work-dir /FOLDER"
        )
    volumes_there = f" ({', '.join(writable)})" if writable else ""
    raise UserError(
        f"run_dir {place}: in no volume that can be written{volumes_there}: checkpoints would be lost with the pods; "
        "expected --pvc CLAIM:/FOLDER above it"
    )


def _check_data_here(settings: RunConfig, ranks: int) -> None:
    """Check the datasets when they are here too; else the pods do, before a rank starts."""
    parts = [part for part in (*settings.data.train, settings.data.validation) if part is not None]
    elsewhere = sorted({part.path for part in parts if not Path(part.path).is_dir()})
    if elsewhere:
        say(f"not on this machine, so checked by the pods when they start: {', '.join(elsewhere)}")
    else:
        check_data(settings, ranks)
