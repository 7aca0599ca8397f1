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

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, Cohort, PatientRecord, Patients, require_releasable
from cardiac_ldm.cohort.attributes import LV, MYOCARDIUM, RV

METRICS = {
    "FD-EffNet": "FD-EffNet (lower is better)",
    "KID": "KID (lower is better)",
    "coverage": "coverage of the patients' pictures",
    "FD-anatomy": "FD of the segmenter's features",
    "correlation LVEDV": "r of LV volume, asked and measured",
    "correlation RVEDV": "r of RV volume, asked and measured",
    "phase accuracy": "phase accuracy",
    "MS-SSIM": "MS-SSIM between patients",
}
"""What the trade-off shows, and the titles of its panels."""

NEIGHBOURS = ("precision", "recall", "density", "coverage")
FIDELITY = ("FD-EffNet", "FD-EffNet extrapolated", "KID", "FD-anatomy", "FID", "FID, paper's code", *NEIGHBOURS)
DIVERSITY = ("MS-SSIM", "attribute coverage", "attribute recall")
CONTROL = (
    "phase accuracy",
    "phase order",
    *(
        f"{metric} {attribute}"
        for attribute in ("LVEDV", "LVESV", "LVEF", "RVEDV", "RVESV", "RVEF", "MYOEDTHICK", "MYOESTHICK", "ANGLE")
        for metric in ("correlation", "slope", "bias", "mean absolute error")
    ),
)
"""What the chapter on evaluation shows, in this order, as far as it was measured."""

RECONSTRUCTED = "reconstructions"
TITLES = {a.name: f"{a.name} ({a.unit})" if a.unit else a.name for a in ATTRIBUTES}
"""Attributes with their units."""


def model_name(epsilon: float) -> str:
    """What a model of this budget is called."""
    return {0.0: "public data only", math.inf: "no privacy"}.get(epsilon, f"ε = {epsilon:g}")


def patients_name(metrics: Mapping[str, Any]) -> str:
    """What the patients are called beside whom a `metrics.json` stands; older ones don't say if they're simulated."""
    return "held-out simulated patients" if metrics.get("reference_simulated") else "held-out patients"


def cohorts_table(cohorts: Sequence[Cohort]) -> pd.DataFrame:
    """What each cohort is and how many patients are in its splits; of real private ones the places, which are public.

    Where splits are shares, how many there are is their holder's secret.
    """
    rows = []
    for cohort in cohorts:
        said = cohort.manifest
        row: dict[str, Any] = {"cohort": said.name, "role": said.role, "simulated": said.simulated}
        for split in cohort.splits:
            public = f"{said.places} places" if split == "train" else "not told"
            row[f"{split} patients"] = public if said.secret else len(cohort.split(split))
        rows.append(row)
    return pd.DataFrame(rows).set_index("cohort")


def attributes_table(cohorts: Mapping[str, Patients]) -> pd.DataFrame:
    """Mean ± standard deviation of every attribute by cohort and diagnostic group, and what share of volumes lacks it.

    Raises PrivacyError for patients who are private and not simulated.
    """
    columns = {}
    for name, patients in cohorts.items():
        require_releasable(patients, "means and spreads of the patients' attributes")
        group = np.array([str(g or "") for g in patients.groups])[patients.patient_index]
        for label in sorted(set(group)):
            rows = patients.attributes[group == label].astype(np.float64)
            columns[name, label, f"{len(set(patients.patient_index[group == label]))} patients"] = [
                _moments(column) for column in rows.T
            ]
    return pd.DataFrame(columns, index=pd.Index(TITLES.values(), name="attribute"))


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
    """The rows of one `metrics.json` about all patients, one string a cell: value [low, high], and the reference."""
    rows = _rows(metrics, grouped=False)
    better = rows["better"].str.replace("near real", "near the patients'")
    table = {"unit": rows["unit"], "value [95 %]": rows["cell"], patients_name(metrics): rows["theirs"]}
    return pd.DataFrame(table | {"patients": rows["n_patients"], "better": better}).set_index(rows["metric"])


def _rows(metrics: Mapping[str, Any], grouped: bool) -> pd.DataFrame:
    """The rows of a `metrics.json` about groups or all patients: metrics with attributes, and numbers as cells."""
    rows = pd.DataFrame(metrics["rows"])
    rows = rows[rows["grouping"].notna() == grouped]
    ours, theirs = ("value", "low", "high"), ("reference", "reference_low", "reference_high")
    cells = {
        name: list(map(_cell, *(rows[side] for side in sides))) for name, sides in (("cell", ours), ("theirs", theirs))
    }
    return rows.assign(metric=_titles(rows), **cells)


