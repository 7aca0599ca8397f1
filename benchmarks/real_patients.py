"""What private training gives some sixty REAL patients: `python -m benchmarks.real_patients [PART] [--data DIR]`.

ACDC's patients are published, so they may stand in for a hospital's and be evaluated all the same; no other real
private patient may. The public model has met simulated patients alone. Four folds: every patient is held out of one and
trains in three. The recipe is the `laptop` profile's, noise from the operating system and accounting included; so few
patients are all in every batch. How many of the public directions are tuned is the one thing that is chosen for so few,
by the part `rehearsal`: as many patients of `phantom_rehearsal`, a simulated PUBLIC population.

folds: on the held-out patients of all folds together, the change of the denoising loss against the public model, with
the same timesteps and noise; FD-EffNet of what is drawn for their attributes, against public only, patient by patient;
and what the study's segmenter, which has met phantoms alone, reads from it.

useful: a segmenter is trained on what each fold's model draws for the attributes of simulated public patients, and
tested on the real patients whom that model never met; beside it one that is trained on as many simulated patients
themselves, and one on what the public model draws.

Two hours and a half on one core in all; goes on after a kill.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import RESULTS, keep
from benchmarks.acdc import RUNS, parser
from benchmarks.private_recipe import PUBLIC
from cardiac_ldm.cohort import Manifest, Patients, Volumes, load_manifest, prepare
from cardiac_ldm.evaluation.intervals import mean
from cardiac_ldm.evaluation.measured import measure, measure_real
from cardiac_ldm.evaluation.metrics import differences, estimate
from cardiac_ldm.evaluation.utility import labelled_volumes, training_patients, utility
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.runs import place
from cardiac_ldm.study import Study
from cardiac_ldm.training.finetune import FinetuneSettings, finetune
from cardiac_ldm.training.pretrain import held_out_loss
from cardiac_ldm.training.subspace import Directions, SubspaceSettings

FOLDS = 4
BUDGETS, USEFUL = (1.0, 3.0, 10.0, math.inf), 10.0
TWINS = {"patient076"}
"""The one file is the other's, patient074's, under a second name."""
DIMENSIONS, REHEARSED_AT = (384, 128, 32), 3.0
N_REHEARSED, N_VALIDATION = 59, 60
BOOTSTRAP: dict[str, Any] = {"resamples": 1000, "seed": 0}
DRAW: dict[str, Any] = BOOTSTRAP | {"half_sample_pairs": 40}
TOLD = [("FD-EffNet", "", "fd"), ("correlation", "LVEDV", "r_lvedv"), ("correlation", "LVEF", "r_lvef")]


@dataclass
class Recipe:
    """The profile's recipe along the first of its directions."""

    study: Study
    dimensions: int

    @property
    def settings(self) -> FinetuneSettings:
        """The private recipe."""
        recipe = self.study.profile.finetune
        along = recipe.along.model_copy(update={"dimensions": self.dimensions})
        return recipe.model_copy(update={"subspace": along, "selection": None})

    @property
    def key(self) -> list[object]:
        """What it depends on."""
        return [self.study.directions.key, self.settings.model_dump(mode="json")]

    def tuned(self, train: Patients, latents: np.ndarray, epsilon: float) -> Denoiser:
        """The public model, tuned on these patients now or before."""
        study, settings = self.study, self.settings
        model = study.denoiser(study.pretrained)
        every = study.load_directions()
        assert every is not None
        ((_, weights),) = every.sizes
        first = Directions([(self.dimensions, weights)])
        first.block0.copy_(every.block0[: self.dimensions])  # they are in the order of their variance
        plan = settings.plan(epsilon, settings.delta, len(train))
        described = [*self.key, str(epsilon), train.name, train.ids]
        folder = place(RUNS, "real", described).folder
        folder.mkdir(parents=True, exist_ok=True)
        noise = Randomness(None, simulated=train.simulated)
        finetune(model, train, latents, plan, settings, noise, folder, "phantom_public", first)
        return model.eval()


