"""What EfficientNet-Lite0 sees in the middle slices: the features of FD-EffNet and KID."""

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from cardiac_ldm.models.perception import PerceptionEncoder

SLICES = slice(3, 10)
"""Slices 3..9 of 13, as Daum et al., arXiv 2407.16405: further out, many volumes are padding."""


@torch.no_grad()
def slice_features(
    images: np.ndarray, owners: np.ndarray, *, batch: int = 4, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Encode slices 3..9 of volumes (n, 13, 96, 96) in [0, 1], `batch` volumes at a time.

    Returns:
        Features, float32 (7 n, 1280), and the patient or request that each slice belongs to, int64 (7 n,).
    """
    encoder = PerceptionEncoder()
    batches = np.array_split(images[:, SLICES], max(1, len(images) // batch))
    features = [
        encoder(torch.from_numpy(rearrange(volumes, "n d h w -> (n d) 1 h w"))).numpy()
        for volumes in tqdm(batches, desc="features", unit="batch", disable=not progress, leave=False)
    ]
    return np.concatenate(features), np.repeat(owners, SLICES.stop - SLICES.start)