def _titles(rows: pd.DataFrame) -> pd.Series:
    """Metrics with the attribute that they're of, if any."""
    return rows["metric"].str.cat(rows["attribute"].fillna("").astype(str), sep=" ").str.strip()


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval, as far as they're defined; pandas writes None as NaN."""
    if value is None or math.isnan(value):
        return "not defined"
    known = low is not None and high is not None and not math.isnan(low)
    return f"{value:.4g} [{low:.4g}, {high:.4g}]" if known else f"{value:.4g}"


def models_table(evaluations: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> pd.DataFrame:
    """These metrics of several cohorts beside each other: name -> `metrics.json`; last, what patients reach."""
    return _beside(evaluations, ["metric"]).reindex(list(shown)).dropna(how="all")


def groups_table(evaluations: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """What was measured of groups of patients: a row a group and metric, columns as in `models_table`."""
    return _beside(evaluations, ["grouping", "group", "metric"])


def _beside(evaluations: Mapping[str, Mapping[str, Any]], index: list[str]) -> pd.DataFrame:
    """A column a cohort and a row a place in the index; last, the patients', by the first cohort that has it."""
    tables = {name: _rows(metrics, "group" in index) for name, metrics in evaluations.items()}
    tables = {name: rows.drop_duplicates(index, keep="last").set_index(index) for name, rows in tables.items()}
    theirs = pd.concat([table["theirs"] for table in tables.values()])
    columns = {name: table["cell"] for name, table in tables.items()}
    columns[patients_name(next(iter(evaluations.values())))] = theirs[~theirs.index.duplicated()]
    return pd.concat(columns, axis=1).fillna("")


def differences_table(tables: Mapping[str, pd.DataFrame], shown: Sequence[str]) -> pd.DataFrame:
    """Differences between pairs of models: what was compared -> `differences.csv`; a row a metric, a column a pair."""
    columns = {}
    for name, table in tables.items():
        cells = pd.Series(list(map(_cell, table.value, table.low, table.high)), index=_titles(table))
        columns[name] = cells.reindex(list(shown)).dropna()
    return pd.DataFrame(columns).rename_axis("metric")


def compared(pair: str, table: pd.DataFrame, metric: str = "FD-EffNet") -> str:
    """One sentence on a metric of which less is better, from `differences.csv` of a pair called "first less second".

    Only a paired 95 % interval that excludes 0 is called a difference.
    """
    row = table[(table.metric == metric) & table.attribute.isna()].iloc[0]
    first, second = pair.split(" less ")
    found = f"{row.value:+.1f} [{row.low:+.1f}, {row.high:+.1f}], paired over {row.n_patients} patients"
    if row.low <= 0 <= row.high:
        return f"{metric} at {first} can't be told from that of {second}: {found}."
    return f"{metric} at {first} is {'below' if row.value < 0 else 'above'} that of {second}: {found}."


def tradeoff_table(evaluations: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run and metric: metric, epsilon, model (its name), value, low, high, n_patients, run.

    Rows with epsilon NaN hold what held-out patients reach. Metrics that are not defined for a run are left out.
    """
    theirs = {"value": "reference", "low": "reference_low", "high": "reference_high"}
    tables = []
    for metrics in evaluations:
        rows, epsilon = _rows(metrics, grouped=False).assign(run=metrics["model"]), float(metrics["epsilon"])
        tables.append(rows.assign(epsilon=epsilon, model=model_name(epsilon)))
        if len(tables) == 1:
            numbers = {name: rows[column] for name, column in theirs.items()}
            tables.append(rows.assign(epsilon=math.nan, model=patients_name(metrics), **numbers))
    columns = ["metric", "n_patients", "run", "epsilon", "model", *theirs]
    table = pd.concat([rows[columns] for rows in tables], ignore_index=True)
    return table.astype(dict.fromkeys(theirs, float)).dropna(subset=["value"])


def source(run: str, metrics: Mapping[str, Any]) -> HTML:
    """The line under a figure or table that names its run and holds its `metrics.json` to download."""
    data = base64.b64encode(json.dumps(metrics, indent=1).encode()).decode()
    name = escape(run)
    link = f'<a download="{name}.json" href="data:application/json;base64,{data}">metrics.json</a>'
    return HTML(f"<p><small>Run <code>{name}</code>, {link}</small></p>")


def utility_rows(baselines: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What training sets are worth, from the metrics of `useful_baselines` and `useful`: one row a measure.

    Columns training_set, against ("", or the baseline beyond which it's counted, patient by patient), metric, value,
    low, high, n_patients, run. What isn't known is left out: Dice, of models whose decoder gives no labels.
    """
    tables = []
    for metrics in (baselines, *models):
        drawn = f"synthetic ({model_name(float(metrics['epsilon']))})" if "epsilon" in metrics else "synthetic"
        rows = pd.DataFrame(metrics["rows"])
        units = rows["unit"].map(lambda unit: f" ({unit})" if unit else "")
        training_sets = rows["training_set"].str.replace("synthetic", drawn, regex=False)
        tables.append(rows.assign(training_set=training_sets, metric=_titles(rows) + units, run=metrics["model"]))
    columns = ["training_set", "against", "metric", "value", "low", "high", "n_patients", "run"]
    table = pd.concat([rows[columns] for rows in tables], ignore_index=True)
    return table.astype({"value": float, "low": float, "high": float}).dropna(subset=["value"])


def utility_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The training sets of `utility_rows` by measure, one string a cell: value [low, high]."""
    alone = rows[rows["against"] == ""]
    cells = [f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]" for row in alone.itertuples()]
    table = alone.assign(cell=cells).pivot(index="training_set", columns="metric", values="cell")
    table = table.reindex(index=alone["training_set"].unique(), columns=alone["metric"].unique())
    return table.fillna("not known").rename_axis(columns=None)


def audit_rows(audits: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What audits show, from their metrics: columns model, noise (its factor), bound, shown, at_most, stated, canaries.

    shown: the lower bound on epsilon; at_most: what it would be had every canary been found.
    """
    tables = [
        pd.DataFrame(audit["rows"]).assign(
            model=model_name(float(audit["epsilon"])), stated=float(audit["stated"]), canaries=audit["n_canaries"]
        )
        for audit in audits
    ]
    return pd.concat(tables, ignore_index=True)


def audit_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `audit_rows` with a column a bound; last, what a perfect attack would show."""
    shown = rows.assign(
        noise=rows.noise.map({1.0: "as stated", 0.1: "a tenth", 0.0: "none"}), stated=rows.stated.map("{:.3g}".format)
    )
    table = shown.pivot(index=["model", "noise", "stated", "canaries"], columns="bound", values="shown")
    order = pd.MultiIndex.from_frame(shown[list(table.index.names)].drop_duplicates())
    table = table.loc[order, rows.bound.unique()]
    table.loc[("any, every canary found", "", "", rows.canaries.max()), :] = rows.groupby("bound").at_most.max()
    table = table.round(2).rename_axis(columns=None).reset_index().rename(columns={"stated": "stated ε"})
    return table.set_index("model")


def membership_table(attacks: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """What attacks by loss find, a row a model and attack: name -> metrics with `membership`."""
    titles = {
        "auc": "AUC [95 %]",
        "tpr_at_fpr_0.01": "TPR at 1 % FPR [95 %]",
        "tpr_at_fpr_0.001": "TPR at 0.1 % FPR [95 %]",
    }
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for model, metrics in attacks.items():
        for row in metrics["membership"]:
            cells = rows.setdefault((model, row["attack"]), {})
            cells[titles[row["measure"]]] = _cell(row["value"], row["low"], row["high"])
            cells |= {"members": metrics["n_members"], "others": metrics["n_others"]}
    table = pd.DataFrame(rows).T
    return table[[*titles.values(), "members", "others"]].rename_axis(["model", "attack"])


def memorisation_table(found: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """How near synthetic cohorts lie to training patients, a row a model and space: name -> metrics, `memorisation`."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for model, metrics in found.items():
        for row in (row for row in metrics["memorisation"] if row["grouping"] is None):
            sizes = {"conditions": row["n_requests"], "nearest patients": row["n_patients"]}
            cells = rows.setdefault((model, row["space"]), sizes)
            cells[f"{row['statistic']} [95 %]"] = _cell(row["value"], row["low"], row["high"])
            cells[f"p ({row['statistic']})"] = f"{row['p_value']:.3f}"
    return pd.DataFrame(rows).T.rename_axis(["model", "space"])


def memorised_groups_table(found: Mapping[str, Mapping[str, Any]], space: str) -> pd.DataFrame:
    """The share of requests nearer to training patients and its p-value, a row a group and a column a model."""
    columns = {}
    for model, metrics in found.items():
        rows = pd.DataFrame(metrics["memorisation"]).query("n_requests > 0 and grouping.notna() and space == @space")
        rows = rows[rows.statistic == "nearer to training"]
        cells = [f"{row.value:.2f} (p = {row.p_value:.2f}, {row.n_requests})" for row in rows.itertuples()]
        columns[model] = pd.Series(cells, index=pd.MultiIndex.from_frame(rows[["grouping", "group"]]))
    return pd.DataFrame(columns).fillna("")


def sensitivity_table(metrics: Mapping[str, Any]) -> pd.DataFrame:
    """How far one patient moves the sum of clipped gradients, in clips: a row a loss, a column for who is added."""
    rows = pd.DataFrame(metrics["rows"])
    table = rows.pivot(index="loss", columns="added", values="sensitivity")
    return table.loc[rows.loss.unique(), rows.added.unique()].round(3).rename_axis(columns=None)
