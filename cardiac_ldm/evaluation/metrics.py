"""All measures of a synthetic cohort, each beside what real patients reach, as one tidy table."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.control import agreement, phase_accuracy, phase_order
from cardiac_ldm.evaluation.diversity import attribute_neighbours, mean_similarity
from cardiac_ldm.evaluation.fidelity import (
    KernelDistance,
    Neighbourhood,
    NeighbourMeasures,
    frechet_distance,
    frechet_infinity,
    paper_fid,
)
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS, Estimate, bootstrap, half_samples, rows_of
from cardiac_ldm.evaluation.measured import Measured

LEAST = dict.fromkeys((*Neighbourhood._fields, "FD-EffNet extrapolated"), 6)
"""Patients that a half-sample must have: a ball needs 5 neighbours, an extrapolation three parts of two patients."""

JUDGEMENTS = {
    **dict.fromkeys(("FD-EffNet", "FD-EffNet extrapolated", "KID", "FD-anatomy"), ("floor", "lower")),
    **dict.fromkeys(("FID", "FID, paper's code"), ("floor", "lower")),
    **dict.fromkeys(("precision", "recall", "density", "coverage"), ("ceiling", "higher")),
    "MS-SSIM": ("level", "near real"),
    **dict.fromkeys(("attribute coverage", "attribute recall"), ("ceiling", "higher")),
    **dict.fromkeys(("phase accuracy", "phase order", "correlation"), ("ceiling", "higher")),
    "slope": ("ceiling", "near one"),
    "bias": ("ceiling", "near zero"),
    "mean absolute error": ("ceiling", "lower"),
}
"""What the real patients' number means for each metric, and which way is better: a floor is what two disjoint parts of
them reach, a ceiling what models can't be expected to exceed, a level that of real pairs."""

GROUPED = ("LVEDV", "LVEF", "RVEDV")
"""Attributes whose mean absolute error is given for each group of patients too."""

AT_SIZE = "FD-EffNet at size"
"""FD-EffNet from parts of n_patients: how much of a distance is due to small numbers."""

Distance = Callable[[np.ndarray, np.ndarray], float]
Statistic = tuple[Callable[[np.ndarray], float], int]


class Measure(NamedTuple):
    """What an estimate is of: a metric, of an attribute or of all, in a group of patients or in everybody ("")."""

    metric: str
    attribute: str = ""
    grouping: str = ""
    group: str = ""


def estimate(
    cohort: Measured, real: Measured, *, size: int, resamples: int, half_sample_pairs: int, seed: int
) -> pd.DataFrame:
    """Every measure of a cohort with its 95 % interval over patients; of `real` itself, what real patients reach.

    size: patients of either cohort in the half-samples from which distances and neighbour measures come.
    resamples: of the bootstrap, for all else. half_sample_pairs: of the half-samples.

    Warns where `size` is too small for a measure, which then isn't defined.

    Returns:
        A row a measure: metric, attribute, grouping, group ("" for all), value, low, high, n_patients; last, AT_SIZE.
    """
    draw: dict[str, Any] = {"pairs": half_sample_pairs, "seed": seed}
    n_second, sizes = None if cohort is real else real.n_patients, []
    found = {
        Measure(metric): half_samples(distance, cohort.n_patients, n_second, size, **draw)
        for metric, distance in _distances(cohort, real, size).items()
    }
    if size >= LEAST["FD-EffNet extrapolated"]:
        features = [part for m in (cohort, real) for part in (m.features["EffNet"], m.feature_patient_index)]
        curve, found[Measure("FD-EffNet extrapolated")] = frechet_infinity(*features, size=size, **draw)
        sizes = [curve.assign(**Measure(AT_SIZE)._asdict())]
    if small := [f"{metric} ({least})" for metric, least in LEAST.items() if size < least]:
        warnings.warn(
            f"{cohort.name}: {size} patients in a half-sample are too few for {', '.join(small)}; left out: give more",
            stacklevel=2,
        )
        found |= {Measure(metric): Estimate.undefined(size) for metric, least in LEAST.items() if size < least}
    tables = cohort.anatomy, real.anatomy
    found[Measure("attribute coverage")] = attribute_neighbours("coverage", *tables, size=size, **draw)
    found[Measure("attribute recall")] = attribute_neighbours("recall", *tables, size=size, **draw)
    for what, (statistic, n_patients) in _statistics(cohort).items():
        found[what] = bootstrap(statistic, n_patients, resamples=resamples, seed=seed)
    for what, (distance, members, others, n) in _grouped_distances(cohort, real).items():
        found[what] = half_samples(distance, len(members), None if cohort is real else len(others), n, **draw)
    return pd.concat([_table(found), *sizes], ignore_index=True)


