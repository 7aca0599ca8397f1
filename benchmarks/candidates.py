"""How many candidates to draw for a request: `python -m benchmarks.candidates [--patients N]`.

The `laptop` profile's public model (the one that is shipped) draws four pairs of volumes for each public validation
patient's attributes; of the first 1, 2 and 4 the one is kept that a release would keep. Control is measured by the
segmenter, which also chose, and by the labels that the decoder means, which had no part in it; distances are
EfficientNet's. Half an hour on one core.
"""

import argparse
from dataclasses import replace

import numpy as np

from benchmarks import keep
from cardiac_ldm.cohort import GRID, Volumes, measure_attributes
from cardiac_ldm.evaluation import candidates
from cardiac_ldm.evaluation.control import agreement
from cardiac_ldm.evaluation.intervals import Estimate, bootstrap
from cardiac_ldm.evaluation.measured import measure, measure_real
from cardiac_ldm.evaluation.metrics import estimate
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.progress import tqdm
from cardiac_ldm.study import Study

TRIED = (1, 2, 4)
SHOWN = ("FD-EffNet", "FD-anatomy", "precision", "recall", "density", "coverage", "attribute coverage", "MS-SSIM")
CONTROLLED = ("LVEDV", "LVESV", "LVEF", "RVEDV", "RVEF", "MYOEDTHICK")


def cohorts(study: Study, n_patients: int) -> tuple[dict[int, Volumes], dict[int, dict[str, float]]]:
    """By number of candidates: the cohort that is kept, and how many were and stayed implausible."""
    patients = study.public.split("validation")[:n_patients]
    model, networks = study.denoiser(study.pretrained), study.anatomy_networks
    kept: dict[int, list[Volumes]] = {k: [] for k in TRIED}
    refused: dict[int, list[tuple[float, bool]]] = {k: [] for k in TRIED}
    for number in tqdm(range(len(patients)), desc="candidates", unit="patient"):
        conditions = patients.attributes[patients.offsets[number] : patients.offsets[number + 1]]
        requested = candidates.requests(conditions, number, max(TRIED))
        drawn = candidates.labelled(study.draw(model, *requested), networks[0])
        judged = candidates.judge(drawn, *networks)
        for k in TRIED:
            few = replace(judged, distance=judged.distance[:k], plausible=judged.plausible[:k])
            best = candidates.of_candidate(drawn, few.best())
            kept[k].append(replace(best, patient_index=np.full(len(best.images), number)))
            refused[k].append((float((~few.plausible).mean()), not few.plausible.any()))
    joined = {k: _joined(volumes) for k, volumes in kept.items()}
    shares = {
        k: {"candidates_refused": np.mean([r for r, _ in x]), "kept_implausible": np.mean([i for _, i in x])}
        for k, x in refused.items()
    }
    return joined, shares


def _joined(volumes: list[Volumes]) -> Volumes:
    parts = (np.concatenate([getattr(v, x) for v in volumes]) for x in ("images", "attributes", "patient_index"))
    return Volumes("synthetic", *parts, np.concatenate([v.labels for v in volumes]))


def by_labels(cohort: Volumes, anatomy, attribute: str, resamples: int, seed: int) -> Estimate:  # noqa: ANN001
    """The mean absolute error of an attribute as the decoder's own labels have it."""
    table = anatomy[anatomy.attribute == attribute].copy()
    own = {}
    for patient in np.unique(cohort.patient_index):
        rows = np.flatnonzero(cohort.patient_index == patient)
        phases = {"ED" if cohort.attributes[r, 11] == 1 else "ES": cohort.labels[r] for r in rows}
        own[patient] = measure_attributes(phases, GRID.spacing_mm)[attribute]
    table["measured"] = table.patient.map(own)
    statistics, n = agreement(table, attribute)
    return bootstrap(statistics["mean absolute error"], n, resamples=resamples, seed=seed)


def main() -> None:
    """Draw, choose, measure, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=100)
    study = Study(Parameters(profile="laptop"))
    n_patients = parser.parse_args().patients
    drawn, shares = cohorts(study, n_patients)
    networks, settings = study.anatomy_networks, study.profile.evaluation
    real = measure_real(study.public.split("validation")[:n_patients], *networks, seed=study.seed)
    size = real.n_patients // 2
    draws = {"resamples": settings.resamples, "half_sample_pairs": settings.half_sample_pairs, "seed": study.seed}
    rows = []
    for k, cohort in drawn.items():
        found = measure(cohort, *networks, seed=study.seed)
        table = estimate(found, real, size=size, **draws)
        whole = table[
            (table.grouping == "") & table.metric.isin([*SHOWN, "phase accuracy", "mean absolute error", "slope"])
        ]
        whole = whole[(whole.attribute == "") | whole.attribute.isin(CONTROLLED)]
        measured = {
            f"{row.metric} {row.attribute}".strip(): {
                "value": row.value,
                "low": row.low,
                "high": row.high,
                "n_patients": row.n_patients,
            }
            for row in whole.itertuples()
        }
        for attribute in CONTROLLED:
            one = by_labels(cohort, found.anatomy, attribute, settings.resamples, study.seed)
            measured[f"mean absolute error {attribute}, by the decoder's labels"] = vars(one)
        rows.append({"candidates": k} | {name: float(x) for name, x in shares[k].items()} | measured)
        print(rows[-1], flush=True)
    keep("candidates", run=study.pretrained.key, profile="laptop", validation_patients=n_patients, rows=rows)


if __name__ == "__main__":
    main()
