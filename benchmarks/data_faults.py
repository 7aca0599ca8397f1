"""What the check of anatomy finds, and how often it's wrong: `python -m benchmarks.data_faults`.

Sound patients are those of ACDC (CARDIAC_LDM_ROOT_ACDC) and phantoms of both populations; each fault is done to some of
them. Thresholds were chosen on every other patient of ACDC and on 2,000 phantoms; the rates are of the other patients
and of 1,000 further phantoms. `fit` prints the weights of handedness.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.optimize import minimize
from tqdm import tqdm

from benchmarks import keep
from cardiac_ldm.cohort import Patient, Volume, load_manifest
from cardiac_ldm.cohort.anatomy import Sources, examine
from cardiac_ldm.cohort.attributes import measure_attributes
from cardiac_ldm.cohort.orientation import features
from cardiac_ldm.cohort.phantom import simulate
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import CohortError

SEEDS = {"clinics": 777, "biobank": 778}
CHOSEN_ON, PHANTOMS, SPOILT = 1000, 500, 100
"""Of each population: how many thresholds were chosen on, how many further ones are tried, how many of them spoilt."""
Spoil = Callable[[Patient, np.random.Generator], Patient]
_FILES = {"ED": "ED", "ES": "ES"}


def volumes(change: Callable[[Volume, np.ndarray], Volume]) -> Callable[[Patient], Patient]:
    """Change every volume, given its labels."""

    def spoil(patient: Patient) -> Patient:
        changed = tuple(change(v, v.labels) for v in patient.volumes if v.labels is not None)
        return replace(patient, volumes=changed)

    return spoil


def both(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Patient], Patient]:
    """Change images and labels alike."""
    return volumes(lambda v, labels: replace(v, image=change(v.image), labels=change(labels)))


def relabelled(exchange: tuple[int, ...]) -> Spoil:
    """Other values for labels 0 to 3."""
    new = np.array(exchange, np.uint8)
    return lambda patient, rng: volumes(lambda v, labels: replace(v, labels=new[labels]))(patient)


def shuffled(patient: Patient, rng: np.random.Generator) -> Patient:
    """Slices in any other order than theirs."""
    n = len(patient.volumes[0].image)
    while np.all(np.abs(np.diff(order := rng.permutation(n))) == 1):
        pass
    return both(lambda a: a[order])(patient)


def interleaved(patient: Patient, rng: np.random.Generator) -> Patient:
    """Every second slice first, as scanners take them."""
    n = len(patient.volumes[0].image)
    return both(lambda a: a[[*range(0, n, 2), *range(1, n, 2)]])(patient)


def slice_from(patient: Patient, rng: np.random.Generator, factor: float, offset: int) -> Patient:
    """A slice inside the stack is factor times the one `offset` further on."""
    k = int(rng.integers(1, len(patient.volumes[0].image) - 1))

    def change(v: Volume, labels: np.ndarray) -> Volume:
        image = v.image.copy()
        image[k] = factor * image[k + offset]
        return replace(v, image=image)

    return volumes(change)(patient)


def as_cine(patient: Patient, rng: np.random.Generator) -> Patient:
    """25 frames of the middle slice, from ED to ES and back, with noise: no labels."""
    ed, es = (v.image[len(v.image) // 2] for v in patient.volumes)
    beat = np.sin(np.pi * np.arange(25) / 25)[:, None, None]
    frames = [(1 - beat) * a + beat * b for a, b in ((ed, es), (es, ed))]
    noisy = [f + rng.normal(0, 0.03 * f.std(), f.shape) for f in frames]
    pairs = zip(patient.volumes, noisy, strict=True)
    return replace(patient, volumes=tuple(replace(v, image=f.astype(np.float32), labels=None) for v, f in pairs))


def wrap(patient: Patient, rng: np.random.Generator) -> Patient:
    """Intensities up to 36,000 to 65,535 stored in signed 16 bits."""
    top = rng.uniform(36_000, 65_535)

    def change(v: Volume, labels: np.ndarray) -> Volume:
        unsigned = np.round((v.image - v.image.min()) / np.ptp(v.image) * top).astype(np.uint16)
        return replace(v, image=unsigned.view(np.int16).astype(np.float32))

    return volumes(change)(patient)


def interpolated(patient: Patient, rng: np.random.Generator, values: tuple[int, ...] = (0, 1, 2, 3)) -> Patient:
    """Labels moved by a part of a pixel, linearly, then rounded, in a file whose values these are."""
    to, shift = np.array(values), rng.uniform(0.2, 0.8, 2)
    back = np.argsort(to).astype(np.uint8)

    def change(v: Volume, labels: np.ndarray) -> Volume:
        moved = ndimage.shift(to[labels].astype(np.float32), (0, *shift), order=1)
        return replace(v, labels=back[np.round(moved).astype(int)])

    return volumes(change)(patient)


def finer(patient: Patient, rng: np.random.Generator) -> Patient:
    """Labels and images brought to finer pixels, linearly, the labels then rounded."""
    zoom = (1.0, *(2 * [rng.uniform(1.2, 2.0)]))

    def change(v: Volume, labels: np.ndarray) -> Volume:
        moved = np.round(ndimage.zoom(labels.astype(np.float32), zoom, order=1)).astype(np.uint8)
        return replace(v, image=ndimage.zoom(v.image, zoom, order=1), labels=moved)

    return volumes(change)(patient)


def table(patient: Patient, rng: np.random.Generator, **factors: float) -> Patient:
    """A table that says of the labels' volumes so many times what they are, with the ejection fraction of these."""
    labels: dict[str, np.ndarray] = {v.phase: v.labels for v in patient.volumes if v.labels is not None}
    measured = measure_attributes(labels, patient.volumes[0].spacing_mm)
    said = {name: measured[name] for name in ("LVEDV", "LVESV")}
    said["LVEF"] = factors.get("LVEF", 0) + 100 * (1 - said["LVESV"] / said["LVEDV"])
    return replace(
        patient, attributes=said | {name: measured[name] * factors[name] for name in factors if name in said}
    )


