"""How alike the volumes of different patients are: a cohort of copies shows here."""

import numpy as np
import torch
from monai.metrics.regression import compute_ms_ssim
from tqdm import tqdm

from cardiac_ldm.evaluation.features import SLICES

_BATCH = 8
SCALE_WEIGHTS = tuple(np.array([0.0448, 0.2856, 0.3001]) / (0.0448 + 0.2856 + 0.3001))
"""The three finest of MS-SSIM's five scales (Wang et al., Asilomar 2003), scaled to sum to 1: the usual 11 x 11 window
fits into 96 pixels halved twice, not four times."""


@torch.no_grad()
def similarity_of_pairs(
    images: np.ndarray,
    owners: np.ndarray,
    phases: np.ndarray,
    *,
    partners: int = 4,
    seed: int,
    progress: bool = True,
) -> np.ndarray:
    """MS-SSIM of pairs of volumes of DIFFERENT patients in the same phase; each volume meets 2 x `partners` others.

    Slices 3..9 are channels: windows and halvings are in-plane, as in 3D with a window of depth 1, since 13 slices of
    10 mm bear neither an 11-voxel window nor a halving.

    Args:
        images: (n, 13, 96, 96) in [0, 1].
        owners: int64 (n,), the patient or request of each volume.
        phases: (n,), 0 end-systole, 1 end-diastole.
        partners: pairs drawn per volume.
        seed: draws the pairs.
        progress: show a bar.

    Returns:
        float64 (patients, patients), symmetric: a pair's mean MS-SSIM over its phases, NaN where it wasn't drawn.
    """
    rng, pairs = np.random.default_rng(seed), []
    for phase in np.unique(phases):
        ring = rng.permutation(np.flatnonzero(phases == phase))
        for step in range(1, min(partners, (len(ring) - 1) // 2) + 1):
            pairs += [(i, j) for i, j in zip(ring, np.roll(ring, step), strict=True) if owners[i] != owners[j]]
    n_patients = int(owners.max()) + 1
    total, count = np.zeros((n_patients, n_patients)), np.zeros((n_patients, n_patients))
    bar = tqdm(range(0, len(pairs), _BATCH), desc="MS-SSIM", unit="batch", disable=not progress, leave=False)
    for start in bar:
        first, second = np.array(pairs[start : start + _BATCH]).T
        x, y = (torch.from_numpy(images[side, SLICES]) for side in (first, second))
        value = compute_ms_ssim(x, y, spatial_dims=2, weights=SCALE_WEIGHTS).flatten().double().numpy()
        for a, b in ((owners[first], owners[second]), (owners[second], owners[first])):
            np.add.at(total, (a, b), value)
            np.add.at(count, (a, b), 1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def mean_similarity(similarity: np.ndarray, patients: np.ndarray) -> float:
    """Mean of the drawn pairs (patients, patients) among these patients, who may be repeated; never one with itself."""
    repeats = np.bincount(patients, minlength=len(similarity)).astype(np.float64)
    drawn = np.isfinite(similarity)
    weights = np.outer(repeats, repeats) * drawn
    return float((weights * np.where(drawn, similarity, 0)).sum() / weights.sum()) if weights.any() else float("nan")