def study_of(**parameters: str) -> Study:
    """The `laptop` study, along directions of the whole network, whose first few are the most telling ones."""
    study = Study(Parameters(profile="laptop", **parameters))
    recipe = study.profile.finetune.model_copy(update={"subspace": SubspaceSettings.model_validate(PUBLIC)})
    study.profile = study.profile.model_copy(update={"finetune": recipe})
    return study


def rehearsal() -> dict[str, Any]:
    """How many directions to tune for so few patients, of a simulated population."""
    study = study_of(cohort_private="phantom_rehearsal")
    train, held_out = study.private.split("train"), study.private.split("validation")[:N_VALIDATION]
    latents = study.latents(train, study.private)
    others = study.latents(study.private.split("validation"), study.private)[: held_out.offsets[-1]]
    train, before = train[:N_REHEARSED], held_out_loss(study.denoiser(study.pretrained), others, held_out)
    rows: list[dict[str, Any]] = []
    for dimensions in DIMENSIONS:
        model = Recipe(study, dimensions).tuned(train, latents[: train.offsets[-1]], REHEARSED_AT)
        change = 1000 * (held_out_loss(model, others, held_out) - before)
        rows.append({"dimensions": dimensions, "epsilon": str(REHEARSED_AT), "places": len(train)})
        rows[-1] |= asdict(mean(change, **BOOTSTRAP))
        print(rows[-1], flush=True)
    return {"rehearsal": rows, "dimensions": min(rows, key=lambda row: row["value"])["dimensions"]}


@dataclass
class Fold:
    """Who trains and who is held out, with their latents."""

    number: int
    train: Patients
    held_out: Patients
    latents: np.ndarray
    others: np.ndarray


def folds(study: Study, data: Path) -> tuple[Patients, list[Fold]]:
    """ACDC's patients in the order of the folds that hold them out, and the folds."""
    names = sorted({path.parent.name for path in data.glob("*/Info.cfg")} - TWINS)
    said = load_manifest("acdc").model_dump()
    said["splits"] = {"train": names[:-2], "validation": names[-2:-1], "test": names[-1:]}
    cohort = prepare(Manifest.model_validate(said), store=RUNS / "cohorts", data_root=data)
    patients = cohort.split("train")
    latents, who, found = study.latents(patients, cohort)[:], np.arange(len(patients)), []
    for fold in range(FOLDS):
        inside, outside = who[who % FOLDS != fold], who[who % FOLDS == fold]
        ours, others = (latents[np.isin(patients.patient_index, some)] for some in (inside, outside))
        found.append(Fold(fold, patients.subset(inside), patients.subset(outside), ours, others))
    return patients.subset(np.argsort(who % FOLDS, kind="stable")), found


