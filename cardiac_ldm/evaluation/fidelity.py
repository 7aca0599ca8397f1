"""How far synthetic slices lie from real ones, and how much of the real they cover, by their features."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import linalg

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.intervals import Estimate, half_samples, rows_of

_PARTS = (1, 2, 3)
"""Smaller parts make the extrapolated distance no surer, but bend its line."""


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to features (n, d) and (m, d) (Heusel et al., arXiv 1706.08500).

    |mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), S with n - 1 degrees of freedom. With centred features X and Y,
    the trace of the root is the nuclear norm of X Y' / ((n - 1) (m - 1))^(1/2), exact for singular S too: the sum of
    the roots of the eigenvalues of its Gram matrix, never larger than d x d.

    Raises:
        ParameterError: fewer than 2 slices on a side, features of different widths, or values that aren't finite.
    """
    _require_features("Frechet distance", first, second)
    (mean_1, x), (mean_2, y) = _centred(first), _centred(second)
    variances = np.square(x).sum() + np.square(y).sum()
    x, y = (linalg.qr(z, mode="r")[0] if len(z) > z.shape[1] else z for z in (x, y))
    product = x @ y.T
    gram = product @ product.T if len(product) <= len(product.T) else product.T @ product
    overlap = np.sqrt(linalg.eigvalsh(gram).clip(0)).sum()
    return float(np.square(mean_1 - mean_2).sum() + max(variances - 2 * overlap, 0.0))


def paper_fid(first: np.ndarray, second: np.ndarray) -> float:
    """FID of features (n, d) and (m, d) as the public code of Daum et al., arXiv 2407.16405, computes it.

    mean |mean1 - mean2| + tr(S1 + S2 - 2 U s^(1/2) V'), where S1 S2 = U s V' and S has n - 1 degrees of freedom. It
    can't be compared with the textbook's FID (`frechet_distance`): the first term is the mean of absolute differences,
    not the sum of squared ones, and U s^(1/2) V' is a square root of S1 S2 only where these commute; elsewhere its
    trace was smaller in all we tried. Their code works in single precision, this in double, on slices 3..9 through
    torchvision's Inception-v3 behind ImageNet's normalisation (`InceptionEncoder`).

    Raises:
        ParameterError: as `frechet_distance`.
    """
    _require_features("paper's FID", first, second)
    (mean_1, x), (mean_2, y) = _centred(first), _centred(second)
    (q_1, r_1), (q_2, r_2) = (linalg.qr(z.T, mode="economic") for z in (x, y))
    u, s, vt = linalg.svd(r_1 @ (x @ y.T) @ r_2.T, full_matrices=False)
    overlap = np.einsum("i,ij,ji", np.sqrt(s), vt, q_2.T @ q_1 @ u)
    return float(np.abs(mean_1 - mean_2).mean() + np.square(x).sum() + np.square(y).sum() - 2 * overlap)


