"""What networks read from a cohort, synthetic or real, once: features, similarity, anatomy and groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Patients, Volumes
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.control import read_anatomy
from cardiac_ldm.evaluation.diversity import similarity_of_pairs
from cardiac_ldm.evaluation.features import N_SLICES, AnatomyEncoder, slice_features
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter

AGES = (50, 65)
"""Years at which the age bands meet: fixed and public."""


@dataclass(frozen=True)
class Measured:
    """What networks read from one cohort, synthetic or real; intervals are taken from it. Picklable.

    features: encoder -> float32 (slices, d); feature_patient_index: int64 (slices,); similarity: float64 (patients,
    patients), NaN where not drawn; anatomy: table of patient, attribute, requested, measured; groups: a row a
    patient, missing where unknown.
    """

    name: str
    n_patients: int
    features: Mapping[str, np.ndarray]
    feature_patient_index: np.ndarray
    similarity: np.ndarray
    anatomy: pd.DataFrame
    groups: pd.DataFrame


def groups_of(
    attributes: np.ndarray, patient_index: np.ndarray, diseases: Sequence[str | None] | None = None
) -> pd.DataFrame:
    """Sex, age band and disease of patients or requests 0..m-1 (n,) with attributes (n, 14); None if unknown.

    diseases: one a patient.
    """
    first = np.unique(patient_index, return_index=True)[1]
    age, sex = (attributes[first, ATTRIBUTE_NAMES.index(name)] for name in ("AGE", "SEX"))
    bands = (f"under {AGES[0]}", f"{AGES[0]} to {AGES[1] - 1}", f"{AGES[1]} and over")
    return pd.DataFrame(
        {
            "sex": [{0.0: "female", 1.0: "male"}.get(value) for value in sex],
            "age": [bands[np.searchsorted(AGES, value, side="right")] if np.isfinite(value) else None for value in age],
            "disease": list(diseases) if diseases is not None else [None] * len(first),
        },
        dtype=object,
    )


def measure(
    volumes: Volumes,
    segmenter: Segmenter,
    classifier: PhaseClassifier,
    *,
    seed: int,
    diseases: Sequence[str | None] | None = None,
    inception: nn.Module | None = None,
) -> Measured:
    """Read volumes of patients or requests 0..m-1.

    Slices are encoded by EfficientNet-Lite0, by the segmenter's way down and, if it's given, by Inception-v3.

    Raises:
        ParameterError: fewer than 8 requests, one without a volume, or a phase not given.
    """
    n_patients, patient_index = volumes.n_patients, volumes.patient_index
    if n_patients < MIN_PATIENTS or n_patients != patient_index.max() + 1:
        last = patient_index.max() if n_patients else "none"
        raise ParameterError(
            f"{volumes.name}: {n_patients} patients with volumes, numbered to {last}; at least {MIN_PATIENTS}, "
            "from 0 on"
        )
    encoders: dict[str, nn.Module | None] = {"EffNet": None, "anatomy": AnatomyEncoder(segmenter)}
    if inception is not None:
        encoders["Inception"] = inception
    return Measured(
        volumes.name,
        n_patients,
        {encoder: slice_features(volumes.images, network) for encoder, network in encoders.items()},
        np.repeat(patient_index, N_SLICES),
        similarity_of_pairs(volumes, seed=seed),
        read_anatomy(volumes, segmenter, classifier),
        groups_of(volumes.attributes, patient_index, diseases),
    )


def measure_real(
    patients: Patients,
    segmenter: Segmenter,
    classifier: PhaseClassifier,
    *,
    seed: int,
    inception: nn.Module | None = None,
) -> Measured:
    """Read real patients, once for all models that are compared with them.

    Raises:
        PrivacyError: they are private and not simulated.
    """
    volumes = Volumes.of(patients, "statistics of private patients, with no noise, through the metrics")
    return measure(volumes, segmenter, classifier, seed=seed, diseases=patients.groups, inception=inception)
