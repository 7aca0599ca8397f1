"""The study's figures, in plotly; importing this module makes every plotly figure show in the book and live."""

import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from cardiac_ldm.cohort import ATTRIBUTES, Patients, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.report import live
from cardiac_ldm.report.tables import RECONSTRUCTED, TITLES, patients_name

# Okabe & Ito, "Color Universal Design" (2008): told apart by all common kinds of colour vision
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
INK, GREY, RULE, GRID_LINES = "#24292f", "#6e7781", "#8c959f", "#e3e6ea"

TITLE = {"size": 13, "weight": 600}
_AXIS = {"gridcolor": GRID_LINES, "linecolor": RULE, "zeroline": False, "showline": True, "ticks": "outside"}
pio.templates["cardiac"] = go.layout.Template(
    layout={
        "colorway": COLOURS,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": {**_AXIS, "title": {"font": {"size": 13}}},
        "yaxis": {**_AXIS, "title": {"font": {"size": 13}}},
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yref": "container", "yanchor": "top"},
        "hoverlabel": {"bgcolor": "white", "bordercolor": GRID_LINES, "font": {"color": INK}},
    }
)
pio.templates.default = "cardiac"
pio.renderers["book"] = live.BookRenderer()
pio.renderers.default = "book"


CAPTIONS = {
    "attribute_distributions": "How each attribute is distributed: the share of volumes, by cohort.",
    "tradeoff": "Each measure against the privacy budget, with 95 % intervals over patients. Dashed lines with bands "
    "are models of public data only and without privacy, the dotted one is what the held-out patients reach.",
    "distance_by_size": "FD-EffNet against one over the number of patients, with 95 % intervals and fitted lines. An "
    "intercept is an extrapolation: that of patients against patients isn't 0 either.",
    "requested_and_measured": "Measured against requested, by attribute and model; the dotted line is the identity. "
    "Bars are 95 % intervals of means.",
    "beyond_range": "Measured against requested on logarithmic axes, with 95 % intervals; open points lie outside of "
    "the range of public patients.",
    "training_curve": "The training loss on public patients, by step, on a logarithmic axis.",
    "response_matrix": "Row by row one attribute is moved by a step: the mean change of each measured attribute, in "
    "steps, and what was requested. Intervals show on hovering and in the run's metrics.",
    "interval_dots": "Each measure with its 95 % interval over patients; synthetic ones in blue.",
    "audit_bounds": "Lower bounds on ε that the audit shows (points) beside the ε that is stated (bars).",
}
"""What stands under a figure, by the function that draws it."""


def model_colours(names: Iterable[str]) -> dict[str, str]:
    """Return the colour of each model, the same in every figure; those with a budget take the rest in turn."""
    known = {"public data only": VERMILLION, "no privacy": GREEN, RECONSTRUCTED: ORANGE}
    rest = cycle((SKY, BLUE, PURPLE))
    return {name: known.get(name) or next(rest) for name in names}


def _captioned(figure: go.Figure, name: str) -> go.Figure:
    """Put the caption of a function's figures beside it."""
    return figure.update_layout(meta={"caption": CAPTIONS[name]})


def _facets(figure: go.Figure, height: float, margin: Mapping[str, float], *, shared_y: bool = False) -> go.Figure:
    """Give panels axes of their own, or the vertical one of their row, and their titles the text's size."""
    figure.for_each_annotation(lambda title: title.update(text=title.text.partition("=")[2]))
    figure.update_annotations(font=TITLE)
    figure.update_xaxes(matches=None, showticklabels=True)
    if not shared_y:
        figure.update_yaxes(matches=None, showticklabels=True)
    return figure.update_layout(height=height, margin=margin, legend_title_text="")


