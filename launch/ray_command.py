"""The command `parallelotope launch ray`: check the config here, submit the sharding, follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.config import ShardConfig
from data_pipeline.settings import load_settings
from launch.command import Overrides
from launch.ray import exit_code, follow, job_client, job_request
from launch.rendezvous import say

EXIT_INTERRUPTED = 130


def ray(
    config: Annotated[Path, typer.Argument(help="YAML of data_pipeline.config.ShardConfig.")],
    address: Annotated[str, typer.Option(help="Dashboard of the cluster's head: http://HOST:8265.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option(help="Follow the log and leave with the job's exit code.")] = True,
    dry_run: Annotated[bool, typer.Option(help="Print the job's command and submit nothing.")] = False,
) -> None:
    """Shard a corpus on a Ray cluster: submit `parallelotope shard` as a job.

    Every node needs parallelotope, and the manifest, its media and out_dir at the same paths. A cluster that wants a
    token: RAY_AUTH_TOKEN_PATH in the environment. Ctrl-C stops following; the job goes on.
    """
    settings = load_settings(ShardConfig, config, overrides or [])
    request = job_request(settings)
    if dry_run:
        print(request["entrypoint"])
        for name, value in request["runtime_env"]["env_vars"].items():
            print(f"{name}={value}")
        return
    with job_client(address) as client:
        job_id = client.submit_job(**request)
        to_follow, to_stop = (f"ray job {verb} --address {address} {job_id}" for verb in ("logs --follow", "stop"))
        submitted = (
            f"job {job_id} submitted to {address}; the cluster must see {settings.manifest} and {settings.out_dir}"
        )
        if not wait:
            say(submitted)
            say(f"  follow it: {to_follow}; stop it: {to_stop}")
            print(job_id)
            return
        try:
            say(submitted)
            follow(client, job_id)
            code, words = exit_code(client, job_id)
        except KeyboardInterrupt:
            code, words = EXIT_INTERRUPTED, f"goes on without us; follow it: {to_follow}; stop it: {to_stop}"
    say(f"job {job_id} {words}")
    raise typer.Exit(code)
