"""Readers: from a manifest and a patient's name to that patient's volumes as acquired."""

import hashlib
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np

from cardiac_ldm.cohort.manifest import AcdcReader, Manifest, PhantomReader
from cardiac_ldm.cohort.phantom import simulate
from cardiac_ldm.cohort.volumes import Patient, Phase, Volume
from cardiac_ldm.errors import CohortError


def read_patient(manifest: Manifest, root: Path | None, patient_id: str) -> Patient:
    """Read one patient of a cohort whose files lie under root (None for phantoms).

    Raises CohortError naming the file and what to do.
    """
    match manifest.reader:
        case PhantomReader(population=population, seed=seed):
            return simulate(population, seed, int(patient_id.removeprefix("p")))
        case AcdcReader() if root is not None:
            return read_acdc(root / patient_id)
    raise CohortError(f"{manifest.name}: the reader {manifest.reader.kind} needs a data folder")


def read_acdc(folder: Path) -> Patient:
    """Read one patient of the ACDC challenge (Bernard et al., IEEE TMI 37(11), 2018, doi:10.1109/TMI.2018.2837502).

    The folder holds Info.cfg (ED and ES frame numbers, Group), patientNNN_frameFF.nii.gz and, beside each,
    patientNNN_frameFF_gt.nii.gz (0 background, 1 RV, 2 myocardium, 3 LV), stored (x, y, z). Height and weight, where
    Info.cfg has them (cm, kg), become the body mass index. The picture's orientation is the files'.
    """
    info_file = folder / "Info.cfg"
    if not info_file.is_file():
        raise CohortError(
            f"{info_file}: there's no such file; is {folder.parent} the folder of ACDC's patientNNN folders?"
        )
    info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info_file.read_text().splitlines())}
    volumes, read = [], []
    for phase in ("ED", "ES"):
        if not info.get(phase, "").isdigit():
            raise CohortError(f"{info_file}: {phase} is {info.get(phase)!r}; expected a line '{phase}: <frame number>'")
        image_file = folder / f"{folder.name}_frame{int(info[phase]):02d}.nii.gz"
        labels_file = folder / f"{folder.name}_frame{int(info[phase]):02d}_gt.nii.gz"
        volumes.append(_read_nifti(phase, image_file, labels_file))
        read += [image_file, labels_file]
    if len({(v.image.shape, v.spacing_mm) for v in volumes}) > 1:
        raise CohortError(
            f"{folder}: the ED and ES frames differ in shape or spacing; expected one geometry per patient"
        )
    attributes = {}
    with suppress(KeyError, ValueError, ZeroDivisionError):
        attributes["BMI"] = float(info["Weight"]) / (float(info["Height"]) / 100) ** 2
    files = {f"{folder.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in (info_file, *read)}
    return Patient(folder.name, info.get("Group"), tuple(volumes), attributes, files)


def _read_nifti(phase: Phase, image_file: Path, labels_file: Path) -> Volume:
    arrays = {}
    for file in (image_file, labels_file):
        if not file.is_file():
            raise CohortError(f"{file}: there's no such file, and {phase} needs it; expected it beside Info.cfg")
        try:
            nifti = nib.load(file)
            arrays[file] = np.asarray(nifti.dataobj, dtype=np.float32)
        except Exception as error:
            raise CohortError(f"{file}: can't be read as NIfTI ({error}); fetch this file again") from error
        if arrays[file].ndim != 3 or not np.isfinite(arrays[file]).all():
            raise CohortError(f"{file}: expected a 3D volume of finite numbers, shape (x, y, z); fetch this file again")
    image, labels = arrays[image_file], arrays[labels_file]
    if image.shape != labels.shape:
        raise CohortError(
            f"{labels_file}: its shape {labels.shape} isn't its image's, {image.shape}; pair the right files"
        )
    if not np.isin(labels, (0, 1, 2, 3)).all() or not labels.any():
        raise CohortError(f"{labels_file}: expected labels 0, 1, 2, 3 and not all 0, found {np.unique(labels)[:8]}")
    dx, dy, dz = (float(v) for v in nib.load(image_file).header.get_zooms())
    return Volume(phase, image.T, labels.T.astype(np.uint8), (dz, dy, dx))
