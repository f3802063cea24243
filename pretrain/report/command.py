"""The `report` command, and the page that `evaluate` leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.settings import UserError

EXTRA = "needs plotly and jinja2: pip install 'parallelotope[train]'"


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; default: report.html of the run, comparison.html of several."),
    ] = None,
) -> None:
    """Curves, retrieval, a gallery and the embeddings of a run in one HTML file; several runs on the same figures."""
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    for run in runs:
        if not run.is_dir():
            raise UserError(f"run {run}: no such folder; expected a run_dir of 'parallelotope pretrain'")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UserError(f"--out {target}: expected the name of a file in a folder that exists")
    try:
        from pretrain.report.page import write_report
    except ModuleNotFoundError as error:
        raise UserError(f"report: {EXTRA} ({error})") from error
    try:
        write_report(runs, target)
    except OSError as error:
        raise UserError(f"report {target}: cannot be written: {error.strerror}") from error
    typer.echo(f"report: {target}")


def refresh_page(run: Path) -> str:
    """Make report.html of a run again; a line that says where it is, or why there is none."""
    try:
        from pretrain.report.page import PAGE, write_report

        write_report([run], run / PAGE)
    except ModuleNotFoundError as error:
        return f"no report: it {EXTRA} ({error})"
    except (UserError, OSError) as error:
        return f"no report: {error}"
    return f"report: {run / PAGE}"
