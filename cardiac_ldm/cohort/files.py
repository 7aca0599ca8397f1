"""The files of one patient: hashed, opened, read and paired, so that every problem of every file is known at once."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, voxel_sizes

from cardiac_ldm.cohort.attributes import LV, MYOCARDIUM, RV, implausible
from cardiac_ldm.cohort.manifest import Manifest
from cardiac_ldm.cohort.nifti import Nifti, on_a_line, open_nifti, read_voxels
from cardiac_ldm.cohort.orientation import SAID, flipped, turns
from cardiac_ldm.cohort.tables import UNKNOWN, read_table
from cardiac_ldm.cohort.volumes import Phase, Volume
from cardiac_ldm.errors import CohortError

OURS = {RV: RV, MYOCARDIUM: MYOCARDIUM, LV: LV}
"""ACDC's label values are ours."""
LV_FIRST = {1: LV, 2: MYOCARDIUM, 3: RV}
"""Label values of M&Ms, M&Ms-2 and of ukbb_cardiac's contours and segmentations."""
_SEXES = {"f": 0.0, "female": 0.0, "m": 1.0, "male": 1.0}


@dataclass(frozen=True)
class Stack:
    """Where one phase lies: files below the data root, the frame (from 0) in those that are 4D, the labels' values."""

    phase: Phase
    image: str
    labels: str | None
    frame: int | None = None
    values: Mapping[int, int] = field(default_factory=lambda: OURS)


