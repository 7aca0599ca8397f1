"""Prepared patients: how they're stored, and read when asked for.

A split is a table, `<split>.jsonl`, a JSON object a line for every patient, and a folder with a file of volumes each.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numcodecs import Zstd

from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES
from cardiac_ldm.cohort.manifest import SPLITS, Budget, Manifest
from cardiac_ldm.cohort.volumes import GRID
from cardiac_ldm.errors import PrivacyError

_VOLUME = np.dtype([("images", np.float16, GRID.shape), ("labels", np.uint8, GRID.shape)])
"""A volume as it's stored; half precision keeps 11 bits of what scanners store in 12."""


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


def write_patient(path: Path, split: str, number: int, record: PatientRecord) -> None:
    """Write the volumes of patient `number` of a split of the cohort at path, all or none."""
    volumes = np.empty(len(record.images), _VOLUME)
    volumes["images"], volumes["labels"] = record.images, record.labels
    file = volumes_file(path, split, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{secrets.token_hex(4)}.tmp")
    temporary.write_bytes(Zstd(checksum=True).encode(volumes.tobytes()))
    temporary.replace(file)


def volumes_file(path: Path, split: str, number: int) -> Path:
    """Where the volumes of patient `number` of a split lie in the prepared cohort at path."""
    return path / split / f"{number:06d}.zst"


def table_row(record: PatientRecord) -> dict[str, Any]:
    """What a split's table says of a patient; attributes that are unknown are null."""
    said = {name: getattr(record, name) for name in ("id", "group", "labelled", "repairs", "doubts")}
    return said | {"attributes": [[None if x != x else x for x in row] for row in record.attributes.tolist()]}


def read_rows(path: Path, split: str) -> Iterator[dict[str, Any]]:
    """The table of a split of the prepared cohort at path, row by row, in the patients' order."""
    with (path / f"{split}.jsonl").open() as table:
        yield from map(json.loads, table)


class _Row(NamedTuple):
    """What of a table's row is kept in memory; attributes: float32 (v, 14)."""

    number: int
    id: str
    person: tuple[str, ...]
    group: str | None
    labelled: bool
    attributes: np.ndarray
    repairs: tuple[str, ...]
    doubts: tuple[str, ...]


@lru_cache(maxsize=8)
def _table(path: Path, split: str) -> list[_Row]:
    return [
        _Row(
            number,
            row["id"],
            (row.get("person", row["id"]), *row.get("voxels", ())),
            row["group"],
            row["labelled"],
            np.asarray(row["attributes"], np.float32),
            tuple(row["repairs"]),
            tuple(row["doubts"]),
        )
        for number, row in enumerate(read_rows(path, split))
    ]


class Patients(Sequence[PatientRecord]):
    """The patients of one split, or some of them: small tables in memory, volumes read when asked for."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        path: Path,
        members: Sequence[int] | np.ndarray | None = None,
        draw: Callable[[str, int, str], None] | None = None,
    ) -> None:
        """The patients with these rows in the table of the prepared cohort at path, or all.

        draw: writes the patient of a split, row and name who is in the table and not in the store yet.
        """
        self._manifest, self.split, self.path, self._members, self._draw = manifest, split, path, members, draw

    @cached_property
    def _rows(self) -> list[_Row]:
        table = _table(self.path, self.split)
        return table if self._members is None else [table[number] for number in self._members]

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
        return tuple(row.id for row in self._rows)

    @property
    def places(self) -> int:
        """How many places the patients of this split have, which is public; real private ones may leave some empty."""
        whole = self.split == "train" and len(self) == len(_table(self.path, self.split))
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
        return tuple((f"{self.name}/{row.person[0]}", *row.person[1:]) for row in self._rows)

    @cached_property
    def groups(self) -> tuple[str | None, ...]:
        """The patients' diagnostic groups."""
        return tuple(row.group for row in self._rows)

    @cached_property
    def labelled(self) -> np.ndarray:
        """Bool (n_patients,): whose labels were given; those of the others were predicted, or are all 0."""
        return np.array([row.labelled for row in self._rows], bool)

    @cached_property
    def attributes(self) -> np.ndarray:
        """float32 (n_volumes, 14): attributes of every volume, NaN where unknown."""
        volumes = [volume for row in self._rows for volume in row.attributes]
        return np.array(volumes, np.float32).reshape(-1, len(ATTRIBUTE_NAMES))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 (n_patients + 1,): patient p's volumes have indices offsets[p] to offsets[p + 1]."""
        return np.cumsum([0, *(len(row.attributes) for row in self._rows)])

    @cached_property
    def patient_index(self) -> np.ndarray:
        """int64 (n_volumes,): index of the patient to whom each volume belongs."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images(self, volumes: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, 13, 96, 96) in [0, 1]: the images of the volumes with these indices."""
        return self._read("images", volumes).astype(np.float32)

    def labels(self, volumes: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (k, 13, 96, 96): the labels of the volumes with these indices."""
        return self._read("labels", volumes)

    def _read(self, what: str, volumes: Sequence[int] | np.ndarray) -> np.ndarray:
        volumes = np.asarray(volumes, np.int64)
        read = np.empty(volumes.shape, _VOLUME[what])
        patient_index = self.patient_index[volumes]
        for index in np.unique(patient_index):
            places = np.flatnonzero(patient_index == index)
            row = self._rows[index]
            file = volumes_file(self.path, self.split, row.number)
            if self._draw and not file.exists():
                self._draw(self.split, row.number, row.id)
            stored = np.frombuffer(Zstd().decode(file.read_bytes()), _VOLUME)
            read[places] = stored[what][volumes[places] - self.offsets[index]]
        return read

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Patients":
        """Only the patients with these indices, in this order."""
        members = [self._rows[index].number for index in np.asarray(indices, np.int64)]
        return Patients(self._manifest, self.split, self.path, members, self._draw)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> PatientRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "Patients": ...
    def __getitem__(self, index: int | slice) -> "PatientRecord | Patients":
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        index = range(len(self))[index]
        own, row = range(self.offsets[index], self.offsets[index + 1]), self._rows[index]
        read = self.images(own), self.labels(own), row.attributes
        return PatientRecord(row.id, row.group, *read, row.labelled, row.repairs, row.doubts)

    def __iter__(self) -> Iterator[PatientRecord]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        count = "" if self.secret else f", {len(self)} patients"  # which only the holder may know
        return f"Patients({self.name}, {self.split}, {self.role}{count})"


@dataclass(frozen=True)
class Cohort:
    """A prepared cohort: its manifest, the folder that holds it, and the key of everything that shaped it.

    draw: of one that is drawn on demand, writes the patient of a split, row and name.
    """

    manifest: Manifest
    path: Path
    key: str
    draw: Callable[[str, int, str], None] | None = None
    splits = SPLITS

    def split(self, name: str) -> Patients:
        """The patients of one split. Raises CohortError if there's none of that name."""
        self.manifest.require_split(name)
        return Patients(self.manifest, name, self.path, draw=self.draw)