def exchanged(patient: Patient, rng: np.random.Generator) -> Patient:
    """ED taken for ES."""
    ed, es = patient.volumes
    return replace(patient, volumes=(replace(es, phase="ED"), replace(ed, phase="ES")))


def moved_labels(patient: Patient, rng: np.random.Generator) -> Patient:
    """Labels mirrored, images not."""
    return volumes(lambda v, labels: replace(v, labels=labels[:, :, ::-1]))(patient)


def bare(spoil: Spoil) -> Spoil:
    """The same to a patient without labels."""
    return lambda patient, rng: replace(
        spoilt := spoil(patient, rng), volumes=tuple(replace(v, labels=None) for v in spoilt.volumes)
    )


FAULTS: dict[str, Spoil] = {
    "RV and wall exchanged": relabelled((0, 2, 1, 3)),
    "wall and LV exchanged": relabelled((0, 1, 3, 2)),
    "RV and LV exchanged": relabelled((0, 3, 2, 1)),
    "all three labels moved on": relabelled((0, 2, 3, 1)),
    "mirrored left to right": lambda p, rng: both(lambda a: a[:, :, ::-1])(p),
    "x and y exchanged": lambda p, rng: both(lambda a: a.transpose(0, 2, 1))(p),
    "mirrored upside down": lambda p, rng: both(lambda a: a[:, ::-1])(p),
    "turned by 180 degrees": lambda p, rng: both(lambda a: a[:, ::-1, ::-1])(p),
    "labels mirrored, images not": moved_labels,
    "slices shuffled": shuffled,
    "slices interleaved": interleaved,
    "slices shuffled, no labels": bare(shuffled),
    "slices interleaved, no labels": bare(interleaved),
    "a black slice": partial(slice_from, factor=0, offset=0),
    "a repeated slice": partial(slice_from, factor=1, offset=1),
    "a cine of one slice as a stack": as_cine,
    "uint16 wrapped to int16": wrap,
    "labels moved by interpolation": interpolated,
    "the same, of values with the LV first": partial(interpolated, values=(0, 3, 2, 1)),
    "labels interpolated to finer pixels": finer,
    "phases exchanged": exchanged,
    "LVEDV three times what is measured": partial(table, LVEDV=3.0),
    "LVESV above LVEDV": partial(table, LVESV=6.0),
    "LVEF 30 points off": partial(table, LVEF=30.0),
}


