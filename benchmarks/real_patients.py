"""What private training gives a few dozen REAL patients: `python -m benchmarks.real_patients [--data DIR]`.

ACDC's patients are published, so they may stand in for a hospital's and be evaluated all the same. The public model has
met simulated patients alone. Four folds: every patient is held out of one, and trains in three. All but one of a fold's
training patients are expected in every step: they are too few to gain from sampling.
Noise comes from the operating system. What was chosen (RECIPE), was chosen on `rehearsal`: as many patients of
`phantom_rehearsal`, a simulated population.

Held-out patients of all folds together: the change of the denoising loss against the public model, with the same
timesteps and noise, and FD-EffNet of what is drawn for their attributes, against public only, patient by patient. An
hour and a half on one core; goes on after a kill.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import RESULTS, keep
from benchmarks.acdc import RUNS, parser
from cardiac_ldm.cohort import Manifest, Patients, load_manifest, prepare
from cardiac_ldm.evaluation.intervals import bootstrap
from cardiac_ldm.evaluation.measured import Measured, measure, measure_real
from cardiac_ldm.evaluation.metrics import differences, estimate
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.study import Study
from cardiac_ldm.training.finetune import FinetuneSettings, finetune
from cardiac_ldm.training.pretrain import Latents, held_out_loss
from cardiac_ldm.training.subspace import SubspaceSettings

FOLDS = 4
BUDGETS = (1.0, 3.0, 10.0, math.inf)
TWINS = {"patient076"}
"""The one file is the other's, patient074's, under a second name."""
PUBLIC = {"dimensions": 384, "patients": 400, "draws": 8, "power": 0.25}
RECIPE = {"dimensions": 128, "steps": 12, "learning_rate": 3.0, "clip": 0.03, "draws": 1, "average_decay": 0.5}
REHEARSED = [{}, {"learning_rate": 1.0}, {"learning_rate": 10.0}, {"dimensions": 32}, {"dimensions": 384}]


def recipe(study: Study, n_patients: int, changes: Mapping[str, Any]) -> FinetuneSettings:
    """The profile's private recipe with RECIPE's settings and the changes, for so many patients."""
    given: dict[str, Any] = RECIPE | dict(changes)
    subspace = SubspaceSettings.model_validate(PUBLIC | {"dimensions": given.pop("dimensions")})
    given |= {"tuned": "subspace", "subspace": subspace, "expected_batch": n_patients - 1}
    return study.profile.finetune.model_copy(update=given)


def tuned(
    study: Study, train: Patients, latents: Latents | np.ndarray, settings: FinetuneSettings, epsilon: float, name: str
) -> Denoiser:
    """The public model, tuned on these patients now or before."""
    whole = settings.model_copy(update={"subspace": SubspaceSettings.model_validate(PUBLIC)})
    study.profile = study.profile.model_copy(update={"finetune": whole})
    model = study.denoiser(study.pretrained)
    directions = study.load_directions(model)[: settings.along.dimensions]  # they are in the order of their variance
    plan = settings.plan(epsilon, settings.delta, len(train))
    folder = RUNS / "real_patients" / f"{study.pretrained.key}-{name}-{epsilon:g}"
    randomness = Randomness(None, simulated=False)
    folder.mkdir(parents=True, exist_ok=True)
    finetune(model, train, latents, plan, settings, randomness, folder, "phantom_public", directions)
    return model.eval()


def rehearsal() -> list[dict[str, Any]]:
    """Recipes tried on simulated patients, at epsilon 3: as many as a fold's train, 40 held out."""
    study = Study(Parameters(profile="laptop", cohort_private="phantom_rehearsal"))
    whole = study.private.split("train")
    train, held_out = whole[:58], study.private.split("validation")[:40]
    latents = study.latents(whole, study.private)[: train.offsets[-1]]
    others = study.latents(study.private.split("validation"), study.private)[: held_out.offsets[-1]]
    before, rows = held_out_loss(study.denoiser(study.pretrained), others, held_out), []
    for number, changes in enumerate(REHEARSED):
        settings = recipe(study, len(train), changes)
        model = tuned(study, train, latents, settings, 3.0, f"rehearsal{number}")
        change = 1000 * (held_out_loss(model, others, held_out) - before)
        rows.append({"changed": json.dumps(changes), "n_patients": len(held_out), **mean(change)})
        print(rows[-1], flush=True)
    return rows