class Reading:
    """One patient's reading: the data root, the files met so far, what was mended, and everything that is wrong."""

    def __init__(self, manifest: Manifest, root: Path | None) -> None:
        if root is None:
            raise CohortError(f"{manifest.name}: the reader {manifest.reader.kind} needs a data folder; name its root")
        self.root = Path(os.path.realpath(root))
        self.files: dict[str, str] = {}
        self.repairs: list[str] = []
        self.problems: list[str] = []
        self._checksums = manifest.checksums
        self._affines: dict[str, np.ndarray] = {}

    def error(self, file: str, what: str) -> CohortError:
        """A problem, to be raised."""
        return CohortError(f"{self.root / file}: {what}")

    @contextmanager
    def about(self, file: str) -> Iterator[None]:
        """Say of this file, or this place in one, what a ValueError says. Raises CohortError."""
        try:
            yield
        except ValueError as error:
            raise self.error(file, str(error)) from error

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note a CohortError and go on after the block."""
        try:
            yield
        except CohortError as error:
            self.problems.append(str(error))

    def raise_problems(self) -> None:
        """Raise CohortError if anything was noted."""
        if self.problems:
            raise CohortError("\n".join(dict.fromkeys(self.problems)))

    def mend(self, file: str, what: str) -> None:
        """Note a repair."""
        if (repair := f"{file}: {what}") not in self.repairs:
            self.repairs.append(repair)

    def exists(self, file: str) -> bool:
        """Whether there's anything of this name, packed or unpacked."""
        return os.path.lexists(self.root / self._there(file))

    def _there(self, file: str) -> str:
        """The name under which a file is there: .nii for .nii.gz and the reverse, and / for a backslash of Windows."""
        names = [name for name in (file, file.replace("\\", "/")) if "\0" not in name]
        names += [
            f"{name}.gz" if name.endswith(".nii") else name.removesuffix(".gz") for name in names if ".nii" in name
        ]
        return next((name for name in names if os.path.lexists(self.root / name)), file)

    def folder(self, patient: str, parents: Iterable[str]) -> str:
        """The patient's folder below the root: in one of these parents, and in one alone. Raises CohortError."""
        paths = [str(PurePosixPath(parent) / patient) for parent in parents]
        there = [path for path in paths if (self.root / path).is_dir()]
        if not there:
            raise self.error(paths[0], "there's no such folder; is this the data root, and the patient's name right?")
        if len(there) > 1:
            raise self.error(patient, f"lies in {' and in '.join(there)}; keep one")
        return there[0]

    def file(self, file: str) -> Path:
        """An ordinary file below the root, hashed and held against the checksums. Raises CohortError."""
        try:
            place = Path(os.path.realpath(self.root / self._there(file)))
            if not place.is_relative_to(self.root):
                raise self.error(file, f"leads out of the data folder, to {place}; copy it below the data root")
            if not place.exists():
                raise self.error(file, "there's no such file; fetch it, or correct its name")
            if not place.is_file():
                raise self.error(file, "is no file but a folder or the like; put the file in its place")
            name = place.relative_to(self.root).as_posix()
            if name not in self.files:
                self.files[name] = _digest(place, _modified(place))
        except (OSError, ValueError) as error:
            raise self.error(file, f"can't be opened ({on_a_line(error)}); mend its name or permissions") from error
        if self._checksums:
            listed = _checksums(self._checksums, _modified(self._checksums)).get(name, "not listed")
            if listed != self.files[name]:
                sums = f"its SHA-256 is {self.files[name]}, in {self._checksums.name} {listed}"
                raise self.error(file, f"{sums}; fetch it again, or correct the checksums")
        return place

    def text(self, file: str) -> str:
        """A text file's content. Raises CohortError."""
        try:
            return self.file(file).read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise self.error(file, f"isn't UTF-8 text ({on_a_line(error)}); fetch it again") from error

    def table(self, file: str, key: str, *columns: Sequence[str], **how: Any) -> pd.DataFrame:  # noqa: ANN401
        """A CSV's rows as text, by the column `key`. columns: needed, optional; see read_table. Raises CohortError."""
        place = self.file(file)
        with self.about(file):
            return read_table(place, _modified(place), key, *map(tuple, columns), **how)

    def row(self, file: str, key: str, names: Sequence[str], needed: Sequence[str]) -> dict[str, str]:
        """The one row of a table whose key is one of these spellings of a name. Raises CohortError."""
        table = self.table(file, key, needed)
        rows = table.loc[[name for name in dict.fromkeys(names) if name in table.index]]
        if len(rows) != 1:
            raise self.error(file, f"has {len(rows)} rows whose {key} is {names[0]}; expected one")
        return {str(column): str(text) for column, text in rows.iloc[0].items()}

    def frame(self, where: str, column: str, text: str) -> int:
        """A frame's number from a table. Raises CohortError."""
        try:
            number = float(text)
            if number < 0 or not number.is_integer():
                raise ValueError
        except ValueError as error:
            raise self.error(where, f"{column} is {on_a_line(repr(text))}; expected the number of a frame") from error
        return int(number)

    def attributes(self, said: Iterable[tuple[str, str, object]]) -> dict[str, float]:
        """Attributes from (where it's said, our name, text), the last known one of a name; what is wrong is noted.

        SEX may be F, M, female or male.
        """
        known = {}
        for where, name, text in said:
            word = str(text).strip().lower()
            if word in UNKNOWN:
                continue
            with self.noting(), self.about(where):
                try:
                    known[name] = _SEXES[word] if name == "SEX" and word in _SEXES else float(word)
                except ValueError as error:
                    met = on_a_line(repr(text))
                    raise ValueError(f"{name} is {met}; expected a number, decimals after a point") from error
                if problem := implausible(name, known[name]):
                    raise ValueError(problem)
        return known

    def body_mass_index(self, where: str, height_cm: str, weight_kg: str) -> list[tuple[str, str, object]]:
        """BMI as `attributes` takes it; none, which is a repair, from a height and weight that can't be a patient's."""
        try:
            bmi = float(weight_kg) / (float(height_cm) / 100) ** 2
        except (ValueError, ArithmeticError):
            bmi = float("nan")
        if implausible("BMI", bmi) is None:
            return [(where, "BMI", bmi)]
        if not {height_cm.lower(), weight_kg.lower()} & set(UNKNOWN):
            self.mend(where, f"height {height_cm} cm and weight {weight_kg} kg are no patient's; BMI was left unknown")
        return []

    def volume(self, stack: Stack) -> Volume | None:
        """One phase's image and labels, as stored; None if anything is wrong with either, which is noted."""
        image = labels = None
        with self.noting():
            image, spacing = self._stack(stack.image, stack.frame)
            if image.min() == image.max():
                raise self.error(stack.image, f"every voxel is {image.min():g}; fetch this file again")
        with self.noting():
            labels = self._labels(stack) if stack.labels else None
        if image is None or (stack.labels and labels is None):
            return None
        if stack.labels and labels is not None:
            with self.noting(), self.about(stack.labels):
                self._compare_labels(stack.image, image.shape, stack.labels, labels.shape)
        return Volume(stack.phase, image, labels, spacing)

    def _labels(self, stack: Stack) -> np.ndarray:
        """Labels uint8 (slices, rows, columns) by our values."""
        assert stack.labels
        stored, _ = self._stack(stack.labels, stack.frame, labels=True)
        values = {0: 0, **stack.values}
        if met := [f"{v:g}" for v in np.unique(stored) if v not in values][:8]:
            expected = ", ".join(map(str, values))
            raise self.error(stack.labels, f"has the label values {', '.join(met)}; expected {expected}: map them")
        labels = np.zeros(stored.shape, np.uint8)
        for theirs, ours in values.items():
            labels[stored == theirs] = ours
        if not labels.any():
            raise self.error(stack.labels, f"is all 0 at {stack.phase}; label this phase, or leave its labels out")
        return labels

    def _compare_labels(self, image: str, its_shape: tuple[int, ...], labels: str, shape: tuple[int, ...]) -> None:
        """Refuse labels that aren't their image's: of another shape, or whose affine puts a corner a voxel away."""
        if shape != its_shape:
            raise ValueError(f"its shape {shape[::-1]} isn't its image's, {its_shape[::-1]}; pair the right files")
        corners = list(product(*((0, n - 1) for n in shape[::-1])))
        here, there = (apply_affine(self._affines[file], corners) for file in (labels, image))
        if (apart := np.linalg.norm(here - there, axis=1).max()) > voxel_sizes(self._affines[image]).min():
            raise ValueError(f"its affine puts it {apart:.3g} mm from its image; pair the right files")

    def _stack(
        self, file: str, frame: int | None, labels: bool = False
    ) -> tuple[np.ndarray, tuple[float, float, float]]:
        """A volume float32 (slices, rows, columns) and its spacing (z, y, x) in mm."""
        nifti = self._nifti(file)
        n = nifti.data.shape[3]
        if labels and n == 1:
            frame = None
        with self.about(file):
            if frame is None and n > 1:
                raise ValueError(f"holds {n} frames where one volume is expected; say which, or give a 3D file")
            if (frame or 0) >= n:
                raise ValueError(f"frame {frame} is beyond its end: it has {n}, counted from 0; correct the number")
            dx, dy, dz = nifti.spacing_mm
            return read_voxels(nifti.data, frame or 0).T, (dz, dy, dx)

    def cine(self, file: str) -> np.ndarray:
        """All frames of a file, float32 (x, y, z, t). Raises CohortError."""
        with self.about(file):
            return read_voxels(self._nifti(file).data, slice(None))

    def _nifti(self, file: str) -> Nifti:
        place = self.file(file)
        with self.about(file):
            nifti = open_nifti(place)
        for repair in nifti.repairs:
            self.mend(file, repair)
        self._affines[file] = nifti.affine
        return nifti

    def compare(self, stacks: Sequence[Stack], volumes: Sequence[Volume]) -> None:
        """Refuse an ED and an ES that can't be one patient's. Raises CohortError."""
        ed, es = volumes
        if ed.image.shape != es.image.shape or not np.allclose(ed.spacing_mm, es.spacing_mm, rtol=1e-3):
            met = " and ".join(f"{v.image.shape} at {v.spacing_mm} mm" for v in volumes)
            raise self.error(
                stacks[1].image, f"ED and ES differ in shape or spacing, {met}; expected one geometry per patient"
            )
        if np.array_equal(ed.image, es.image):
            raise self.error(stacks[1].image, "ES is the same picture as ED; correct the files or frames")

    def turns(self, stack: Stack, volumes: Sequence[Volume]) -> tuple[int, ...]:
        """The axes along which a stack is stored the other way round; to turn them is a repair."""
        axes = turns(self._affines[stack.image], [v.labels for v in volumes if v.labels is not None])
        if axes:
            self.mend(stack.image, f"{', '.join(SAID[axis] for axis in axes)}: turned round")
        return axes

    def turned(self, stack: Stack, volumes: Sequence[Volume]) -> tuple[Volume, ...]:
        """Volumes with rows down the picture, columns to its right and the base first; a turn is a repair."""
        return flipped(volumes, self.turns(stack, volumes))


def _modified(path: Path) -> int:
    """When a file was last changed, ns; part of what results about it are cached by."""
    return path.stat().st_mtime_ns if path.exists() else 0


@lru_cache(maxsize=64)
def _digest(place: Path, modified: int) -> str:
    """SHA-256 of a file; cached, because all patients share the tables."""
    with place.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(maxsize=4)
def _checksums(path: Path, modified: int) -> dict[str, str]:
    """SHA-256 by path, from a file in sha256sum's format. Raises CohortError if it's none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CohortError(
            f"{path}: the checksums can't be read ({on_a_line(error)}); correct the field checksums"
        ) from error
    listed = {}
    for line in lines:
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not name.lstrip(" *"):
            raise CohortError(f"{path}: {line[:80]!r} is no line of sha256sum's; expected '<64 digits>  <path>'")
        listed[name.lstrip(" *").removeprefix("./")] = digest.lower()
    return listed
