"""The study's figures, in plotly; importing this module makes every plotly figure show in the book and live."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from einops import rearrange
from numpy.typing import ArrayLike, NDArray
from plotly.io.base_renderers import MimetypeRenderer
from plotly.subplots import make_subplots
from plotly.utils import image_array_to_data_uri
from scipy import ndimage

from cardiac_ldm.cohort import ATTRIBUTES, Patients, require_releasable
from cardiac_ldm.errors import ParameterError, StudyError
from cardiac_ldm.report.live import front_end, loader
from cardiac_ldm.report.tables import patients_name

# Okabe & Ito, "Color Universal Design" (2008): told apart by all common kinds of colour vision
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
INK, GRID_LINES = "#24292f", "#e3e6ea"

_AXIS = {"gridcolor": GRID_LINES, "linecolor": "#8c959f", "zeroline": False, "showline": True, "ticks": "outside"}
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


def embed(kind: str, payload: str, height: int, poster: str = "") -> str:
    """Return the HTML in which the book's script finds a figure.

    kind: its class. payload: JSON. height: pixels to keep free. poster: HTML shown until it's drawn.
    """
    data = payload.replace("<", "\\u003c")  # nothing in the data may end the script element
    script = f'<script type="application/json">{data}</script>'
    return f'<div class="{kind}" style="min-height: {height}px">{script}{poster}</div>'


CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False}
"""How plotly shows a figure: with no button that uploads it, which it has by default."""


class BookRenderer(MimetypeRenderer):
    """Shows a figure the way the book draws it, with plotly's own mimetype beside it for live notebooks."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the figure as `text/html` and as plotly's JSON."""
        figure = pio.to_json({**fig_dict, "config": CONFIG}, validate=False)
        html = embed("bk-plot", figure, fig_dict["layout"].get("height", 450))
        if front_end() == "classic":  # the one that doesn't know plotly's mimetype
            html += loader("bk-plot")
        return {"application/vnd.plotly.v1+json": json.loads(figure), "text/html": html}


pio.renderers["book"] = BookRenderer()
pio.renderers.default = "book"


def mosaic(volumes: ArrayLike, columns: int) -> NDArray[np.uint8]:
    """Lay the middle slices of volumes out as tiles.

    volumes: (n, slices, height, width), intensities in [0, 1]; slices that are all zero are padding and don't count.
    columns: tiles in a row. Returns one grey image (rows * (height + 2), columns * (width + 2)).
    """
    slices = []
    for volume in np.asarray(volumes):
        filled = np.flatnonzero(volume.any(axis=(1, 2)))
        slices.append(volume[filled[len(filled) // 2] if len(filled) else len(volume) // 2])
    tiles = np.pad(np.stack(slices), [(0, -len(slices) % columns), (0, 2), (0, 2)], constant_values=1.0)
    grey = rearrange(tiles, "(r c) h w -> (r h) (c w)", c=columns)
    return np.round(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def png(picture: NDArray[np.uint8]) -> str:
    """Return an image, grey (height, width) or in colours (height, width, 3), as a PNG data URI."""
    return image_array_to_data_uri(np.asarray(picture), backend="pypng", compression=9)


def _wall(volumes: NDArray[np.float32], captions: Sequence[str], columns: int) -> go.Figure:
    """Return the tiles of `mosaic` as a figure, each with its caption."""
    _match(captions, len(volumes))
    columns = min(columns, len(volumes))
    height, width = volumes.shape[2] + 2, volumes.shape[3] + 2
    corners = [(i % columns * width, i // columns * height) for i in range(len(volumes))]
    return _captioned(mosaic(volumes, columns), corners, captions)


def _match(captions: Sequence[str], n_volumes: int) -> None:
    if len(captions) != n_volumes or n_volumes == 0:
        raise ParameterError(f"a wall needs one caption per volume: {len(captions)} captions, {n_volumes} volumes")


def _captioned(picture: NDArray[np.uint8], corners: Sequence[tuple[int, int]], captions: Sequence[str]) -> go.Figure:
    """Return a picture as wide as the book's text, a caption in each of these corners (column, row)."""
    height, width = picture.shape[:2]
    figure = go.Figure(go.Image(source=png(picture), hoverinfo="skip", zsmooth="fast"))
    column, row = np.transpose(corners)
    figure.add_scatter(
        x=column + 3,
        y=row + 3,
        text=list(captions),
        mode="text",
        textposition="bottom right",
        textfont={"color": "white", "size": 11, "shadow": "1px 1px 2px black"},
        hoverinfo="skip",
    )
    scale = 682 / width  # the book's text column leaves about that many pixels
    figure.update_xaxes(visible=False, range=[0, width], constrain="domain")
    figure.update_yaxes(visible=False, range=[height, 0], scaleanchor="x", constrain="domain")
    return figure.update_layout(height=round(height * scale) + 20, margin={"l": 10, "r": 10, "t": 10, "b": 10})