def frechet_infinity(
    first: np.ndarray,
    first_index: np.ndarray,
    second: np.ndarray,
    second_index: np.ndarray,
    *,
    size: int,
    pairs: int,
    seed: int,
) -> tuple[pd.DataFrame, Estimate]:
    """Extrapolate the Frechet distance to endlessly many patients (after Chong and Forsyth, arXiv 1911.07023).

    From n patients of either cohort the distance is too large by about c / n. Half-samples of `size` patients are cut
    into 1, 2 and 3 disjoint parts; the line through the parts' mean distances against 1 / n has its intercept at the
    distance between the distributions. Where the slices of a part don't far outnumber the directions in which
    features vary, the curve bends and the intercept is still too large: look at the table, and at the floor's
    intercept, which ought to be 0.

    first, second: features (n, d) and (m, d), with the patient, from 0, of each row; the very same array gives the
    floor, between disjoint parts of one cohort. size: patients in a half-sample: half of the smaller cohort.

    Returns:
        The distance at each size, with 95 % intervals, as a table of n_patients, value, low, high; and the intercept
        with its own, which may reach below 0. Values and intervals are as in `half_samples`.

    Raises:
        ParameterError: as `frechet_distance`, `size` below 6, or a cohort below `size` (2 x for the floor).
    """
    metric = "Frechet distance extrapolated"
    _require_features(metric, first, second)
    n_first, n_second = int(first_index.max()) + 1, None if second is first else int(second_index.max()) + 1
    _require_patients(metric, size, 2 * max(_PARTS))
    _require_patients(metric, n_first // 2 if n_second is None else min(n_first, n_second), size)
    counts = [size // parts for parts in _PARTS]
    curves: list[list[float]] = []

    def at(n: int, some: np.ndarray, others: np.ndarray) -> float:
        """The mean over disjoint parts of n patients."""
        cuts = [slice(start, start + n) for start in range(0, size - n + 1, n)]
        distances = [
            frechet_distance(first[np.isin(first_index, some[cut])], second[np.isin(second_index, others[cut])])
            for cut in cuts
        ]
        return float(np.mean(distances))

    def intercept(some: np.ndarray, others: np.ndarray) -> float:
        curves.append([at(n, some, others) for n in counts])
        return float(np.polyfit(1 / np.array(counts), curves[-1], 1)[1])

    estimate = half_samples(intercept, n_first, n_second, size, pairs=pairs, seed=seed)
    mean, margin = np.mean(curves, axis=0), 1.96 * np.std(curves, axis=0, ddof=1)
    return pd.DataFrame({"n_patients": counts, "value": mean, "low": mean - margin, "high": mean + margin}), estimate


class KernelDistance:
    """KID between parts of two cohorts: MMD^2 with the kernel (x.y / d + 1)^3 (Binkowski et al., arXiv 1801.01401).

    Slices of one patient resemble each other, so pairs WITHIN a patient are left out, not only a slice with itself:
    thus the estimate is unbiased for patients as the unit, and zero on average between two parts of one cohort. With
    one slice a patient it's the textbook's unbiased estimate. The kernel is summed once into blocks of patients.
    """

    def __init__(
        self, first: np.ndarray, first_index: np.ndarray, second: np.ndarray, second_index: np.ndarray
    ) -> None:
        """Sum the kernel of features (n, d) and (m, d) by the patients who own them: (n,) and (m,), from 0.

        Raises:
            ParameterError: as `frechet_distance`.
        """
        _require_features("KID", first, second)
        self._blocks = {
            "11": _block_sums(first, first_index, first, first_index),
            "22": _block_sums(second, second_index, second, second_index),
            "12": _block_sums(first, first_index, second, second_index),
        }

    def __call__(self, first: np.ndarray, second: np.ndarray) -> float:
        """Give the distance between these patients of the first cohort and these of the second, nobody repeated.

        Raises:
            ParameterError: fewer than 2 patients on a side.
        """
        _require_patients("KID", min(len(first), len(second)), 2)
        return (
            _mean(self._blocks["11"], first, first, within=False)
            + _mean(self._blocks["22"], second, second, within=False)
            - 2 * _mean(self._blocks["12"], first, second, within=True)
        )


class Neighbourhood(NamedTuple):
    """Precision, recall and coverage are shares of slices; density is 1 on average between cohorts alike."""

    precision: float
    recall: float
    density: float
    coverage: float


class NeighbourMeasures:
    """Precision, recall (Kynkaanniemi et al., arXiv 1904.06991), density, coverage (Naeem et al., arXiv 2002.09797).

    Slices of one patient resemble each other, so the ball round a slice ends at the k-th nearest OTHER PATIENT of its
    cohort, who is as near as their nearest slice. Precision is the share of synthetic slices inside a real ball, recall
    that of real slices inside a synthetic ball, coverage that of real balls which hold a synthetic slice, and density
    counts the synthetic PATIENTS in real balls. Patients weigh alike, however many slices they have.

    Between n real and m synthetic patients of one distribution, density is 1 on average and coverage
    1 - prod_{i=1..k} (n - i) / (n + m - i), whatever the features and however slices cluster: round a slice, all orders
    of the n - 1 + m others are equally likely. With one slice a patient all four are the textbook's. Distances are
    taken once and kept, 8 bytes a pair of slices.
    """

    def __init__(
        self,
        synthetic: np.ndarray,
        synthetic_index: np.ndarray,
        real: np.ndarray,
        real_index: np.ndarray,
        *,
        k: int = 5,
    ) -> None:
        """Take the distances of features (n, d) and (m, d), owned by patients (n,) and (m,), from 0.

        Raises:
            ParameterError: as `frechet_distance`.
        """
        _require_features("precision, recall, density and coverage", synthetic, real)
        self._k, self._known = k, dict[tuple[bytes, bytes], Neighbourhood]()
        self._synthetic_owners, self._real_owners = synthetic_index, real_index
        self._between = _distances(real, synthetic)
        self._to_synthetic = _to_patients(self._between, synthetic_index)
        self._within_synthetic = _to_others(synthetic, synthetic_index)
        self._within_real = _to_others(real, real_index)

    def __call__(self, synthetic: np.ndarray, real: np.ndarray) -> Neighbourhood:
        """Give the four between these synthetic patients and these real ones, nobody repeated; once for each pair.

        Raises:
            ParameterError: fewer than k + 1 patients on a side.
        """
        _require_patients(
            f"precision, recall, density and coverage with k = {self._k}", min(len(synthetic), len(real)), self._k + 1
        )
        pair = synthetic.tobytes(), real.tobytes()
        if pair not in self._known:
            self._known[pair] = self._between_them(synthetic, real)
        return self._known[pair]

    def _between_them(self, synthetic: np.ndarray, real: np.ndarray) -> Neighbourhood:
        ours, our_weights = _rows(self._synthetic_owners, synthetic)
        theirs, their_weights = _rows(self._real_owners, real)
        our_radii = self._radii(self._within_synthetic[np.ix_(ours, synthetic)])
        their_radii = self._radii(self._within_real[np.ix_(theirs, real)])[:, None]
        between = self._between[np.ix_(theirs, ours)]
        in_real_ball = between < their_radii
        patients_in_ball = (self._to_synthetic[np.ix_(theirs, synthetic)] < their_radii).mean(axis=1)
        return Neighbourhood(
            precision=float(our_weights @ in_real_ball.any(axis=0)),
            recall=float(their_weights @ (between < our_radii).any(axis=1)),
            density=float(their_weights @ patients_in_ball) * len(real) / self._k,
            coverage=float(their_weights @ in_real_ball.any(axis=1)),
        )

    def _radii(self, distances: np.ndarray) -> np.ndarray:
        return np.partition(distances, self._k - 1, axis=1)[:, self._k - 1]


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = (torch.from_numpy(features.astype(np.float64)) for features in (x, y))
    return torch.cdist(a, b).numpy()


def _to_patients(distances: np.ndarray, patient_index: np.ndarray) -> np.ndarray:
    """From slices to slices (n, m), to the nearest slice of each patient (n, patients)."""
    return np.stack([distances[:, rows].min(axis=1, initial=np.inf) for rows in rows_of(patient_index)], axis=1)


def _to_others(features: np.ndarray, patient_index: np.ndarray) -> np.ndarray:
    """From each slice to each patient of its own cohort (n, patients), infinite to the one who owns it."""
    distances = _to_patients(_distances(features, features), patient_index)
    distances[np.arange(len(patient_index)), patient_index] = np.inf
    return distances


def _rows(patient_index: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of these patients, and their weights: patients weigh alike, so do the rows of one; they sum to 1."""
    rows = np.flatnonzero(np.isin(patient_index, patients))
    weights = 1 / np.bincount(patient_index[rows])[patient_index[rows]]
    return rows, weights / weights.sum()


def _centred(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean (d,), and what's left (n, d) scaled so that its Gram matrix is the covariance; float64."""
    mean = features.mean(axis=0, dtype=np.float64)
    return mean, (features - mean) / np.sqrt(len(features) - 1)


def _require_features(metric: str, *cohorts: np.ndarray) -> None:
    shapes = [features.shape for features in cohorts]
    if any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
        raise ParameterError(
            f"{metric}: features of shapes {' and '.join(map(str, shapes))}; it needs (n, d) and (m, d), so read both "
            "cohorts with the same encoder"
        )
    for features in cohorts:
        if len(features) < 2:
            raise ParameterError(f"{metric}: {len(features)} slices; it needs at least 2 of either cohort")
        if not np.isfinite(features.sum(dtype=np.float64)):
            n_bad = int((~np.isfinite(features)).any(axis=1).sum())
            raise ParameterError(
                f"{metric}: {n_bad} of {len(features)} slices have features that aren't finite; it needs all finite: "
                "look at the images"
            )


def _require_patients(metric: str, found: int, needed: int) -> None:
    if found < needed:
        raise ParameterError(f"{metric}: {found} patients; it needs at least {needed} of either cohort")


def _block_sums(
    x: np.ndarray, x_index: np.ndarray, y: np.ndarray, y_index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel and numbers of pairs, both (patients of x, patients of y)."""
    in_x, in_y = (
        np.equal.outer(np.arange(patient_index.max() + 1), patient_index).astype(np.float64)
        for patient_index in (x_index, y_index)
    )
    kernel = (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3
    return in_x @ kernel @ in_y.T, np.outer(in_x.sum(axis=1), in_y.sum(axis=1))


def _mean(block: tuple[np.ndarray, np.ndarray], rows: np.ndarray, columns: np.ndarray, *, within: bool) -> float:
    """Mean of the kernel over the pairs of these patients, those within one patient left out or not."""
    sums, counts = (part[np.ix_(rows, columns)] for part in block)
    kept = np.ones_like(counts) if within else rows[:, None] != columns[None, :]
    return float((sums * kept).sum() / (counts * kept).sum())
