"""NIfTI files: opened, their header held against itself, and read. Every reader opens its files here."""

import gzip
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.openers import ImageOpener

SPACING_MM = ((0.3, 5.0), (0.3, 5.0), (1.0, 30.0))
EXTENT_MM = ((50.0, 1000.0), (50.0, 1000.0), (20.0, 300.0))
"""What a short-axis stack's voxels and field measure along columns, rows and slices."""
MAX_VOXELS = 2**28
"""More than any cine has: a header that claims more is damaged, which is found before memory is asked for."""
ENDINGS = (".nii", ".nii.gz")
_UNITS = {2: ("mm", 1.0), 1: ("metres", 1000.0), 3: ("micrometres", 0.001), 0: ("(no unit)", 1.0)}
_SAME_SIZE = 0.1
"""Relative difference up to which a voxel's size is the same in an affine and in pixdim."""


@dataclass(frozen=True)
class Nifti:
    """A file's data (x, y, z, t), unread; its spacing (x, y, z) and affine (4, 4) in mm; what was mended."""

    data: ArrayProxy
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    repairs: tuple[str, ...]


def open_nifti(place: Path) -> Nifti:
    """Open a volume (x, y, z) or a cine (x, y, z, t) of a short-axis stack.

    Where sform and pixdim contradict each other and the qform, which has a code, doesn't, the qform is taken: so are
    ACDC's files as they are downloaded. Units that the header names are brought to mm. Both are repairs.

    Raises ValueError that says what is wrong and what to do.
    """
    try:
        if place.suffix == ".gz":
            with gzip.open(place) as stream:  # to the end, where the checksum stands that tells of a flipped bit
                while stream.read(2**20):
                    pass
        with LoggingOutputSuppressor(), np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            image = nib.load(place)
            if not isinstance(image, nib.Nifti1Image):
                raise TypeError(f"it's {type(image).__name__}")
            with ImageOpener(place) as stream:
                stored = type(image.header).from_fileobj(stream, check=False)
            data, dtype = image.dataobj, image.get_data_dtype()
            raw = [float(v) for v in stored["pixdim"][1:4]]
            affine, repairs = _affine(image, raw)
    except Exception as error:
        raise ValueError(f"can't be read as NIfTI ({on_a_line(error)}); fetch this file again") from error
    shape = data.shape
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"its shape is {shape}; expected a volume (x, y, z) or a cine (x, y, z, t)")
    if dtype.kind not in "iuf":
        raise ValueError(f"holds {dtype} values; expected one number a voxel: save the magnitude image")
    unit, factor = _UNITS.get(int(stored["xyzt_units"]) % 8, _UNITS[0])
    dx, dy, dz = (v * factor for v in raw)
    if not _within((dx, dy, dz), SPACING_MM):
        likely = [name for name, f in _UNITS.values() if f != factor and _within([v * f for v in raw], SPACING_MM)]
        hint = f"it looks like {likely[0]}: " if likely else ""
        met = " x ".join(f"{v:g}" for v in raw)
        raise ValueError(f"its spacing is {met} {unit}, no short-axis stack's; {hint}correct the header")
    extent = [n * s for n, s in zip(shape, (dx, dy, dz), strict=False)]
    if not _within(extent, EXTENT_MM):
        met = " x ".join(f"{v:.0f}" for v in extent)
        raise ValueError(f"its shape {shape} covers {met} mm, no short-axis stack; correct file or header")
    if affine is None:
        raise ValueError("its affine contradicts its spacing (pixdim); correct the header")
    if factor != 1:
        repairs = (*repairs, f"its spacing, in {unit}, was brought to mm")
    affine = np.diag([factor, factor, factor, 1]) @ affine
    return Nifti(data.reshape((*shape[:3], -1)), (dx, dy, dz), affine, repairs)


def _affine(image: Any, pixdim: Sequence[float]) -> tuple[np.ndarray | None, tuple[str, ...]]:  # noqa: ANN401
    """The affine that agrees with the spacing: the one that counts, else a qform with a code; None if neither does."""
    if np.allclose(voxel_sizes(image.affine), pixdim, rtol=_SAME_SIZE):
        return np.asarray(image.affine), ()
    qform, code = image.get_qform(coded=True)
    if code > 0 and qform is not None and np.allclose(voxel_sizes(qform), pixdim, rtol=_SAME_SIZE):
        met = " x ".join(f"{v:.3g}" for v in voxel_sizes(image.affine))
        return np.asarray(qform), (f"its sform has voxels of {met}, which pixdim contradicts: the qform was taken",)
    return None, ()


def read_voxels(data: ArrayProxy, frame: int | slice) -> np.ndarray:
    """Voxels float32 of one frame (x, y, z), or of several (x, y, z, t). Raises ValueError that says what is wrong."""
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            voxels = np.asarray(data[..., frame]).astype(np.float32)
    except Exception as error:
        raise ValueError(f"can't be read to its end ({on_a_line(error)}); fetch this file again") from error
    if not np.isfinite(voxels).all():
        raise ValueError("expected finite numbers, found NaN or infinity; fetch or write this file again")
    return voxels


def on_a_line(said: object) -> str:
    """An error of a library, or the like, on one short line."""
    return " ".join(str(said).split())[:160] or type(said).__name__


def _within(values: Sequence[float], ranges: Sequence[tuple[float, float]]) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(values, ranges, strict=False))
