"""Synthetic cohorts whoever made them: a folder of NIfTI volumes and a CSV, brought to the study's grid."""

import difflib
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Manifest, Patient, Volumes
from cardiac_ldm.cohort.attributes import LV, RV
from cardiac_ldm.cohort.files import OURS, Reading, Stack
from cardiac_ldm.cohort.grid import place_on_grid
from cardiac_ldm.cohort.manifest import TableReader
from cardiac_ldm.cohort.tables import header_of
from cardiac_ldm.cohort.volumes import Volume
from cardiac_ldm.errors import CohortError
from cardiac_ldm.evaluation.synthesis import RELEASED

TABLE = "attributes.csv"
_COLUMNS = ("file", "labels", *ATTRIBUTE_NAMES)


def content_of(folder: Path) -> str:
    """Hash of all files in a folder, and of their paths in it."""
    content = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content.update(str(file.relative_to(folder)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return content.hexdigest()


def read_folder(folder: Path) -> Volumes:
    """Read a synthetic cohort from a folder such as a release, whoever made it.

    `attributes.csv` has a row per volume: patient, file (NIfTI, stored x, y, z; its path below the folder), ESED (1
    end-diastole, 0 end-systole) and, as far as they were asked for, the other attributes, one value a patient; or the
    columns that the `table` reader of patients takes. Labels, 0 background, 1 RV, 2 myocardium, 3 LV, are named in the
    column labels or lie beside the volumes, `_seg` in the name, of all of them or of none.

    Volumes in a release's own layout (8 bits, the study's grid and axes) are taken as they are. Others go the way of
    real patients: turned by their affine or labels, resampled round the labels, else round the middle of the field of
    view, and scaled between percentiles; what was mended is warned of. An affine along the scanner's axes is believed
    of a release, whatever has turned it since, and where labels agree with it. A patient's volumes share one geometry.

    Returns:
        The cohort, patients in the order of their names, ED before ES; what isn't in the table is NaN.

    Raises:
        CohortError: the table or a volume can't be used; it names file, field and value.
        PrivacyError: the folder shares files with a cohort of real private patients.
    """
    reading = _SyntheticReading(folder)
    rows = _rows(reading)
    labelled = _labels_of(reading, list(rows["file"]), list(rows["labels"]))
    stacks = [
        Stack("ED" if row["ESED"] else "ES", row["file"], labels)
        for row, labels in zip(rows.to_dict("records"), labelled, strict=True)
    ]
    patients = rows.groupby("patient")
    placed = [_placed(reading, str(patient), [stacks[row] for row in own]) for patient, own in patients.indices.items()]
    if n := len(reading.repairs):
        warnings.warn(f"{folder}: {n} repair(s): {'; '.join(reading.repairs[:10])}", stacklevel=2)
    return Volumes(
        folder.resolve().name,
        np.concatenate([images for images, _ in placed]),
        rows[list(ATTRIBUTE_NAMES)].to_numpy(np.float32),
        patients.ngroup().to_numpy(np.int64),
        np.concatenate([labels for _, labels in placed]) if stacks[0].labels else None,
    )


class _SyntheticReading(Reading):
    """Reads synthetic files; labels that were drawn may be as poor as the model, empty for one."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CohortError(f"{folder}: there's no such folder; give the one that holds {TABLE}")
        manifest = Manifest.model_construct(
            name=folder.resolve().name,
            role="public",
            root=None,
            checksums=None,
            reader=TableReader(kind="table", table=TABLE),
        )
        super().__init__(manifest, manifest.data_root(folder))  # refuses the folder of a real private cohort

    def _labels(self, stack: Stack) -> np.ndarray:
        assert stack.labels
        stored, _ = self._stack(stack.labels, None, labels=True)
        if met := [f"{v:g}" for v in np.unique(stored) if v not in (0, *OURS)][:8]:
            raise self.error(
                stack.labels, f"has the label values {', '.join(met)}; write 0 for background, 1 RV, 2 myocardium, 3 LV"
            )
        return stored.astype(np.uint8)

    def is_released(self, file: str) -> bool:
        """Whether a volume that was read is as releases have them, whatever has turned it since."""
        image = nib.load(self.root / file)
        return (
            self.is_ours(file)
            and image.shape == GRID.shape[::-1]
            and image.get_data_dtype() == np.uint8
            and (image.dataobj.slope, image.dataobj.inter) == (1, 0)
            and np.allclose(np.abs(self.affine(file)), np.diag(GRID.spacing_mm[::-1]), atol=1e-4)
        )

    def affine(self, file: str) -> np.ndarray:
        """Voxel axes of a volume that was read, (3, 3): columns are x, y and z in RAS, mm."""
        return self._affines[file][:3, :3]

    def turned(self, stack: Stack, volumes: Sequence[Volume]) -> tuple[Volume, ...]:
        """As real patients are turned, once `lying` has believed what it can of the affine."""
        return super().turned(stack, self.lying(stack, volumes))

    def lying(self, stack: Stack, volumes: Sequence[Volume]) -> tuple[Volume, ...]:
        """Volumes turned by what the readers of real patients leave alone: affines along axes, rows for columns.

        Columns to the left, rows down and slices to the apex of a heart that is no mirror image are a left-handed frame
        in RAS. Where the affine makes it a right-handed one, and rows run further left than columns, they're exchanged.
        """
        directions = self.affine(stack.image) / np.linalg.norm(self.affine(stack.image), axis=0)
        if not np.allclose(directions.T @ directions, np.eye(3), atol=0.1):
            return tuple(volumes)
        backward = np.array([*directions.sum(axis=0)[:2], directions[:, 2] @ (1, -1, 1) / 3**0.5]) > 0.5
        meant = directions * np.where(backward, -1, 1)
        left_and_up = (-1, 0, 1) @ meant
        exchanged = bool(np.linalg.det(meant) > 0 and left_and_up[1] > left_and_up[0])
        along = np.abs(directions).max() >= 0.999
        flipped = tuple(np.flatnonzero(backward[::-1]).tolist()) if along else ()
        lying = tuple(_turned(volume, flipped, exchanged) for volume in volumes)
        if not (flipped or exchanged) or (along and not self.is_ours(stack.image) and not _plausible(lying)):
            return tuple(volumes)
        self.mend(stack.image, "turned as its affine says")
        if exchanged:
            self._affines[stack.image] = self._affines[stack.image][:, [1, 0, 2, 3]]
        return lying

    def is_ours(self, file: str) -> bool:
        """Whether its header says that it is of a release."""
        return nib.load(self.root / file).header["descrip"].item() == RELEASED.encode()


def _turned(volume: Volume, flipped: tuple[int, ...], exchanged: bool) -> Volume:
    """A volume flipped along these axes, rows and columns then exchanged."""

    def lie(array: np.ndarray) -> np.ndarray:
        upright = np.flip(array, flipped)
        return np.ascontiguousarray(upright.swapaxes(1, 2) if exchanged else upright)

    dz, dy, dx = volume.spacing_mm
    labels = None if volume.labels is None else lie(volume.labels)
    return replace(
        volume, image=lie(volume.image), labels=labels, spacing_mm=(dz, dx, dy) if exchanged else (dz, dy, dx)
    )


def _plausible(volumes: Sequence[Volume]) -> bool:
    """Whether labels have the RV left of the LV and, on average, in the basal half, as all 80 ACDC patients do."""
    labels = [volume.labels for volume in volumes if volume.labels is not None]
    rv, lv = (
        np.concatenate([np.argwhere(a == structure) for a in labels or [np.zeros((1, 1, 1))]]) for structure in (RV, LV)
    )
    if not len(rv) or not len(lv):
        return False
    shown = np.flatnonzero(np.any([(a > 0).any(axis=(1, 2)) for a in labels], axis=0))
    return bool(rv[:, 2].mean() < lv[:, 2].mean() and rv[:, 0].mean() < shown.mean())


def _rows(reading: Reading) -> pd.DataFrame:
    """The table, sorted: patient and file as text, attributes as numbers. Raises CohortError."""
    header = header_of(reading.text(TABLE).lstrip("\ufeff"))
    if "phase" in header:  # as the `table` reader has it
        text = reading.table(TABLE, "patient", ("phase", "path"), ("labels", *ATTRIBUTE_NAMES))
        phases = text["phase"].map({"ED": "1", "ES": "0"}).fillna("")
        text = text.drop(columns="phase").rename(columns={"path": "file"}).assign(ESED=phases)
        header = [{"phase": "ESED", "path": "file"}.get(name, name) for name in header]
    else:
        text = reading.table(TABLE, "patient", ("file",), ("labels", *ATTRIBUTE_NAMES))
    known = {name.casefold(): name for name in ("patient", *_COLUMNS)}
    for column in header:
        if column not in known.values():
            close = difflib.get_close_matches(column.casefold(), known, 1)
            hint = f"did you mean {known[close[0]]}?" if close else f"the others may be {', '.join(ATTRIBUTE_NAMES)}"
            raise reading.error(TABLE, f"has the unknown column {column!r}; rename or remove it; {hint}")
    text = text.reindex(columns=list(_COLUMNS), fill_value="").reset_index()
    if twice := list(text["file"][text["file"].duplicated()]):
        raise reading.error(TABLE, f"lists the file {twice[0]} more than once; give each volume a row and a file")
    numbers = []
    for row in text.to_dict("records"):
        reading.file(row["file"])
        where = f"{TABLE}: {row['file']}"
        numbers.append(reading.attributes((where, name, row[name]) for name in ATTRIBUTE_NAMES))
        reading.raise_problems()
        if (phase := numbers[-1].get("ESED")) not in (0, 1):
            met = "missing" if phase is None else f"{phase:g}"
            raise reading.error(where, f"ESED is {met}, but it's needed: give 1 at end-diastole, 0 at end-systole")
    rows = text[["patient", "file", "labels"]].join(pd.DataFrame(numbers, columns=list(ATTRIBUTE_NAMES), dtype=float))
    for patient, own in rows.groupby("patient"):
        where = f"{TABLE}: {patient}"
        if own["ESED"].duplicated().any():
            raise reading.error(where, f"has {len(own)} volumes, two of one phase; give each pair a patient of its own")
        for name in (n for n in ATTRIBUTE_NAMES if n != "ESED" and own[n].nunique(dropna=False) > 1):
            met = " and ".join("unknown" if np.isnan(value) else f"{value:g}" for value in own[name])
            raise reading.error(where, f"{name} is {met}; expected one value a patient")
    return rows.sort_values(["patient", "ESED"], ascending=[True, False], ignore_index=True)


def _labels_of(reading: Reading, files: Sequence[str], named: Sequence[str]) -> list[str | None]:
    """The labels' file of each volume, all None if there are none. Raises CohortError if some lack it."""
    beside = [name or "_seg.nii".join(file.rsplit(".nii", 1)) for file, name in zip(files, named, strict=True)]
    lacking = [file for file in beside if not reading.exists(file)]
    if len(lacking) == len(beside):
        return [None] * len(beside)
    if lacking:
        n_labelled = len(beside) - len(lacking)
        raise reading.error(
            lacking[0], f"isn't there, but {n_labelled} of {len(beside)} volumes have labels; give all of them, or none"
        )
    return list(beside)


def _placed(reading: _SyntheticReading, patient: str, stacks: Sequence[Stack]) -> tuple[np.ndarray, np.ndarray]:
    """A patient's images float32 and labels uint8 (v, 13, 96, 96), the latter 0 if none. Raises CohortError."""
    volumes = [volume for stack in stacks if (volume := reading.volume(stack))]
    reading.raise_problems()
    first = stacks[0].image
    for stack, volume in zip(stacks, volumes, strict=True):
        if volume.image.shape != volumes[0].image.shape or not np.allclose(volume.spacing_mm, volumes[0].spacing_mm):
            raise reading.error(
                stack.image, f"differs in shape or spacing from {first}; expected one geometry per patient"
            )
        a, b = (reading.affine(file) / np.linalg.norm(reading.affine(file), axis=0) for file in (stack.image, first))
        if (a * b).sum(axis=0).min() < 0.9:
            raise reading.error(
                stack.image, f"lies otherwise than {first}, as their affines say; expected one geometry per patient"
            )
    if all(reading.is_released(stack.image) for stack in stacks):
        volumes = [reading.lying(stack, [volume])[0] for stack, volume in zip(stacks, volumes, strict=True)]
        drawn = np.stack([volume.image for volume in volumes]) / 255
        meant = [volume.labels for volume in volumes if volume.labels is not None]
        return drawn, np.stack(meant) if meant else np.zeros(drawn.shape, np.uint8)
    record = place_on_grid(Patient(str(reading.root / patient), None, reading.turned(stacks[0], volumes), {}))
    reading.repairs.extend(record.repairs)
    if not record.labelled:
        reading.mend(TABLE, "its volumes have no labels; the middle of the field of view was taken for the heart")
    return record.images, record.labels
