"""Fine-tune on private patients: the pre-trained denoiser and, where the profile says so, the public decoder."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from einops import repeat
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor

from cardiac_ldm.cohort import Patients
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import compute_device, is_first_process
from cardiac_ldm.models.diffusion import TIMESTEPS, drop_attributes
from cardiac_ldm.models.lora import merge_lora
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness
from cardiac_ldm.privacy.accounting import Unit
from cardiac_ldm.privacy.canaries import UnitLoss
from cardiac_ldm.training.autoencoder import blurred_l1
from cardiac_ldm.training.checkpoint import load_weights, save_weights
from cardiac_ldm.training.pretrain import Latents, random_loss
from cardiac_ldm.training.private import PrivateSettings, train_privately


def _sensible(band: tuple[int, int, float]) -> tuple[int, int, float]:
    low, high, weight = band
    if not 0 <= low < high <= TIMESTEPS or not 0 < weight < math.inf:
        raise ValueError(f"must be [low, high, weight] with 0 <= low < high <= {TIMESTEPS} and a weight above 0")
    return band


Band = Annotated[tuple[int, int, float], AfterValidator(_sensible)]


class DecoderSettings(PrivateSettings):
    """The decoder's private stage; `share` is the part of epsilon that it may spend, before the denoiser's stage."""

    share: float = Field(gt=0, lt=1)


class FinetuneSettings(PrivateSettings):
    """The private recipe.

    unit: what the guarantee protects; "volume" only to compare with the paper. timesteps: training timesteps are drawn
    uniformly from [low, high) bands chosen by weight (Ghalebikesabi et al., arXiv 2302.13861). tuned: what of the
    denoiser learns, see `Denoiser.tunable`. decoder: its own stage, which shares the budget, or nothing.
    """

    decoder: DecoderSettings | None
    unit: Unit
    delta: float = Field(gt=0, lt=1)
    attribute_dropout: float = Field(ge=0, le=1)
    timesteps: tuple[Band, ...]
    tuned: str = Field(pattern=r"^(all|attention|attributes|edges|head|lora-[1-9]\d*)$")

    @field_validator("timesteps")
    @classmethod
    def _some(cls, bands: tuple[Band, ...]) -> tuple[Band, ...]:
        if not bands:
            raise ValueError("must hold at least one band [low, high, weight]")
        return bands

    @field_validator("unit")
    @classmethod
    def _decoder_of_patients(cls, unit: Unit, others: ValidationInfo) -> Unit:
        if others.data.get("decoder") and unit != "patient":
            raise ValueError("the decoder's private stage takes whole patients: set unit to patient or decoder to null")
        return unit

    def check(self, epsilon: float, cohort: str, n_patients: int, secret: bool) -> None:
        """Find, before anything is trained, what would stop the private stages of a budget.

        Args:
            secret: whether the cohort's patients are real.

        Raises:
            PrivacyError: real patients wouldn't be protected, or not whole.
            ParameterError: no plan with these settings spends the budget on so many patients.
        """
        if secret and math.isinf(epsilon):
            raise PrivacyError(f"epsilon: inf on {cohort} would reveal real private patients; give a finite one")
        if secret and self.unit != "patient":
            raise PrivacyError(f"unit: {cohort} holds real patients, who are protected whole; set it to patient")
        if self.decoder:
            self.decoder.require_reachable(self.decoder.share * epsilon, self.delta, self.unit, n_patients)
        self.require_reachable(epsilon, self.delta, self.unit, n_patients)


def finetune(
    model: Denoiser,
    patients: Patients,
    latents: np.ndarray | Latents,
    plan: PrivatePlan,
    settings: FinetuneSettings,
    randomness: Randomness,
    folder: Path,
    public_data: str,
    save_every: float = 30.0,
) -> Ledger:
    """Run a plan on private patients; leaves `weights.safetensors` and `privacy.json` in `folder`.

    A folder with the weights of this very plan is read, not trained again: that would spend the budget twice. One with
    its ledger is gone on with, by the noise and the identity that this ledger has.

    Args:
        model: the pre-trained denoiser; changed in place.
        latents: (n_volumes, c, d, h, w) of the patients' volumes.
        public_data: what the pre-training used, for the ledger.

    Raises:
        ParameterError: the plan is for another number of patients, or `folder` holds another run.
    """
    ledger = plan.ledger(
        randomness,
        stage="denoiser",
        tuned=settings.tuned,
        private_data=f"{patients.name} ({patients.split})",
        public_data=public_data,
    )
    plan, ledger = _begun(plan, ledger, folder)
    if _finished(model, folder):
        return ledger
    tuned, unit_loss = denoising(model, patients, latents, plan, settings)
    train_privately(tuned, unit_loss, plan, settings, randomness, ledger, patients, folder, save_every)
    merge_lora(model.cpu())
    return _leave(model, ledger, folder)


def denoising(
    model: Denoiser,
    patients: Patients,
    latents: np.ndarray | Latents,
    plan: PrivatePlan,
    settings: FinetuneSettings,
) -> tuple[dict[str, torch.nn.Parameter], UnitLoss]:
    """What of a denoiser learns, by name, and each unit's loss: the mean over its volumes and the draws of each."""
    offsets = _places(patients, plan)
    device = compute_device()
    tuned, model = model.tunable(settings.tuned), model.to(device)
    attributes = torch.from_numpy(patients.attributes)

    def unit_loss(unit: int, generator: torch.Generator) -> Tensor | None:
        own = plan.volumes_of(unit, offsets)
        if not own:
            return None
        rows = max(plan.draws, 2 // len(own))  # one row alone is slow: PyTorch's Conv3d then takes its fallback
        given = drop_attributes(attributes[own], settings.attribute_dropout, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return random_loss(
                model,
                repeat(torch.from_numpy(latents[own]), "v ... -> (v k) ...", k=rows).to(device),
                repeat(given, "v n -> (v k) n", k=rows).to(device),
                generator,
                settings.timesteps,
            ).mean()

    return tuned, unit_loss


def finetune_decoder(
    model: Autoencoder,
    patients: Patients,
    plan: PrivatePlan,
    settings: DecoderSettings,
    randomness: Randomness,
    folder: Path,
    public_data: str,
    save_every: float = 30.0,
) -> Ledger:
    """Let the public autoencoder's decoder learn how private hearts look; leaves the same files as `finetune`.

    The loss is the mean absolute error of reconstruction, blurred so that the decoder keeps the texture that it has
    learnt to draw; there is no critic, which would learn from private patients outside the clipped gradient. The
    encoder, its codebook and the latent scale stay public, so the latents that the denoiser was pre-trained on stay
    what they were.

    Raises:
        ParameterError: the plan is for another number of patients, or `folder` holds another run.
    """
    ledger = plan.ledger(
        randomness,
        stage="decoder",
        tuned="decoder",
        private_data=f"{patients.name} ({patients.split})",
        public_data=public_data,
    )
    plan, ledger = _begun(plan, ledger, folder)
    if _finished(model, folder):
        return ledger
    offsets = _places(patients, plan)
    device = compute_device()
    model.eval().to(device).requires_grad_(False)
    tuned = model.decoder_parameters()
    for parameter in tuned.values():
        parameter.requires_grad_(True)

    def unit_loss(unit: int, generator: torch.Generator) -> Tensor | None:
        own = plan.volumes_of(unit, offsets)
        if not own:
            return None
        volumes = torch.from_numpy(patients.images(own)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            with torch.no_grad():
                latents = model.encode(volumes)
            noise = torch.randn(volumes.shape, generator=generator).to(device)
            return blurred_l1(model.decode(latents, noise).float(), volumes)

    train_privately(tuned, unit_loss, plan, settings, randomness, ledger, patients, folder, save_every)
    return _leave(model.cpu(), ledger, folder)


def _begun(plan: PrivatePlan, ledger: Ledger, folder: Path) -> tuple[PrivatePlan, Ledger]:
    """The plan and the ledger of the run that `folder` holds, or these where it holds none.

    Raises:
        ParameterError: it's another run's.
    """
    path = folder / "privacy.json"
    if not path.exists():
        return plan, ledger
    known = Ledger.load(path)
    if not known.same_run(ledger):
        raise ParameterError(f"{path}: was left by a run with other settings; give this one its own folder")
    if not (folder / "weights.safetensors").exists():
        known = known.bound()  # it was killed before they got their name
    *before, last = known.mechanisms
    return replace(plan, noise_multiplier=last.noise_multiplier, before=tuple(before)), known


def _finished(model: torch.nn.Module, folder: Path) -> bool:
    """Whether `folder` holds the weights that its ledger is of, which `model` then has."""
    weights = folder / "weights.safetensors"
    if not weights.exists():
        return False
    load_weights(model, weights)
    _tidy(folder)
    return True


def _places(patients: Patients, plan: PrivatePlan) -> np.ndarray:
    """int64 (N + 1,): the offsets of the patients' volumes, and of places that nobody fills."""
    return np.pad(patients.offsets, (0, max(0, plan.n_patients - len(patients))), mode="edge")


def _leave(model: torch.nn.Module, ledger: Ledger, folder: Path) -> Ledger:
    """Bind the ledger to the weights, then save these, then drop what was needed to resume."""
    weights, unbound = folder / "weights.safetensors", folder / "weights.unbound"
    if is_first_process():
        save_weights(model.eval(), unbound)
        ledger = ledger.bound(unbound)
        ledger.save(folder / "privacy.json")
        unbound.replace(weights)
        _tidy(folder)
    return ledger


def _tidy(folder: Path) -> None:
    """Remove what a finished run no longer needs, and what kills left half-written."""
    for name in ("state.pt", "state.tmp", "weights.tmp", "progress.txt"):
        (folder / name).unlink(missing_ok=True)
