"""All measures of a synthetic cohort, each beside what real patients reach, as one tidy list."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, Patients, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.control import agreement, phase_accuracy, phase_order, read_anatomy
from cardiac_ldm.evaluation.diversity import mean_similarity, similarity_of_pairs
from cardiac_ldm.evaluation.features import slice_features
from cardiac_ldm.evaluation.fidelity import KernelDistance, frechet_distance
from cardiac_ldm.evaluation.intervals import Estimate, bootstrap, half_samples, rows_of
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter

MIN_PATIENTS = 8
"""Fewer patients give no interval worth the name."""

Kind = Literal["floor", "ceiling", "level"]
Better = Literal["lower", "higher", "near zero", "near real"]
JUDGEMENTS: dict[str, tuple[Kind, Better]] = {
    "FD-EffNet": ("floor", "lower"),
    "KID": ("floor", "lower"),
    "MS-SSIM": ("level", "near real"),
    "phase accuracy": ("ceiling", "higher"),
    "phase order": ("ceiling", "higher"),
    "correlation": ("ceiling", "higher"),
    "bias": ("ceiling", "near zero"),
    "mean absolute error": ("ceiling", "lower"),
}
"""What the real patients' number means for each metric, and which way is better."""

Estimates = dict[tuple[str, str | None], Estimate]
Number = Annotated[float | None, BeforeValidator(lambda x: None if x is None or not math.isfinite(x) else x)]
"""A finite number, or None, which JSON can hold: NaN and infinities become None."""


class Row(BaseModel):
    """One measure of the synthetic cohort with its 95 % interval, and what real patients reach (`reference`).

    The reference is a floor (two disjoint parts of the real patients, for a distance), a ceiling (the same instrument
    on real patients, for control) or a level (real pairs, for diversity). None stands for what isn't defined.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    attribute: str | None
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


class Metrics(BaseModel):
    """The measures of one synthetic cohort; `pandas.DataFrame(metrics.model_dump()["rows"])` is tidy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference_cohort: str
    n_requests: int
    n_real_patients: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Measured:
    """What the instruments read from one cohort, synthetic or real; intervals are taken from it. Picklable.

    features: float32 (slices, 1280); feature_owners: int64 (slices,); similarity: float64 (patients, patients), NaN
    where not drawn; anatomy: table of owner, attribute, asked, measured.
    """

    name: str
    n_patients: int
    features: np.ndarray
    feature_owners: np.ndarray
    similarity: np.ndarray
    anatomy: pd.DataFrame


def measure(
    images: np.ndarray,
    attributes: np.ndarray,
    owners: np.ndarray,
    segmenter: Segmenter,
    classifier: PhaseClassifier,
    *,
    name: str,
    seed: int,
    progress: bool = True,
) -> Measured:
    """Read images (n, 13, 96, 96) in [0, 1] of requests 0..m-1 = owners (n,), which asked for attributes (n, 14).

    Raises:
        ParameterError: fewer than 8 requests, one without a volume, a number that isn't finite, or a phase not given.
    """
    n_patients = len(np.unique(owners))
    if n_patients < MIN_PATIENTS or n_patients != owners.max() + 1:
        raise ParameterError(
            f"{name}: {n_patients} patients with volumes, numbered to {owners.max()}; at least 8, from 0 on"
        )
    if not np.isfinite(images).all():
        raise ParameterError(f"{name}: images hold values that aren't finite; the model that made them has diverged")
    features, feature_owners = slice_features(images, owners, progress=progress)
    phases = attributes[:, ATTRIBUTE_NAMES.index("ESED")]
    anatomy = read_anatomy(images, attributes, owners, segmenter, classifier, progress=progress)
    similarity = similarity_of_pairs(images, owners, phases, seed=seed, progress=progress)
    return Measured(name, n_patients, features, feature_owners, similarity, anatomy)


