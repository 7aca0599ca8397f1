"""The private loop: every step is one private gradient of a plan, nothing else; it can be killed at any moment."""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from cardiac_ldm.cohort import Patients
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.device import is_first_process
from cardiac_ldm.privacy import Ledger, Mechanism, PrivatePlan, Randomness
from cardiac_ldm.privacy.accounting import require_reachable, terms_of
from cardiac_ldm.privacy.budget import require_charged
from cardiac_ldm.privacy.dpsgd import UnitGradients, UnitLoss
from cardiac_ldm.progress import tqdm
from cardiac_ldm.settings import Precision, Settings
from cardiac_ldm.training.checkpoint import load_state, save_state, update_average


class PrivateSettings(Settings):
    """The recipe of one private stage: all of it is public, none of it is chosen on private patients.

    expected_batch: patients in a step; all of them, in every step, where the cohort has fewer. precision: of the
    forward pass; gradients, clipping and noise are float32 or better either way.
    """

    steps: int = Field(ge=1)
    expected_batch: int = Field(ge=1)
    clip: float = Field(gt=0, allow_inf_nan=False)
    draws: int = Field(ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    average_decay: float = Field(ge=0, lt=1)
    precision: Precision

    def plan(self, epsilon: float, delta: float, n_patients: int, before: tuple[Mechanism, ...] = ()) -> PrivatePlan:
        """The plan that, after `before`, has spent `epsilon` on `n_patients` places. Warns of a delta above N^-1.1."""
        if delta > (most := n_patients**-1.1):
            warnings.warn(f"delta: {delta:g} is above N^-1.1 = {most:.2g} (N = {n_patients}): give less", stacklevel=2)
        return PrivatePlan.for_budget(epsilon, delta, before=before, **self._terms(n_patients))

    def require_reachable(
        self, epsilon: float, delta: float, n_patients: int, before: tuple[Mechanism, ...] = ()
    ) -> None:
        """Check what `plan` would, but for the search of the noise multiplier, which takes seconds.

        Raises:
            ParameterError: a setting doesn't fit so many patients, or no noise suffices for the budget.
        """
        plan = PrivatePlan(epsilon=epsilon, delta=delta, noise_multiplier=0.0, **self._terms(n_patients))
        require_reachable(epsilon, delta, plan.sampling_rate, self.steps, terms_of(before))

    def _terms(self, n_patients: int) -> dict[str, Any]:
        batch = min(self.expected_batch, n_patients)
        return self.model_dump(include={"steps", "clip", "draws"}) | {"n_patients": n_patients, "expected_batch": batch}


def require_places(patients: Patients, plan: PrivatePlan) -> None:
    """Raise ParameterError where a plan is for another number of patients."""
    if patients.places != plan.n_patients:
        raise ParameterError(f"{patients.name}: has {patients.places} patients, the plan is for {plan.n_patients}")


def train_privately(
    tuned: Mapping[str, nn.Parameter],
    unit_loss: UnitLoss | UnitGradients,
    plan: PrivatePlan,
    settings: PrivateSettings,
    randomness: Randomness,
    ledger: Ledger,
    patients: Patients,
    folder: Path,
    save_every: float = 30.0,
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> None:
    """Run a plan on private patients; leaves the moving average in `tuned`, `privacy.json` and `state.pt` in `folder`.

    Simulated patients' seed gives every run and stage its own batches and noise: what several runs reveal together is
    stated as of independent ones.

    The ledger of the whole plan is on disk before the first step. The state is saved every `save_every` seconds, synced
    before it replaces the last one; a killed run goes on from there. The steps after it are taken again: their
    updates were never written, so nobody has seen them. No loss, norm or count is kept or shown; the progress of a run
    on real patients, whose rate would tell how large batches were, goes to a file.

    Raises:
        PrivacyError: real patients weren't charged for this run, or their noise could be drawn again.
        ParameterError: the plan is for another number of patients, or `folder` holds the state of another run.
    """
    require_charged(patients, randomness, ledger)
    require_places(patients, plan)
    own = f"{randomness.run}/{ledger.mechanisms[-1].stage}/{plan.epsilon}/{settings.model_dump_json()}"
    randomness = Randomness(randomness.seed, simulated=randomness.simulated, run=own)
    parameters = list(tuned.values())
    average = {name: p.detach().clone() for name, p in tuned.items()}
    moves = optimiser(parameters, settings.learning_rate)
    cohort = hashlib.sha256(repr(patients.people).encode()).hexdigest() if patients.secret else patients.path.name
    run = {"ledger": ledger.model_dump_json(), "settings": settings.model_dump_json(), "cohort": cohort}
    run |= {"directions": getattr(unit_loss, "digest", "")}
    state, done = folder / "state.pt", 0
    if saved := load_state(state):
        for what, now in run.items():
            if saved[what] != now:
                other = {"cohort": "patients", "directions": "public directions"}.get(what, "settings")
                raise ParameterError(f"{state}: was left by a run with other {other}; give this one its own folder")
        with torch.no_grad():
            for name, parameter in tuned.items():
                parameter.copy_(saved["tuned"][name])
                average[name].copy_(saved["average"][name])
        moves.load_state_dict(saved["optimiser"])
        done = saved["step"]
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        ledger.save(folder / "privacy.json")

    written = time.monotonic()
    hide = patients.secret and is_first_process()
    with (folder / "progress.txt").open("w") if hide else open(os.devnull, "w") as hidden:  # noqa: PTH123
        shown = tqdm(
            range(done, plan.steps),
            initial=done,
            total=plan.steps,
            desc=f"private {ledger.mechanisms[-1].stage}",
            unit="step",
            file=hidden if patients.secret else None,
            disable=not is_first_process(),
        )
        for step in shown:
            gradient = plan.gradient(step, parameters, unit_loss, randomness)
            for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
            moves.step()
            update_average(average, tuned, step, settings.average_decay)
            if is_first_process() and time.monotonic() - written >= save_every:
                progress = {"step": step + 1, "tuned": dict(tuned), "average": average}
                save_state(state, **progress, **run, optimiser=moves.state_dict())
                written = time.monotonic()
    with torch.no_grad():
        for name, parameter in tuned.items():
            parameter.copy_(average[name])
