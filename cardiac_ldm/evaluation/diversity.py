"""How alike the volumes of different patients are, and which hearts nobody has: a cohort of copies shows here."""

from typing import Literal

import numpy as np
import pandas as pd
import torch
from monai.metrics.regression import compute_ms_ssim

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Volumes
from cardiac_ldm.evaluation.features import SLICES
from cardiac_ldm.evaluation.fidelity import NeighbourMeasures
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS, Estimate, half_samples
from cardiac_ldm.progress import tqdm

_BATCH = 8
NEAREST = {"coverage": 1, "recall": 3}
"""Neighbours of a heart that count."""
_OUT_OF_REACH = 1e3
"""Standard deviations; nobody's neighbours are so far away."""
SCALE_WEIGHTS = tuple(np.array([0.0448, 0.2856, 0.3001]) / (0.0448 + 0.2856 + 0.3001))
"""The three finest of MS-SSIM's five scales (Wang et al., Asilomar 2003), scaled to sum to 1: the usual 11 x 11 window
fits into 96 pixels halved twice, not four times."""


@torch.no_grad()
def similarity_of_pairs(volumes: Volumes, *, partners: int = 4, seed: int) -> np.ndarray:
    """MS-SSIM of pairs of volumes of DIFFERENT patients in the same phase; each volume meets 2 x `partners` others.

    Slices 3..9 are channels: windows and halvings are in-plane, as in 3D with a window of depth 1, since 13 slices of
    10 mm bear neither an 11-voxel window nor a halving. The seed draws the pairs.

    Returns:
        float64 (patients, patients), symmetric: a pair's mean MS-SSIM over its phases, NaN where it wasn't drawn.
    """
    patient_index, phases = volumes.patient_index, volumes.attributes[:, ATTRIBUTE_NAMES.index("ESED")]
    rng, pairs = np.random.default_rng(seed), []
    for phase in np.unique(phases):
        ring = rng.permutation(np.flatnonzero(phases == phase))
        for step in range(1, min(partners, (len(ring) - 1) // 2) + 1):
            pairs += [
                (i, j) for i, j in zip(ring, np.roll(ring, step), strict=True) if patient_index[i] != patient_index[j]
            ]
    n_patients = int(patient_index.max()) + 1
    total, count = np.zeros((n_patients, n_patients)), np.zeros((n_patients, n_patients))
    bar = tqdm(range(0, len(pairs), _BATCH), desc="MS-SSIM", unit="batch", leave=False)
    for start in bar:
        first, second = np.array(pairs[start : start + _BATCH]).T
        x, y = (torch.from_numpy(volumes.images[side, SLICES]) for side in (first, second))
        value = compute_ms_ssim(x, y, spatial_dims=2, weights=SCALE_WEIGHTS).flatten().double().numpy()
        for a, b in ((patient_index[first], patient_index[second]), (patient_index[second], patient_index[first])):
            np.add.at(total, (a, b), value)
            np.add.at(count, (a, b), 1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def mean_similarity(similarity: np.ndarray, patients: np.ndarray) -> float:
    """Mean of the drawn pairs (patients, patients) among these patients, who may be repeated; never one with itself."""
    repeats = np.bincount(patients, minlength=len(similarity)).astype(np.float64)
    drawn = np.isfinite(similarity)
    weights = np.outer(repeats, repeats) * drawn
    return float((weights * np.where(drawn, similarity, 0)).sum() / weights.sum()) if weights.any() else float("nan")


def attribute_neighbours(
    measure: Literal["coverage", "recall"],
    synthetic: pd.DataFrame,
    real: pd.DataFrame,
    *,
    size: int,
    pairs: int,
    seed: int,
) -> Estimate:
    """Coverage or recall of hearts: vectors of all that the segmenter reads, in standard deviations of the real ones.

    Coverage (Naeem et al., arXiv 2002.09797): the share of real hearts that have a synthetic one nearer than their
    nearest real neighbour. With more neighbours it's blind where patients are few: among 20, copies of the mean heart,
    which is everybody's neighbour, cover 70 % for 5 and 13 % for 1. Requests that repeat the real patients' attributes,
    well obeyed, cover more than real halves do. A real heart in which something can't be measured doesn't count; a
    synthetic one does, and covers nobody.

    Recall (Kynkaanniemi et al., arXiv 1904.06991): the share of real hearts that lie no farther from a synthetic one
    than its third synthetic neighbour, which falls where synthetic hearts are all too ordinary. It says little of which
    attributes go together. Hearts in which something can't be measured don't count.

    synthetic, real: tables of `read_anatomy`; the very same table twice compares disjoint halves of the real patients,
    which is the ceiling. size: patients of either in a half-sample (`half_samples`), no more than half of those who can
    be measured.

    Returns:
        The share with its interval; NaN where there are fewer than 8 patients.
    """
    theirs = _hearts(real).dropna(axis="columns", how="all").dropna()
    theirs = theirs.loc[:, theirs.std() > 0]
    ours = theirs if synthetic is real else _hearts(synthetic).reindex(columns=theirs.columns)
    if measure == "recall":
        ours = ours.dropna()  # the ball round a heart out of reach would hold everybody
    size = min(size, len(ours) // 2, len(theirs) // 2)
    if size < MIN_PATIENTS // 2 or theirs.empty:
        return Estimate.undefined(size)
    first, second = (
        ((hearts - theirs.mean()) / theirs.std()).fillna(_OUT_OF_REACH).to_numpy() for hearts in (ours, theirs)
    )
    between = NeighbourMeasures(first, np.arange(len(first)), second, np.arange(len(second)), k=NEAREST[measure])
    return half_samples(
        lambda some, others: float(getattr(between(some, others), measure)),
        len(first),
        None if synthetic is real else len(second),
        size,
        pairs=pairs,
        seed=seed,
    )


def _hearts(table: pd.DataFrame) -> pd.DataFrame:
    """What's measured, a row a patient and a column per attribute."""
    return table[table.attribute != "ESED"].pivot(index="patient", columns="attribute", values="measured")
