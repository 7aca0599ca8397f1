"""How far phantoms lie from real hearts, beside real ones from each other: `python -m benchmarks.phantom_realism`.

FD-EffNet and KID between the phantoms of phantom_public and ACDC, from random parts of equal size, and between disjoint
halves of ACDC of that size. `--picture FILE.html` writes a page with real hearts and phantoms side by side, to be
looked at and never published: it shows real patients.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import keep
from benchmarks.acdc import RUNS, halves, parser
from cardiac_ldm.cohort import Patients, load_manifest, prepare
from cardiac_ldm.evaluation.features import N_SLICES, slice_features
from cardiac_ldm.evaluation.fidelity import KernelDistance, frechet_distance
from cardiac_ldm.evaluation.intervals import half_samples, rows_of
from cardiac_ldm.report.walls import synthetic_wall


def encoded(cohorts: list[Patients]) -> tuple[np.ndarray, np.ndarray]:
    """Features of the middle slices of all volumes, and the patient that each belongs to."""
    features, patient_index, first = [], [], 0
    for patients in cohorts:
        features.append(slice_features(patients.images(np.arange(len(patients.patient_index)))))
        patient_index.append(np.repeat(patients.patient_index, N_SLICES) + first)
        first += len(patients)
    return np.concatenate(features), np.concatenate(patient_index)


def distances(
    x: np.ndarray, x_owners: np.ndarray, y: np.ndarray, y_owners: np.ndarray
) -> dict[str, Callable[..., float]]:
    """Both distances, as functions of the patients that are chosen on either side."""
    x_rows, y_rows = rows_of(x_owners), rows_of(y_owners)

    def frechet(first: np.ndarray, second: np.ndarray) -> float:
        chosen = (np.concatenate([rows[i] for i in who]) for rows, who in ((x_rows, first), (y_rows, second)))
        return frechet_distance(*(features[rows] for features, rows in zip((x, y), chosen, strict=True)))

    return {"FD-EffNet": frechet, "KID": KernelDistance(x, x_owners, y, y_owners)}


def main() -> None:
    """Encode, compare, keep the rows."""
    arguments = parser(__doc__)
    arguments.add_argument("--picture", type=Path)
    given = arguments.parse_args()
    real = [patients for half in halves(given.data) for patients in half]
    n = sum(len(patients) for patients in real)
    limits = {"train": 1, "validation": 1, "test": n}
    phantoms = prepare(load_manifest("phantom_public"), store=RUNS / "cohorts", limits=limits).split("test")
    hearts, simulated = encoded(real), encoded([phantoms])
    rows = []
    for name, others in (("half of ACDC", None), ("phantoms", simulated)):
        for metric, distance in distances(*(others or hearts), *hearts).items():
            estimate = half_samples(
                distance, len(phantoms) if others else n, n if others else None, n // 2, pairs=40, seed=0
            )
            row = {"metric": metric, "between": f"{name} and ACDC", "value": estimate.value}
            rows.append(row | {"low": estimate.low, "high": estimate.high, "n_patients": estimate.n_patients})
    ratio = rows[2]["value"] / rows[0]["value"]
    if given.picture:
        volumes = [cohort.images(np.arange(0, 48, 2)) for cohort in (real[0], phantoms)]
        walls = [synthetic_wall(v, [""] * len(v), columns=8).to_html(include_plotlyjs=True) for v in volumes]
        given.picture.write_text("<h1>Real, then simulated</h1>" + "".join(walls))
    keep("phantom_realism", frechet_ratio=ratio, rows=rows)


if __name__ == "__main__":
    main()