def found(patient: Patient) -> tuple[bool, bool]:
    """Whether anything is refused, and whether anything is refused or doubted."""
    findings = examine(patient.volumes, patient.attributes, Sources(_FILES, _FILES))
    return any(not finding.doubt for finding in findings), bool(findings)


def tried(patient: Patient, number: int, spoil: bool) -> dict[str, tuple[bool, bool]]:
    """What is found in a patient as they are and, if they're to be spoilt, with each fault."""
    with_faults = FAULTS.items() if spoil else ()
    return {"none": found(patient)} | {
        fault: found(do(patient, np.random.default_rng([number, k]))) for k, (fault, do) in enumerate(with_faults)
    }


def phantom(task: tuple[str, int]) -> dict[str, tuple[bool, bool]]:
    """Draw and try one."""
    population, number = task
    return tried(simulate(population, SEEDS[population], number), number, number < CHOSEN_ON + SPOILT)  # type: ignore[arg-type]


def real() -> Iterator[Patient]:
    """ACDC's patients, by name. Raises CohortError where they aren't."""
    manifest = load_manifest("acdc")
    root = manifest.data_root()
    for patient in sorted(p for split in ("train", "validation", "test") for p in manifest.patient_ids(split)):
        yield read_patient(manifest, root, patient)


def fit() -> None:
    """Print weights of handedness, by logistic regression without intercept; both cohorts weigh the same."""
    hearts = np.array([_features(p) for p in real()][::2])
    drawn = np.array(
        [
            _features(simulate(population, seed, n))  # type: ignore[arg-type]
            for population, seed in SEEDS.items()
            for n in tqdm(range(0, CHOSEN_ON, 2))
        ]
    )
    scale = np.sqrt((hearts.var(axis=0) + drawn.var(axis=0)) / 2)

    def loss(w: np.ndarray) -> float:
        losses = [np.logaddexp(0, -x / scale @ w).mean() for x in (hearts, drawn)]
        return float(np.mean(losses) + 1e-3 * w @ w)

    weights = minimize(loss, np.zeros(len(scale))).x / scale
    print(np.round(weights / (drawn @ weights).mean(), 2).tolist())


def _features(patient: Patient) -> np.ndarray:
    return np.mean([features(v.image, v.labels, v.spacing_mm) for v in patient.volumes if v.labels is not None], axis=0)


def main() -> None:
    """Try everybody, count those who weren't used to choose a threshold, keep the rates."""
    if sys.argv[1:] == ["fit"]:
        return fit()
    names = [(population, n) for population in SEEDS for n in range(CHOSEN_ON, CHOSEN_ON + PHANTOMS)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        drawn = list(tqdm(pool.map(phantom, names, chunksize=8), "phantoms", len(names)))
    hearts = [tried(patient, number, True) for number, patient in enumerate(tqdm(real(), "ACDC", 80)) if number % 2]
    rows: list[dict[str, Any]] = []
    for fault in ("none", *FAULTS):
        row: dict[str, Any] = {"fault": fault}
        for cohort, all_tried in (("acdc", hearts), ("phantoms", drawn)):
            with_it = [one[fault] for one in all_tried if fault in one]
            row |= {f"{cohort}_patients": len(with_it)}
            row |= {f"{cohort}_{what}": sum(one[i] for one in with_it) for i, what in enumerate(("refused", "found"))}
        both_found, both_tried = (row[f"acdc_{x}"] + row[f"phantoms_{x}"] for x in ("found", "patients"))
        rows.append(row | {"share": both_found / both_tried})
    keep("data_faults", sound=rows[0], faults=rows[1:])
    return None


if __name__ == "__main__":
    try:
        main()
    except CohortError as error:
        sys.exit(str(error))
