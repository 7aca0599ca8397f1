"""Which private recipe teaches most at a given budget: `python -m benchmarks.private_recipe` (an hour; resumable).

A second PUBLIC phantom population of 4,000 patients (`phantom_rehearsal`) plays the private one, so that nothing is
chosen on private patients, simulated or not. Every recipe starts from the `laptop` profile's public model (the one that
is shipped, where it is) or from scratch; what it is worth is the change of the denoising loss on held-out rehearsal
patients, patient by patient, with the same timesteps and noise.

The base recipe takes a third of the profile's private gradients, so a recipe's place among others is measured, not what
the profile reaches.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import keep
from cardiac_ldm.evaluation.intervals import bootstrap
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.study import Parameters, Study
from cardiac_ldm.training.finetune import finetune
from cardiac_ldm.training.pretrain import held_out_loss

BASE = {"tuned": "all", "learning_rate": 1e-3, "steps": 20, "expected_batch": 128, "draws": 1, "average_decay": 0.8}


@dataclass(frozen=True)
class Recipe:
    """The budget, what differs from the base recipe, and whether the model is pre-trained."""

    epsilon: float
    changes: dict[str, object] = field(default_factory=dict)
    pretrained: bool = True


GRID = [
    Recipe(math.inf),
    Recipe(10),
    Recipe(10, {"steps": 40, "expected_batch": 64}),
    Recipe(1),
    Recipe(10, {"learning_rate": 2e-3}),
    Recipe(math.inf, {"steps": 160, "expected_batch": 16, "average_decay": 0.95}),
    Recipe(10, pretrained=False),
    Recipe(10, {"learning_rate": 3e-4}),
    Recipe(1, {"learning_rate": 3e-4}),
    Recipe(10, {"draws": 2, "expected_batch": 64}),
    Recipe(1, {"tuned": "lora-4", "learning_rate": 3e-3}),
    Recipe(10, {"clipping": "normalised"}),
    Recipe(10, {"timesteps": ((30, 150, 1.0),)}),
    Recipe(10, {"tuned": "attention", "learning_rate": 3e-3}),
]


def _mean(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())


def main() -> None:
    """Run what has not been run yet; keep one row a recipe."""
    study = Study(Parameters(profile="laptop", cohort_private="phantom_rehearsal"))
    train, validation = study.private.split("train"), study.private.split("validation")
    latents, held_out = study.latents(train, study.private), study.latents(validation, study.private)
    name = study.profile.denoiser.schedule
    before = held_out_loss(study.denoiser(study.pretrained), name, held_out, validation)
    rows = []
    for recipe in tqdm(GRID, desc="recipes"):
        settings = study.profile.finetune.model_copy(update=BASE | recipe.changes)
        described = json.dumps(
            [str(recipe.epsilon), recipe.pretrained, study.private.key, settings.model_dump(mode="json")]
        )
        key = hashlib.sha256(described.encode()).hexdigest()[:12]
        folder = study.runs / "recipes" / f"{study.pretrained.key}-{key}"
        plan = settings.plan(recipe.epsilon, settings.delta, "patient", len(train))
        torch.manual_seed(0)
        model = study.profile.denoiser.build(latents.shape[1])
        if recipe.pretrained:
            model = study.denoiser(study.pretrained)
        finetune(model, train, latents, plan, settings, name, Randomness(0, simulated=True), folder, "phantom_public")
        change = held_out_loss(model.eval(), name, held_out, validation) - before
        worth = bootstrap(partial(_mean, change), len(change), resamples=1000, seed=0)
        rows.append(
            {
                "epsilon": str(recipe.epsilon),
                "start": "pre-trained" if recipe.pretrained else "from scratch",
                **{key: str(value) for key, value in (BASE | recipe.changes).items()},
                "clipping": settings.clipping,
                "timesteps": ", ".join(f"{low}–{high}" for low, high, _ in settings.timesteps),
                "noise_multiplier": plan.noise_multiplier,
                "change_milli": 1000 * worth.value,
                "low_milli": 1000 * worth.low,
                "high_milli": 1000 * worth.high,
                "better_patients": float(np.mean(change < 0)),
            }
        )
        print(rows[-1], flush=True)
        keep(
            "private_recipe",
            run=study.pretrained.key,
            public_loss=float(before.mean()),
            n_patients=len(validation),
            patients=len(train),
            rows=rows,
        )


if __name__ == "__main__":
    main()
