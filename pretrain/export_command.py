"""The commands `parallelotope export` and `parallelotope embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.preflight import run_folder


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="A new folder for the model.")],
    checkpoint: Annotated[str, typer.Option(help="best or last.")] = "best",
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
) -> None:
    """Write the weights, config, tokenizer and model card of a run; see pretrain.inference for how to use them."""
    run_folder(run, checkpoint)
    from pretrain.export import export_run

    exported = export_run(run, out, checkpoint, force)
    size_mb = (out / "model.safetensors").stat().st_size / 1e6
    typer.echo(
        f"exported {exported.origin.checkpoint} of {run} to {out}: {', '.join(exported.modalities)}, "
        f"{exported.embedding_dim} dimensions, {size_mb:.1f} MB; its README.md says how to use it"
    )


def embed(
    export: Annotated[Path, typer.Argument(help="A folder that 'parallelotope export' wrote.")],
    data: Annotated[str, typer.Option(help="A dataset folder or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for the Parquet files; run again, it does only what is missing.")],
    split: Annotated[str | None, typer.Option(help="The split to embed; default: all.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine; with GPUs, one each.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples computed at once.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes of each.")] = 2,
) -> None:
    """Embeddings of a sharded dataset as a Parquet dataset: a row a sample, a column a modality.

    Under `accelerate launch` (or torchrun) each of its processes takes a share, and --processes is not needed.
    """
    from pretrain.embed import EmbedJob, embed_dataset

    embed_dataset(
        EmbedJob(export=export, data=data, split=split, out=out, batch_size=batch, workers=workers), processes
    )
