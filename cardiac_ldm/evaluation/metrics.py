"""All measures of a synthetic cohort, each beside what real patients reach, as one tidy list."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, Patients, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.control import agreement, phase_accuracy, phase_order, read_anatomy
from cardiac_ldm.evaluation.diversity import attribute_coverage, attribute_recall, mean_similarity, similarity_of_pairs
from cardiac_ldm.evaluation.features import AnatomyEncoder, slice_features
from cardiac_ldm.evaluation.fidelity import (
    KernelDistance,
    NeighbourMeasures,
    frechet_distance,
    frechet_infinity,
    paper_fid,
)
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS, Estimate, bootstrap, half_samples, rows_of
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter

LEAST = dict.fromkeys(("precision", "recall", "density", "coverage", "FD-EffNet extrapolated"), 6)
"""Patients that a half-sample must have: a ball needs 5 neighbours, an extrapolation three parts of two patients."""

AGES = (50, 65)
"""Years at which the age bands meet: fixed and public."""

Kind = Literal["floor", "ceiling", "level"]
Better = Literal["lower", "higher", "near zero", "near one", "near real"]
JUDGEMENTS: dict[str, tuple[Kind, Better]] = {
    "FD-EffNet": ("floor", "lower"),
    "FD-EffNet extrapolated": ("floor", "lower"),
    "KID": ("floor", "lower"),
    "FD-anatomy": ("floor", "lower"),
    "FID": ("floor", "lower"),
    "FID, paper's code": ("floor", "lower"),
    "precision": ("ceiling", "higher"),
    "recall": ("ceiling", "higher"),
    "density": ("ceiling", "higher"),
    "coverage": ("ceiling", "higher"),
    "MS-SSIM": ("level", "near real"),
    "attribute coverage": ("ceiling", "higher"),
    "attribute recall": ("ceiling", "higher"),
    "phase accuracy": ("ceiling", "higher"),
    "phase order": ("ceiling", "higher"),
    "correlation": ("ceiling", "higher"),
    "slope": ("ceiling", "near one"),
    "bias": ("ceiling", "near zero"),
    "mean absolute error": ("ceiling", "lower"),
}
"""What the real patients' number means for each metric, and which way is better."""

GROUPED = ("LVEDV", "LVEF", "RVEDV")
"""Attributes whose mean absolute error is given for each group of patients too."""

Distance = Callable[[np.ndarray, np.ndarray], float]
Statistic = tuple[Callable[[np.ndarray], float], int]
Number = Annotated[float | None, BeforeValidator(lambda x: None if x is None or not math.isfinite(x) else x)]
"""A finite number, or None, which JSON can hold: NaN and infinities become None."""


class Measure(NamedTuple):
    """What an estimate is of: a metric, of an attribute or of all, in a group of patients or in everybody."""

    metric: str
    attribute: str | None = None
    grouping: str | None = None
    group: str | None = None


class Row(BaseModel):
    """One measure of the synthetic cohort with its 95 % interval, and what real patients reach (`reference`).

    grouping, group: "sex" and "female", say, where only those patients count. The reference is a floor (two disjoint
    parts of the real patients, for a distance), a ceiling (the same on real patients, for what models can't be expected
    to exceed) or a level (real pairs, for diversity). None stands for what isn't defined.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    attribute: str | None
    grouping: str | None
    group: str | None
    value: Number
    low: Number
    high: Number
    n_patients: int
    unit: str
    reference: Number
    reference_low: Number
    reference_high: Number
    reference_kind: Kind
    better: Better


class SizePoint(BaseModel):
    """FD-EffNet from parts of `n_patients`, with its 95 % interval: how much of a distance is due to small numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cohort: Literal["synthetic", "real"]
    n_patients: int
    value: Number
    low: Number
    high: Number