def patient_wall(patients: Patients, volumes: Sequence[int], captions: Sequence[str], columns: int = 6) -> go.Figure:
    """Return a wall of the middle slices of patients' volumes.

    volumes: indices, as `patients.images` takes them. captions: one per volume. columns: slices in a row.
    Raises PrivacyError when the patients are private and not simulated.
    """
    require_releasable(patients, "what a patient's heart looks like")
    return _wall(patients.images(volumes), captions, columns)


def stack_wall(patients: Patients, volumes: Sequence[int], captions: Sequence[str]) -> go.Figure:
    """Return whole stacks, a row each from base to apex, with the labels outlined: LV, myocardium and RV.

    volumes: indices, as `patients.images` takes them. captions: one per volume. Raises PrivacyError when the patients
    are private and not simulated.
    """
    require_releasable(patients, "what a patient's heart looks like")
    _match(captions, len(volumes))
    images, labels = patients.images(volumes), patients.labels(volumes)
    shown = np.flatnonzero(images.any(axis=(0, 2, 3)))
    rows = rearrange(np.repeat(images[:, shown, :, :, None], 3, axis=4), "n d h w c -> (n h) (d w) c")
    picture = np.round(255 * np.clip(rows, 0, 1)).astype(np.uint8)
    for label, colour in ((1, SKY), (2, GREEN), (3, VERMILLION)):
        inside = labels[:, shown] == label
        edge = inside & ~ndimage.binary_erosion(inside, np.ones((1, 1, 3, 3), bool))
        picture[rearrange(edge, "n d h w -> (n h) (d w)")] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return _captioned(picture, [(0, i * images.shape[2]) for i in range(len(images))], captions)


def synthetic_wall(volumes: NDArray[np.float32], captions: Sequence[str], columns: int = 6) -> go.Figure:
    """Return a wall of the middle slices of synthetic volumes.

    volumes: (n, slices, height, width) in [0, 1]. captions: one per volume. columns: slices in a row.
    """
    return _wall(np.asarray(volumes), captions, columns)


def attribute_distributions(cohorts: Mapping[str, Patients | NDArray[np.float32]], columns: int = 4) -> go.Figure:
    """Return one small histogram per attribute, with every cohort in it.

    cohorts: name -> patients, or the attributes (n_volumes, 14) of synthetic volumes, NaN where unknown.
    columns: histograms in a row. Raises PrivacyError for patients who are private and not simulated.
    """
    values = {}
    for name, cohort in cohorts.items():
        if isinstance(cohort, np.ndarray):
            values[name] = cohort
        else:
            require_releasable(cohort, "how patients' attributes are distributed")
            values[name] = cohort.attributes
    rows = math.ceil(len(ATTRIBUTES) / columns)
    titles = [f"{a.name} ({a.unit})" if a.unit else a.name for a in ATTRIBUTES]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.09, horizontal_spacing=0.05)
    for i in range(len(ATTRIBUTES)):
        known = {name: v[np.isfinite(v[:, i]), i].astype(float) for name, v in values.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(known.values())), bins=20)
        for (name, sample), colour in zip(known.items(), COLOURS, strict=False):
            if len(sample) == 0:
                continue
            share = 100 * np.histogram(sample, edges)[0] / len(sample)
            figure.add_scatter(
                x=np.round(edges, 4),
                y=np.round(np.append(share, share[-1]), 2),
                name=name,
                legendgroup=name,
                showlegend=i == 0,
                line={"shape": "hv", "color": colour, "width": 1.5},
                fill="tozeroy",
                hovertemplate="%{x}: %{y} % of volumes",
                row=i // columns + 1,
                col=i % columns + 1,
            )
    figure.update_yaxes(rangemode="tozero", showticklabels=False, ticks="")
    return _small_titles(figure).update_layout(height=60 + 190 * rows, margin={"l": 20, "r": 10, "t": 70, "b": 30})


