"""Draw a synthetic cohort: volumes for the attributes that were requested."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Volumes
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import device_of
from cardiac_ldm.models.diffusion import Sampler, sample_ddim
from cardiac_ldm.progress import tqdm

RELEASED = "synthetic, cardiac_ldm: short axis, base first"
"""`descrip` of the NIfTI files in which synthetic volumes are given away: their affines say how the heart lies."""
RELEASED_AXES = np.array([-1.0, -1.0, -1.0])
"""Their columns, rows and slices in RAS: to the patient's left, to the back, down from the base."""


@torch.no_grad()
def synthesise(
    autoencoder: Autoencoder,
    denoiser: Denoiser,
    attributes: np.ndarray,
    patient_index: np.ndarray,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 8,
    sampler: Sampler = sample_ddim,
) -> Volumes:
    """Sample one volume for each row of `attributes` (n, 14), and its labels if the decoder gives any.

    The volumes of one request start from the same noise, which depends on the seed and the request alone; the noise of
    their texture depends on the row too: models are compared on the same requests and noise. Slices beyond the DEPTH
    that was asked for are empty, as in the data.
    """
    size, device = GRID.size // autoencoder.reduction, device_of(autoencoder)
    shape = (autoencoder.latent_channels, GRID.n_slices, size, size)
    noise = torch.stack([_normal([seed, owner], *shape) for owner in patient_index])
    requested, volumes, labels = torch.from_numpy(attributes), [], []
    n_batches = len(range(0, len(requested), batch))
    with tqdm(total=n_batches * steps, desc="sample", unit="step") as bar:
        for rows in torch.arange(len(requested)).split(batch):
            start, wanted = noise[rows].to(device), requested[rows].to(device)
            latents = sampler(denoiser, start, wanted, guidance, steps, bar.update)
            texture = torch.stack(
                [_normal([seed, patient_index[row], 1 + row], GRID.n_slices, GRID.size, GRID.size) for row in rows]
            )
            drawn, meant = autoencoder.decode_labelled(latents, texture.to(device))
            volumes.append(drawn.cpu().numpy())
            labels += [] if meant is None else [meant.cpu().numpy()]
    images, meant_labels = np.concatenate(volumes), np.concatenate(labels) if labels else None
    cohort = Volumes("synthetic", images, attributes, patient_index, meant_labels)
    slices = np.arange(GRID.n_slices)
    for row, depth in enumerate(attributes[:, ATTRIBUTE_NAMES.index("DEPTH")]):
        if np.isfinite(depth):
            first = (GRID.n_slices - round(float(depth))) // 2
            beyond = (slices < first) | (slices >= first + round(float(depth)))
            for stack in (cohort.images, cohort.labels):
                if stack is not None:
                    stack[row, beyond] = 0
    return cohort


def _normal(seed: Sequence[int], *shape: int) -> Tensor:
    """White noise of this shape, which the seed alone tells."""
    rng = np.random.default_rng([int(part) for part in seed])
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
