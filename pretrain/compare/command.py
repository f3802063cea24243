"""The `compare-objectives` command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.settings import UserError, load_settings
from data_pipeline.target_folder import check_target_folder
from pretrain.compare import corpus
from pretrain.compare.cells import CELLS, Cell, Outcome, list_cells, read_result, run_missing
from pretrain.compare.config import CompareConfig, SyntheticConfig
from pretrain.compare.summary import summarise


def compare_objectives(
    config: Annotated[Path, typer.Argument(help="YAML of pretrain.compare.config.CompareConfig.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys to change: seeds=[0,1,2] ...")] = None,
    page_only: Annotated[bool, typer.Option(help="Make the page of what is there; train nothing.")] = False,
) -> None:
    """Every objective on the same data, with the same encoders and budget, over several seeds: tables and a plot.

    The same command again makes what is missing; in several terminals at once it shares the work. Exit codes: 0
    everything is there, 1 a cell failed or is missing, 2 a mistake, said in one line.
    """
    settings = load_settings(CompareConfig, config, overrides or [])
    out_dir = Path(settings.out_dir)
    check_target_folder(out_dir, "out_dir", [CELLS], "one of an earlier start of this comparison")
    experiment = settings.experiment
    run = None if isinstance(experiment, SyntheticConfig) else corpus.cell_config(None, experiment, out_dir)
    cells = list_cells(settings, run, page_only=page_only)
    results = [(cell, read_result(out_dir, cell)) for cell in cells]  # a mistake is said before anything is made
    failures: list[str] = []
    if not page_only and any(found is None for _, found in results):
        failures = run_missing(out_dir, cells, _maker(settings, cells, out_dir))
        results = [(cell, read_result(out_dir, cell)) for cell in cells]
    from pretrain.compare.page import show, write_page

    comparison = summarise(settings, results)
    if not comparison.rows:
        why = [*failures, *comparison.notes][:1] or ["no cell has a result"]
        raise UserError(f"out_dir {out_dir}: nothing to make a page of: {why[0]}")
    written = write_page(settings, comparison, [cell for cell, _ in results], out_dir)
    show(comparison, written, failures)
    if failures or comparison.missing:
        raise typer.Exit(1)


def _maker(settings: CompareConfig, cells: Sequence[Cell], out_dir: Path) -> Callable[[Cell], Outcome]:
    """What makes a cell, after every cell of the first seed has been checked."""
    first = [cell for cell in cells if cell.seed == settings.seeds[0]]
    experiment = settings.experiment
    if not isinstance(experiment, SyntheticConfig):
        for cell in first:
            corpus.check_cell(cell, experiment, out_dir)
        return lambda cell: corpus.run_cell(cell, experiment, out_dir)
    import torch

    from pretrain.compare import synthetic

    torch.set_num_threads(1)  # small matrices; and results do not depend on the machine's cores
    for cell in first:
        synthetic.check_cell(cell, experiment)
    return lambda cell: synthetic.run_cell(cell, experiment)