class Metrics(BaseModel):
    """The measures of one synthetic cohort: `metrics.json`, whose JSON schema is `Metrics.model_json_schema()`.

    epsilon: the budget as a number or "inf", or None for what no model of this study drew. In its fields' names, "real"
    are the patients beside whom it's measured; reference_simulated: whether they are simulated, None where it's not
    known. `pandas.DataFrame` of the dumped rows is tidy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    epsilon: float | Literal["inf"] | None
    reference_cohort: str
    reference_simulated: bool | None = None
    n_requests: int
    n_real_patients: int
    rows: tuple[Row, ...]
    sizes: tuple[SizePoint, ...]


@dataclass(frozen=True)
class Measured:
    """What the instruments read from one cohort, synthetic or real; intervals are taken from it. Picklable.

    features: encoder -> float32 (slices, d); feature_owners: int64 (slices,); similarity: float64 (patients, patients),
    NaN where not drawn; anatomy: table of owner, attribute, asked, measured; groups: a row a patient, missing where
    unknown.
    """

    name: str
    n_patients: int
    features: Mapping[str, np.ndarray]
    feature_owners: np.ndarray
    similarity: np.ndarray
    anatomy: pd.DataFrame
    groups: pd.DataFrame


@dataclass(frozen=True)
class Estimates:
    """All estimates of a cohort against the real one, or of the real one against itself. Picklable."""

    of: Mapping[Measure, Estimate]
    sizes: pd.DataFrame = field(default_factory=pd.DataFrame)


def groups_of(attributes: np.ndarray, owners: np.ndarray, diseases: Sequence[str | None] | None = None) -> pd.DataFrame:
    """Sex, age band and disease of patients or requests 0..m-1 = owners (n,) with attributes (n, 14); None if unknown.

    diseases: one a patient.
    """
    first = np.unique(owners, return_index=True)[1]
    age, sex = (attributes[first, ATTRIBUTE_NAMES.index(name)] for name in ("AGE", "SEX"))
    bands = (f"under {AGES[0]}", f"{AGES[0]} to {AGES[1] - 1}", f"{AGES[1]} and over")
    return pd.DataFrame(
        {
            "sex": [{0.0: "female", 1.0: "male"}.get(value) for value in sex],
            "age": [bands[np.searchsorted(AGES, value, side="right")] if np.isfinite(value) else None for value in age],
            "disease": list(diseases) if diseases is not None else [None] * len(first),
        },
        dtype=object,
    )


def measure(
    images: np.ndarray,
    attributes: np.ndarray,
    owners: np.ndarray,
    segmenter: Segmenter,
    classifier: PhaseClassifier,
    *,
    name: str,
    seed: int,
    diseases: Sequence[str | None] | None = None,
    inception: nn.Module | None = None,
    progress: bool = True,
) -> Measured:
    """Read images (n, 13, 96, 96) in [0, 1] of requests 0..m-1 = owners (n,), which asked for attributes (n, 14).

    Slices are encoded by EfficientNet-Lite0, by the segmenter's way down and, if it's given, by Inception-v3.

    Raises:
        ParameterError: shapes that don't fit, fewer than 8 requests, one without a volume, a number that isn't finite,
            or a phase not given.
    """
    if not images.ndim == 4 or attributes.shape != (len(images), len(ATTRIBUTE_NAMES)) or len(owners) != len(images):
        raise ParameterError(
            f"{name}: images {images.shape}, attributes {attributes.shape}, owners {owners.shape}; give a row of "
            f"{len(ATTRIBUTE_NAMES)} attributes and an owner for each volume"
        )
    n_patients = len(np.unique(owners))
    if n_patients < MIN_PATIENTS or n_patients != owners.max() + 1:
        last = owners.max() if n_patients else "none"
        raise ParameterError(
            f"{name}: {n_patients} patients with volumes, numbered to {last}; at least {MIN_PATIENTS}, from 0 on"
        )
    if not np.isfinite(images).all():
        raise ParameterError(f"{name}: images hold values that aren't finite; the model that made them has diverged")
    encoders: dict[str, nn.Module | None] = {"EffNet": None, "anatomy": AnatomyEncoder(segmenter)}
    if inception is not None:
        encoders["Inception"] = inception
    read = {
        name: slice_features(images, owners, encoder=encoder, progress=progress) for name, encoder in encoders.items()
    }
    phases = attributes[:, ATTRIBUTE_NAMES.index("ESED")]
    return Measured(
        name,
        n_patients,
        {name: features for name, (features, _) in read.items()},
        read["EffNet"][1],
        similarity_of_pairs(images, owners, phases, seed=seed, progress=progress),
        read_anatomy(images, attributes, owners, segmenter, classifier, progress=progress),
        groups_of(attributes, owners, diseases),
    )


def measure_real(
    patients: Patients,
    segmenter: Segmenter,
    classifier: PhaseClassifier,
    *,
    seed: int,
    inception: nn.Module | None = None,
    progress: bool = True,
) -> Measured:
    """Read real patients, once for all models that are compared with them.

    Raises:
        PrivacyError: they are private and not simulated.
    """
    require_releasable(patients, "statistics of private patients, with no noise, through the metrics")
    return measure(
        patients.images(np.arange(len(patients.owners))),
        patients.attributes,
        patients.owners,
        segmenter,
        classifier,
        name=patients.name,
        seed=seed,
        diseases=patients.groups,
        inception=inception,
        progress=progress,
    )


def estimate(
    cohort: Measured,
    real: Measured,
    *,
    size: int,
    resamples: int,
    half_sample_pairs: int,
    seed: int,
    progress: bool = True,
) -> Estimates:
    """Every measure of a cohort with its 95 % interval over patients; of `real` itself, what real patients reach.

    size: patients of either cohort in the half-samples from which distances and neighbour measures come.
    resamples: of the bootstrap, for all else. half_sample_pairs: of the half-samples.

    Warns where `size` is too small for a measure, which then isn't defined.
    """
    found: dict[Measure, Estimate] = {}
    draw: dict[str, Any] = {"pairs": half_sample_pairs, "seed": seed, "progress": progress}
    n_second, sizes = None if cohort is real else real.n_patients, pd.DataFrame()
    for metric, distance in _distances(cohort, real, size).items():
        found[Measure(metric)] = half_samples(distance, cohort.n_patients, n_second, size, **draw)
    if size >= LEAST["FD-EffNet extrapolated"]:
        features = cohort.features["EffNet"], cohort.feature_owners, real.features["EffNet"], real.feature_owners
        sizes, found[Measure("FD-EffNet extrapolated")] = frechet_infinity(*features, size=size, **draw)
    if small := [f"{metric} ({least})" for metric, least in LEAST.items() if size < least]:
        warnings.warn(
            f"{cohort.name}: {size} patients in a half-sample are too few for {', '.join(small)}; left out: give more",
            stacklevel=2,
        )
        nothing = Estimate(math.nan, math.nan, math.nan, size)
        found |= {Measure(metric): nothing for metric, least in LEAST.items() if size < least}
    tables = cohort.anatomy, real.anatomy
    found[Measure("attribute coverage")] = attribute_coverage(*tables, size=size, **draw)
    found[Measure("attribute recall")] = attribute_recall(*tables, size=size, **draw)
    for what, (statistic, n_patients) in _statistics(cohort).items():
        found[what] = _interval(statistic, n_patients, resamples, seed)
    for what, (distance, members, others, n) in _grouped_distances(cohort, real).items():
        second = None if cohort is real else len(others)
        found[what] = half_samples(distance, len(members), second, n, **draw)
    return Estimates(found, sizes)


def compare(
    synthetic: Estimates,
    real: Estimates,
    *,
    model: str,
    epsilon: float | None,
    reference_cohort: str,
    n_requests: int,
    n_real_patients: int,
    reference_simulated: bool | None = None,
) -> Metrics:
    """Put every measure of a synthetic cohort beside the same of real patients, where these have it."""
    units = {attribute.name: attribute.unit for attribute in ATTRIBUTES}
    nothing, rows = Estimate(math.nan, math.nan, math.nan, 0), []
    for what, ours in synthetic.of.items():
        kind, better = JUDGEMENTS[what.metric]
        theirs = real.of.get(what, nothing)
        measured_in_units = what.metric in ("bias", "mean absolute error")
        rows.append(
            Row(
                **what._asdict(),
                **asdict(ours),
                unit=units[what.attribute] if what.attribute and measured_in_units else "",
                reference=theirs.value,
                reference_low=theirs.low,
                reference_high=theirs.high,
                reference_kind=kind,
                better=better,
            )
        )
    sizes = [
        SizePoint.model_validate({"cohort": name} | point)
        for name, estimates in (("synthetic", synthetic), ("real", real))
        for point in estimates.sizes.to_dict("records")
    ]
    return Metrics(
        model=model,
        epsilon="inf" if epsilon is not None and math.isinf(epsilon) else epsilon,
        reference_cohort=reference_cohort,
        reference_simulated=reference_simulated,
        n_requests=n_requests,
        n_real_patients=n_real_patients,
        rows=tuple(rows),
        sizes=tuple(sizes),
    )


def differences(
    first: Measured,
    second: Measured,
    real: Measured,
    *,
    size: int,
    resamples: int,
    half_sample_pairs: int,
    seed: int,
    progress: bool = True,
) -> pd.DataFrame:
    """What the first model reaches beyond the second, request by request: both drew the same requests from one noise.

    Half-samples and resamples hold the same requests of both, so what a request's difficulty adds to either cancels. A
    request counts where both models' hearts could be measured.

    Returns:
        A row a measure: metric, attribute, value (first - second), low, high, n_patients.

    Raises:
        ParameterError: they weren't asked for the same.
    """
    asked = [m.anatomy[["owner", "attribute", "asked"]].reset_index(drop=True) for m in (first, second)]
    if not asked[0].equals(asked[1]):
        raise ParameterError(f"{second.name}: wasn't asked for what {first.name} was; compare models on one request")
    known = first.anatomy.measured.notna().to_numpy() & second.anatomy.measured.notna().to_numpy()
    ours, theirs = (
        _statistics(replace(cohort, anatomy=cohort.anatomy[known]), grouped=False) for cohort in (first, second)
    )
    found = {}
    near, far = (_distances(model, real, size) for model in (first, second))
    for metric in near:
        beyond = partial(_difference, near[metric], far[metric])
        found[Measure(metric)] = half_samples(
            beyond, first.n_patients, real.n_patients, size, pairs=half_sample_pairs, seed=seed, progress=progress
        )
    for what, (statistic, n_patients) in ours.items():
        found[what] = _interval(partial(_difference, statistic, theirs[what][0]), n_patients, resamples, seed)
    return pd.DataFrame([what._asdict() | asdict(estimate) for what, estimate in found.items()]).drop(
        columns=["grouping", "group"]
    )


def _difference(first: Callable[..., float], second: Callable[..., float], *patients: np.ndarray) -> float:
    return first(*patients) - second(*patients)


def _interval(statistic: Callable[[np.ndarray], float], n_patients: int, resamples: int, seed: int) -> Estimate:
    if n_patients < MIN_PATIENTS:
        return Estimate(math.nan, math.nan, math.nan, n_patients)
    return bootstrap(statistic, n_patients, resamples=resamples, seed=seed)


def _distances(first: Measured, real: Measured, size: int) -> dict[str, Distance]:
    """Distances and neighbour measures between `size` patients of either cohort, as far as these are enough."""
    seen = first.features["EffNet"], first.feature_owners, real.features["EffNet"], real.feature_owners
    found: dict[str, Distance] = {
        "FD-EffNet": _of_features(frechet_distance, first, real, "EffNet"),
        "KID": KernelDistance(*seen),
        "FD-anatomy": _of_features(frechet_distance, first, real, "anatomy"),
    }
    if size >= LEAST["coverage"]:
        neighbours = NeighbourMeasures(*seen)
        found |= {
            name: partial(_neighbourhood, neighbours, name) for name in ("precision", "recall", "density", "coverage")
        }
    if {"Inception"} <= set(first.features) & set(real.features):
        found["FID"] = _of_features(frechet_distance, first, real, "Inception")
        found["FID, paper's code"] = _of_features(paper_fid, first, real, "Inception")
    return found


def _of_features(distance: Distance, first: Measured, second: Measured, encoder: str) -> Distance:
    """A distance between features as one between patients."""
    ours, theirs = rows_of(first.feature_owners), rows_of(second.feature_owners)

    def between(some: np.ndarray, others: np.ndarray) -> float:
        return distance(
            first.features[encoder][np.concatenate([ours[i] for i in some])],
            second.features[encoder][np.concatenate([theirs[i] for i in others])],
        )

    return between


def _neighbourhood(measures: NeighbourMeasures, name: str, some: np.ndarray, others: np.ndarray) -> float:
    return float(getattr(measures(some, others), name))


def _statistics(cohort: Measured, grouped: bool = True) -> dict[Measure, Statistic]:
    """Diversity and control within one cohort, and what of them is given for groups of patients."""
    found: dict[Measure, Statistic] = {
        Measure("MS-SSIM"): (partial(mean_similarity, cohort.similarity), cohort.n_patients)
    }
    found |= {Measure(metric): statistic for metric, statistic in _phases(cohort.anatomy).items()}
    for attribute in (name for name in ATTRIBUTE_NAMES if name != "ESED" and name in set(cohort.anatomy.attribute)):
        statistics, n_known = agreement(cohort.anatomy, attribute)
        found |= {Measure(metric, attribute): (statistic, n_known) for metric, statistic in statistics.items()}
    for grouping, group, members in _groups(cohort) if grouped else ():
        own = cohort.anatomy[cohort.anatomy.owner.isin(members)]
        for metric, statistic in _phases(own).items():
            found[Measure(metric, None, grouping, group)] = statistic
        for attribute in GROUPED:
            statistics, n_known = agreement(own, attribute)
            found[Measure("mean absolute error", attribute, grouping, group)] = (
                statistics["mean absolute error"],
                n_known,
            )
    return found


def _phases(anatomy: pd.DataFrame) -> dict[str, Statistic]:
    return {"phase accuracy": phase_accuracy(anatomy), "phase order": phase_order(anatomy)}


def _groups(cohort: Measured) -> list[tuple[str, str, np.ndarray]]:
    """Grouping, group and members of every group that is large enough."""
    return [
        (str(grouping), str(group), np.flatnonzero(column == group))
        for grouping, column in cohort.groups.items()
        for group in sorted(column.dropna().unique())
        if (column == group).sum() >= MIN_PATIENTS
    ]


def _grouped_distances(cohort: Measured, real: Measured) -> dict[Measure, tuple[Distance, np.ndarray, np.ndarray, int]]:
    """FD-EffNet of each group from the real patients of that group: distance, both sides' members, half-samples' size.

    A distance depends on numbers, so all groups of a grouping are cut to the size of the smallest: they compare with
    each other, not with everybody's distance.
    """
    distance = _of_features(frechet_distance, cohort, real, "EffNet")
    found: dict[Measure, tuple[Distance, np.ndarray, np.ndarray, int]] = {}
    theirs = {(grouping, group): members for grouping, group, members in _groups(real)}
    ours = {(grouping, group): members for grouping, group, members in _groups(cohort)}
    for grouping in dict.fromkeys(grouping for grouping, _ in ours):
        shared = [key for key in ours if key[0] == grouping and key in theirs]
        if len(shared) < 2:
            continue
        size = min(min(len(ours[key]), len(theirs[key])) for key in shared) // 2
        for key in shared:
            found[Measure("FD-EffNet", None, *key)] = (
                partial(_among, distance, ours[key], theirs[key]),
                ours[key],
                theirs[key],
                size,
            )
    return found


def _among(distance: Distance, members: np.ndarray, others: np.ndarray, some: np.ndarray, more: np.ndarray) -> float:
    return distance(members[some], others[more])
