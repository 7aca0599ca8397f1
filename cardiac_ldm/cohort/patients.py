"""Prepared patients, read lazily; and the two guards that keep private ones from leaking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import zarr

from cardiac_ldm.cohort.manifest import SPLITS, Manifest
from cardiac_ldm.errors import CohortError, PrivacyError


@dataclass(frozen=True)
class PatientRecord:
    """A prepared patient with v volumes (usually two: ED, then ES).

    images: float32 (v, 13, 96, 96) in [0, 1]. labels: uint8 (v, 13, 96, 96): 0 background, 1 RV, 2 myocardium, 3 LV.
    attributes: float32 (v, 14) in the units of ATTRIBUTES, NaN where unknown.
    """

    id: str
    group: str | None
    images: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray


class Patients(Sequence[PatientRecord]):
    """The patients of one split, or some of them: small tables in memory, volumes read when asked for."""

    def __init__(self, manifest: Manifest, split: str, path: Path, members: np.ndarray | None = None) -> None:
        """Open a split of a prepared cohort. members: int64 (n_patients,), rows of the stored split; None for all."""
        self._manifest, self.split, self.path = manifest, split, path
        self._members = np.arange(len(self._stored.attrs["ids"])) if members is None else members  # type: ignore[arg-type]

    @cached_property
    def _stored(self) -> zarr.Group:
        return zarr.open_group(self.path / self.split, mode="r")

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.asarray(self._stored["offsets"])

    @cached_property
    def _volumes(self) -> np.ndarray:
        """int64 (n_volumes,): where each volume of these patients lies in the stored split."""
        ranges = [np.arange(self._offsets[m], self._offsets[m + 1]) for m in self._members]
        return np.concatenate(ranges) if ranges else np.empty(0, np.int64)

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
        ids: Any = self._stored.attrs["ids"]
        return tuple(ids[m] for m in self._members)

    @cached_property
    def groups(self) -> tuple[str | None, ...]:
        """The patients' diagnostic groups."""
        groups: Any = self._stored.attrs["groups"]
        return tuple(groups[m] for m in self._members)

    @cached_property
    def attributes(self) -> np.ndarray:
        """float32 (n_volumes, 14): attributes of every volume, NaN where unknown."""
        return np.asarray(self._stored["attributes"])[self._volumes]

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 (n_patients + 1,): patient p's volumes have indices offsets[p] to offsets[p + 1]."""
        return np.concatenate([[0], np.cumsum(np.diff(self._offsets)[self._members])])

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
        stored: Any = self._stored[array]
        first, end = (wanted[0], wanted[-1] + 1) if len(wanted) else (0, 0)
        read = stored[first:end] if end - first == len(wanted) else stored.oindex[wanted]
        return np.asarray(read)[back]

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Patients":
        """Only the patients with these indices, in this order."""
        return Patients(self._manifest, self.split, self.path, self._members[np.asarray(indices, np.int64)])

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
            self.ids[index], self.groups[index], self.images(own), self.labels(own), self.attributes[own]
        )

    def __iter__(self) -> Iterator[PatientRecord]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Patients({self.name}, {self.split}, {self.role}, {len(self)} patients)"


@dataclass(frozen=True)
class Cohort:
    """A prepared cohort: its manifest, the folder that holds it, and the key of everything that shaped it."""

    manifest: Manifest
    path: Path
    key: str

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return SPLITS

    def split(self, name: str) -> Patients:
        """The patients of one split. Raises CohortError if there's none of that name."""
        if name not in SPLITS:
            raise CohortError(f"{self.manifest.name}: there's no split {name!r}; the splits are {', '.join(SPLITS)}")
        return Patients(self.manifest, name, self.path)


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
