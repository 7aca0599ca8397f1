"""The figure of the book's first page: what a budget costs, and what private patients add at all."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cardiac_ldm.report.figures import BLUE, GREEN, GREY, PURPLE, RULE, TITLE

CAPTION = (
    "Distance of each model's samples to held-out simulated patients, with 95 % intervals over patients, and its "
    "change against the public model, paired over conditions: a change is measured where its interval excludes 0."
)
NARROW = {
    "height": 820,
    "margin": {"t": 140, "r": 20, "b": 60},
    "xaxis": {"domain": [0, 1]},
    "xaxis2": {"domain": [0, 1]},
    "yaxis": {"domain": [0.56, 1]},
    "yaxis2": {"domain": [0, 0.36]},
    "annotations": [{"x": 0.5, "y": 1}, {"x": 0.5, "y": 0.36}],
}
"""How the layout changes on a narrow screen, where the book's script stacks the panels."""


def headline(
    points: pd.DataFrame, changes: pd.DataFrame, references: Mapping[str, tuple[float, float, float]]
) -> go.Figure:
    """Return the study's result: models' distances to held-out patients, and their paired changes from the public one.

    points: columns `model`, `start` (which series), `value`, `low`, `high`. changes: columns `model`, `value`, `low`,
    `high`, paired over conditions. references: name -> value, low, high, drawn as bands (floor and ceiling).
    """
    titles = ("distance to held-out patients", "change from public model")
    figure = make_subplots(1, 2, column_widths=[0.62, 0.38], horizontal_spacing=0.12, subplot_titles=titles)
    colours = dict(zip(dict.fromkeys(points["start"]), (BLUE, PURPLE, GREEN), strict=False))
    symbols = dict(zip(colours, ("circle", "diamond", "square"), strict=False))
    models = list(dict.fromkeys(points["model"]))
    for (name, (value, low, high)), dash in zip(references.items(), ("dash", "dot"), strict=False):
        figure.add_hrect(low, high, fillcolor=GREY, opacity=0.18, line_width=0, row=1, col=1)
        line = {"color": GREY, "dash": dash, "width": 1.5}
        figure.add_scatter(x=models, y=[value] * len(models), name=name, mode="lines", line=line, row=1, col=1)
    shown = [(str(name), rows, 1, colours[name], symbols[name]) for name, rows in points.groupby("start", sort=False)]
    for series, rows, column, colour, symbol in [*shown, ("", changes, 2, BLUE, "circle")]:
        figure.add_scatter(
            x=rows["model"],
            y=rows["value"],
            error_y={"array": rows["high"] - rows["value"], "arrayminus": rows["value"] - rows["low"]},
            customdata=rows[["low", "high"]],
            hovertemplate=f"%{{x}}: %{{y:.0f}} [%{{customdata[0]:.0f}}, %{{customdata[1]:.0f}}]<extra>{series}</extra>",
            name=series,
            mode="markers",
            showlegend=column == 1,
            marker={"size": 10, "color": colour, "symbol": symbol},
            row=1,
            col=column,
        )
    figure.add_hline(0, line={"color": RULE, "dash": "dash", "width": 1.5}, row=1, col=2)
    ticks = [200, 300, 500, 1000, 2000]
    figure.update_yaxes(title="FD-EffNet (log scale, lower is better)", type="log", tickvals=ticks, row=1, col=1)
    figure.update_yaxes(title="change in FD-EffNet", row=1, col=2)
    figure.update_xaxes(title="model", type="category")
    figure.update_annotations(font=TITLE)
    return figure.update_layout(height=460, margin={"t": 100, "b": 60}, meta={"caption": CAPTION, "narrow": NARROW})
