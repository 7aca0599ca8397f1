"""Which private recipe teaches most at a given budget: `python -m benchmarks.private_recipe` (an hour; resumable).

A second PUBLIC phantom population (`phantom_rehearsal`) plays the private one, so that nothing is chosen on private
patients, simulated or not. Every recipe starts from the quick profile's public model; what it is worth is the change of
the denoising loss on held-out rehearsal patients, patient by patient, with the same timesteps and noise.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tqdm import tqdm

from benchmarks import keep
from cardiac_ldm.evaluation.intervals import bootstrap
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.study import Parameters, PatientLimits, Study
from cardiac_ldm.training.finetune import finetune
from cardiac_ldm.training.pretrain import held_out_loss

PATIENTS = PatientLimits(train=1000, validation=8, test=100)
EVERYWHERE = ((0, 150, 1.0),)
BASE = {
    "steps": 20,
    "expected_batch": 48,
    "average_decay": 0.8,
    "draws": 1,
    "clip": 0.3,
    "clipping": "fixed",
    "timesteps": EVERYWHERE,
    "precision": "fp32",
}


@dataclass(frozen=True)
class Recipe:
    """What differs from the base recipe, and the budget."""

    epsilon: float
    changes: dict[str, object] = field(default_factory=dict)


def grid() -> list[Recipe]:
    """What is tuned at several learning rates first; then one change at a time from the best of these."""
    tuned = [
        Recipe(10, {"tuned": tuned, "learning_rate": rate})
        for tuned, rates in {
            "attention": (1e-3, 3e-3),
            "all": (3e-4, 1e-3, 3e-3),
            "attributes": (3e-3,),
            "lora-4": (1e-3, 3e-3),
        }.items()
        for rate in rates
    ]
    one_at_a_time = [
        {"draws": 4},
        {"clipping": "normalised"},
        {"clip": 0.1},
        {"steps": 10, "expected_batch": 96},
        {"timesteps": ((75, 150, 1.0),)},
        {"average_decay": 0.0},
    ]
    best = {"tuned": "all", "learning_rate": 1e-3}
    single = [Recipe(10, best | change) for change in one_at_a_time]
    budgets = [Recipe(epsilon, best) for epsilon in (1, math.inf)]
    short = best | {"steps": 5, "expected_batch": 16}
    return tuned + single + budgets + [Recipe(10, short | {"precision": p}) for p in ("fp32", "bf16")]


def _mean(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())


def main() -> None:
    """Run what has not been run yet; keep one row a recipe."""
    study = Study(Parameters(cohort_private="phantom_rehearsal"))
    study.profile = study.profile.model_copy(update={"patients": study.profile.patients | {"private": PATIENTS}})
    train, test = study.private.split("train"), study.private.split("test")
    latents, held_out = study.latents(train, study.private), study.latents(test, study.private)
    name = study.profile.denoiser.schedule
    before = held_out_loss(study.denoiser(study.pretrained), name, held_out, test)
    rows = []
    for recipe in tqdm(grid(), desc="recipes"):
        settings = study.profile.finetune.model_copy(update=BASE | recipe.changes)
        described = json.dumps([str(recipe.epsilon), study.private.key, settings.model_dump(mode="json")])
        key = hashlib.sha256(described.encode()).hexdigest()[:12]
        folder = study.runs / "recipes" / f"{study.pretrained.key}-{key}"
        model, plan = study.denoiser(study.pretrained), settings.plan(recipe.epsilon, 1e-5, "patient", len(train))
        finetune(model, train, latents, plan, settings, name, Randomness(0, simulated=True), folder, "phantom_public")
        change = held_out_loss(model.eval(), name, held_out, test) - before
        worth = bootstrap(partial(_mean, change), len(change), resamples=1000, seed=0)
        rows.append(
            {
                "epsilon": str(recipe.epsilon),
                **{key: str(value) for key, value in (BASE | recipe.changes).items()},
                "timesteps": ", ".join(f"{low}–{high}" for low, high, _ in settings.timesteps),
                "noise_multiplier": plan.noise_multiplier,
                "change_milli": 1000 * worth.value,
                "low_milli": 1000 * worth.low,
                "high_milli": 1000 * worth.high,
                "better_patients": float(np.mean(change < 0)),
            }
        )
        print(rows[-1], flush=True)
    keep("private_recipe", public_loss=float(before.mean()), n_patients=len(test), patients=len(train), rows=rows)


if __name__ == "__main__":
    main()
