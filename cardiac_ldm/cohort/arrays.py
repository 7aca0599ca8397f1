"""Volumes in memory, synthetic or of patients: what is drawn, measured, trained on, shown and released."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES
from cardiac_ldm.cohort.guards import require_labelled, require_releasable
from cardiac_ldm.cohort.patients import Patients
from cardiac_ldm.cohort.volumes import GRID
from cardiac_ldm.errors import ParameterError

_LABELS = 4


@dataclass(frozen=True)
class Volumes:
    """Volumes with their attributes, labels and patients; plain arrays, which guard nobody.

    images: float32 (n, 13, 96, 96) in [0, 1]. attributes: float32 (n, 14), NaN where unknown; of synthetic volumes,
    what was requested. patient_index: int64 (n,), the patient or request of each volume. labels: uint8 (n, 13, 96, 96):
    0 background, 1 RV, 2 myocardium, 3 LV (of synthetic volumes, what the decoder meant); None where there are none.

    Raises:
        ParameterError: an array has another shape, or values that aren't finite or no label.
    """

    name: str
    images: np.ndarray
    attributes: np.ndarray
    patient_index: np.ndarray
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        for field, shape in (
            ("images", (n, *GRID.shape)),
            ("labels", (n, *GRID.shape)),
            ("attributes", (n, len(ATTRIBUTE_NAMES))),
            ("patient_index", (n,)),
        ):
            given = getattr(self, field)
            if given is not None and given.shape != shape:
                raise ParameterError(f"{self.name}: {field} are {given.shape}, expected {shape}")
        if not np.isfinite(self.images).all():
            raise ParameterError(
                f"{self.name}: images hold values that aren't finite; leave those volumes out; a model that drew such "
                "has diverged"
            )
        if self.labels is not None and self.labels.max(initial=0) >= _LABELS:
            raise ParameterError(f"{self.name}: labels go up to {self.labels.max()}; give 0 to {_LABELS - 1}")

    @property
    def n_patients(self) -> int:
        """Number of patients or requests who have a volume."""
        return len(np.unique(self.patient_index))

    @classmethod
    def of(cls, patients: Patients, leak: str, labelled_for: str | None = None) -> "Volumes":
        """All volumes of patients.

        leak: completes "this would reveal ..." of the refusal. labelled_for: for what labels are needed; then they come
        along, and only patients whose labels were given do.

        Raises:
            PrivacyError: they are private and not simulated.
            CohortError: labels are wanted, and none of them has any.
        """
        require_releasable(patients, leak)
        patients = require_labelled(patients, labelled_for) if labelled_for else patients
        volumes = np.arange(len(patients.patient_index))
        labels = patients.labels(volumes) if labelled_for else None
        return cls(patients.name, patients.images(volumes), patients.attributes, patients.patient_index, labels)

    def __add__(self, other: "Volumes") -> "Volumes":
        """Both together, without labels where either has none; nobody of the one is anybody of the other."""
        unlabelled = self.labels is None or other.labels is None
        return Volumes(
            f"{self.name} + {other.name}",
            np.concatenate([self.images, other.images]),
            np.concatenate([self.attributes, other.attributes]),
            np.concatenate([self.patient_index, other.patient_index + self.patient_index.max() + 1]),
            None if unlabelled else np.concatenate([self.labels, other.labels]),
        )

    def save(self, path: Path) -> None:
        """Write to one compressed file, images at 8 bits; the name isn't kept."""
        temporary = path.with_suffix(".tmp.npz")
        images = (self.images * 255).round().astype(np.uint8)
        parts = {"images": images, "attributes": self.attributes, "patient_index": self.patient_index}
        labels = {} if self.labels is None else {"labels": self.labels}
        np.savez_compressed(temporary, **parts | labels)  # type: ignore[arg-type]
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Volumes":
        """Read what `save` wrote; named after its folder, which is its run's."""
        with np.load(path) as stored:
            images = stored["images"].astype(np.float32) / 255
            return cls(path.parent.name, images, stored["attributes"], stored["patient_index"], stored.get("labels"))