def tradeoff(metrics: pd.DataFrame, labels: Mapping[str, str], columns: int = 2) -> go.Figure:
    """Return one panel per metric: its value against epsilon, with the references it has to be read against.

    metrics: one row per run and metric: columns `metric`, `epsilon` (0: public data only, inf: no privacy, NaN: what
    held-out patients reach), `model` (what those are called), `value`, `low` and `high` (95 % interval), `n_patients`
    and `run`. Rows that share metric and epsilon (seeds) are drawn as their mean, from the lowest `low` to the highest
    `high`.
    labels: metric -> title of its panel; says which metrics are shown, and in which order. columns: panels in a row.
    """
    missing = set(labels) - set(metrics["metric"])
    if missing:
        raise ParameterError(f"no rows for {sorted(missing)}; the table has {sorted(set(metrics['metric']))}")
    columns = min(columns, len(labels))
    rows = math.ceil(len(labels) / columns)
    titles = list(labels.values())
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.3 / rows, horizontal_spacing=0.09)
    private = metrics["epsilon"].between(0, math.inf, inclusive="neither")
    epsilons = sorted(metrics.loc[private, "epsilon"].unique())
    if not epsilons:
        raise ParameterError("a trade-off needs at least one private run: a row with a finite epsilon above 0")
    span = [epsilons[0] / 2.5, epsilons[-1] * 2.5]
    patients = next(iter(metrics.loc[metrics["epsilon"].isna(), "model"]), "")
    for i, metric in enumerate(labels):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        summary = (
            metrics[metrics["metric"] == metric]
            .groupby("epsilon", dropna=False, as_index=False)
            .agg({"value": "mean", "low": "min", "high": "max", "n_patients": "max", "run": "nunique"})
        )
        references = {
            "public data only": (summary["epsilon"] == 0, VERMILLION, "dash"),
            "no privacy": (np.isposinf(summary["epsilon"]), GREEN, "dash"),
            patients: (summary["epsilon"].isna(), "#6e7781", "dot"),
        }
        for name, (chosen, colour, dash) in references.items():
            for point in summary[chosen].itertuples():
                text = f"{name}: {point.value:.3g} [{point.low:.3g}, {point.high:.3g}], {point.n_patients} patients"
                line = {"color": colour, "dash": dash, "width": 1.5}
                shared = {"legendgroup": name, "hoverinfo": "text", "text": text, "mode": "lines"}
                band = {"fill": "toself", "fillcolor": colour, "opacity": 0.12, "line": {"width": 0}}
                corners = [point.low, point.low, point.high, point.high]
                figure.add_scatter(x=[*span, *span[::-1]], y=corners, showlegend=False, **shared, **band, **place)
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
    return _small_titles(figure).update_layout(height=100 + 300 * rows, margin={"t": 80, "b": 70})


