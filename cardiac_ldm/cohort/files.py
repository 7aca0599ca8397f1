"""The files of one patient: hashed, opened, read and examined, so that every problem of every file is known at once."""

import csv
import gzip
import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.openers import ImageOpener
from scipy import ndimage

from cardiac_ldm.cohort.attributes import LV, MYOCARDIUM, RV, implausible, measure_attributes
from cardiac_ldm.cohort.manifest import Manifest
from cardiac_ldm.cohort.volumes import Phase, Volume
from cardiac_ldm.errors import CohortError

OURS = {RV: RV, MYOCARDIUM: MYOCARDIUM, LV: LV}
"""ACDC's label values are ours."""
LV_FIRST = {1: LV, 2: MYOCARDIUM, 3: RV}
"""Label values of M&Ms, M&Ms-2 and of ukbb_cardiac's contours and segmentations."""
SPACING_MM = ((0.3, 5.0), (0.3, 5.0), (1.0, 30.0))
EXTENT_MM = ((50.0, 1000.0), (50.0, 1000.0), (20.0, 300.0))
"""What a short-axis stack's voxels and field measure along columns, rows and slices."""
MAX_VOXELS = 2**28
"""More than any cine has: a header that claims more is damaged, which is found before memory is asked for."""
_UNITS = {2: ("mm", 1.0), 1: ("metres", 1000.0), 3: ("micrometres", 0.001), 0: ("(no unit)", 1.0)}
_UNKNOWN = ("", "nan", "na", "n/a")
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
        """Raises CohortError without a root."""
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
        """Whether there's anything of this name."""
        return os.path.lexists(self.root / file)

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
            place = Path(os.path.realpath(self.root / file))
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
            raise self.error(file, f"can't be opened ({_line(error)}); mend its name or permissions") from error
        if self._checksums:
            listed = _checksums(self._checksums, _modified(self._checksums)).get(name, "not listed")
            if listed != self.files[name]:
                sums = f"its SHA-256 is {self.files[name]}, in {self._checksums.name} {listed}"
                raise self.error(file, f"{sums}; fetch it again, or correct the checksums")
        return place

    def text(self, file: str) -> str:
        """A text file's content. Raises CohortError."""
        try:
            return self.file(file).read_text(encoding="utf-8")
        except ValueError as error:
            raise self.error(file, f"isn't UTF-8 text ({_line(error)}); fetch it again") from error

    def table(
        self, file: str, key: str, needed: Sequence[str], optional: Sequence[str] = (), others: bool = True
    ) -> pd.DataFrame:
        """A CSV's rows as text, indexed by the column `key`. Raises CohortError.

        needed: columns that must be there, optional: those that may. others: whether there may be more, left unread.
        """
        place = self.file(file)
        try:
            return _table(place, _modified(place), key, tuple(needed), tuple(optional), others)
        except ValueError as error:
            raise self.error(file, str(error)) from error

    def row(
        self, file: str, key: str, names: Sequence[str], needed: Sequence[str], optional: Sequence[str] = ()
    ) -> dict[str, str]:
        """The one row of a table whose key is one of these spellings of a name. Raises CohortError."""
        table = self.table(file, key, needed, optional)
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
            raise self.error(where, f"{column} is {_line(repr(text))}; expected the number of a frame") from error
        return int(number)

    def attributes(self, said: Iterable[tuple[str, str, object]]) -> dict[str, float]:
        """Attributes from (where it's said, our name, text), the last known one of a name; what is wrong is noted.

        SEX may be F, M, female or male.
        """
        known = {}
        for where, name, text in said:
            word = str(text).strip().lower()
            if word in _UNKNOWN:
                continue
            with self.noting():
                try:
                    known[name] = _SEXES[word] if name == "SEX" and word in _SEXES else float(word)
                except ValueError as error:
                    raise self.error(
                        where, f"{name} is {_line(repr(text))}; expected a number, decimals after a point"
                    ) from error
                if problem := implausible(name, known[name]):
                    raise self.error(where, problem)
        return known

    def body_mass_index(self, where: str, height_cm: str, weight_kg: str) -> list[tuple[str, str, object]]:
        """BMI as `attributes` takes it; none, which is a repair, from a height and weight that can't be a patient's."""
        try:
            bmi = float(weight_kg) / (float(height_cm) / 100) ** 2
        except (ValueError, ArithmeticError):
            bmi = float("nan")
        if implausible("BMI", bmi) is None:
            return [(where, "BMI", bmi)]
        if not {height_cm.lower(), weight_kg.lower()} & set(_UNKNOWN):
            self.mend(where, f"height {height_cm} cm and weight {weight_kg} kg are no patient's; BMI was left unknown")
        return []

    def volume(self, stack: Stack) -> Volume | None:
        """One phase's image and labels, as stored; None if anything is wrong with either, which is noted."""
        image = labels = None
        with self.noting():
            image = self._stack(stack.image, stack.frame)
            if image[0].min() == image[0].max():
                raise self.error(stack.image, f"every voxel is {image[0].min():g}; fetch this file again")
        with self.noting():
            labels = self._labels(stack) if stack.labels else None
        if image is None or (stack.labels and labels is None):
            return None
        if stack.labels and labels is not None:
            with self.noting():
                self._paired(stack.image, image[0], stack.labels, labels)
        return Volume(stack.phase, image[0], labels, image[1])

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
        if _within_wall(labels, RV) > _within_wall(labels, LV):
            raise self.error(stack.labels, "the wall surrounds what is labelled RV, not LV; map the label values")
        return labels

    def _paired(self, image_file: str, image: np.ndarray, labels_file: str, labels: np.ndarray) -> None:
        """Refuse labels that aren't their image's: of another shape, or whose affine puts a corner a voxel away."""
        if labels.shape != image.shape:
            shapes = f"{labels.shape[::-1]} isn't its image's, {image.shape[::-1]}"
            raise self.error(labels_file, f"its shape {shapes}; pair the right files")
        corners = np.array([*np.indices((2, 2, 2)).reshape(3, 8), np.ones(8)])
        corners[:3] *= np.array(image.shape[::-1])[:, None] - 1
        affine = self._affines[image_file]
        apart = np.linalg.norm(((self._affines[labels_file] - affine) @ corners)[:3], axis=0).max()
        if apart > np.linalg.norm(affine[:3, :3], axis=0).min():
            raise self.error(labels_file, f"its affine puts it {apart:.3g} mm from its image; pair the right files")

    def _stack(
        self, file: str, frame: int | None, labels: bool = False
    ) -> tuple[np.ndarray, tuple[float, float, float]]:
        """A volume float32 (slices, rows, columns) and its spacing (z, y, x) in mm."""
        proxy, (dx, dy, dz) = self._nifti(file)
        n = proxy.shape[3]
        if labels and n == 1:
            frame = None
        if frame is None and n > 1:
            raise self.error(file, f"holds {n} frames where one volume is expected; say which, or give a 3D file")
        if (frame or 0) >= n:
            raise self.error(file, f"frame {frame} is beyond its end: it has {n}, counted from 0; correct the number")
        return self._voxels(file, proxy, frame or 0).T, (dz, dy, dx)

    def cine(self, file: str) -> np.ndarray:
        """All frames of a file, float32 (x, y, z, t). Raises CohortError."""
        return self._voxels(file, self._nifti(file)[0], slice(None))

    def _voxels(self, file: str, proxy: ArrayProxy, frame: int | slice) -> np.ndarray:
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
                voxels = np.asarray(proxy[..., frame]).astype(np.float32)
        except Exception as error:
            raise self.error(file, f"can't be read to its end ({_line(error)}); fetch this file again") from error
        if not np.isfinite(voxels).all():
            raise self.error(file, "expected finite numbers, found NaN or infinity; fetch or write this file again")
        return voxels

    def _nifti(self, file: str) -> tuple[ArrayProxy, tuple[float, float, float]]:
        """A NIfTI file's data (x, y, z, t), unread, and spacing (x, y, z) in mm."""
        place = self.file(file)
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
                proxy, affine, dtype = image.dataobj, np.asarray(image.affine), image.get_data_dtype()
                sizes = voxel_sizes(affine)
        except Exception as error:
            raise self.error(file, f"can't be read as NIfTI ({_line(error)}); fetch this file again") from error
        shape = proxy.shape
        if len(shape) < 3 or min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
            raise self.error(file, f"its shape is {shape}; expected a volume (x, y, z) or a cine (x, y, z, t)")
        if dtype.kind not in "iuf":
            raise self.error(file, f"holds {dtype} values; expected one number a voxel: save the magnitude image")
        raw = [float(v) for v in stored["pixdim"][1:4]]
        unit, factor = _UNITS.get(int(stored["xyzt_units"]) % 8, _UNITS[0])
        dx, dy, dz = (v * factor for v in raw)
        if not _within((dx, dy, dz), SPACING_MM):
            likely = [name for name, f in _UNITS.values() if f != factor and _within([v * f for v in raw], SPACING_MM)]
            hint = f"it looks like {likely[0]}: " if likely else ""
            met = " x ".join(f"{v:g}" for v in raw)
            raise self.error(file, f"its spacing is {met} {unit}, no short-axis stack's; {hint}correct the header")
        extent = [n * s for n, s in zip(shape, (dx, dy, dz), strict=False)]
        if not _within(extent, EXTENT_MM):
            met = " x ".join(f"{v:.0f}" for v in extent)
            raise self.error(file, f"its shape {shape} covers {met} mm, no short-axis stack; correct file or header")
        if not np.allclose(sizes, raw, rtol=0.1):
            raise self.error(file, "its affine contradicts its spacing (pixdim); correct the header")
        if factor != 1:
            self.mend(file, f"its spacing, in {unit}, was brought to mm")
        self._affines[file] = np.diag([factor, factor, factor, 1]) @ affine
        return proxy.reshape((*shape[:3], -1)), (dx, dy, dz)

    def compare(self, stacks: Sequence[Stack], volumes: Sequence[Volume]) -> None:
        """Refuse an ED and an ES that can't be one patient's, or that are exchanged. Raises CohortError."""
        ed, es = volumes
        if ed.image.shape != es.image.shape or not np.allclose(ed.spacing_mm, es.spacing_mm, rtol=1e-3):
            met = " and ".join(f"{v.image.shape} at {v.spacing_mm} mm" for v in volumes)
            raise self.error(
                stacks[1].image, f"ED and ES differ in shape or spacing, {met}; expected one geometry per patient"
            )
        if np.array_equal(ed.image, es.image):
            raise self.error(stacks[1].image, "ES is the same picture as ED; correct the files or frames")
        if ed.labels is None or es.labels is None:
            return
        measured = measure_attributes({"ED": ed.labels, "ES": es.labels}, ed.spacing_mm)
        if problem := implausible("LVEDV", measured["LVEDV"]):
            raise self.error(stacks[0].labels or "", f"as its labels and spacing have it, {problem}")
        if measured["LVESV"] > measured["LVEDV"]:
            met = f"{measured['LVESV']:.0f} mL against {measured['LVEDV']:.0f} mL"
            raise self.error(stacks[1].labels or "", f"the LV is larger at ES than at ED, {met}; exchange the phases")

    def turned(self, stack: Stack, volumes: Sequence[Volume]) -> tuple[Volume, ...]:
        """Volumes with rows down the picture, columns to its right and the base first; a turn is a repair.

        The order of slices shows in the RV, which is wide at the base and ends before the apex: in all 80 ACDC patients
        the basal third holds more of it than the apical one, by 12 to 78 % of the whole. Where labels don't tell, an
        affine does, since the apex points left, forwards and down. By the affine alone columns and rows run to the
        left, back or down, as scanners show the short axis. An affine along the scanner's axes is a placeholder, as
        ACDC's are, since no heart lies so: it tells nothing.
        """
        directions = self._affines[stack.image][:3, :3] / np.linalg.norm(self._affines[stack.image][:3, :3], axis=0)
        told = np.abs(directions).max() < 0.999 and np.allclose(directions.T @ directions, np.eye(3), atol=0.1)
        labels = [v.labels for v in volumes if v.labels is not None]
        rv, shown = (
            np.sum([match(a).sum(axis=(1, 2)) for a in labels], axis=0)
            for match in (lambda a: a == RV, lambda a: a > 0)
        )
        labelled = np.flatnonzero(shown)
        third = len(labelled) // 3
        lean = (rv[labelled[:third]].sum() - rv[labelled[-third:]].sum()) / rv.sum() if third and rv.any() else 0.0
        to_apex = directions[:, 2] @ (-1, 1, -1) / 3**0.5 if told else 0.0
        reverse = lean < 0 if abs(lean) >= 0.1 else to_apex < -0.5
        columns, rows = -directions.sum(axis=0)[:2] < -0.5 if told else (False, False)
        turns = ((0, reverse, "slices ran from apex to base"), (1, rows, "rows up"), (2, columns, "columns left"))
        axes = tuple(axis for axis, turn, _ in turns if turn)
        if not axes:
            return tuple(volumes)
        self.mend(stack.image, f"{', '.join(said for _, turn, said in turns if turn)}: turned round")

        def turn(array: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(np.flip(array, axes))

        return tuple(
            replace(v, image=turn(v.image), labels=None if v.labels is None else turn(v.labels)) for v in volumes
        )


def _line(said: object) -> str:
    """An error of a library, or the like, on one short line."""
    return " ".join(str(said).split())[:160] or type(said).__name__


def _within(values: Sequence[float], ranges: Sequence[tuple[float, float]]) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(values, ranges, strict=False))


