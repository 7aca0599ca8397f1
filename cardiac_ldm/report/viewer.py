"""Volumes that turn: slices and a 3D view, drawn by NiiVue in the book and by itkwidgets in a live notebook."""

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from cardiac_ldm.cohort import GRID, Patients, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.synthesis import RELEASED, RELEASED_AXES
from cardiac_ldm.report.figures import embed, mosaic, png


@dataclass(frozen=True, repr=False)
class VolumeViewer:
    """HTML that a notebook cell shows: a still picture, which the book's script turns into a viewer."""

    html: str

    def _repr_html_(self) -> str:
        """IPython's hook."""
        return self.html


def show_patients(patients: Patients, volumes: Sequence[int], titles: Sequence[str]) -> VolumeViewer:
    """Show patients' volumes, one at a time, chosen by title.

    volumes: indices, as `patients.images` takes them. titles: one per volume.
    Raises PrivacyError when the patients are private and not simulated.
    """
    require_releasable(patients, "what a patient's heart looks like")
    return _viewer(patients.images(volumes), titles)


def show_synthetic(volumes: NDArray[np.float32], titles: Sequence[str]) -> VolumeViewer:
    """Show synthetic volumes (n, slices, height, width) in [0, 1], one at a time, chosen by title."""
    return _viewer(np.asarray(volumes), titles)


def view_live(volume: NDArray[np.float32]) -> object:
    """Return an itkwidgets view, for a live notebook, of one volume (slices, height, width) in [0, 1]."""
    try:
        import itk
        from itkwidgets import view
    except ImportError as missing:
        raise ParameterError('the live view needs itkwidgets: pip install "cardiac-ldm[live]"') from missing
    image = itk.image_from_array(np.ascontiguousarray(volume, dtype=np.float32))
    image.SetSpacing([float(mm) for mm in reversed(GRID.spacing_mm)])
    return view(image)


def nifti(volume: NDArray[np.float32] | NDArray[np.uint8]) -> bytes:
    """Return a volume (slices, height, width) in [0, 1] as a gzipped 8-bit NIfTI file on the study's grid, in mm.

    uint8 labels are kept as they are; anything else is scaled to 0..255.

    The heart lies with its base up: columns run to the patient's left, as in pictures of the short axis, rows to the
    back and slices down, from base to apex; the centre is the origin. So the RV lies on the patient's right.
    """
    affine = np.diag([*RELEASED_AXES * GRID.spacing_mm[::-1], 1.0])
    scaled = volume if volume.dtype == np.uint8 else (255 * volume.clip(0, 1)).round().astype(np.uint8)
    voxels = scaled.transpose(2, 1, 0)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(voxels.shape) - 1) / 2
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = RELEASED
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="aligned")
    return gzip.compress(image.to_bytes(), mtime=0)


def _viewer(volumes: NDArray[np.float32], titles: Sequence[str]) -> VolumeViewer:
    """Embed volumes (n, slices, height, width) and, until they're drawn, a picture of their middle slices."""
    if len(titles) != len(volumes) or len(volumes) == 0:
        raise ParameterError(f"a viewer needs one title per volume: {len(titles)} titles, {len(volumes)} volumes")
    files = [base64.b64encode(nifti(volume)).decode() for volume in volumes]
    payload = [{"title": title, "nifti": file} for title, file in zip(titles, files, strict=True)]
    picture = png(mosaic(volumes, min(6, len(volumes))))
    poster = f'<img alt="the middle slice of each volume" src="{picture}">'
    return VolumeViewer(embed("bk-volumes", json.dumps({"volumes": payload}), 400, poster))
