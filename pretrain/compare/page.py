"""What a comparison leaves behind: tables as CSV and Parquet, a Markdown page, a plot; and what the terminal shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich import box
from rich.console import Console
from rich.table import Table

from data_pipeline.shards import partial_path, publish
from pretrain.compare.cells import Cell
from pretrain.compare.config import CompareConfig
from pretrain.compare.summary import NO_DIFFERENCE, Comparison, Row

PAGE, FIGURE = "comparison.md", "comparison.html"
HEADLINES = {
    "recall_at_1/one -> one/cosine": "R@1 one → one, cosine",
    "recall_at_1/one -> others/own": "R@1 one → others, own score",
    "recall_at_1/one -> others/volume": "R@1 one → others, volume",
    "recall_at_1/one -> others/summed_cosine": "R@1 one → others, summed cosine",
    "recall_at_1/others -> one/summed_cosine": "R@1 others → one, summed cosine",
    "accuracy/one": "accuracy, one",
    "accuracy/all": "accuracy, all",
}
SHARES = ("recall_at_1/", "accuracy/")  # metrics in [0, 1], shown in per cent


def headlines(comparison: Comparison, setting: str) -> dict[str, str]:
    """Metrics that a setting is summarised by, and their headings."""
    measured = comparison.metrics_of(setting)
    return {metric: heading for metric, heading in HEADLINES.items() if metric in measured}


def write_page(config: CompareConfig, comparison: Comparison, cells: Sequence[Cell], out_dir: Path) -> list[Path]:
    """Write everything; returns what was written, the page first."""
    from pretrain.compare.figure import comparison_html

    table = pa.Table.from_pylist([row.record() for row in comparison.rows.values()])
    written = [out_dir / name for name in (PAGE, FIGURE, "comparison.csv", "comparison.parquet")]
    for path in written:
        partial = partial_path(path)
        try:
            if path.suffix == ".csv":
                pyarrow.csv.write_csv(table, partial)
            elif path.suffix == ".parquet":
                pyarrow.parquet.write_table(table, partial)
            elif path.name == FIGURE:
                partial.write_text(comparison_html(comparison), encoding="utf-8")
            else:
                partial.write_text("\n".join(markdown(config, comparison, cells)) + "\n", encoding="utf-8")
            publish(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return written


def markdown(config: CompareConfig, comparison: Comparison, cells: Sequence[Cell]) -> list[str]:
    """Lines of the page: what was compared, the statements, a table a setting, every direction, hyper-parameters."""
    lines = ["# Objectives compared", "", *_what(config, comparison)]
    for setting in comparison.settings:
        if comparison.labels_of(setting):
            lines += [
                "",
                f"## {setting}",
                "",
                *_statements(comparison, setting),
                "",
                *_headline_table(comparison, setting),
            ]
    lines += [
        "",
        "## Every direction",
        "",
        "Mean ± half of the 95 % interval: shares in per cent, cosines of matched pairs as they are.",
    ]
    for setting in comparison.settings:
        if comparison.labels_of(setting):
            lines += ["", f"### {setting}, every direction", "", *_direction_table(comparison, setting)]
    return [*lines, "", "## Hyper-parameters", "", *_hyper_parameters(config, cells)]


def _what(config: CompareConfig, comparison: Comparison) -> list[str]:
    experiment = config.experiment.model_dump(mode="json")
    seeds = ", ".join(map(str, config.seeds))
    lines = [
        f"Same data, encoders, budget and order of batches for all; seeds {seeds}. A figure is the mean over seeds",
        "with its 95 % t interval; after it stands the difference from the baseline of the same setting and seed.",
        *_second_views(config),
        f'Where that interval holds 0 the page says "{NO_DIFFERENCE}". The intervals are over seeds, one at a time: of',
        "twenty true equalities one will seem a difference. Nothing is claimed beyond them: another budget, learning",
        "rate or corpus may order the objectives otherwise.",
        "",
        f"Baseline: {comparison.baseline}. All cells took {comparison.seconds / 60:.1f} minutes together.",
        "",
        f"    {json.dumps(experiment)}",
    ]
    if comparison.missing:
        shown = ", ".join(comparison.missing[:5])
        lines += ["", f"**{len(comparison.missing)} cells have no result yet**: {shown}, ... Run the command again."]
    return lines + (["", "Without metrics:", *(f"- {note}" for note in comparison.notes)] if comparison.notes else [])


def _second_views(config: CompareConfig) -> list[str]:
    """Who sees more than the others do: not all of a difference is the objective's."""
    wanted = {entry.label: set().union(*(part.views for part in entry.objective)) for entry in config.objectives}
    seeing = [label for label, views in wanted.items() if "augmented" in views]
    more = [label for label, views in wanted.items() if "independent" in views]
    lines = []
    if seeing:
        lines.append(
            f"A second view of every sample, and twice the forward passes, have: {', '.join(seeing)}"
            + (f"; a second projection a modality: {', '.join(more)}" if more else "")
            + ". Against the others a difference may be the view's."
        )
    return lines


def _statements(comparison: Comparison, setting: str) -> list[str]:
    """For each headline, who is higher, who is lower, and of whom neither can be said."""
    lines = []
    for metric, heading in headlines(comparison, setting).items():
        groups: dict[str, list[str]] = {}
        for label in comparison.labels_of(setting):
            row = comparison.find(setting, label, metric)
            if row is not None and row.verdict != "baseline":
                groups.setdefault(row.verdict, []).append(label)
        said = "; ".join(f"{verdict}: {', '.join(labels)}" for verdict, labels in groups.items())
        lines.append(
            f"- {heading}, against {comparison.baseline}: {said}." if said else f"- {heading}: baseline alone."
        )
    return lines