def distance_by_size(evaluations: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """Return FD-EffNet against 1 / patients, a line a cohort, and where it meets endlessly many patients.

    evaluations: name -> `metrics.json`. The patients' own line comes from the first.
    """
    curves = {
        name: [point for point in metrics["sizes"] if point["cohort"] == "synthetic"]
        for name, metrics in evaluations.items()
    }
    first = next(iter(evaluations.values()))
    patients = patients_name(first)
    curves[patients] = [point for point in first["sizes"] if point["cohort"] == "real"]
    figure = go.Figure()
    for (name, points), colour in zip(curves.items(), cycle(COLOURS), strict=False):
        if not points:
            continue
        share = np.array([1 / point["n_patients"] for point in points])
        value = np.array([point["value"] for point in points])
        slope, intercept = np.polyfit(share, value, 1)
        line = {"color": "#6e7781" if name == patients else colour}
        hover = "%{text}<extra>" + name + "</extra>"
        text = [f"{p['n_patients']} patients: {p['value']:.0f} [{p['low']:.0f}, {p['high']:.0f}]" for p in points]
        error = {"array": [p["high"] - p["value"] for p in points], "thickness": 1}
        shared = {"legendgroup": name, "line": line}
        figure.add_scatter(
            x=share, y=value, error_y=error, text=text, name=name, mode="markers", hovertemplate=hover, **shared
        )
        ends = np.array([0, share.max()])
        figure.add_scatter(
            x=ends, y=intercept + slope * ends, mode="lines", hoverinfo="skip", showlegend=False, **shared
        )
    counts = sorted({point["n_patients"] for points in curves.values() for point in points})
    figure.update_xaxes(title="patients", tickvals=[0, *(1 / n for n in counts)], ticktext=["∞", *map(str, counts)])
    return figure.update_yaxes(title="FD-EffNet").update_layout(height=420, margin={"t": 70})


def control_scatter(pairs: pd.DataFrame, columns: int = 3) -> go.Figure:
    """Return one panel per attribute: what was measured on synthetic volumes against what was asked for.

    pairs: one row per synthetic volume and attribute: columns `attribute`, `asked` and `measured` (in the attribute's
    unit) and `run` (which model; it colours the points). columns: panels in a row.
    """
    units = {a.name: a.unit for a in ATTRIBUTES}
    names = list(dict.fromkeys(pairs["attribute"]))
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    titles = [f"{name} ({units[name]})" if units.get(name) else name for name in names]
    figure = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.08)
    for i, name in enumerate(names):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        panel = pairs[pairs["attribute"] == name]
        both = panel[["asked", "measured"]].to_numpy(dtype=float)
        ends = [np.nanmin(both), np.nanmax(both)]
        identity = {"mode": "lines", "line": {"color": "#8c959f", "dash": "dot"}, "hoverinfo": "skip"}
        figure.add_scatter(x=ends, y=ends, showlegend=False, **identity, **place)
        for j, (run, points) in enumerate(panel.groupby("run", sort=False)):
            figure.add_scatter(
                x=points["asked"].round(2),
                y=points["measured"].round(2),
                mode="markers",
                marker={"size": 6, "opacity": 0.7, "color": COLOURS[j % len(COLOURS)]},
                name=str(run),
                legendgroup=str(run),
                showlegend=i == 0,
                hovertemplate="asked %{x}, measured %{y}",
                **place,
            )
    figure.update_xaxes(title="asked for")
    figure.update_yaxes(title="measured", col=1)
    return _small_titles(figure).update_layout(height=80 + 300 * rows, margin={"t": 80})


def training_curve(curve: pd.DataFrame, title: str = "loss") -> go.Figure:
    """Return training curves on a log axis. For public training alone: an exact loss on private patients leaks.

    curve: one row per point: columns `step`, `series` (which curve) and `value` (> 0). title: of the vertical axis.
    """
    figure = go.Figure()
    for name, points in curve.groupby("series", sort=False):
        line = {"mode": "lines", "hovertemplate": "%{x}: %{y:.4g}"}
        figure.add_scatter(x=points["step"], y=points["value"], name=str(name), **line)
    figure.update_xaxes(title="step").update_yaxes(title=title, type="log")
    return figure.update_layout(height=380, showlegend=True)


def save_headline(figure: go.Figure, path: str | Path) -> None:
    """Write a figure as a still picture, 900 pixels wide, in the format of the suffix (.svg, .png)."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}{path.suffix}")
    try:
        figure.write_image(scratch, width=900, height=figure.layout.height)
    except (ValueError, RuntimeError) as error:
        remedy = 'pip install "cardiac-ldm[book]"; apt-get install chromium'
        raise StudyError(f"{path}: a still picture needs kaleido and Chromium ({remedy})") from error
    scratch.replace(path)


def _small_titles(figure: go.Figure) -> go.Figure:
    """Set the panels' titles in the text's own size."""
    return figure.update_annotations(font={"size": 13, "weight": 600})


def captions(attributes: NDArray[np.float32]) -> list[str]:
    """Return the phase and LV volume of each row of attributes (n, 14), as far as they're known: "ED 142 mL"."""
    names = [a.name for a in ATTRIBUTES]
    texts = []
    for row in attributes:
        phase = {1.0: "ED", 0.0: "ES"}.get(float(row[names.index("ESED")]), "")
        volume = row[names.index(f"LV{phase}V")] if phase else math.nan
        texts.append(f"{phase} {volume:.0f} mL" if math.isfinite(volume) else phase)
    return texts