def measure_real(
    patients: Patients, segmenter: Segmenter, classifier: PhaseClassifier, *, seed: int, progress: bool = True
) -> Measured:
    """Read real patients, once for all models that are compared with them.

    Raises:
        PrivacyError: they are private and not simulated.
    """
    require_releasable(patients, "statistics of private patients, with no noise, through the metrics")
    images = patients.images(np.arange(len(patients.owners)))
    return measure(
        images,
        patients.attributes,
        patients.owners,
        segmenter,
        classifier,
        name=patients.name,
        seed=seed,
        progress=progress,
    )


def compare(
    synthetic: Measured, real: Measured, *, resamples: int, half_sample_pairs: int, seed: int, progress: bool = True
) -> Metrics:
    """Put every measure of a synthetic cohort beside the same of real patients, with 95 % intervals over patients.

    resamples: of the bootstrap. half_sample_pairs: of the two distances, whose value and interval come from parts of
    min(requests, real patients) // 2 patients, as their floor does.
    """
    size = min(synthetic.n_patients, real.n_patients) // 2
    estimates, references = (
        _distances(cohort, real, size, half_sample_pairs, seed, progress) | _readings(cohort, resamples, seed)
        for cohort in (synthetic, real)
    )
    units = {attribute.name: attribute.unit for attribute in ATTRIBUTES}
    rows = []
    for (metric, attribute), ours in estimates.items():
        kind, better = JUDGEMENTS[metric]
        theirs = references[metric, attribute]
        rows.append(
            Row(
                metric=metric,
                attribute=attribute,
                value=ours.value,
                low=ours.low,
                high=ours.high,
                n_patients=ours.n_patients,
                unit=units[attribute] if attribute and metric != "correlation" else "",
                reference=theirs.value,
                reference_low=theirs.low,
                reference_high=theirs.high,
                reference_kind=kind,
                better=better,
            )
        )
    return Metrics(
        reference_cohort=real.name, n_requests=synthetic.n_patients, n_real_patients=real.n_patients, rows=tuple(rows)
    )


def _distances(first: Measured, real: Measured, size: int, pairs: int, seed: int, progress: bool) -> Estimates:
    """FD and KID from the real patients; of the real patients themselves, the floor."""
    ours, theirs = rows_of(first.feature_owners), rows_of(real.feature_owners)

    def frechet(some: np.ndarray, others: np.ndarray) -> float:
        return frechet_distance(
            first.features[np.concatenate([ours[i] for i in some])],
            real.features[np.concatenate([theirs[i] for i in others])],
        )

    kernel = KernelDistance(first.features, first.feature_owners, real.features, real.feature_owners)
    n_second = None if first is real else real.n_patients
    distances: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"FD-EffNet": frechet, "KID": kernel}
    return {
        (metric, None): half_samples(
            distance, first.n_patients, n_second, size, pairs=pairs, seed=seed, progress=progress
        )
        for metric, distance in distances.items()
    }


def _readings(cohort: Measured, resamples: int, seed: int) -> Estimates:
    """Diversity and control within one cohort."""

    def interval(statistic: Callable[[np.ndarray], float], n_patients: int) -> Estimate:
        if n_patients < MIN_PATIENTS:
            return Estimate(math.nan, math.nan, math.nan, n_patients)
        return bootstrap(statistic, n_patients, resamples=resamples, seed=seed)

    estimates: Estimates = {
        ("MS-SSIM", None): interval(lambda patients: mean_similarity(cohort.similarity, patients), cohort.n_patients),
        ("phase accuracy", None): interval(*phase_accuracy(cohort.anatomy)),
        ("phase order", None): interval(*phase_order(cohort.anatomy)),
    }
    for attribute in (name for name in ATTRIBUTE_NAMES if name != "ESED" and name in set(cohort.anatomy.attribute)):
        statistics, n_known = agreement(cohort.anatomy, attribute)
        estimates |= {(metric, attribute): interval(statistic, n_known) for metric, statistic in statistics.items()}
    return estimates
