"""The networks that read a heart: a segmenter, which also finds it, and a phase classifier; a laptop trains them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from monai.networks.nets import Classifier, UNet
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn

from cardiac_ldm.cohort import GRID
from cardiac_ldm.cohort.grid import scaled

N_LABELS = 4
"""Background, right ventricle, myocardium, left ventricle."""
_LOOKS = 6


class Segmenter(nn.Module):
    """A 2D U-Net (Ronneberger et al., arXiv 1505.04597) on each slice, its pixels folded 2 x 2 into channels.

    Folding (pixel-unshuffle) keeps all detail and costs a third of a U-Net at full resolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = UNet(
            spatial_dims=2,
            in_channels=4,
            out_channels=4 * N_LABELS,
            channels=(32, 64, 96, 128),
            strides=(2, 2, 2),
            act="PRELU",
            norm="INSTANCE",
        )

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits (b, 4, 13, 96, 96) of the labels of images (b, 13, 96, 96) in [0, 1]."""
        logits = self.network(rearrange(images, "b d (h i) (w j) -> (b d) (i j) h w", i=2, j=2))
        return rearrange(logits, "(b d) (c i j) h w -> b c d (h i) (w j)", b=len(images), i=2, j=2)


class PhaseClassifier(nn.Module):
    """Tells end-diastole from end-systole; slices are channels, so depth is never strided."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Classifier(
            in_shape=(13, 96, 96), classes=2, channels=(32, 32, 64, 64), strides=(2, 2, 2, 2), num_res_units=1
        )

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits (b, 2) of images (b, 13, 96, 96) in [0, 1]: index 0 is end-systole, 1 end-diastole (ESED)."""
        return self.network(images)


@dataclass(frozen=True)
class HeartFinder:
    """Labels whole fields of view with a saved segmenter: what `cohort.prepare` takes as its localiser.

    The segmenter knows hearts in the middle of a field of GRID's size: so it looks there first, then where it saw one,
    until it stays. Shown the whole field at once it finds hearts in the chest wall.

    key: of the run that trained it, on public patients.
    """

    weights: Path
    key: str

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Give labels uint8 of an image float32 (slices, rows, columns) in [0, 1] with GRID's spacing, of any size.

        Raises:
            FileNotFoundError: there are no weights.
        """
        segmenter, margin = _saved_segmenter(self.weights), GRID.size
        padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)))
        corner = (np.array(image.shape[1:]) + margin) // 2
        for _ in range(_LOOKS):
            field = np.s_[:, corner[0] : corner[0] + GRID.size, corner[1] : corner[1] + GRID.size]
            found = _largest_part(segmenter, scaled(padded[field]))
            looked_at, last, seen = field, corner, np.argwhere(found)
            if len(seen):
                centre = corner + seen[:, 1:].mean(axis=0)
                corner = np.clip(np.round(centre).astype(int) - GRID.size // 2, 0, np.array(image.shape[1:]) + margin)
            if np.abs(corner - last).max() <= 2:
                break
        labels = np.zeros(padded.shape, np.uint8)
        labels[looked_at] = found
        return labels[:, margin:-margin, margin:-margin]


@cache
def _saved_segmenter(weights: Path) -> Segmenter:
    """Read once per process, on the CPU: as many processes as there are cores look for hearts."""
    segmenter = Segmenter()
    segmenter.load_state_dict(load_file(weights))
    return segmenter.eval()


@torch.inference_mode()
def _largest_part(segmenter: Segmenter, image: np.ndarray) -> np.ndarray:
    """Labels of an image (slices, 96, 96), those alone that hang together most."""
    labels = segmenter(torch.from_numpy(image)[None])[0].argmax(dim=0).numpy().astype(np.uint8)
    parts, _ = ndimage.label(labels)
    sizes = np.bincount(parts.ravel())[1:]
    return labels * (parts == 1 + sizes.argmax()) if len(sizes) else labels