def response_matrix(table: pd.DataFrame) -> go.Figure:
    """Return a heat map: the attribute that was moved by row, the one that was measured by column, in steps.

    table: as `response` in `evaluation.control` gives it. A cell says the mean change and, where it isn't 0, what was
    asked; a model whose attributes obey alone shows what was asked everywhere. The interval shows on hovering.
    """
    moved, measured = (list(dict.fromkeys(table[column])) for column in ("moved", "attribute"))
    units = {a.name: a.unit for a in ATTRIBUTES}
    cells = table.assign(
        text=[_said(*steps) for steps in table[["change_steps", "asked_steps"]].to_numpy(dtype=float)],
        hover=[
            f"{row.moved} moved by one step, {row.attribute} by {row.change:.3g} [{row.low:.3g}, {row.high:.3g}] "
            f"{units[str(row.attribute)]} where {row.asked:.3g} was asked; {row.n_patients} patients"
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
    return figure.update_layout(height=150 + 44 * len(moved), margin={"l": 130, "t": 130, "b": 20})


def _said(change: float, asked: float) -> str:
    """A cell's text: what happened and, where anything was, what was asked."""
    if not math.isfinite(change):
        return "not<br>read"
    happened, wanted = (f"{round(steps, 2) + 0:.2f}".replace("-", "−") for steps in (change, asked))
    return f"{happened}<br>of {wanted}" if abs(asked) >= 0.005 else happened


def calibration_plot(bins: pd.DataFrame, columns: int = 3) -> go.Figure:
    """Return one panel per attribute: the mean that was measured against what was asked for, with the identity.

    bins: rows of `calibration` in `evaluation.control` for one or more models, with the column `run` (which one; it
    colours the points). columns: panels in a row.
    """
    return _asked_and_measured(bins.assign(symbol="circle"), columns)


def beyond_range(table: pd.DataFrame, columns: int = 3) -> go.Figure:
    """Return one panel per attribute: the mean that was measured against what was asked for, beyond all patients too.

    table: rows of `beyond_range` in `evaluation.control` for one or more models, with the column `run`. Open points lie
    outside of what public patients have. columns: panels in a row.
    """
    inside = table["where"] == "inside"
    figure = _asked_and_measured(table.assign(symbol=np.where(inside, "circle", "circle-open")), columns)
    ticks = [2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000]
    return figure.update_xaxes(type="log", tickvals=ticks).update_yaxes(type="log", tickvals=ticks)


def _asked_and_measured(points: pd.DataFrame, columns: int) -> go.Figure:
    """Return points with their intervals and the identity, a panel per attribute, a colour per run."""
    units = {a.name: a.unit for a in ATTRIBUTES}
    names = list(dict.fromkeys(points["attribute"]))
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    titles = [f"{name} ({units[name]})" if units[name] else name for name in names]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.3 / rows, horizontal_spacing=0.08)
    colours = {run: COLOURS[j % len(COLOURS)] for j, run in enumerate(dict.fromkeys(points["run"]))}
    for i, name in enumerate(names):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        panel = points[points["attribute"] == name]
        ends = [panel["asked"].min(), panel["asked"].max()]
        identity = {"mode": "lines", "line": {"color": "#8c959f", "dash": "dot"}, "hoverinfo": "skip"}
        figure.add_scatter(x=ends, y=ends, showlegend=False, **identity, **place)
        for run, part in panel.groupby("run", sort=False):
            figure.add_scatter(
                x=part["asked"],
                y=part["measured"],
                error_y={
                    "array": part["high"] - part["measured"],
                    "arrayminus": part["measured"] - part["low"],
                    "thickness": 1.2,
                    "width": 3,
                },
                customdata=part[["low", "high", "n_patients"]],
                hovertemplate="asked %{x:.3g}, measured %{y:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}]<br>"
                "%{customdata[2]} patients",
                mode="lines+markers",
                marker={"size": 7, "symbol": part["symbol"]},
                line={"color": colours[run], "width": 1.2},
                name=str(run),
                legendgroup=str(run),
                showlegend=i == 0,
                **place,
            )
    figure.update_xaxes(title="asked for", row=rows)
    figure.update_yaxes(title="measured", col=1)
    return _small_titles(figure).update_layout(height=100 + 240 * rows, margin={"t": 80})


def utility_dots(rows: pd.DataFrame, against: str = "", columns: int = 3) -> go.Figure:
    """Return one panel per measure: what each arm reaches on test patients as a dot with its 95 % interval.

    rows: of `utility_rows`. against: the baseline beyond which arms are counted, "" for none. columns: panels in a row.
    """
    chosen = rows[rows["against"] == against]
    if chosen.empty:
        raise ParameterError(f"against: no rows for {against!r}; choose from {sorted(set(rows['against']))}")
    panels, arms = list(chosen["metric"].unique()), list(chosen["arm"].unique())
    n_rows = math.ceil(len(panels) / columns)
    titles = [panel.replace(" LVEDV", "<br>LVEDV") for panel in panels]
    spacing = {"vertical_spacing": 0.2 / n_rows, "horizontal_spacing": 0.03}
    figure = make_subplots(n_rows, columns, subplot_titles=titles, shared_yaxes=True, **spacing)
    for i, panel in enumerate(panels):
        points, place = chosen[chosen["metric"] == panel], {"row": i // columns + 1, "col": i % columns + 1}
        colours = [BLUE if "synthetic" in arm else "#6e7781" for arm in points["arm"]]
        ends = {"array": points["high"] - points["value"], "arrayminus": points["value"] - points["low"]}
        figure.add_scatter(
            x=points["value"],
            y=points["arm"],
            error_x={**ends, "color": "#8c959f", "thickness": 1.5, "width": 0},
            customdata=points[["low", "high", "n_patients"]],
            hovertemplate="%{y}: %{x:.3g} [%{customdata[0]:.3g}, %{customdata[1]:.3g}], %{customdata[2]} test patients"
            "<extra></extra>",
            mode="markers",
            marker={"size": 8, "color": colours},
            showlegend=False,
            **place,
        )
        if against:
            figure.add_vline(x=0, line={"color": "#8c959f", "dash": "dot"}, **place)
    figure.update_yaxes(range=[len(arms) - 0.5, -0.5], categoryorder="array", categoryarray=arms, automargin=True)
    return _small_titles(figure).update_layout(height=90 + n_rows * (60 + 26 * len(arms)), margin={"l": 10, "b": 40})


def audit_bounds(rows: pd.DataFrame) -> go.Figure:
    """Return what audits show beside what is stated: a row a model, and one for each control with less noise.

    rows: columns `model`, `noise` (its factor; 1 is the mechanism as it is), `bound`, `shown` (a lower bound on
    epsilon) and `stated` (the epsilon of the ledger).
    """
    rows = rows.assign(row=rows.model.where(rows.noise == 1, rows.model + ", noise × " + rows.noise.map("{:g}".format)))
    names = list(dict.fromkeys(rows["row"]))
    figure = go.Figure()
    stated = rows[np.isfinite(rows["stated"])].drop_duplicates("row")
    tick = {"symbol": "line-ns", "size": 28, "line": {"width": 3, "color": INK}}
    hover = {"hovertemplate": "%{y}: %{x:.2f}"}
    figure.add_scatter(x=stated["stated"], y=stated["row"], name="stated", mode="markers", marker=tick, **hover)
    symbols = ("circle", "cross", "diamond", "square")
    for symbol, (bound, points) in zip(symbols, rows.groupby("bound", sort=False), strict=True):
        look = {"mode": "markers", "marker": {"symbol": symbol, "size": 10}, "cliponaxis": False}
        figure.add_scatter(x=points["shown"], y=points["row"], name=f"shown: {bound}", **look, **hover)
    figure.update_xaxes(title="ε at the ledger's δ", rangemode="tozero")
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], title="")
    return figure.update_layout(height=140 + 48 * len(names), margin={"l": 150, "t": 60})
