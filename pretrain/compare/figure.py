"""The plot of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pretrain.compare.page import headlines, interval_text
from pretrain.compare.summary import Comparison
from pretrain.report.figures import SERIES_COLOURS

ROW_PX = 26
PANEL_PX = 300
LABEL_PX = 160


def comparison_html(comparison: Comparison) -> str:
    """Means and 95 % intervals of the headline metrics, a panel each, a colour a setting; the page itself."""
    return str(comparison_figure(comparison).to_html(include_plotlyjs=True, full_html=True))


def comparison_figure(comparison: Comparison) -> go.Figure:
    """A line an objective, the first of the config on top; a dotted line at the baseline's mean."""
    shown = {metric: heading for s in comparison.settings for metric, heading in headlines(comparison, s).items()}
    labels = [
        label for label in comparison.labels if any(label in comparison.labels_of(s) for s in comparison.settings)
    ]
    figure = make_subplots(rows=1, cols=len(shown), shared_yaxes=True, subplot_titles=list(shown.values()),
                           horizontal_spacing=0.02)  # fmt: skip
    for column, metric in enumerate(shown, start=1):
        for place, setting in enumerate(comparison.settings):
            _add_points(figure, comparison, metric, setting, place, labels, column)
    num_settings = max(1, len(comparison.settings))
    figure.update_yaxes(range=[len(labels) - 0.5, -0.5], tickvals=list(range(len(labels))), ticktext=labels)
    figure.update_xaxes(title_text="%", rangemode="tozero")
    figure.update_layout(
        template="plotly_white", height=160 + ROW_PX * len(labels) * max(1.0, 0.5 * num_settings),
        width=LABEL_PX + PANEL_PX * len(shown), hovermode="closest", legend={"title": {"text": "setting"}},
        title=f"Means over seeds with 95 % intervals; dotted: {comparison.baseline}",
    )  # fmt: skip
    return figure


def _add_points(
    figure: go.Figure, comparison: Comparison, metric: str, setting: str, place: int, labels: list[str], column: int
) -> None:
    colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
    shift = 0.6 * ((place + 0.5) / len(comparison.settings) - 0.5)
    rows = [(n, row) for n, label in enumerate(labels) if (row := comparison.find(setting, label, metric)) is not None]
    figure.add_scatter(
        x=[100 * row.value.mean for _, row in rows], y=[number + shift for number, _ in rows], mode="markers",
        name=setting, legendgroup=setting, showlegend=column == 1, marker={"size": 7, "color": colour},
        error_x={
            "type": "data", "array": [100 * (row.value.half_width or 0.0) for _, row in rows], "thickness": 1.5,
            "width": 0,
        },
        text=[f"{row.label}, {setting}: {interval_text(row)} %<br>{row.verdict}" for _, row in rows],
        hovertemplate="%{text}<extra></extra>", row=1, col=column,
    )  # fmt: skip
    baseline = comparison.find(setting, comparison.baseline, metric)
    if baseline is not None:
        figure.add_vline(
            x=100 * baseline.value.mean, line={"dash": "dot", "width": 1, "color": colour}, row=1, col=column
        )
