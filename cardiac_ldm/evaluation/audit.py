"""Audits: the least that a mechanism and a whole private training spend, shown by canaries; no private patient's loss.

The positive controls state too little: a tenth of the noise, or none in the loop.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cardiac_ldm.cohort import Patients
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import Ledger, Randomness
from cardiac_ldm.privacy.bounds import BOUNDS
from cardiac_ldm.privacy.canaries import draw_canaries, ledger_scores, weights_scores, with_canaries
from cardiac_ldm.training.finetune import FinetuneSettings, learning
from cardiac_ldm.training.pretrain import Latents
from cardiac_ldm.training.private import train_privately
from cardiac_ldm.training.subspace import Directions, SubspaceLoss

_PLACES, _KNOWN, _STEPS = 600, 16, 8


def audit_mechanism(ledger: Ledger, seed: int) -> dict[str, Any]:
    """What canaries show of the mechanism of a ledger, and of the same with a tenth of its noise; touches no patient.

    Raises:
        ParameterError: no private patient trained the model.
    """
    noises = (1.0, 0.1) if math.isfinite(ledger.epsilon) else (1.0,)
    scores = {noise: ledger_scores(ledger, seed, noise=noise) for noise in noises}
    rows = [row for noise, found in scores.items() for row in _shown(noise, *found, ledger.delta)]
    return {"delta": ledger.delta, "n_canaries": len(scores[1.0][0]), "rows": rows}


def audit_training(
    denoiser: Denoiser,
    patients: Patients,
    latents: np.ndarray | Latents,
    epsilon: float,
    recipe: FinetuneSettings,
    randomness: Randomness,
    folder: Path,
    directions: Directions | None = None,
) -> dict[str, Any]:
    """The same through a private training, from end to end: most places are canaries', an attacker reads final weights.

    Args:
        denoiser: where training starts; left as it is.
        patients: simulated or public, of whom the first 16 take part with their real loss.
        latents: of the volumes of those at least.
        randomness: whose seed everything comes from.
        folder: for what the training leaves, which is removed.
        directions: along which all weights learn, where a subspace is tuned; then canaries are at most as many.
    """
    known, rows = min(_KNOWN, len(patients)), []
    start = {name: weight.clone() for name, weight in denoiser.state_dict().items()}
    places = _PLACES if directions is None else min(_PLACES, known + len(directions))
    cohort = patients.subset(np.arange(places) % len(patients))  # whoever is last makes room for canaries
    settings = recipe.model_copy(update={"steps": _STEPS, "expected_batch": places // 2})
    plan = settings.plan(epsilon, settings.delta, places)
    for noise in (1.0, 0.0) if math.isfinite(epsilon) else (0.0,):
        own = Randomness(randomness.seed, simulated=True, run=f"{randomness.run}-{noise}")
        denoiser.load_state_dict(start)
        tuned, loss = learning(denoiser, cohort, latents, plan, settings, directions)
        weights = list(tuned.values())
        before = [weight.detach().clone() for weight in weights]
        included, signs = draw_canaries(places - known, weights, np.random.default_rng(randomness.seed))
        words = {"private_data": "canaries", "public_data": "canaries"}
        ledger = plan.ledger(own, stage="denoiser", tuned=settings.tuned, **words)
        run = replace(plan, noise_multiplier=noise * plan.noise_multiplier)
        of_unit = loss.alone if isinstance(loss, SubspaceLoss) else loss
        with_them = with_canaries(of_unit, included, signs, plan, weights)
        where = cohort, folder / f"noise-{noise}"
        train_privately(tuned, with_them, run, settings, own, ledger, *where, optimiser=settings.optimiser)
        shutil.rmtree(folder / f"noise-{noise}")
        scores = weights_scores(before, [weight.detach() for weight in weights], signs)
        rows += _shown(noise, scores, included, plan.delta)
    return {"delta": plan.delta, "n_canaries": places - known, "n_patients": known, "rows": rows}


def _shown(noise: float, scores: np.ndarray, included: np.ndarray, delta: float) -> list[dict[str, Any]]:
    """A row a bound: what it shows, and what it would if every canary was found."""
    return [
        {"noise": noise, "bound": name, "shown": bound(scores, included, delta)}
        | {"at_most": bound(included.astype(float), included, delta)}
        for name, bound in BOUNDS.items()
    ]