def attribute_distributions(cohorts: Mapping[str, Patients | NDArray[np.float32]]) -> go.Figure:
    """Return one small histogram per attribute, with every cohort in it.

    cohorts: name -> patients, or the attributes (n_volumes, 14) of synthetic volumes, NaN where unknown. Raises
    PrivacyError for patients who are private and not simulated.
    """
    values = {}
    for name, cohort in cohorts.items():
        if not isinstance(cohort, np.ndarray):
            require_releasable(cohort, "how patients' attributes are distributed")
        values[name] = cohort if isinstance(cohort, np.ndarray) else cohort.attributes
    bars = []
    for i, attribute in enumerate(ATTRIBUTES):
        known = {name: v[np.isfinite(v[:, i]), i].astype(float) for name, v in values.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(known.values())), bins=20)
        for name, sample in known.items():
            if len(sample):
                share = np.round(100 * np.histogram(sample, edges)[0] / len(sample), 2)
                about = {"cohort": name, "attribute": TITLES[attribute.name]}
                bars.append(pd.DataFrame({"x": np.round(edges, 4), "share": np.append(share, share[-1])} | about))
    figure = px.line(
        pd.concat(bars),
        x="x",
        y="share",
        color="cohort",
        line_shape="hv",
        facet_col="attribute",
        facet_col_wrap=4,
        facet_row_spacing=0.09,
        facet_col_spacing=0.05,
        category_orders={"attribute": list(TITLES.values()), "cohort": list(cohorts)},
        labels={"x": "", "share": ""},
    )
    figure.update_traces(fill="tozeroy", line_width=1.5, hovertemplate="%{x}: %{y} % of volumes")
    _facets(figure, 60 + 190 * math.ceil(len(ATTRIBUTES) / 4), {"l": 20, "r": 10, "t": 70, "b": 30})
    figure.update_yaxes(rangemode="tozero", ticks="", showticklabels=False)
    return _captioned(figure.update_yaxes(title="share of volumes", col=1), "attribute_distributions")


def tradeoff(metrics: pd.DataFrame, labels: Mapping[str, str]) -> go.Figure:
    """Return one panel per metric: its value against epsilon, with the references it has to be read against.

    metrics: one row per run and metric: columns `metric`, `epsilon` (0: public data only, inf: no privacy, NaN: what
    held-out patients reach), `model` (what those are called), `value`, `low` and `high` (95 % interval), `n_patients`
    and `run`. Rows that share metric and epsilon (seeds) are drawn as their mean, from the lowest `low` to the highest
    `high`.
    labels: metric -> title of its panel; says which metrics are shown, and in which order.
    """
    missing = set(labels) - set(metrics["metric"])
    if missing:
        raise ParameterError(f"no rows for {sorted(missing)}; the table has {sorted(set(metrics['metric']))}")
    private = metrics["epsilon"].between(0, math.inf, inclusive="neither")
    epsilons = sorted(metrics.loc[private, "epsilon"].unique())
    if not epsilons:
        raise ParameterError("a trade-off needs at least one private run: a row with a finite epsilon above 0")
    columns = min(2, len(labels))
    rows, titles = math.ceil(len(labels) / columns), list(labels.values())
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.3 / rows, horizontal_spacing=0.09)
    span = [epsilons[0] / 2.5, epsilons[-1] * 2.5]
    patients = next(iter(metrics.loc[metrics["epsilon"].isna(), "model"]), "")
    references = {
        0.0: ("public data only", VERMILLION, "dash"),
        math.inf: ("no privacy", GREEN, "dash"),
        math.nan: (patients, GREY, "dot"),
    }
    for i, metric in enumerate(labels):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        summary = (
            metrics[metrics["metric"] == metric]
            .groupby("epsilon", dropna=False, as_index=False)
            .agg({"value": "mean", "low": "min", "high": "max", "n_patients": "max", "run": "nunique"})
        )
        for epsilon, (name, colour, dash) in references.items():
            for point in summary[summary["epsilon"].isin([epsilon])].itertuples():
                text = f"{name}: {point.value:.3g} [{point.low:.3g}, {point.high:.3g}], {point.n_patients} patients"
                shared = {"legendgroup": name, "hoverinfo": "text", "text": text, "mode": "lines"}
                band = {"fill": "toself", "fillcolor": colour, "opacity": 0.12, "line": {"width": 0}}
                corners = [point.low, point.low, point.high, point.high]
                figure.add_scatter(x=[*span, *span[::-1]], y=corners, showlegend=False, **shared, **band, **place)
                line = {"color": colour, "dash": dash, "width": 1.5}
                ends = [point.value, point.value]
                figure.add_scatter(x=span, y=ends, name=name, showlegend=i == 0, line=line, **shared, **place)
        points = summary[summary["epsilon"].isin(epsilons)]
        figure.add_scatter(
            x=points["epsilon"],
            y=points["value"],
            error_y={"array": points["high"] - points["value"], "arrayminus": points["value"] - points["low"]},
            customdata=points[["low", "high", "n_patients", "run"]],
            hovertemplate="ε = %{x}: %{y:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<br>"
            "%{customdata[2]} patients, %{customdata[3]} run(s)<extra></extra>",
            name="private",
            legendgroup="private",
            showlegend=i == 0,
            mode="lines+markers",
            marker={"size": 9},
            line={"color": BLUE},
            **place,
        )
    ticks = [f"{epsilon:g}" for epsilon in epsilons]
    figure.update_xaxes(type="log", range=np.log10(span).tolist(), tickvals=epsilons, ticktext=ticks)
    figure.update_xaxes(title="ε per patient", row=rows)
    figure.update_annotations(font=TITLE)
    return _captioned(figure.update_layout(height=100 + 300 * rows, margin={"t": 80, "b": 70}), "tradeoff")


