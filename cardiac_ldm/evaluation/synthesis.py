"""Draw a synthetic cohort: volumes for the attributes that were asked for, and its file format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import device_of
from cardiac_ldm.models.diffusion import Sampler, sample_ddim
from cardiac_ldm.progress import tqdm

RELEASED = "cardiac_ldm: short axis, base first"
"""`descrip` of the NIfTI files in which synthetic volumes are given away: their affines say how the heart lies."""
RELEASED_AXES = np.array([-1.0, -1.0, -1.0])
"""Their columns, rows and slices in RAS: to the patient's left, to the back, down from the base."""


@dataclass(frozen=True)
class SyntheticCohort:
    """Synthetic volumes and what was asked for.

    images: float32 (n, 13, 96, 96) in [0, 1]. attributes: float32 (n, 14), as asked. owners: int64 (n,), the request
    (a synthetic patient, with an ED and an ES volume) to which each volume belongs. labels: uint8 (n, 13, 96, 96), what
    the decoder meant by what it drew (0 background, 1 RV, 2 myocardium, 3 LV), or None if it has no anatomy head.
    """

    images: np.ndarray
    attributes: np.ndarray
    owners: np.ndarray
    labels: np.ndarray | None = None

    def save(self, path: Path) -> None:
        """Write to one compressed file, images at 8 bits."""
        temporary = path.with_suffix(".tmp.npz")
        images = (self.images * 255).round().astype(np.uint8)
        parts = {"images": images, "attributes": self.attributes, "owners": self.owners}
        labels = {} if self.labels is None else {"labels": self.labels}
        np.savez_compressed(temporary, **parts | labels)  # type: ignore[arg-type]
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "SyntheticCohort":
        """Read what `save` wrote."""
        with np.load(path) as stored:
            images = stored["images"].astype(np.float32) / 255
            return cls(images, stored["attributes"], stored["owners"], stored.get("labels"))


@torch.no_grad()
def synthesise(
    autoencoder: Autoencoder,
    denoiser: Denoiser,
    attributes: np.ndarray,
    owners: np.ndarray,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 8,
    sampler: Sampler = sample_ddim,
) -> SyntheticCohort:
    """Sample one volume for each row of `attributes` (n, 14), and its labels if the decoder gives any.

    The volumes of one request start from the same noise, which depends on the seed and the request alone; the noise of
    their texture depends on the row too: models are compared on the same requests and noise. Slices beyond the DEPTH
    that was asked for are empty, as in the data.
    """
    size, device = GRID.size // autoencoder.reduction, device_of(autoencoder)
    shape = (autoencoder.latent_channels, GRID.n_slices, size, size)
    noise = torch.stack([_normal([seed, owner], *shape) for owner in owners])
    asked, volumes, labels = torch.from_numpy(attributes), [], []
    n_batches = len(range(0, len(asked), batch))
    with tqdm(total=n_batches * steps, desc="sample", unit="step") as bar:
        for rows in torch.arange(len(asked)).split(batch):
            start, wanted = noise[rows].to(device), asked[rows].to(device)
            latents = sampler(denoiser, start, wanted, guidance, steps, bar.update)
            texture = torch.stack(
                [_normal([seed, owners[row], 1 + row], GRID.n_slices, GRID.size, GRID.size) for row in rows]
            )
            drawn, meant = autoencoder.decode_labelled(latents, texture.to(device))
            volumes.append(drawn.cpu().numpy())
            labels += [] if meant is None else [meant.cpu().numpy()]
    cohort = SyntheticCohort(np.concatenate(volumes), attributes, owners, np.concatenate(labels) if labels else None)
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