def compare(
    ours: pd.DataFrame,
    theirs: pd.DataFrame,
    cohort: Measured,
    real: Measured,
    *,
    epsilon: float | None,
    reference_simulated: bool | None = None,
) -> dict[str, Any]:
    """`metrics.json`: every estimate of a synthetic cohort beside the same of real patients, where these have it.

    epsilon: the budget, or None for what no model of this study drew. reference_simulated: whether the patients beside
    whom it's measured are simulated. None stands for what isn't defined, not of an attribute or not of a group.
    """
    units = {attribute.name: attribute.unit for attribute in ATTRIBUTES}
    what, numbers = list(Measure._fields), ["value", "low", "high", "n_patients"]
    table = ours[ours.metric != AT_SIZE]
    reference = theirs[theirs.metric != AT_SIZE].set_index(what).reindex(pd.MultiIndex.from_frame(table[what]))
    in_units = table.metric.isin(["bias", "mean absolute error"])
    kinds, better = zip(*table.metric.map(JUDGEMENTS), strict=True)
    table = table[what + numbers].assign(
        unit=table.attribute.map(units).where(in_units, "").fillna(""),
        reference=reference.value.to_numpy(),
        reference_low=reference.low.to_numpy(),
        reference_high=reference.high.to_numpy(),
        reference_kind=kinds,
        better=better,
    )
    rows = _finite(table)
    for row in rows:
        row |= {name: row[name] or None for name in what}
    sizes = [
        {"cohort": name} | point
        for name, estimates in (("synthetic", ours), ("real", theirs))
        for point in _finite(estimates.loc[estimates.metric == AT_SIZE, ["n_patients", "value", "low", "high"]])
    ]
    return {
        "model": cohort.name,
        "epsilon": "inf" if epsilon is not None and math.isinf(epsilon) else epsilon,
        "reference_cohort": real.name,
        "reference_simulated": reference_simulated,
        "n_requests": cohort.n_patients,
        "n_real_patients": real.n_patients,
        "rows": rows,
        "sizes": sizes,
    }


def differences(
    first: Measured, second: Measured, real: Measured, *, size: int, resamples: int, half_sample_pairs: int, seed: int
) -> pd.DataFrame:
    """What the first model reaches beyond the second, request by request: both drew the same requests from one noise.

    Half-samples and resamples hold the same requests of both, so what a request's difficulty adds to either cancels. A
    request counts where both models' hearts could be measured.

    Returns:
        A row a measure: metric, attribute, value (first - second), low, high, n_patients.

    Raises:
        ParameterError: they weren't asked for the same.
    """
    requested = [m.anatomy[["patient", "attribute", "requested"]].reset_index(drop=True) for m in (first, second)]
    if not requested[0].equals(requested[1]):
        raise ParameterError(f"{second.name}: wasn't asked for what {first.name} was; compare models on one request")
    known = first.anatomy.measured.notna().to_numpy() & second.anatomy.measured.notna().to_numpy()
    near, far = (_distances(model, real, size) for model in (first, second))
    draw: dict[str, Any] = {"pairs": half_sample_pairs, "seed": seed}
    found = {
        Measure(metric): half_samples(
            partial(_difference, near[metric], far[metric]), first.n_patients, real.n_patients, size, **draw
        )
        for metric in near
    }
    ours, theirs = (
        _statistics(replace(model, anatomy=model.anatomy[known]), grouped=False) for model in (first, second)
    )
    for what, (statistic, n_patients) in ours.items():
        beyond = partial(_difference, statistic, theirs[what][0])
        found[what] = bootstrap(beyond, n_patients, resamples=resamples, seed=seed)
    return _table(found).drop(columns=["grouping", "group"])


def _table(found: Mapping[Measure, Estimate]) -> pd.DataFrame:
    return pd.DataFrame([what._asdict() | asdict(estimate) for what, estimate in found.items()])


