"""Tables for the book: tidy metrics of several runs, and the line that says which run a number comes from."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, PatientRecord, Patients, require_releasable
from cardiac_ldm.cohort.attributes import LV, MYOCARDIUM, RV

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


def attributes_table(cohorts: Mapping[str, Patients]) -> pd.DataFrame:
    """Mean ± standard deviation of every attribute by cohort and diagnostic group, and what share of volumes lacks it.

    Raises PrivacyError for patients who are private and not simulated.
    """
    columns = {}
    for name, patients in cohorts.items():
        require_releasable(patients, "means and spreads of the patients' attributes")
        group = np.array([str(g or "") for g in patients.groups])[patients.owners]
        for label in sorted(set(group)):
            rows = patients.attributes[group == label].astype(np.float64)
            columns[name, label, f"{len(set(patients.owners[group == label]))} patients"] = [
                _moments(column) for column in rows.T
            ]
    units = [f"{a.name} ({a.unit})" if a.unit else a.name for a in ATTRIBUTES]
    return pd.DataFrame(columns, index=pd.Index(units, name="attribute"))


def _moments(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return "missing"
    lacking = "" if len(known) == len(values) else f" ({1 - len(known) / len(values):.0%} missing)"
    return f"{known.mean():.3g} ± {known.std():.2g}{lacking}"


def quality_table(cohorts: Mapping[str, Patients]) -> pd.DataFrame:
    """In how many patients of each cohort something about the prepared volumes asks for a look; read one by one.

    Raises PrivacyError for patients who are private and not simulated.
    """
    columns = {}
    for name, patients in cohorts.items():
        require_releasable(patients, "what is odd about its patients")
        found = pd.DataFrame([_oddities(record) for record in patients])
        columns[f"{name} ({len(patients)} patients)"] = found.sum()
    return pd.DataFrame(columns).rename_axis("patients in whom").astype(int)


def _oddities(record: PatientRecord) -> dict[str, bool]:
    images, labels = record.images, record.labels
    heart = np.asarray(labels > 0)
    depth = np.asarray(heart.any(axis=(2, 3)))
    span = [np.ptp(np.flatnonzero(d)) + 1 if d.any() else 0 for d in depth]
    volume = dict(
        zip(record.attributes[:, ATTRIBUTE_NAMES.index("ESED")], (labels == LV).sum(axis=(1, 2, 3)), strict=True)
    )
    blood, muscle = (np.median(images[labels == k]) if (labels == k).any() else np.nan for k in (LV, MYOCARDIUM))
    return {
        "nobody has labelled the heart": not record.labelled,
        "something was mended in reading or preparing": bool(record.repairs),
        "a phase is missing": not {0.0, 1.0} <= set(volume),
        "the heart reaches the edge of the field": bool(heart[..., [0, -1], :].any() or heart[..., [0, -1]].any()),
        "a slice within the heart is blank": bool((depth & ~images.any(axis=(2, 3))).any()),
        "a slice within the heart is unlabelled": bool((np.asarray(span) != depth.sum(axis=1)).any()),
        "fewer than 6 slices show the ventricles": bool(max(span) < 6),
        "the right ventricle is missing": not (labels == RV).any(axis=(1, 2, 3)).all(),
        "the left ventricle doesn't get smaller": bool(volume.get(0.0, 0) >= volume.get(1.0, np.inf)),
        "blood is hardly brighter than muscle": bool(blood < 1.2 * muscle),
        "a tenth of the voxels is saturated": bool((images[:, images.any(axis=(0, 2, 3))] >= 1).mean() > 0.1),
    }


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
