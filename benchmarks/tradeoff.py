"""How worth follows budget, start, patients and the noise's seed: `python -m benchmarks.tradeoff` (resumable; hours).

The `laptop` profile's recipe runs on the simulated private cohort at six budgets, each with three seeds of batches and
noise; for fewer patients, and for five times as many of the same population; and all weights are trained from scratch.
What all weights learn from these patients without noise, until validation patients gain hardly more, bounds them all.
A model is worth the change of the denoising loss on private test patients against the public model, patient by patient,
with the same timesteps and noise. Points are run in the order of the grid, `--points N` of those that are missing, and
each is kept as soon as it's there; one that is stopped goes on. `--again` runs two points anew, with other batches and
noise, and keeps both values beside each other.
"""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import RESULTS, keep
from benchmarks.private_recipe import ALL
from cardiac_ldm.cohort import Cohort, Manifest, Patients, prepare
from cardiac_ldm.evaluation.intervals import mean
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.study import Study
from cardiac_ldm.training.finetune import finetune
from cardiac_ldm.training.pretrain import Latents, held_out_loss, pretrain

EVERYBODY, MANY = 4000, 20_000
CONVERGED = "pre-trained, all weights, to convergence"
STEPS, ENOUGH, N_VALIDATION = 1500, 0.1, 100
"""A cycle of the learning rate, each half as high as the last, is so long; one that gives validation patients less than
this part of what all have given is the last."""


@dataclass(frozen=True)
class Point:
    """A training. start: what it begins from. seed: of batches and noise. patients: so many train.

    One that is CONVERGED tunes all weights of the pre-trained model, with no mechanism, in ordinary steps.
    """

    epsilon: float
    seed: int = 0
    start: str = "pre-trained"
    patients: int = EVERYBODY


BUDGETS = (0.1, 0.3, 1, 3, 10, math.inf)
GRID = [
    *(Point(epsilon) for epsilon in BUDGETS),
    Point(math.inf, start=CONVERGED),
    *(Point(epsilon, patients=patients) for patients in (80, 400) for epsilon in (1, 10)),
    *(Point(epsilon, seed) for seed in (1, 2) for epsilon in BUDGETS),
    *(Point(epsilon, patients=MANY) for epsilon in (1, 10)),
    *(Point(epsilon, start="from scratch") for epsilon in BUDGETS),
]
AGAIN = (Point(1, patients=80), Point(10, patients=80))


class Sweep:
    """The cohort, its public model, and what a point is worth."""

    def __init__(self) -> None:
        self.study, self.scratch = (Study(Parameters(profile="laptop")) for _ in range(2))
        untrained = self.scratch.profile.pretrain.model_copy(update={"steps": 0, "further": ()})
        everything = self.scratch.profile.finetune.model_copy(update=ALL)
        self.scratch.profile = self.scratch.profile.model_copy(update={"finetune": everything, "pretrain": untrained})
        private = self.study.private
        self.train, self.test = private.split("train"), private.split("test")
        self.latents, self.held_out = self.study.latents(self.train, private), self.study.latents(self.test, private)
        self.before = held_out_loss(self.study.denoiser(self.study.pretrained), self.held_out, self.test)

    def key(self, point: Point) -> str:
        """Tells the very training, so that what is known of another isn't taken for it."""
        owner = self.scratch if point.start == "from scratch" else self.study
        told: list[Any] = [
            asdict(point) | {"epsilon": str(point.epsilon)},
            owner.profile.finetune.model_dump(mode="json"),
        ]
        if point.start == CONVERGED:
            told += [owner.profile.pretrain.cycle(1).model_dump(mode="json"), STEPS, ENOUGH, N_VALIDATION]
        needs = [owner.start.key, self.study.private.key]
        return hashlib.sha256(json.dumps([*told, *needs]).encode()).hexdigest()[:12]

    def changes(self, point: Point, again: bool = False) -> np.ndarray:
        """By how much the loss x 1000 of each test patient (n,) changes."""
        if point == Point(point.epsilon) and not again:  # the study's own model
            return self._change(self.study.denoiser(self.study.finetuned(point.epsilon)))
        owner = self.scratch if point.start == "from scratch" else self.study
        settings, model = owner.profile.finetune, owner.denoiser(owner.pretrained)
        plan = settings.plan(float(point.epsilon), settings.delta, point.patients)
        folder = owner.runs / "sweep" / (self.key(point) + ("-again" if again else ""))
        if again:
            shutil.rmtree(folder, ignore_errors=True)
        if point.start == CONVERGED:
            return self._change(self._converge(model, folder))
        randomness = Randomness(point.seed, simulated=True, run=folder.name)
        given = plan, settings, randomness, folder, "phantom_public", *owner.load_public()
        train, latents = self.many if point.patients > EVERYBODY else (self.train, self.latents)
        finetune(model, train[: point.patients], latents, *given)
        return self._change(model)

    def _converge(self, model: Denoiser, folder: Path) -> Denoiser:
        """Train all weights until validation patients gain hardly more; goes on with the cycles that `folder` holds."""
        train, private = self._cohort(name="phantom_open", role="public").split("train"), self.study.private
        everybody = private.split("validation")
        validation = everybody[:N_VALIDATION]
        held_out = self.study.latents(everybody, private)[: validation.offsets[-1]]
        losses = [held_out_loss(model, held_out, validation).mean()]
        settings = self.study.profile.pretrain.cycle(1)
        folder.mkdir(parents=True, exist_ok=True)
        while len(losses) < 3 or losses[-2] - losses[-1] > ENOUGH * (losses[0] - losses[-1]):
            number = len(losses)
            halved = {"steps": STEPS, "learning_rate": settings.learning_rate / 2 ** (number - 1)}
            state = folder / f"cycle-{number}.pt"
            pretrain(train, self.latents, model, settings.model_copy(update=halved), number, state)
            losses.append(held_out_loss(model, held_out, validation).mean())
        return model

    @cached_property
    def many(self) -> tuple[Patients, Latents]:
        """Other patients of the private population, more than the cohort has, and their latents."""
        reader = self.study.parameters.manifest("private").model_dump()["reader"]
        splits = {"train": MANY, "validation": 8, "test": 8}
        cohort = self._cohort(name="phantom_many", reader=reader | {"seed": reader["seed"] + 1}, splits=splits)
        train = cohort.split("train")
        return train, self.study.latents(train, cohort)

    def _cohort(self, **changes: object) -> Cohort:
        """A cohort of the private one's simulated population, but for what of its manifest changes."""
        manifest = Manifest.model_validate(self.study.parameters.manifest("private").model_dump() | changes)
        return prepare(manifest, store=self.study.runs / "cohorts", on_demand=True)

    def _change(self, model: Denoiser) -> np.ndarray:
        return 1000 * (held_out_loss(model.eval(), self.held_out, self.test) - self.before)