def _finite(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows, unrounded; what isn't finite becomes None, which JSON can hold."""
    plain = table.replace([np.inf, -np.inf], np.nan).astype(object)
    rows: list[dict[Any, Any]] = plain.where(plain.notna(), None).to_dict("records")
    return rows


def _difference(first: Callable[..., float], second: Callable[..., float], *patients: np.ndarray) -> float:
    return first(*patients) - second(*patients)


def _distances(first: Measured, real: Measured, size: int) -> dict[str, Distance]:
    """Distances and neighbour measures between `size` patients of either cohort, as far as these are enough."""
    seen = first.features["EffNet"], first.feature_patient_index, real.features["EffNet"], real.feature_patient_index
    found: dict[str, Distance] = {
        "FD-EffNet": _of_features(frechet_distance, first, real, "EffNet"),
        "KID": KernelDistance(*seen),
        "FD-anatomy": _of_features(frechet_distance, first, real, "anatomy"),
    }
    if size >= LEAST["coverage"]:
        neighbours = NeighbourMeasures(*seen)
        found |= {name: lambda *parts, name=name: getattr(neighbours(*parts), name) for name in Neighbourhood._fields}
    if {"Inception"} <= set(first.features) & set(real.features):
        found["FID"] = _of_features(frechet_distance, first, real, "Inception")
        found["FID, paper's code"] = _of_features(paper_fid, first, real, "Inception")
    return found


def _of_features(distance: Distance, first: Measured, second: Measured, encoder: str) -> Distance:
    """A distance between features as one between patients."""
    ours, theirs = rows_of(first.feature_patient_index), rows_of(second.feature_patient_index)

    def between(some: np.ndarray, others: np.ndarray) -> float:
        return distance(
            first.features[encoder][np.concatenate([ours[i] for i in some])],
            second.features[encoder][np.concatenate([theirs[i] for i in others])],
        )

    return between


def _statistics(cohort: Measured, grouped: bool = True) -> dict[Measure, Statistic]:
    """Diversity and control within one cohort, and what of them is given for groups of patients."""
    found: dict[Measure, Statistic] = {
        Measure("MS-SSIM"): (partial(mean_similarity, cohort.similarity), cohort.n_patients)
    }
    tables: list[tuple[dict[str, str], pd.DataFrame]] = [({}, cohort.anatomy)]
    for (grouping, group), members in _groups(cohort).items() if grouped else ():
        own = cohort.anatomy[cohort.anatomy.patient.isin(members)]
        tables.append(({"grouping": grouping, "group": group}, own))
    told = set(cohort.anatomy.attribute) - {"ESED"}
    for about, table in tables:
        found[Measure("phase accuracy", **about)] = phase_accuracy(table)
        found[Measure("phase order", **about)] = phase_order(table)
        for attribute in GROUPED if about else [name for name in ATTRIBUTE_NAMES if name in told]:
            statistics, n_known = agreement(table, attribute)
            for metric in ("mean absolute error",) if about else statistics:
                found[Measure(metric, attribute, **about)] = statistics[metric], n_known
    return found


def _groups(cohort: Measured) -> dict[tuple[str, str], np.ndarray]:
    """The members of every group, by grouping and group, that is large enough."""
    return {
        (str(grouping), str(group)): np.flatnonzero(column == group)
        for grouping, column in cohort.groups.items()
        for group in sorted(column.dropna().unique())
        if (column == group).sum() >= MIN_PATIENTS
    }


def _grouped_distances(cohort: Measured, real: Measured) -> dict[Measure, tuple[Distance, np.ndarray, np.ndarray, int]]:
    """FD-EffNet of each group from the real patients of that group: distance, both sides' members, half-samples' size.

    A distance depends on numbers, so all groups of a grouping are cut to the size of the smallest: they compare with
    each other, not with everybody's distance.
    """
    distance = _of_features(frechet_distance, cohort, real, "EffNet")
    found: dict[Measure, tuple[Distance, np.ndarray, np.ndarray, int]] = {}
    ours, theirs = _groups(cohort), _groups(real)
    for grouping in dict.fromkeys(grouping for grouping, _ in ours):
        shared = [key for key in ours if key[0] == grouping and key in theirs]
        if len(shared) < 2:
            continue
        size = min(min(len(ours[key]), len(theirs[key])) for key in shared) // 2
        for key in shared:
            members, others = ours[key], theirs[key]
            among = lambda some, more, us=members, them=others: distance(us[some], them[more])  # noqa: E731
            found[Measure("FD-EffNet", "", *key)] = among, members, others, size
    return found
