"""Volumes to look through, in the book and in live notebooks: linked slices, and a 3D view by NiiVue or itkwidgets."""

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cardiac_ldm.cohort import ATTRIBUTES, GRID, Patients, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.synthesis import RELEASED_AXES
from cardiac_ldm.report.live import embed, front_end, loader
from cardiac_ldm.report.walls import SYNTHETIC, mosaic, png, shown_as


@dataclass(frozen=True, repr=False)
class VolumeViewer:
    """HTML that a notebook cell shows: a still picture, which the book's script turns into a viewer.

    A live notebook has no such script: there, the cell brings it along, with NiiVue (1 MB) where volumes turn.
    kind: the viewer's class.
    """

    html: str
    kind: Literal["bk-volumes", "bk-levels"] = "bk-volumes"

    def _repr_html_(self) -> str:
        """IPython's hook."""
        return self.html + loader(self.kind) if front_end() else self.html


def show_patients(patients: Patients, volumes: Sequence[int], titles: Sequence[str]) -> VolumeViewer:
    """Show patients' volumes, with linked slices.

    volumes: indices, as `patients.images` takes them. titles: one per volume.
    Raises PrivacyError when the patients are private and not simulated.
    """
    require_releasable(patients, "what a patient's heart looks like")
    return _viewer(patients.images(volumes), titles, shown_as(patients))


def show_synthetic(
    volumes: NDArray[np.float32],
    titles: Sequence[str],
    phases: Sequence[str] = (),
    labels: NDArray[np.uint8] | None = None,
) -> VolumeViewer:
    """Show synthetic volumes (n, slices, height, width) in [0, 1], with linked slices.

    titles: one per volume. phases: one per volume, "ED" or "ES": the viewer shows one of them and flips. labels: of the
    volumes' shape, shown over them.
    """
    return _viewer(np.asarray(volumes), titles, SYNTHETIC, phases, labels)


def show_levels(images: NDArray[np.float32], levels: pd.DataFrame, model: str) -> VolumeViewer:
    """Show a dial that moves one attribute of a sample: its middle slice, what was requested and what was measured.

    images: (n, slices, height, width) in [0, 1], synthetic. levels: a row each, with columns attribute, phase,
    requested and measured; every attribute has as many. model: which one drew them.
    """
    told = {a.name: (a.description, a.unit) for a in ATTRIBUTES}
    attributes = []
    for name, rows in levels.groupby("attribute", sort=False):
        description, unit = told[str(name)]
        read = [{side: _said(row[side], unit) for side in ("requested", "measured")} for _, row in rows.iterrows()]
        attributes.append({"name": description, "phase": rows["phase"].iloc[0], "levels": read})
    if len(images) != len(levels) or levels["attribute"].value_counts().nunique() != 1:
        raise ParameterError(f"{len(images)} images, {len(levels)} levels: give one image a level, equally many each")
    columns = len(levels) // len(attributes)
    payload = {"badge": f"{SYNTHETIC}, {model}", "tile": images.shape[2] + 2, "mm": GRID.spacing_mm[2]}
    names = "; ".join(f"{part['name']}, {part['phase']}" for part in attributes)
    alt = f"{SYNTHETIC}: one sample while one attribute is moved, a row each: {names}"
    poster = f'<img alt="{alt}" src="{png(mosaic(images, columns))}">'
    html = embed("bk-levels", json.dumps(payload | {"attributes": attributes}), 300, alt, poster)
    return VolumeViewer(html, "bk-levels")


def _said(value: float, unit: str) -> str:
    """A value with its unit, as the dial says it."""
    return f"{value:.3g} {unit}".strip() if np.isfinite(value) else "not read"


