"""Fine-tune a pre-trained denoiser on private patients: every step is one private gradient of a plan, nothing else."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import repeat
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from tqdm.auto import tqdm

from cardiac_ldm.cohort import Patients
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.diffusion import ScheduleName, drop_attributes, schedule
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness
from cardiac_ldm.training.checkpoint import load_state, save_state, save_weights, update_average
from cardiac_ldm.training.pretrain import random_loss


class FinetuneSettings(BaseModel):
    """The private recipe: all of it is public, none of it is chosen on private patients."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    expected_batch: int
    clip: float
    draws: int
    delta: float
    learning_rate: float
    attribute_dropout: float
    average_decay: float
    tuned: Literal["all", "attention"]

    def plan(self, epsilon: float, n_patients: int) -> PrivatePlan:
        """The plan that spends `epsilon` on a cohort of `n_patients`."""
        return PrivatePlan.for_budget(
            epsilon,
            self.delta,
            n_patients=n_patients,
            expected_batch=self.expected_batch,
            steps=self.steps,
            clip=self.clip,
            draws=self.draws,
        )


def finetune(
    model: Denoiser,
    patients: Patients,
    latents: np.ndarray,
    plan: PrivatePlan,
    settings: FinetuneSettings,
    name: ScheduleName,
    randomness: Randomness,
    folder: Path,
    public_data: str,
) -> Ledger:
    """Run a plan on private patients; leaves `weights.safetensors` and `privacy.json` in `folder`.

    The ledger of the whole plan is on disk before the first step. After each step the state is saved; a killed run goes
    on from there, and a step whose update was never saved was never seen. No loss, norm or count of the private
    patients is kept or shown.

    Args:
        model: the pre-trained denoiser; changed in place.
        latents: (n_volumes, c, d, h, w) of the patients' volumes.
        public_data: what the pre-training used, for the ledger.

    Raises:
        ParameterError: the plan is for another number of patients, or `folder` holds another plan's state.
    """
    if len(patients) != plan.n_patients:
        raise ParameterError(f"{patients.name}: has {len(patients)} patients, the plan is for {plan.n_patients}")
    tunable = model.requires_grad_(False).tunable(settings.tuned)
    parameters = [p.requires_grad_(True) for p in tunable.values()]
    average = {key: p.detach().clone() for key, p in tunable.items()}
    optimiser = torch.optim.Adam(parameters, settings.learning_rate)
    noising, attributes = schedule(name), torch.from_numpy(patients.attributes)
    volumes = [np.flatnonzero(patients.owners == patient) for patient in range(len(patients))]

    ledger = plan.ledger(
        randomness, tuned=settings.tuned, private_data=f"{patients.name} ({patients.split})", public_data=public_data
    )
    folder.mkdir(parents=True, exist_ok=True)
    state, done = folder / "state.pt", 0
    if saved := load_state(state):
        if saved["ledger"] != ledger.model_dump_json():
            raise ParameterError(f"{state}: was left by a run with other settings; delete {folder} to start afresh")
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        average, done = saved["average"], saved["step"]
    ledger.save(folder / "privacy.json")

    def patient_loss(patient: int, generator: torch.Generator) -> Tensor:
        own, rows = volumes[patient], max(plan.draws, 2 // len(volumes[patient]))
        given = drop_attributes(attributes[own], settings.attribute_dropout, generator)
        return random_loss(
            model,
            noising,
            repeat(torch.from_numpy(latents[own]), "v ... -> (v k) ...", k=rows),
            repeat(given, "v n -> (v k) n", k=rows),
            generator,
        ).mean()

    for step in tqdm(range(done, plan.steps), initial=done, total=plan.steps, desc="finetune", unit="step"):
        for parameter, gradient in zip(
            parameters, plan.gradient(step, parameters, patient_loss, randomness), strict=True
        ):
            parameter.grad = gradient
        optimiser.step()
        update_average(average, tunable, step, settings.average_decay)
        save_state(
            state,
            step=step + 1,
            model=model.state_dict(),
            optimiser=optimiser.state_dict(),
            average=average,
            ledger=ledger.model_dump_json(),
        )
    model.load_state_dict(average, strict=False)
    save_weights(model.eval(), folder / "weights.safetensors")
    state.unlink(missing_ok=True)
    return ledger
