"""report.html: one file that needs nothing else, for one run or for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from data_pipeline.shards import partial_path, publish
from pretrain.report import figures, overview
from pretrain.report.closeup import make_closeup
from pretrain.report.history import RunHistory, read_run
from pretrain.report.overview import Card, Panel
from pretrain.scoring.names import SCORE_LABELS

PAGE = "report.html"
MEDIA_BYTES = 5_000_000  # of frames and sounds in one page, whatever the number of samples
MAX_CLOSEUPS = 4


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What the page says of one run."""

    name: str
    summary: str
    state: str
    state_words: str
    colour: str
    cards: list[Card]
    facts: list[tuple[str, str]]
    warnings: list[str]
    config: str
    figures: dict[str, str]  # last loss and R@1 of each set, by name


@dataclass(frozen=True, kw_only=True)
class ComparedSet:
    """Retrieval of several runs on sets of one name. rows: direction, score, and for each run R@1 and its interval."""

    name: str
    runs: list[str]
    rows: list[tuple[str, str, list[tuple[str, str]]]]
    panel: Panel


def write_report(folders: Sequence[Path], target: Path, state: str | None = None) -> None:
    """Write the page of one run, or of several compared, whole or not at all.

    Args:
        folders: run folders.
        state: of the run, where the caller knows it (training, finished, stopped).

    Raises:
        UserError: a folder is no run.
        OSError: it cannot be written.
    """
    runs = [read_run(folder, state) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    text = render(runs)
    partial = partial_path(target)
    try:
        partial.write_text(text, encoding="utf-8")
        publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def render(runs: Sequence[RunHistory]) -> str:
    """The page as HTML."""
    several = len(runs) > 1
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    looked_at = next((run for run in runs if any(s.embeddings.is_file() for s in run.sets)), runs[0])
    shown = looked_at.sets[:MAX_CLOSEUPS]
    return environment.get_template("page.html.j2").render(
        title=" and ".join(run.name for run in runs),
        runs=[_view(run, place) for place, run in enumerate(runs)],
        several=several,
        run_figures=list(dict.fromkeys(name for run in runs for name in _figures(run))),
        stride=max(run.stride for run in runs),
        curves=overview.compared_curve_panels(runs) if several else overview.curve_panels(runs[0]),
        times=[panel for run in runs if (panel := overview.time_panel(run, run.name if several else "")) is not None],
        settings=overview.differing_settings(runs) if several else [],
        compared=_compared_sets(runs) if several else [],
        closeups=[make_closeup(looked_at, evaluated, MEDIA_BYTES // len(shown)) for evaluated in shown],
        selected=next((n for n, evaluated in enumerate(shown, start=1) if evaluated.name != "validation"), 1),
        looked_at=looked_at.name,
        left_out=[evaluated.name for evaluated in looked_at.sets[MAX_CLOSEUPS:]],
        colours=figures.MODALITY_COLOURS,
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=Markup(get_plotlyjs()),  # the library's own source
    )


def _view(run: RunHistory, place: int) -> RunView:
    config = run.config
    objective = " + ".join(part.name for part in config.objective)
    words = {"finished": f"finished, {run.step:,} steps"}
    state_words = words.get(run.state, f"{run.state}, step {run.step:,} of {config.schedule.num_steps:,}")
    return RunView(
        name=run.name,
        summary=f"{', '.join(config.towers.names)} trained together by {objective}",
        state=run.state,
        state_words=state_words,
        colour=figures.SERIES_COLOURS[place % len(figures.SERIES_COLOURS)],
        cards=overview.cards(run),
        facts=overview.facts(run),
        warnings=overview.warnings_of(run),
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        figures=_figures(run),
    )


def _figures(run: RunHistory) -> dict[str, str]:
    found = {"loss": f"{run.last['loss']:.3f}"} if "loss" in run.last else {}
    for evaluated in run.sets:
        row = overview.headline_row(run, evaluated.result["metrics"])
        if row is not None:
            found[f"R@1 {evaluated.name}"] = f"{overview.percent(row['recall_at_1'])} of {overview.queries(row)}"
    return found


def _compared_sets(runs: Sequence[RunHistory]) -> list[ComparedSet]:
    names = dict.fromkeys(evaluated.name for run in runs for evaluated in run.sets)
    return [_compared_set(name, runs) for name in names]


def _compared_set(name: str, runs: Sequence[RunHistory]) -> ComparedSet:
    results = {run.name: s.result["metrics"] for run in runs for s in run.sets if s.name == name}
    found: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for run, metrics in results.items():
        for row in metrics:
            interval = (
                f"{100 * row['recall_at_1_low']:.1f}–{100 * row['recall_at_1_high']:.1f}, {overview.queries(row)}"
            )
            place = (f"{row['query']} → {row['candidates']}", SCORE_LABELS.get(row["score"], row["score"]))
            found.setdefault(place, {})[run] = (f"{100 * row['recall_at_1']:.1f}", interval)
    rows = [(d, score, [values.get(run, ("–", "")) for run in results]) for (d, score), values in found.items()]
    figure = figures.figure_json(figures.retrieval_figure(results))
    return ComparedSet(name=name, runs=list(results), rows=rows, panel=Panel(title=f"R@1 on {name}", figure=figure))