def row(point: Point, key: str, changes: np.ndarray) -> dict[str, Any]:
    """A point's row: its worth with an interval over patients, and all of them, to 1e-3."""
    worth = mean(changes, resamples=1000, seed=0)
    told = asdict(point) | {"epsilon": f"{point.epsilon:g}", "run": key, "change": worth.value}
    return told | {
        "low": worth.low,
        "high": worth.high,
        "n_patients": len(changes),
        "changes": changes.round(3).tolist(),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Seeds together, arm by arm: mean changes, and what part they are of two that are bought without privacy.

    Of pre-trained models, closed_no_noise is the part of what the recipe teaches without noise, and closed_all that of
    what all weights learn until they converge, both from all patients. Intervals are over patients and seeds: patients
    are drawn once for both of a comparison, seeds for each of them, but for the one that is no comparison.
    """
    changes: dict[Point, np.ndarray] = {}
    for told in rows:
        kind = Point(float(told["epsilon"]), 0, told["start"], told["patients"])
        changes[kind] = np.vstack([*changes.get(kind, []), told["changes"]])
    bounds = {"no_noise": Point(math.inf), "all": Point(math.inf, start=CONVERGED)}
    references = {name: changes[kind] for name, kind in bounds.items() if kind in changes}
    found = {}
    for kind, own in changes.items():
        against = {} if kind.start == "from scratch" else references
        rng, n, drawn = np.random.default_rng(0), own.shape[1], list[dict[str, float]]()
        for _ in range(1000):
            patients, seeds = rng.integers(n, size=n), rng.integers(len(own), size=len(own))
            change = own[seeds][:, patients].mean()
            others = {
                name: change if most is own else most[rng.integers(len(most), size=len(most))][:, patients].mean()
                for name, most in against.items()
            }
            drawn.append(compared(change, others))
        about = {"start": kind.start, "epsilon": f"{kind.epsilon:g}", "patients": kind.patients, "seeds": len(own)}
        for name, value in compared(own.mean(), {name: most.mean() for name, most in against.items()}).items():
            low, high = np.percentile([one[name] for one in drawn], [2.5, 97.5])
            about |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
        found[kind] = about
    arms: dict[str, Callable[[Point], bool]] = {
        "budgets": lambda kind: kind.start == "pre-trained" and kind.patients == EVERYBODY,
        "cohorts": lambda kind: kind.start == "pre-trained" and kind.epsilon in (1, 10),
        "from_scratch": lambda kind: kind.start == "from scratch",
        "converged": lambda kind: kind.start == CONVERGED,
    }
    ordered = sorted(found, key=lambda kind: (kind.epsilon, kind.patients))
    return {arm: [found[kind] for kind in ordered if belongs(kind)] for arm, belongs in arms.items()}


def compared(change: float, others: dict[str, float]) -> dict[str, float]:
    """A change, what it is less others, and what part of them in per cent."""
    less = {f"less_{name}": change - other for name, other in others.items()}
    return {"change": change} | less | {f"closed_{name}": 100 * change / other for name, other in others.items()}


def main() -> None:
    """Run what is missing; results/tradeoff.json is kept after each point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=len(GRID))
    parser.add_argument("--again", action="store_true")
    asked, path, sweep = parser.parse_args(), RESULTS / "tradeoff.json", Sweep()
    kept = json.loads(path.read_text()) if path.exists() else {"rows": [], "again": []}
    known = {told["run"]: told for told in kept["rows"]}
    rows = {point: known[key] for point in GRID if (key := sweep.key(point)) in known}
    again = [told for told in kept["again"] if told["run"] in known]
    left = [point for point in GRID if point not in rows][: asked.points]
    for point in tqdm(left, desc="sweep", unit="point"):
        rows[point] = row(point, sweep.key(point), sweep.changes(point))
        ordered = [rows[one] for one in GRID if one in rows]
        keep("tradeoff", rows=ordered, **summary(ordered), again=again)
    for point in (point for point in AGAIN if asked.again and point in rows):
        first, second = rows[point], row(point, sweep.key(point), sweep.changes(point, again=True))
        again = [one for one in again if one["run"] != first["run"]]
        again.append({name: first[name] for name in ("epsilon", "patients", "run", "change", "low", "high")})
        again[-1] |= {"change_again": second["change"]}
        ordered = [rows[one] for one in GRID if one in rows]
        keep("tradeoff", rows=ordered, **summary(ordered), again=again)


if __name__ == "__main__":
    main()
