"""Estimates with 95 % intervals over patients: the patient, never the slice or the volume, is what's resampled."""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cardiac_ldm.progress import tqdm

MIN_PATIENTS = 8
"""Fewer patients give no interval worth the name."""


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and the number of patients (on either side, where two cohorts meet) behind it."""

    value: float
    low: float
    high: float
    n_patients: int

    @classmethod
    def undefined(cls, n_patients: int) -> "Estimate":
        """None: all is NaN."""
        return cls(math.nan, math.nan, math.nan, n_patients)


def bootstrap(statistic: Callable[[np.ndarray], float], n_patients: int, *, resamples: int, seed: int) -> Estimate:
    """Estimate with the percentile bootstrap (Efron, 1979) over patients; NaN where there are fewer than 8.

    statistic: int64 (n_patients,) indices of patients, repeats allowed -> number; where it's NaN for some resample, the
    interval is NaN.
    """
    if n_patients < MIN_PATIENTS:
        return Estimate.undefined(n_patients)
    everyone = np.arange(n_patients)
    with warnings.catch_warnings(action="ignore", category=stats.DegenerateDataWarning):
        interval = stats.bootstrap(
            (everyone,), statistic, n_resamples=resamples, vectorized=False, method="percentile", rng=seed
        ).confidence_interval
    return Estimate(statistic(everyone), float(interval.low), float(interval.high), n_patients)


def mean(values: np.ndarray, *, resamples: int, seed: int) -> Estimate:
    """`bootstrap` of the mean over patients (n,)."""
    return bootstrap(lambda patients: float(values[patients].mean()), len(values), resamples=resamples, seed=seed)


def half_samples(
    distance: Callable[[np.ndarray, np.ndarray], float],
    n_first: int,
    n_second: int | None,
    size: int,
    *,
    pairs: int,
    seed: int,
) -> Estimate:
    """Estimate a distance between two cohorts of patients from random parts of `size` patients of each.

    A Frechet distance grows when patients are repeated, as a bootstrap does, and when they are fewer, so that numbers
    of different sizes can't be compared. Half-samples (McCarthy, 1969; Shao and Wu, 1989) repeat nobody, and with
    size = n / 2 their spread is that of the estimate from all n patients, with no scaling. The value is their mean, the
    interval the mean +- 1.96 of their standard deviations.

    distance: two int64 arrays of `size` different patients -> number. n_second: None compares the first cohort with
    itself: two disjoint parts, which is the floor that real patients reach at these numbers.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in tqdm(range(pairs), desc="half-samples", unit="pair", leave=False):
        first = rng.permutation(n_first)
        second = first[size:] if n_second is None else rng.permutation(n_second)
        values.append(distance(first[:size], second[:size]))
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    return Estimate(mean, mean - 1.96 * spread, mean + 1.96 * spread, size)


def rows_of(patient_index: np.ndarray) -> Sequence[np.ndarray]:
    """For every patient 0..n-1, the rows (int64) that are theirs."""
    return [np.flatnonzero(patient_index == patient) for patient in range(int(patient_index.max()) + 1)]


def records(table: pd.DataFrame, digits: int = 10) -> list[dict[str, Any]]:
    """A table's rows as JSON knows them, to so many decimals; what isn't finite becomes None."""
    return json.loads(table.to_json(orient="records", double_precision=digits))
