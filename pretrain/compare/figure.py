"""The plot of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pretrain.compare.page import headlines, interval_text
from pretrain.compare.summary import Comparison
from pretrain.report.figures import SERIES_COLOURS

ROW_PX = 26
PANEL_PX = 320
PANELS_A_ROW = 3
LABEL_PX = 160
TOP_PX, BOTTOM_PX = 120, 60  # title and legend; ticks of the lowest panels


def comparison_html(comparison: Comparison) -> str:
    """Means and 95 % intervals of the headline metrics, a panel each, a colour a setting; the page itself."""
    return str(comparison_figure(comparison).to_html(include_plotlyjs=True, full_html=True))


def comparison_figure(comparison: Comparison) -> go.Figure:
    """A line an objective, the first of the config on top; a dotted line at the baseline's mean."""
    shown = {metric: heading for s in comparison.settings for metric, heading in headlines(comparison, s).items()}
    labels = [
        label for label in comparison.labels if any(label in comparison.labels_of(s) for s in comparison.settings)
    ]
    num_columns = min(PANELS_A_ROW, max(1, len(shown)))
    num_rows = max(1, math.ceil(len(shown) / num_columns))
    panel_px = ROW_PX * len(labels) * max(1.0, 0.4 * len(comparison.settings))
    figure = make_subplots(
        rows=num_rows, cols=num_columns, shared_yaxes=True, subplot_titles=list(shown.values()),
        horizontal_spacing=0.05, vertical_spacing=min(0.1, 80 / (num_rows * panel_px)),
    )  # fmt: skip
    for panel, metric in enumerate(shown):
        for place, setting in enumerate(comparison.settings):
            _add_points(figure, comparison, metric, setting, place, labels, panel, num_columns)
    figure.update_yaxes(range=[len(labels) - 0.5, -0.5], tickvals=list(range(len(labels))), ticktext=labels)
    figure.update_xaxes(ticksuffix=" %", rangemode="tozero")
    height = TOP_PX + BOTTOM_PX + (panel_px + 80) * num_rows
    figure.update_layout(
        template="plotly_white", height=height, width=LABEL_PX + PANEL_PX * num_columns,
        hovermode="closest", showlegend=True, margin={"t": TOP_PX, "b": BOTTOM_PX},
        # On the left, under the title: the toolbar lies over the right.
        legend={"orientation": "h", "x": 0, "y": 1 - 50 / height, "yanchor": "top", "yref": "container"},
        title={
            "text": f"Means over seeds with 95 % intervals; dotted: {comparison.baseline}",
            "y": 1 - 20 / height, "yanchor": "top",
        },
    )  # fmt: skip
    return figure


def _add_points(
    figure: go.Figure, comparison: Comparison, metric: str, setting: str, place: int, labels: list[str], panel: int,
    num_columns: int,
) -> None:  # fmt: skip
    row, column = panel // num_columns + 1, panel % num_columns + 1
    colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
    shift = 0.6 * ((place + 0.5) / len(comparison.settings) - 0.5)
    found = [(n, it) for n, label in enumerate(labels) if (it := comparison.find(setting, label, metric)) is not None]
    figure.add_scatter(
        x=[100 * it.value.mean for _, it in found], y=[number + shift for number, _ in found], mode="markers",
        name=setting, legendgroup=setting, showlegend=panel == 0, marker={"size": 7, "color": colour},
        error_x={
            "type": "data", "array": [100 * (it.value.half_width or 0.0) for _, it in found], "thickness": 1.5,
            "width": 0,
        },
        text=[f"{it.label}, {setting}: {interval_text(it)} %<br>{it.verdict}" for _, it in found],
        hovertemplate="%{text}<extra></extra>", row=row, col=column,
    )  # fmt: skip
    baseline = comparison.find(setting, comparison.baseline, metric)
    if baseline is not None:
        figure.add_vline(
            x=100 * baseline.value.mean, line={"dash": "dot", "width": 1, "color": colour}, row=row, col=column
        )
