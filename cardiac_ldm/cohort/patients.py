"""Prepared patients: how they're stored, read lazily; and the guards on private and on unlabelled ones.

Beside a split's arrays lies its table, a JSON object a line for every patient.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import zarr

from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES
from cardiac_ldm.cohort.manifest import SPLITS, Budget, Manifest
from cardiac_ldm.cohort.volumes import GRID
from cardiac_ldm.errors import CohortError, PrivacyError

MAX_VOLUMES = 3
"""Volumes a patient may have; a patient is one chunk of an array, and empty places in it cost nothing."""


@dataclass(frozen=True)
class PatientRecord:
    """A prepared patient with v volumes (usually two: ED, then ES).

    images: float32 (v, 13, 96, 96) in [0, 1]. labels: uint8 (v, 13, 96, 96): 0 background, 1 RV, 2 myocardium, 3 LV.
    attributes: float32 (v, 14) in the units of ATTRIBUTES, NaN where unknown. labelled: whether the labels were given;
    else they're a segmenter's, or all 0. repairs: what was mended, doubts: what may be wrong, a sentence each.
    """

    id: str
    group: str | None
    images: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    labelled: bool = True
    repairs: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def open_split(path: Path, n_patients: int | None = None) -> dict[str, Any]:
    """The arrays (n_patients * MAX_VOLUMES, 13, 96, 96) of a split: images float16, labels uint8.

    n_patients: of a split that's to be written, and is made where it isn't there yet; None to read.
    """
    if n_patients is None:
        group = zarr.open_group(path, mode="r+")
        return {name: group[name] for name in ("images", "labels")}
    group = zarr.open_group(path, mode="a", zarr_format=3)
    return {
        name: group.require_array(
            name,
            shape=(n_patients * MAX_VOLUMES, *GRID.shape),
            chunks=(MAX_VOLUMES, *GRID.shape),
            dtype=dtype,
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        for name, dtype in (("images", "float16"), ("labels", "uint8"))
    }


def write_patient(arrays: Mapping[str, Any], number: int, record: PatientRecord) -> dict[str, Any]:
    """Write patient `number` of a split, labels last; give what belongs in the table.

    Raises CohortError on too many volumes.
    """
    if len(record.images) > MAX_VOLUMES:
        raise CohortError(f"{record.id}: has {len(record.images)} volumes; give at most {MAX_VOLUMES}")
    for name, volumes in (("images", record.images), ("labels", record.labels)):
        chunk = np.zeros((MAX_VOLUMES, *GRID.shape), arrays[name].dtype)
        chunk[: len(volumes)] = volumes
        arrays[name][number * MAX_VOLUMES : (number + 1) * MAX_VOLUMES] = chunk
    return table_row(record)


def table_row(record: PatientRecord) -> dict[str, Any]:
    """What a split's table says of a patient."""
    return {
        "id": record.id,
        "group": record.group,
        "labelled": record.labelled,
        "repairs": record.repairs,
        "doubts": record.doubts,
        "attributes": [[None if math.isnan(x) else x for x in row] for row in record.attributes.tolist()],
    }


def read_rows(path: Path, split: str) -> Iterator[dict[str, Any]]:
    """The table of a split of the prepared cohort at path, row by row, in the patients' order."""
    with (path / f"{split}.jsonl").open() as table:
        yield from map(json.loads, table)


@lru_cache(maxsize=8)
class _Table:
    """What of a split's table is kept in memory; patient p's `counts[p]` volumes have attributes from `first[p]` on."""

    def __init__(self, path: Path, split: str) -> None:
        ids, people, groups, labelled, remarks, counts = [], [], [], [], [], []
        attributes = [np.empty((0, len(ATTRIBUTE_NAMES)), np.float32)]
        for row in read_rows(path, split):
            ids.append(row["id"])
            people.append((row.get("person", row["id"]), *row.get("voxels", ())))
            groups.append(row["group"])
            labelled.append(row["labelled"])
            remarks.append((tuple(row["repairs"]), tuple(row["doubts"])))
            attributes.append(np.asarray(row["attributes"], np.float32))
            counts.append(len(attributes[-1]))
        self.people, self.ids, self.groups, self.remarks = people, ids, groups, remarks
        self.labelled = np.asarray(labelled, bool)
        self.counts, self.attributes = np.asarray(counts, np.int64), np.concatenate(attributes)
        self.first = np.cumsum(self.counts) - self.counts


