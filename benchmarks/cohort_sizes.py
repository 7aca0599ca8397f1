"""What fine-tuning is worth to cohorts of several sizes: `python -m benchmarks.cohort_sizes` (an hour; resumable).

The first patients of a second PUBLIC phantom population (`phantom_rehearsal`) play a private cohort of that size, and
the recipes of `demo` and `laptop` run on them, noise and accounting included. What a recipe is worth is the change of
the denoising loss on held-out rehearsal patients, patient by patient, with the same timesteps and noise; the interval
is over patients, of one run. Where batches are drawn and a training would take more than 2,000 gradients, it draws a
sixth of each batch with a sixth of the noise, as `benchmarks.private_recipe` does: what privacy adds to the mean
gradient is the same, what sampling adds is more. `cardiac_ldm.training.rehearsed` tells it to whoever is about to spend
a budget.
"""

import hashlib
import json
from itertools import product

from tqdm import tqdm

from benchmarks import RESULTS, keep
from benchmarks.private_recipe import part_of
from cardiac_ldm.evaluation.intervals import mean
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.study import Study
from cardiac_ldm.training.finetune import finetune
from cardiac_ldm.training.pretrain import held_out_loss

SIZES, BUDGETS, N_VALIDATION = (80, 400, 4000), (1.0, 10.0), 60


def study_of(profile: str) -> Study:
    """The study whose private cohort is the rehearsal's, with as many patients as the largest size."""
    study = Study(Parameters(profile=profile, cohort_private="phantom_rehearsal"))
    limits = {"train": SIZES[-1], "validation": N_VALIDATION}
    private = study.profile.patients["private"].model_copy(update=limits)
    study.profile = study.profile.model_copy(update={"patients": study.profile.patients | {"private": private}})
    return study


def key_of(study: Study, size: int, epsilon: float) -> str:
    """Tells the very rehearsal: its recipe, model and patients."""
    recipe = study.profile.finetune.model_dump_json()
    described = f"{study.pretrained.key} {study.private.key} {size} {epsilon:g} {recipe}"
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def main() -> None:
    """Rehearse what has not been; results/cohort_sizes.json is kept after each."""
    path = RESULTS / "cohort_sizes.json"
    known = {row["run"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    studies = {profile: study_of(profile) for profile in ("laptop", "demo")}
    grid = {
        key_of(studies[p], size, epsilon): (p, size, epsilon) for size, p, epsilon in product(SIZES, studies, BUDGETS)
    }
    for key in tqdm([key for key in grid if key not in known], desc="rehearsals"):
        profile, size, epsilon = grid[key]
        study = studies[profile]
        train, validation = study.private.split("train"), study.private.split("validation")
        latents, held_out = study.latents(train, study.private), study.latents(validation, study.private)
        settings, model = study.profile.finetune, study.denoiser(study.pretrained)
        before = held_out_loss(model, held_out, validation, draws=4)
        plan = settings.plan(epsilon, settings.delta, size)
        drawn = part_of(plan) if plan.sampling_rate < 1 and plan.steps * plan.expected_batch > 2000 else plan
        folder, randomness = study.runs / "recipes" / key, Randomness(0, simulated=True)
        given = settings, randomness, folder, "phantom_public", *study.load_public()
        finetune(model, train[:size], latents, drawn, *given)
        change = 1000 * (held_out_loss(model.eval(), held_out, validation, draws=4) - before)
        worth = mean(change, resamples=1000, seed=0)
        row = {"profile": profile, "tuned": settings.tuned, "epsilon": epsilon, "places": size, "run": key}
        row |= {"expected_batch": plan.expected_batch, "drawn": drawn.expected_batch}
        row |= {"noise_multiplier": plan.noise_multiplier, "better_patients": float((change < 0).mean())}
        row |= {"change": worth.value, "low": worth.low, "high": worth.high, "n_patients": len(change)}
        known[key] = row | {"recipe": settings.model_dump(mode="json")}
        keep("cohort_sizes", rows=[known[key] for key in grid if key in known])


if __name__ == "__main__":
    main()