def _headline_table(comparison: Comparison, setting: str) -> list[str]:
    shown = headlines(comparison, setting)
    header = ["objective", "seeds", *shown.values(), "anti-aligned pairs"]
    lines = [_row(header), _row(["---"] + ["---:"] * (len(header) - 1))]
    for label in comparison.labels_of(setting):
        rows = [comparison.find(setting, label, metric) for metric in shown]
        away = comparison.find(setting, label, "anti_aligned")
        num_seeds = max((row.value.num for row in rows if row is not None), default=0)
        lines.append(_row([label, str(num_seeds), *map(_cell, rows), f"{away.value.mean:.1f}" if away else "–"]))
    return lines


def _cell(row: Row | None) -> str:
    """ "12.3 [11.0, 13.6]; -1.2 [-1.9, -0.5]": the mean, and the difference from the baseline."""
    if row is None:
        return "–"
    parts = [interval_text(row)]
    if row.difference is not None:
        other, mark = row.difference, {"higher": " ▲", "lower": " ▼"}.get(row.verdict, "")
        between = (
            "" if other.low is None or other.high is None else f" [{100 * other.low:+.1f}, {100 * other.high:+.1f}]"
        )
        parts.append(f"{100 * other.mean:+.1f}{between}{mark}")
    return "; ".join(parts)


def interval_text(row: Row) -> str:
    """ "12.3 [11.0, 13.6]" in per cent."""
    value = row.value
    between = "" if value.low is None or value.high is None else f" [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{100 * value.mean:.1f}{between}"


def _direction_table(comparison: Comparison, setting: str) -> list[str]:
    labels = comparison.labels_of(setting)
    shown = (*SHARES, "positive_cosine/")
    metrics = [m for m in comparison.metrics_of(setting) if m.startswith(shown) and m not in HEADLINES]
    lines = [_row(["metric", *labels]), _row(["---"] + ["---:"] * len(labels))]
    for metric in metrics:
        rows = [comparison.find(setting, label, metric) for label in labels]
        lines.append(_row([_heading(metric), *(_mean_text(row) for row in rows)]))
    return lines


def _mean_text(row: Row | None) -> str:
    """ "12.3 ± 1.3" of a share in per cent, "+0.60 ± 0.02" of a cosine."""
    if row is None:
        return "–"
    half = row.value.half_width
    if row.metric.startswith(SHARES):
        return f"{100 * row.value.mean:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
    return f"{row.value.mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def _hyper_parameters(config: CompareConfig, cells: Sequence[Cell]) -> list[str]:
    """Every entry's options; and which of them do not have the learning rate and temperature of the others."""
    first = {(cell.setting, cell.label): cell for cell in reversed(cells) if cell.seed == config.seeds[0]}
    shown = list({cell.label: cell for cell in first.values()}.values())[::-1]
    lines = [
        "Learning rate and budget are the same for all where the table says nothing else. Temperatures are options of",
        "the objectives: each begins at the default of its source unless the config says otherwise.",
        "",
        _row(["objective", "learning rate", "temperature at the start", "options"]),
        _row(["---", "---", "---", "---"]),
    ]
    as_written = {entry.label: entry for entry in config.objectives}  # where `best` is not yet a name
    for cell in shown:
        entry = as_written.get(cell.label, cell.entry)
        parts = [part.model_dump(mode="json", exclude={"tile"}) for part in cell.entry.objective]
        given = [part.model_dump(mode="json", exclude_unset=True, exclude={"tile"}) for part in entry.objective]
        temperatures = ", ".join(f"{p['name']} {p['temperature']}" for p in parts if "temperature" in p)
        options = json.dumps(given) + (", the anchor's encoder as it was drawn" if cell.entry.freeze_anchor else "")
        rate = "that of all" if cell.entry.lr is None else f"{cell.entry.lr:g}"
        lines.append(_row([cell.label, rate if parts else "none: not trained", temperatures or "none", options]))
    return lines


def _heading(metric: str) -> str:
    kind, _, rest = metric.partition("/")
    what, _, score = rest.partition("/")
    name = {"recall_at_1": "R@1", "positive_cosine": "cosine"}.get(kind, kind)
    return f"{name} {what.replace('->', '→')}" + (f", {score.replace('_', ' ')}" if score else "")


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def show(comparison: Comparison, written: Sequence[Path], failures: Sequence[str]) -> None:
    """A table a setting on the terminal, then where everything is."""
    console = Console()
    for setting in comparison.settings:
        shown = headlines(comparison, setting)
        if not comparison.labels_of(setting):
            continue
        table = Table(
            title=f"{setting}: mean over seeds, in per cent (> or <: beyond noise of {comparison.baseline})",
            title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        )  # fmt: skip
        table.add_column("objective", no_wrap=True)
        for heading in shown.values():
            table.add_column(heading, justify="right")
        marks = {"higher": " >", "lower": " <"}
        for label in comparison.labels_of(setting):
            rows = [comparison.find(setting, label, metric) for metric in shown]
            values = ("–" if r is None else f"{100 * r.value.mean:.1f}{marks.get(r.verdict, '  ')}" for r in rows)
            table.add_row(label, *values)
        console.print(table)
    for line in [*comparison.notes, *failures]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if comparison.missing:
        console.print(f"{len(comparison.missing)} cells have no result yet: run the command again", highlight=False)
    for path in written:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
