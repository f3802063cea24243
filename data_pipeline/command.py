"""The commands `parallelotope shard` and `parallelotope verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.config import ShardConfig
from data_pipeline.settings import load_settings


def shard(
    config: Annotated[Path, typer.Argument(help="A YAML file, as configs/your-videos/shard.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace the file's, as a.b=value; 'parallelotope keys shard' lists them."),
    ] = None,
) -> None:
    """Turn a manifest into WebDataset shards with Ray. Run again, it does only what is missing."""
    settings = load_settings(ShardConfig, config, overrides or [])
    from data_pipeline.progress import counted
    from data_pipeline.sharding import shard_dataset

    result = shard_dataset(settings)
    if result.failures:
        num_tasks = counted(result.num_tasks, "task")
        for name, error in sorted(result.failures.items()):
            typer.echo(f"shard: {name} failed: {error}", err=True)
        typer.echo(
            f"shard: {len(result.failures)} of {num_tasks} failed; the others are kept, and running again "
            "tries only the failed ones",
            err=True,
        )
        raise typer.Exit(1)


def verify(dataset: Annotated[str, typer.Argument(help="What 'parallelotope shard' wrote: a folder or URL.")]) -> None:
    """Re-read every byte of a sharded dataset and account for every row."""
    from data_pipeline.verify import verify_dataset

    report = verify_dataset(dataset)
    typer.echo(report.table())
    for problem in report.problems:
        typer.echo(f"verify: {problem}", err=True)
    if report.problems:
        raise typer.Exit(1)
