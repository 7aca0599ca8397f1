"""Tables for the book: tidy metrics of several runs, and the line that says which run a number comes from."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
from IPython.display import HTML

METRICS = {
    "FD-EffNet": "FD-EffNet (lower is better)",
    "KID": "KID (lower is better)",
    "correlation LVEDV": "r of LV volume, asked and measured",
    "correlation RVEDV": "r of RV volume, asked and measured",
    "phase accuracy": "phase accuracy",
    "MS-SSIM": "MS-SSIM between patients",
}
"""What the trade-off shows, and the titles of its panels."""


def model_name(epsilon: float) -> str:
    """What a model of this budget is called; NaN stands for the real patients."""
    special = {0.0: "public data only", math.inf: "no privacy"}
    return "real patients" if math.isnan(epsilon) else special.get(epsilon, f"ε = {epsilon:g}")


def losses_table(losses: Mapping[float, Mapping[str, float]]) -> pd.DataFrame:
    """Held-out denoising losses by epsilon, one row a model."""
    rows = {model_name(epsilon): loss for epsilon, loss in losses.items()}
    table = pd.DataFrame(rows).T.astype({"n_patients": int}).round(4)
    return table.rename(columns={"mean": "loss", "standard_error": "standard error", "n_patients": "patients"})


def metrics_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of one `metrics.json` as a table with one string a cell: value [low, high], and the reference."""

    def cell(value: float | None, low: float | None, high: float | None) -> str:
        if value is None:
            return "not defined"
        return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"

    rows = [
        {
            "metric": " ".join(filter(None, (row["metric"], row["attribute"]))),
            "unit": row["unit"],
            "value [95 %]": cell(row["value"], row["low"], row["high"]),
            f"real patients ({row['reference_kind']})": cell(
                row["reference"], row["reference_low"], row["reference_high"]
            ),
            "patients": row["n_patients"],
            "better": row["better"],
        }
        for row in metrics["rows"]
    ]
    kinds = ["real patients (floor)", "real patients (ceiling)", "real patients (level)"]
    table = pd.DataFrame(rows)
    table["real patients"] = table[[k for k in kinds if k in table]].bfill(axis=1).iloc[:, 0]
    return table[["metric", "unit", "value [95 %]", "real patients", "patients", "better"]].set_index("metric")


def tradeoff_table(evaluations: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run and metric: metric, epsilon, value, low, high, n_patients, run.

    Rows with epsilon NaN hold what real patients reach. Metrics that are not defined for a run are left out.
    """
    rows: list[dict[str, Any]] = []
    for number, metrics in enumerate(evaluations):
        for row in metrics["rows"]:
            known = {
                "metric": " ".join(filter(None, (row["metric"], row["attribute"]))),
                "n_patients": row["n_patients"],
                "run": metrics["model"],
            }
            ours = {key: row[key] for key in ("value", "low", "high")}
            rows.append(known | {"epsilon": float(metrics["epsilon"])} | ours)
            if number == 0:
                theirs = {
                    key: row[f"reference{suffix}"]
                    for key, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
                }
                rows.append(known | {"epsilon": math.nan} | theirs)
    return pd.DataFrame(rows).astype({"value": float, "low": float, "high": float}).dropna(subset=["value"])


def source(run: str, metrics: Mapping[str, Any]) -> HTML:
    """The line under a figure or table that names its run and holds its `metrics.json` to download."""
    data = base64.b64encode(json.dumps(metrics, indent=1).encode()).decode()
    name = escape(run)
    link = f'<a download="{name}.json" href="data:application/json;base64,{data}">metrics.json</a>'
    return HTML(f"<p><small>Run <code>{name}</code>, {link}</small></p>")
