"""The quality report that goes with a release: one page of HTML that shows what was measured on the synthetic cohort.

Plotly's script lies beside the page, once for all figures, so that they show from disk and with no network. Still
pictures would be smaller, but drawing them takes Chromium, which the machine that holds the patients may not have.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

from cardiac_ldm.cohort import Volumes
from cardiac_ldm.report.figures import interval_dots, requested_and_measured
from cardiac_ldm.report.tables import metrics_table, patients_name
from cardiac_ldm.report.walls import captions, synthetic_wall

PLOTTED = ("LVEDV", "LVESV", "RVEDV", "RVESV", "LVEF", "MYOEDTHICK")
"""Attributes that are plotted as asked for and as measured."""

_SIDES = ("value", "low", "high"), ("reference", "reference_low", "reference_high")
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quality of a synthetic cohort</title>
<script src="plotly.min.js"></script>
<style>
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #24292f }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.85rem }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; border-bottom: 1px solid #e3e6ea; text-align: left; vertical-align: top }
</style>
</head>
<body>
<h1>Quality of a synthetic cohort</h1>
<p>$n_volumes volumes of $n_requests synthetic patients, measured beside $n_real_patients $patients of
<code>$reference_cohort</code>. All numbers are in <a href="metrics.json">metrics.json</a>.</p>
<h2>Privacy</h2>
$statement
<h2>What it draws</h2>
<p>The middle slice of each volume, with the phase and the volume of the left ventricle that were asked for.</p>
$wall
<h2>How far from $patients</h2>
<p>Distances of synthetic from $patients, and of these from each other in parts of the same size, which is as near as
can be. Bars are 95 % intervals over patients.</p>
$distances
<h2>Asked for, and drawn</h2>
<p>A segmenter, trained on public patients, reads the synthetic hearts. On the dotted line a heart is what was asked
for.</p>
$control
<h2>Everything that was measured</h2>
<p>Distances have a floor, which the $patients reach among themselves at the same numbers. Control has a ceiling, which
the same networks reach on their volumes. Intervals are over patients.</p>
$table
</body>
</html>
""")


def write_page(
    metrics: Mapping[str, Any], anatomy: pd.DataFrame, cohort: Volumes, statement: str, folder: Path
) -> None:
    """Write `quality.html`, and the `plotly.min.js` that it loads, into a release.

    metrics: of `metrics.json`. anatomy: table of patient, attribute, requested, measured, of `read_anatomy`. cohort:
    on which both were measured. statement: of its privacy, in Markdown.
    """
    with pd.option_context("display.max_colwidth", None):
        table = metrics_table(metrics).reset_index().to_html(index=False, border=0)
    known = [row for row in metrics["rows"] if row["value"] is not None and not row.get("group")]
    floors = [row for row in known if row["reference_kind"] == "floor"]
    pairs = anatomy[anatomy["attribute"].isin(PLOTTED)].dropna().assign(run="synthetic")
    shown = {
        "n_volumes": str(len(cohort.images)),
        **{name: escape(str(metrics[name])) for name in ("n_requests", "n_real_patients", "reference_cohort")},
        "patients": patients_name(metrics),
        "statement": MarkdownIt("js-default").render(statement),  # shows HTML that is in it as text
        "wall": _html("wall", synthetic_wall(cohort.images[:12], captions(cohort.attributes[:12]))),
        "distances": _html("distances", _distances(floors, patients_name(metrics)))
        if floors
        else "<p>No distance was measured.</p>",
        "control": _html("control", requested_and_measured(pairs))
        if len(pairs)
        else "<p>No heart could be measured.</p>",
        "table": table,
    }
    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    (folder / "quality.html").write_text(_PAGE.substitute(shown), encoding="utf-8")


def _html(name: str, figure: go.Figure) -> str:
    """A figure's element; its name in place of a random one lets the same release have the same bytes."""
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displayModeBar": False, "responsive": True}
    )


def _distances(rows: Sequence[Mapping[str, Any]], patients: str) -> go.Figure:
    """Return one panel per distance: the synthetic cohort's, and the floor of patients called so."""
    table = pd.DataFrame(
        {"metric": row["metric"], "training_set": training_set, "n_patients": row["n_patients"]}
        | dict(zip(("value", "low", "high"), (row[side] for side in sides), strict=True))
        for row in rows
        for training_set, sides in (("synthetic", _SIDES[0]), (patients, _SIDES[1]))
    )
    figure = interval_dots(table.astype(dict.fromkeys(_SIDES[0], float)), columns=1)
    return figure.update_xaxes(rangemode="tozero")
