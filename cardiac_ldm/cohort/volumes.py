"""What a reader hands over, a patient with their volumes as acquired, and the grid on which the study works."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Phase = Literal["ED", "ES"]


@dataclass(frozen=True)
class Grid:
    """Voxels of a prepared volume: size x size in-plane, n_slices along the heart's axis; spacing (z, y, x) in mm."""

    n_slices: int = 13
    size: int = 96
    spacing_mm: tuple[float, float, float] = (10.0, 1.8269, 1.8269)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns)."""
        return self.n_slices, self.size, self.size


GRID = Grid()
"""The grid of Daum et al., arXiv 2407.16405."""


@dataclass(frozen=True)
class Volume:
    """One short-axis stack at one phase, base first: rows run down the picture, columns to its right.

    image: float32 (slices, rows, columns). labels: uint8 of the same shape, 0 background, 1 right ventricle's cavity,
    2 left ventricle's myocardium, 3 left ventricle's cavity; None where nobody has labelled it. spacing_mm: (z, y, x).
    """

    phase: Phase
    image: np.ndarray
    labels: np.ndarray | None
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Patient:
    """One patient: the unit of splitting, clipping, bootstrapping and privacy.

    volumes share one geometry. attributes: what is known beyond the labels (age, say); it takes precedence over what is
    measured from them. files: what was read, path below the data root -> SHA-256. repairs: what was mended in reading,
    doubts: what the check of anatomy found doubtful, a sentence each, which names the file.
    """

    id: str
    group: str | None
    volumes: tuple[Volume, ...]
    attributes: Mapping[str, float]
    files: Mapping[str, str] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def labels_by_phase(volumes: Iterable[Volume]) -> dict[str, np.ndarray]:
    """Labels of the volumes that have any."""
    return {v.phase: v.labels for v in volumes if v.labels is not None}