def _within_wall(labels: np.ndarray, structure: int) -> float:
    """Share of a structure's neighbours in-plane that are myocardium. ACDC: LVs 98 % or more, RVs 41 % or less."""
    cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]])
    inside = labels == structure
    around = ndimage.binary_dilation(inside, cross) & ~inside
    return float((labels[around] == MYOCARDIUM).mean()) if around.any() else 0.0


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
            f"{path}: the checksums can't be read ({_line(error)}); correct the field checksums"
        ) from error
    listed = {}
    for line in lines:
        digest, _, name = line.partition(" ")
        if len(digest) != 64 or not name.lstrip(" *"):
            raise CohortError(f"{path}: {line[:80]!r} is no line of sha256sum's; expected '<64 digits>  <path>'")
        listed[name.lstrip(" *").removeprefix("./")] = digest.lower()
    return listed


@lru_cache(maxsize=4)
def _table(
    place: Path, modified: int, key: str, needed: tuple[str, ...], optional: tuple[str, ...], others: bool
) -> pd.DataFrame:
    """Raises ValueError that says what is wrong."""
    wanted = (key, *needed, *optional)
    rows = []
    try:
        with place.open(newline="", encoding="utf-8-sig") as stream:
            lines = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(lines, [])]
            kept = [index for index, name in enumerate(header) if name in wanted]
            for line in lines:
                cells = [cell.strip() for cell in line]
                if any(cells) and (len(cells) < len(header) or any(cells[len(header) :])):
                    raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the header {len(header)}")
                if any(cells):
                    rows.append([cells[index] for index in kept])
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"can't be read as CSV ({_line(error)}); save it as UTF-8 with commas between cells"
        ) from error
    if missing := [name for name in (key, *needed) if name not in header]:
        hint = "put commas between cells" if ";" in "".join(header) else "is the first line the header?"
        raise ValueError(f"has no column {', '.join(missing)}, but {_line(', '.join(header) or 'none')}; {hint}")
    unknown = [name for name in header if name not in wanted and not others]
    if twice := unknown or [name for name, n in Counter(header).items() if n > 1 and name in wanted]:
        said = "an unknown column" if unknown else "twice the column"
        raise ValueError(f"has {said} {twice[0]!r}; remove it, or name it one of {', '.join(wanted)}")
    if not rows:
        raise ValueError("has no rows; add the patients")
    table = pd.DataFrame(rows, columns=[header[index] for index in kept], dtype=object)
    if n := int((table[key] == "").sum()):
        raise ValueError(f"has {n} rows without {key}; fill them in")
    return table.set_index(key).sort_index()