def distance_by_size(evaluations: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Return FD-EffNet against 1 / patients, a line a cohort, and where it meets endlessly many patients.

    evaluations: name -> `metrics.json`. The patients' own line comes from the first.
    """
    first = next(iter(evaluations.values()))
    patients = patients_name(first)
    curves = {name: pd.DataFrame(metrics["sizes"]) for name, metrics in evaluations.items() if metrics["sizes"]}
    curves = {name: points[points["cohort"] == "synthetic"] for name, points in curves.items()}
    if first["sizes"]:
        curves[patients] = pd.DataFrame(first["sizes"]).query("cohort == 'real'")
    figure, colours = go.Figure(), model_colours(name for name in curves if name != patients)
    for name, points in curves.items():
        share = 1 / points["n_patients"].to_numpy()
        slope, intercept = np.polyfit(share, points["value"], 1)
        ends = np.array([0, share.max()])
        shared = {"legendgroup": name, "line": {"color": colours.get(name, GREY)}}
        figure.add_scatter(
            x=share,
            y=points["value"],
            error_y={"array": points["high"] - points["value"], "thickness": 1},
            customdata=points[["n_patients", "low", "high"]],
            hovertemplate=f"%{{customdata[0]}} patients: %{{y:.0f}} [%{{customdata[1]:.0f}}, %{{customdata[2]:.0f}}]"
            f"<extra>{name}</extra>",
            name=name,
            mode="markers",
            **shared,
        )
        fitted = intercept + slope * ends
        figure.add_scatter(x=ends, y=fitted, mode="lines", hoverinfo="skip", showlegend=False, **shared)
    counts = sorted({count for points in curves.values() for count in points["n_patients"]})
    figure.update_xaxes(title="patients", tickvals=[0, *(1 / n for n in counts)], ticktext=["∞", *map(str, counts)])
    figure.update_yaxes(title="FD-EffNet").update_layout(height=420, margin={"t": 70})
    return _captioned(figure, "distance_by_size")


def requested_and_measured(points: pd.DataFrame) -> go.Figure:
    """Return one panel per attribute: what was measured against what was asked for, with the identity.

    points: columns `attribute`, `requested` and `measured` (in the attribute's unit) and `run` (which model; it colours
    the points); with `low`, `high` and `n_patients`, as `calibration` in `evaluation.control` gives them, points are
    means with their intervals.
    """
    means = "low" in points
    runs, panels = list(points["run"].unique()), [TITLES[name] for name in points["attribute"].unique()]
    ends = points.groupby("attribute", sort=False)["requested"].agg(["min", "max"]).melt(ignore_index=False)["value"]
    identity = pd.DataFrame(
        {"attribute": ends.index, "requested": ends.to_numpy(), "measured": ends.to_numpy(), "run": ""}
    )
    table = pd.concat([identity, points], ignore_index=True)
    if means:
        table = table.assign(above=table["high"] - table["measured"], below=table["measured"] - table["low"])
    rows = math.ceil(len(panels) / 3)
    figure = px.line(
        table.assign(panel=table["attribute"].map(TITLES)),
        x="requested",
        y="measured",
        error_y="above" if means else None,
        error_y_minus="below" if means else None,
        custom_data=["low", "high", "n_patients"] if means else None,
        color="run",
        color_discrete_map={"": RULE, **model_colours(runs)},
        markers=True,
        facet_col="panel",
        facet_col_wrap=3,
        facet_row_spacing=0.3 / rows,
        facet_col_spacing=0.08,
        category_orders={"panel": panels},
    )
    said = " [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<br>%{customdata[2]} patients" if means else ""
    figure.update_traces(
        mode="lines+markers" if means else "markers",
        marker={"size": 7 if means else 6, "opacity": 1 if means else 0.7},
        line_width=1.2,
        hovertemplate=f"requested %{{x:.4g}}, measured %{{y:.4g}}{said}",
    )
    dotted = {"mode": "lines", "line": {"dash": "dot"}, "hovertemplate": None, "hoverinfo": "skip", "showlegend": False}
    figure.update_traces(dotted, {"name": ""})
    return _captioned(_facets(figure, 100 + (240 if means else 300) * rows, {"t": 80}), "requested_and_measured")


def beyond_range(table: pd.DataFrame) -> go.Figure:
    """Return `requested_and_measured` on log axes, beyond all patients too; open points lie outside of what these have.

    table: rows of `beyond_range` in `evaluation.control` for one model, with the column `run`.
    """
    figure = requested_and_measured(table)
    inside = [part["where"] == "inside" for _, part in table.groupby("attribute", sort=False)]
    models = [trace for trace in figure.data if trace.name]
    for trace, known in zip(models, inside, strict=True):
        trace.marker.symbol = np.where(known, "circle", "circle-open")
    ticks = [2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000]
    figure.update_xaxes(type="log", tickvals=ticks).update_yaxes(type="log", tickvals=ticks)
    return _captioned(figure, "beyond_range")


def training_curve(curve: pd.DataFrame, title: str = "loss") -> go.Figure:
    """Return training curves on a log axis. For public training alone: an exact loss on private patients leaks.

    curve: one row per point: columns `step`, `series` (which curve) and `value` (> 0). title: of the vertical axis.
    """
    figure = px.line(curve, x="step", y="value", color="series", log_y=True, labels={"value": title})
    figure.update_traces(hovertemplate="%{x}: %{y:.4g}")
    return _captioned(figure.update_layout(height=380, showlegend=True, legend_title_text=""), "training_curve")


def response_matrix(table: pd.DataFrame) -> go.Figure:
    """Return a heat map: the attribute that was moved by row, the one that was measured by column, in steps.

    table: as `response` in `evaluation.control` gives it. A cell says the mean change and, where it isn't 0, what was
    asked; a model whose attributes obey alone shows what was asked everywhere. The interval shows on hovering.
    """
    moved, measured = (list(dict.fromkeys(table[column])) for column in ("moved", "attribute"))
    units = {a.name: a.unit for a in ATTRIBUTES}
    cells = table.assign(
        text=[_said(*steps) for steps in table[["change_steps", "requested_steps"]].to_numpy(dtype=float)],
        hover=[
            f"{row.moved} moved by one step, {row.attribute} by {row.change:.3g} [{row.low:.3g}, {row.high:.3g}] "
            f"{units[str(row.attribute)]} where {row.requested:.3g} was asked; {row.n_patients} patients"
            for row in table.itertuples()
        ],
    )
    grid = {
        name: cells.pivot(index="moved", columns="attribute", values=name).loc[moved, measured]
        for name in ("change_steps", "text", "hover")
    }
    figure = go.Figure(
        go.Heatmap(
            x=measured,
            y=moved,
            z=grid["change_steps"],
            text=grid["text"],
            customdata=grid["hover"],
            texttemplate="%{text}",
            textfont={"size": 11},
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=[[0, VERMILLION], [0.5, "white"], [1, BLUE]],
            zmin=-1.5,
            zmax=1.5,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "steps", "font": {"size": 13}}, "thickness": 12, "tickvals": [-1, 0, 1]},
        )
    )
    figure.update_xaxes(title={"text": "measured", "standoff": 0}, side="top", tickangle=-45, showgrid=False, ticks="")
    figure.update_yaxes(title="moved by one step", autorange="reversed", showgrid=False, ticks="")
    figure.update_layout(height=150 + 44 * len(moved), margin={"l": 130, "t": 130, "b": 20})
    return _captioned(figure, "response_matrix")


def _said(change: float, requested: float) -> str:
    """A cell's text: what happened and, where anything was, what was asked."""
    if not math.isfinite(change):
        return "not<br>read"
    happened, wanted = (f"{round(steps, 2) + 0:.2f}".replace("-", "−") for steps in (change, requested))
    return f"{happened}<br>of {wanted}" if abs(requested) >= 0.005 else happened


def interval_dots(rows: pd.DataFrame, columns: int = 3) -> go.Figure:
    """Return one panel per metric: a dot for each training set with its 95 % interval, synthetic ones in blue.

    rows: columns `training_set`, `metric`, `value`, `low`, `high` and `n_patients`. columns: panels in a row.
    """
    panels, training_sets = list(rows["metric"].unique()), list(rows["training_set"].unique())
    n_rows = math.ceil(len(panels) / columns)
    figure = px.scatter(
        rows.assign(above=rows["high"] - rows["value"], below=rows["value"] - rows["low"]),
        x="value",
        y="training_set",
        error_x="above",
        error_x_minus="below",
        custom_data=["low", "high", "n_patients"],
        facet_col="metric",
        facet_col_wrap=columns,
        facet_row_spacing=(0.2 if columns > 1 else 0.5) / n_rows,
        facet_col_spacing=0.03,
        category_orders={"metric": panels, "training_set": training_sets},
        labels={"value": "", "training_set": ""},
    )
    figure.for_each_trace(
        lambda trace: trace.update(
            marker_color=[BLUE if "synthetic" in training_set else GREY for training_set in trace.y]
        )
    )
    figure.update_traces(
        error_x={"color": RULE, "thickness": 1.5, "width": 0},
        marker_size=8,
        hovertemplate="%{y}: %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}], %{customdata[2]} patients"
        "<extra></extra>",
    )
    figure.update_yaxes(automargin=True)
    figure.update_xaxes(title="value", row=1)  # px counts rows from below
    _facets(figure, 90 + n_rows * (60 + 26 * len(training_sets)), {"l": 10, "b": 40}, shared_y=True)
    return _captioned(figure, "interval_dots")


def utility_dots(rows: pd.DataFrame) -> go.Figure:
    """Return `interval_dots` of what training data is worth on test patients: rows of `utility_rows`."""
    alone = rows[rows["against"] == ""]
    return interval_dots(alone.assign(metric=alone["metric"].str.replace(" LVEDV", "<br>LVEDV")))


def audit_bounds(rows: pd.DataFrame) -> go.Figure:
    """Return what audits show beside what is stated: a row a model, and one for each control with less noise.

    rows: columns `model`, `noise` (its factor; 1 is the mechanism as it is), `bound`, `shown` (a lower bound on
    epsilon) and `stated` (the epsilon of the ledger).
    """
    rows = rows.assign(row=rows.model.where(rows.noise == 1, rows.model + ", noise × " + rows.noise.map("{:g}".format)))
    names = list(dict.fromkeys(rows["row"]))
    stated = rows[np.isfinite(rows["stated"])].drop_duplicates("row")
    tick = {"symbol": "line-ns", "size": 28, "line": {"width": 3, "color": INK}}
    figure = go.Figure(go.Scatter(x=stated["stated"], y=stated["row"], name="stated", mode="markers", marker=tick))
    shown = rows.assign(bound="shown: " + rows["bound"])
    symbols = ["circle", "cross", "diamond", "square"]
    points = px.scatter(shown, x="shown", y="row", color="bound", symbol="bound", symbol_sequence=symbols)
    figure.add_traces(points.update_traces(marker_size=10, cliponaxis=False).data)
    figure.update_traces(hovertemplate="%{y}: %{x:.2f}")
    figure.update_xaxes(title="ε at the ledger's δ", rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], title="")
    return _captioned(figure.update_layout(height=140 + 48 * len(names), margin={"l": 150, "t": 60}), "audit_bounds")
