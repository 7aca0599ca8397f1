"""From volumes as acquired to the grid on which the study works: where the heart is, resampling, intensities."""

from typing import Protocol

import numpy as np
from einops import einsum

from cardiac_ldm.cohort.anatomy import segmented
from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES, known_attributes
from cardiac_ldm.cohort.patients import PatientRecord
from cardiac_ldm.cohort.volumes import GRID, Patient, Volume
from cardiac_ldm.errors import CohortError


class Localiser(Protocol):
    """Labels hearts that nobody has labelled. It's pickled; `key` stands for everything that shaped it."""

    @property
    def key(self) -> str:
        """Enters the cohort's key where the localiser was needed."""
        ...

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Labels uint8 of an image float32 (slices, rows, columns) in [0, 1] of any size, GRID's spacing in-plane."""
        ...


def place_on_grid(patient: Patient, localiser: Localiser | None = None) -> PatientRecord:
    """Resample, crop and pad a patient to GRID and scale intensities to [0, 1]; ED and ES alike.

    In-plane the field is centred on the box round the labels. Stacks within 1 mm of the grid's slice spacing keep their
    slices, others are resampled; slices without ventricles in any phase become padding, and what remains is centred.
    In-plane a tent kernel as wide as the coarser of the two grids interpolates (linear, antialiased), and labels take
    the class of largest weight. Between slices images are linear and labels the nearest slice's, counted from the
    middle one: of a stack at 5 mm, every second slice stays as acquired. A stack that is on the grid already is taken
    as it is. A heart longer or wider than the grid loses its ends, which `repairs` say. Attributes are measured on the
    labels as acquired, DEPTH on the grid.

    The localiser labels volumes that nobody has labelled; what the check of anatomy finds in those becomes doubts.
    Where no volume shows a heart, field and slices are centred on the stack, and what labels would tell is unknown.

    Raises CohortError where an image has no contrast round the heart.
    """
    spacing, repairs, volumes = patient.volumes[0].spacing_mm, list(patient.repairs), patient.volumes
    seen_in = {v.phase: labels_of(v, localiser) for v in volumes}
    seen: dict[str, np.ndarray] = {phase: labels for phase, labels in seen_in.items() if labels.any()}
    images, labels = _resampled(np.stack([v.image for v in volumes]), np.stack(list(seen_in.values())), spacing)
    shown = np.flatnonzero(labels.any(axis=(0, 2, 3)))
    shown = np.arange(shown[0], shown[-1] + 1) if len(shown) else np.arange(labels.shape[1])
    if localiser and not seen:
        repairs.append(f"{patient.id}: no heart was found; the middle of the field of view was taken for it")
    doubts = [*patient.doubts, *(segmented(patient, seen) if localiser else ())]
    if surplus := max(0, len(shown) - GRID.n_slices):
        met = f"{len(shown)} slices are more than {GRID.n_slices}"
        repairs.append(f"{patient.id}: {met}; those at the ends were left out")
    extent = [np.ptp(np.nonzero(heart)[axis]) + 1 for heart in seen.values() for axis in (1, 2)]
    if any(n * mm > GRID.size * GRID.spacing_mm[1] for n, mm in zip(extent, spacing[1:] * len(seen), strict=True)):
        repairs.append(f"{patient.id}: the heart is wider than the grid; what lies beyond was cut off")
    shown = shown[surplus // 2 : len(shown) - (surplus - surplus // 2)]
    start = (GRID.n_slices - len(shown)) // 2
    placed_images = np.zeros((len(images), *GRID.shape), np.float32)
    placed_labels = np.zeros((len(images), *GRID.shape), np.uint8)
    placed_labels[:, start : start + len(shown)] = labels[:, shown]
    for phase, image, placed in zip(seen_in, images[:, shown], placed_images, strict=True):
        placed[start : start + len(shown)] = scaled(image)
        if not placed.any():
            raise CohortError(f"{patient.id}: {phase} has the same value all round the heart; export it again")
    known = known_attributes(seen, spacing) | {"DEPTH": float(len(shown))} if seen else {}
    known = known | {name: value for name, value in patient.attributes.items() if name != "DEPTH"}
    of_volumes = [known | {"ESED": float(v.phase == "ED")} for v in volumes]
    attributes = np.array([[of.get(name, np.nan) for name in ATTRIBUTE_NAMES] for of in of_volumes], np.float32)
    labelled = all(v.labels is not None for v in volumes)
    arrays = placed_images, placed_labels, attributes
    return PatientRecord(patient.id, patient.group, *arrays, labelled, tuple(repairs), tuple(doubts))


def scaled(image: np.ndarray) -> np.ndarray:
    """Scale to [0, 1] between the 1st and 99th percentile, and clip; zeros where rounding alone tells these apart."""
    low, high = map(float, np.percentile(image, (1, 99)))  # numpy floats would make it double
    return np.clip((image - low) / (high - low), 0, 1) if high - low > 1e-5 * abs(high) else 0 * image


def labels_of(volume: Volume, localiser: Localiser | None) -> np.ndarray:
    """Labels uint8 as acquired: the volume's own, else the localiser's, who sees it with GRID's spacing; else zeros."""
    if volume.labels is not None:
        return volume.labels
    if localiser is None:
        return np.zeros(volume.image.shape, np.uint8)
    old = [np.arange(n) * mm for n, mm in zip(volume.image.shape[1:], volume.spacing_mm[1:], strict=True)]
    new = [np.arange(0, at[-1] + 1e-6, GRID.spacing_mm[1]) for at in old]
    rows, columns = (
        _tent(o, n, mm, max(mm, GRID.spacing_mm[1])) for o, n, mm in zip(old, new, volume.spacing_mm[1:], strict=True)
    )
    seen = localiser(scaled(rows @ volume.image.astype(np.float32) @ columns.T))
    y, x = (np.abs(o[:, None] - n).argmin(axis=1) for o, n in zip(old, new, strict=True))
    return seen[:, y[:, None], x]


def _resampled(
    images: np.ndarray, labels: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 and labels uint8, (v, slices, 96, 96), with the grid's spacing and as many slices as it takes."""
    dz, dy, dx = spacing
    if spacing == GRID.spacing_mm and images.shape[2:] == GRID.shape[1:]:
        return images, labels
    heart = np.asarray((labels > 0).any(axis=0))
    box = np.nonzero(heart if heart.any() else np.ones_like(heart))
    field = (np.arange(GRID.size) - (GRID.size - 1) / 2) * GRID.spacing_mm[1]
    rows, columns = (
        _tent(np.arange(n) * mm, field + (at.min() + at.max()) / 2 * mm, mm, max(mm, GRID.spacing_mm[1]))
        for n, mm, at in zip(heart.shape[1:], (dy, dx), box[1:], strict=True)
    )
    in_plane = [rows @ stack.astype(np.float32) @ columns.T for stack in (images, *(labels == k for k in range(4)))]
    images, labels = in_plane[0], np.argmax(in_plane[1:], axis=0).astype(np.uint8)
    if abs(dz - GRID.spacing_mm[0]) <= 1:
        return images, labels
    depth = (np.arange(len(heart)) - len(heart) // 2) * dz
    reach = GRID.spacing_mm[0] * np.arange(-len(heart), len(heart) + 1)
    wanted = reach[(reach >= depth[0]) & (reach <= depth[-1])]
    nearest = np.abs(wanted[:, None] - depth).argmin(axis=1)
    return einsum(_tent(depth, wanted, dz, dz), images, "new old, v old h w -> v new h w"), labels[:, nearest]


def _tent(old: np.ndarray, new: np.ndarray, spacing: float, half_width: float) -> np.ndarray:
    """Weights (new, old) of a tent kernel between positions in mm; new ones outside the old field get zeros."""
    distance = np.abs(new[:, None] - old[None, :])
    weights = np.maximum(0, 1 - distance / half_width)
    inside = distance.min(axis=1, keepdims=True) <= spacing / 2 + 1e-6
    return (inside * weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)).astype(np.float32)