def mean(values: np.ndarray) -> dict[str, float]:
    """The mean over patients with its interval."""
    found = bootstrap(lambda chosen: float(values[chosen].mean()), len(values), resamples=1000, seed=0)
    return {"change": found.value, "low": found.low, "high": found.high}


def folds(patients: Patients) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Who trains and who is held out."""
    who = np.arange(len(patients))
    for fold in range(FOLDS):
        yield who[who % FOLDS != fold], who[who % FOLDS == fold]


def cross_validated(data: Path) -> dict[str, Any]:
    """Train at every budget in every fold; a row a budget."""
    study = Study(Parameters(profile="laptop"))
    names = sorted({path.parent.name for path in data.glob("*/Info.cfg")} - TWINS)
    said = load_manifest("acdc").model_dump()
    said["splits"] = {"train": names[:-2], "validation": names[-2:-1], "test": names[-1:]}
    cohort = prepare(Manifest.model_validate(said), store=RUNS / "cohorts", data_root=data)
    patients = cohort.split("train")
    latents, offsets = study.latents(patients, cohort), patients.offsets
    change: dict[float, list[np.ndarray]] = {epsilon: [] for epsilon in BUDGETS}
    drawn: dict[float, list[Any]] = {epsilon: [] for epsilon in (0.0, *BUDGETS)}
    order: list[int] = []
    for fold, (inside, outside) in enumerate(folds(patients)):
        order += outside.tolist()
        train, held_out = patients.subset(inside), patients.subset(outside)
        ours, others = (
            latents[np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in who])] for who in (inside, outside)
        )
        settings, public = recipe(study, len(train), {}), study.denoiser(study.pretrained)
        before = held_out_loss(public, others, held_out)
        drawn[0.0].append(study.draw(public, held_out.attributes, held_out.patient_index))
        for epsilon in BUDGETS:
            model = tuned(study, train, ours, settings, epsilon, f"fold{fold}")
            change[epsilon].append(1000 * (held_out_loss(model, others, held_out) - before))
            drawn[epsilon].append(study.draw(model, held_out.attributes, held_out.patient_index))
            print(f"fold {fold}, epsilon {epsilon:g}: {change[epsilon][-1].mean():+.2f}", flush=True)
    real = measure_real(patients.subset(order), *study.anatomy_networks, seed=0)
    read = {epsilon: _read(study, reduce(add, volumes), epsilon) for epsilon, volumes in drawn.items()}
    draw: dict[str, Any] = {"size": len(order) // 2, "resamples": 1000, "half_sample_pairs": 40, "seed": 0}
    rows = []
    for epsilon, model in read.items():
        row = {"epsilon": str(epsilon), "n_patients": len(order), **_distance(estimate(model, real, **draw))}
        if epsilon:
            row |= mean(np.concatenate(change[epsilon]))
            beyond = differences(model, read[0.0], real, **draw).query("metric == 'FD-EffNet'").iloc[0]
            row |= {"fd_change": beyond.value, "fd_change_low": beyond.low, "fd_change_high": beyond.high}
        rows.append(row)
        print(row, flush=True)
    return {"run": study.pretrained.key, "patients": len(patients), "rows": rows}


def _read(study: Study, volumes: Any, epsilon: float) -> Measured:  # noqa: ANN401
    return measure(replace(volumes, name=f"epsilon {epsilon:g}"), *study.anatomy_networks, seed=0)


def _distance(table: pd.DataFrame) -> dict[str, float]:
    row = table.query("metric == 'FD-EffNet'").iloc[0]
    return {"fd": row.value, "fd_low": row.low, "fd_high": row.high}


def main() -> None:
    """Rehearse, train, measure, keep results/real_patients.json."""
    arguments = parser(__doc__)
    arguments.add_argument("parts", nargs="*", choices=["rehearsal", "folds", []], help="both unless told")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "real_patients.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    known.pop("benchmark", None)
    known |= {"recipe": RECIPE | PUBLIC}
    if "rehearsal" in (given.parts or ["rehearsal"]):
        keep("real_patients", **(known := known | {"rehearsal": rehearsal()}))
    if "folds" in (given.parts or ["folds"]):
        keep("real_patients", **(known | cross_validated(given.data)))


if __name__ == "__main__":
    main()