class Patients(Sequence[PatientRecord]):
    """The patients of one split, or some of them: small tables in memory, volumes read when asked for."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        path: Path,
        members: np.ndarray | None = None,
        draw: Callable[[str, int, str], None] | None = None,
    ) -> None:
        """Open a split of a prepared cohort.

        members: int64 (n_patients,), rows of the stored split; None for all. draw: writes the patient of a split, row
        and name who is in the table and not in the store yet.
        """
        self._manifest, self.split, self.path, self._draw = manifest, split, path, draw
        self._members = np.arange(len(self._table.ids)) if members is None else members

    @cached_property
    def _table(self) -> _Table:
        return _Table(self.path, self.split)

    @cached_property
    def _stored(self) -> zarr.Group:
        return zarr.open_group(self.path / self.split, mode="r")

    def _rows(self, first: np.ndarray) -> np.ndarray:
        """int64 (n_volumes,): rows of these patients' volumes in something where patient m's start at first[m]."""
        ranges = [np.arange(first[m], first[m] + self._table.counts[m]) for m in self._members]
        return np.concatenate(ranges) if ranges else np.empty(0, np.int64)

    @cached_property
    def _volumes(self) -> np.ndarray:
        return self._rows(MAX_VOLUMES * np.arange(len(self._table.ids)))

    @property
    def name(self) -> str:
        """The cohort's name."""
        return self._manifest.name

    @property
    def role(self) -> str:
        """Whether the cohort is "public" or "private"."""
        return self._manifest.role

    @property
    def simulated(self) -> bool:
        """Whether these patients are simulated: nobody is exposed by showing one."""
        return self._manifest.simulated

    @property
    def secret(self) -> bool:
        """Whether these are real private patients, of whom only a private mechanism may tell anything."""
        return self._manifest.secret

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The patients' names."""
        return tuple(self._table.ids[m] for m in self._members)

    @property
    def places(self) -> int:
        """How many places the patients of this split have, which is public; real private ones may leave some empty."""
        whole = self.split == "train" and len(self) == len(self._table.ids)
        return self._manifest.places or len(self) if whole else len(self)

    @property
    def budget(self) -> Budget:
        """What may be spent on real private patients. Raises PrivacyError for others."""
        if self._manifest.budget is None:
            raise PrivacyError(f"{self.name}: these patients aren't real and private, so they have no budget")
        return self._manifest.budget

    @cached_property
    def people(self) -> tuple[tuple[str, ...], ...]:
        """By patient, what tells who they are: the person's name in this cohort, and hashes of the decoded volumes."""
        return tuple(
            (f"{self.name}/{name}", *voxels) for name, *voxels in (self._table.people[m] for m in self._members)
        )

    @cached_property
    def groups(self) -> tuple[str | None, ...]:
        """The patients' diagnostic groups."""
        return tuple(self._table.groups[m] for m in self._members)

    @cached_property
    def labelled(self) -> np.ndarray:
        """Bool (n_patients,): whose labels were given; those of the others were predicted, or are all 0."""
        return self._table.labelled[self._members]

    @cached_property
    def attributes(self) -> np.ndarray:
        """float32 (n_volumes, 14): attributes of every volume, NaN where unknown."""
        return self._table.attributes[self._rows(self._table.first)]

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 (n_patients + 1,): patient p's volumes have indices offsets[p] to offsets[p + 1]."""
        return np.concatenate([[0], np.cumsum(self._table.counts[self._members])])

    @cached_property
    def owners(self) -> np.ndarray:
        """int64 (n_volumes,): index of the patient to whom each volume belongs."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images(self, volumes: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, 13, 96, 96) in [0, 1]: the images of the volumes with these indices."""
        return self._read("images", volumes).astype(np.float32)

    def labels(self, volumes: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (k, 13, 96, 96): the labels of the volumes with these indices."""
        return self._read("labels", volumes)

    def _read(self, array: str, volumes: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted, back = np.unique(self._volumes[np.asarray(volumes, np.int64)], return_inverse=True)
        if self._draw:
            stored_labels = self.path / self.split / "labels"  # what is written last
            for m in np.unique(wanted // MAX_VOLUMES).tolist():
                if not (stored_labels / f"c.{m}.0.0.0").exists():
                    self._draw(self.split, m, self._table.ids[m])
        stored: Any = self._stored[array]
        first, end = (wanted[0], wanted[-1] + 1) if len(wanted) else (0, 0)
        if end - first <= MAX_VOLUMES * len(wanted):  # nearly all of them: one piece is read faster
            return np.asarray(stored[first:end])[wanted - first][back]
        return np.asarray(stored.oindex[wanted])[back]

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Patients":
        """Only the patients with these indices, in this order."""
        members = self._members[np.asarray(indices, np.int64)]
        return Patients(self._manifest, self.split, self.path, members, self._draw)

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> PatientRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "Patients": ...
    def __getitem__(self, index: int | slice) -> "PatientRecord | Patients":
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        index = range(len(self))[index]
        own = range(self.offsets[index], self.offsets[index + 1])
        return PatientRecord(
            self.ids[index],
            self.groups[index],
            self.images(own),
            self.labels(own),
            self.attributes[own],
            bool(self.labelled[index]),
            *self._table.remarks[self._members[index]],
        )

    def __iter__(self) -> Iterator[PatientRecord]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Patients({self.name}, {self.split}, {self.role}, {len(self)} patients)"


@dataclass(frozen=True)
class Cohort:
    """A prepared cohort: its manifest, the folder that holds it, and the key of everything that shaped it.

    draw: of one that is drawn on demand, writes the patient of a split, row and name.
    """

    manifest: Manifest
    path: Path
    key: str
    draw: Callable[[str, int, str], None] | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return SPLITS

    def split(self, name: str) -> Patients:
        """The patients of one split. Raises CohortError if there's none of that name."""
        if name not in SPLITS:
            raise CohortError(f"{self.manifest.name}: there's no split {name!r}; the splits are {', '.join(SPLITS)}")
        return Patients(self.manifest, name, self.path, draw=self.draw)


def require_public(patients: Patients, leak: str) -> None:
    """Refuse private patients, simulated or not, to whatever takes a statistic, chooses or fits without noise.

    leak completes "this would reveal ...". Raises PrivacyError.
    """
    if patients.role != "public":
        raise PrivacyError(f"{patients.name} is private, and this would reveal {leak}; give a public cohort here")


def require_releasable(patients: Patients, leak: str) -> None:
    """Refuse real private patients to whatever shows them or evaluates against them; simulated ones expose nobody.

    leak completes "this would reveal ...". Raises PrivacyError.
    """
    if patients.secret:
        raise PrivacyError(
            f"{patients.name} holds real private patients, and this would reveal {leak}; "
            "give a public or a simulated cohort"
        )


def require_labelled(patients: Patients, purpose: str) -> Patients:
    """Those of the patients whose labels were given, for what predicted ones won't do; purpose says for what.

    Raises CohortError where there are none.
    """
    if not patients.labelled.any():
        raise CohortError(
            f"{patients.name}: no patient ({patients.split}) has labels; {purpose} needs a cohort with some"
        )
    return patients if patients.labelled.all() else patients.subset(np.flatnonzero(patients.labelled))