def view(volume: NDArray[np.float32], labels: NDArray[np.uint8] | None = None, badge: str = "") -> object:
    """Show one volume, and its labels in colours, in whatever front end the notebook is opened.

    Classic Notebook shows itkwidgets' viewer where `pip install "cardiac-ldm[live]"` has brought it. JupyterLab and
    VS Code, for which itkwidgets' stable version has none, classic Notebook without it, and the book show NiiVue's.

    volume: (slices, height, width) in [0, 1]. labels: of the same shape; 1 right ventricle, 2 myocardium, 3 left
    ventricle. badge: whom it shows, as `shown_as` says. Raises ParameterError for other shapes or labels.
    """
    if volume.ndim != 3:
        raise ParameterError(f"view shows one volume (slices, height, width); this one has the shape {volume.shape}")
    if labels is not None and labels.shape != volume.shape:
        raise ParameterError(f"labels of the shape {labels.shape} don't fit a volume of the shape {volume.shape}")
    if labels is not None and not np.isin(labels, range(4)).all():
        raise ParameterError(f"labels are 0 to 3; these have {np.unique(labels).tolist()[:8]}")
    if front_end() == "classic" and _itkwidgets_shows():
        from itkwidgets import view as view_itk

        label_image = None if labels is None else _itk_image(labels.astype(np.uint8))
        viewer = view_itk(_itk_image(volume), label_image, ui_collapsed=True)
        viewer.channels = [True]  # its front end can't do without, and its `view` doesn't say which there are
        return viewer
    titles = ["volume" if labels is None else "volume with labels"]
    return _viewer(volume[None], titles, badge, labels=None if labels is None else labels[None])


def _itkwidgets_shows() -> bool:
    """Whether itkwidgets is there, with the ipywidgets that its viewer in classic Notebook was made for."""
    try:
        import itkwidgets  # noqa: F401

        return version("ipywidgets").startswith("7.7.")
    except ImportError:
        return False


def _itk_image(volume: NDArray[np.float32] | NDArray[np.uint8]) -> object:
    """Return itk's image of the file that `nifti` makes: the same voxels at the same places, axes as itk has them."""
    import itk

    file = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(volume)))
    axes = nib.orientations.axcodes2ornt(("L", "P", "S"))
    turned = file.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(file.affine), axes))
    image = itk.image_from_array(np.ascontiguousarray(np.asarray(turned.dataobj).transpose(2, 1, 0)))
    image.SetSpacing([float(mm) for mm in turned.header.get_zooms()])
    image.SetOrigin((turned.affine[:3, 3] * [-1, -1, 1]).tolist())
    return image


def nifti(volume: NDArray[np.float32] | NDArray[np.uint8], description: str = "") -> bytes:
    """Return a volume (slices, height, width) in [0, 1] as a gzipped 8-bit NIfTI file on the study's grid, in mm.

    uint8 labels are kept as they are; anything else is scaled to 0..255. description: what the header says of it.

    The heart lies with its base up: columns run to the patient's left, as in pictures of the short axis, rows to the
    back and slices down, from base to apex; the centre is the origin. So the RV lies on the patient's right.
    """
    affine = np.diag([*RELEASED_AXES * GRID.spacing_mm[::-1], 1.0])
    scaled = volume if volume.dtype == np.uint8 else (255 * volume.clip(0, 1)).round().astype(np.uint8)
    voxels = scaled.transpose(2, 1, 0)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(voxels.shape) - 1) / 2
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = description
    image.set_qform(affine, code="aligned")
    return gzip.compress(image.to_bytes(), mtime=0)


def _viewer(
    volumes: NDArray[np.float32],
    titles: Sequence[str],
    badge: str,
    phases: Sequence[str] = (),
    labels: NDArray[np.uint8] | None = None,
) -> VolumeViewer:
    """Embed volumes (n, slices, height, width) and, until they're drawn, a picture of their middle slices."""
    if len(titles) != len(volumes) or len(volumes) == 0:
        raise ParameterError(f"a viewer needs one title per volume: {len(titles)} titles, {len(volumes)} volumes")
    files = [base64.b64encode(nifti(volume)).decode() for volume in volumes]
    payload = [{"title": title, "nifti": file} for title, file in zip(titles, files, strict=True)]
    for shown, phase in zip(payload, phases, strict=False):
        shown["phase"] = phase
    for shown, drawn in zip(payload, labels if labels is not None else (), strict=False):
        shown["labels"] = base64.b64encode(nifti(drawn.astype(np.uint8))).decode()
    picture = png(mosaic(volumes, min(6, len(volumes))))
    alt = f"{badge or 'volumes'}: {', '.join(titles)}"
    poster = f'<img alt="the middle slice of each volume" src="{picture}">'
    return VolumeViewer(embed("bk-volumes", json.dumps({"badge": badge, "volumes": payload}), 300, alt, poster))