def kept(described: object, make: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What was made of this description, now or before."""
    run = place(RUNS, "real-kept", described)
    if not (run.folder / "content.pkl").exists():
        content = make()
        run.folder.mkdir(parents=True, exist_ok=True)
        run.keep("content", content)
    return run.read("content")


def cross_validated(recipe: Recipe, patients: Patients, everyone: list[Fold]) -> dict[str, Any]:
    """Train at every budget in every fold; a row a budget, 0 first, and what real patients reach among themselves."""
    study, public = recipe.study, recipe.study.denoiser(recipe.study.pretrained)
    networks = study.anatomy_networks

    def drawn(fold: Fold, epsilon: float) -> tuple[np.ndarray, Volumes]:
        model = recipe.tuned(fold.train, fold.latents, epsilon) if epsilon else public
        loss = held_out_loss(model, fold.others, fold.held_out)
        return loss, study.draw(model, fold.held_out.attributes, fold.held_out.patient_index)

    real = kept([*patients.ids], partial(measure_real, patients, *networks, seed=0))
    draw = DRAW | {"size": real.n_patients // 2}
    rows: list[dict[str, Any]] = []
    losses, read = {}, {}
    for epsilon in (0.0, *BUDGETS):
        key = [*recipe.key, str(epsilon)]
        found = [kept([*key, fold.number], partial(drawn, fold, epsilon)) for fold in everyone]
        losses[epsilon] = np.concatenate([loss for loss, _ in found])
        volumes = reduce(add, (volumes for _, volumes in found))
        read[epsilon] = kept(key, partial(measure, volumes, *networks, seed=0))
        row = {"epsilon": f"{epsilon:g}", "n_patients": real.n_patients, **_told(estimate(read[epsilon], real, **draw))}
        row |= _interval("change", 1000 * (losses[epsilon] - losses[0.0]))
        beyond = differences(read[epsilon], read[0.0], real, **draw).query("metric == 'FD-EffNet'").iloc[0]
        row |= {"fd_change": beyond.value, "fd_change_low": beyond.low, "fd_change_high": beyond.high}
        rows.append(row)
        print(row, flush=True)
    about = {"run": study.pretrained.key, "n_patients": real.n_patients, "places": len(everyone[0].train)}
    return about | {"real": _told(estimate(real, real, **draw)), "folds": rows}


def useful(recipe: Recipe, patients: Patients, everyone: list[Fold]) -> dict[str, Any]:
    """Train segmenters on what the folds' models draw, test them on the patients who were held out."""
    study, budget = recipe.study, recipe.study.profile.utility
    simulated = training_patients(study.public.split("train"), budget.patients, 0)

    def reached(name: str, train: Callable[[], Volumes], test: Patients) -> pd.DataFrame:
        def trained() -> pd.DataFrame:
            given = {"segmenter": budget.segmenter, "phase": budget.phase, **BOOTSTRAP}
            return utility([train()], labelled_volumes(test), **given)[0].outcomes

        return kept([*recipe.key, name, test.ids], trained).filter(like="Dice")

    def drawn(model: Callable[[], Denoiser]) -> Volumes:
        return study.draw(model(), simulated.attributes, simulated.patient_index)

    public = partial(study.denoiser, study.pretrained)
    dice = {
        "simulated patients": reached("simulated", partial(labelled_volumes, simulated), patients),
        "public only": reached("public only", partial(drawn, public), patients),
    }
    parts = []
    for fold in everyone:
        private = partial(recipe.tuned, fold.train, fold.latents, USEFUL)
        parts.append(reached(f"epsilon {USEFUL:g}", partial(drawn, private), fold.held_out))
    dice[f"epsilon {USEFUL:g}"] = pd.concat(parts, ignore_index=True)
    rows = []
    for name, found in dice.items():
        row: dict[str, Any] = {"trained_on": name, "n_patients": len(found)}
        for structure in map(str, found):
            key = structure.lower().replace(" ", "_")
            row |= _interval(key, found[structure])
            row |= _interval(f"{key}_beyond", found[structure] - dice["simulated patients"][structure])
        rows.append(row)
        print(row, flush=True)
    return {"useful": rows}


def _interval(name: str, values: pd.Series | np.ndarray) -> dict[str, float]:
    """The mean over patients with its interval."""
    found = mean(np.asarray(values, np.float64), **BOOTSTRAP)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _told(table: pd.DataFrame) -> dict[str, float]:
    """What is told of a cohort's estimates."""
    found: dict[str, float] = {}
    for metric, attribute, name in TOLD:
        rows = table[(table.metric == metric) & (table.attribute == attribute) & (table.grouping == "")]
        found |= {f"{name}{end}": float(rows[end.strip("_") or "value"].iloc[0]) for end in ("", "_low", "_high")}
    return found


def main() -> None:
    """Rehearse, train, measure, keep results/real_patients.json."""
    arguments = parser(__doc__)
    arguments.add_argument("parts", nargs="*", choices=["rehearsal", "folds", "useful", []], help="all unless told")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "real_patients.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    known.pop("benchmark", None)
    parts = given.parts or ["rehearsal", "folds", "useful"]
    if "rehearsal" in parts:
        keep("real_patients", **(known := known | rehearsal()))
    recipe = Recipe(study_of(), known["dimensions"])
    patients, everyone = folds(recipe.study, given.data)
    for part, measured in (("folds", cross_validated), ("useful", useful)):
        if part in parts:
            keep("real_patients", **(known := known | measured(recipe, patients, everyone)))


if __name__ == "__main__":
    main()
