"""Train an autoencoder, KL or VQ, on public patients, and measure the scale of its latents on them."""

import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from cardiac_ldm.cohort import Patients, require_public
from cardiac_ldm.models.autoencoder import Autoencoder, VQAutoencoder
from cardiac_ldm.models.perception import PerceptionEncoder
from cardiac_ldm.training.checkpoint import load_state, save_state


class KLRegularisation(BaseModel):
    """Latents are drawn to the standard normal; `weight` is that of the KL divergence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["kl"]
    weight: float = Field(ge=0)


class VQRegularisation(BaseModel):
    """The decoder sees the nearest of `codes` codes; `weight` is that of the latents' commitment to their codes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["vq"]
    codes: int = Field(ge=2)
    weight: float = Field(ge=0)


class AutoencoderSettings(BaseModel):
    """Architecture and training of the autoencoder; weights of the loss are relative to the L1 term."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latent_channels: int
    channels: tuple[int, ...]
    residual_blocks: int
    stem: int
    steps: int
    volumes: int
    slices: int
    learning_rate: float
    l2: float
    regularisation: Annotated[KLRegularisation | VQRegularisation, Field(discriminator="kind")]
    perceptual: float
    adversarial: float

    def build(self) -> Autoencoder:
        """A fresh autoencoder of the kind that `regularisation` names."""
        size = self.latent_channels, self.channels, self.residual_blocks, self.stem
        if isinstance(self.regularisation, VQRegularisation):
            return VQAutoencoder(*size, self.regularisation.codes)
        return Autoencoder(*size)


def train_autoencoder(
    patients: Patients, settings: AutoencoderSettings, seed: int, state: Path, save_every: float = 30.0
) -> tuple[Autoencoder, list[dict[str, float]]]:
    """Train on `slices` slices of `volumes` random volumes a step; resumes from `state`, which it writes every 30 s.

    Returns:
        The trained autoencoder with the latent scale set, and the losses by step.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "private patients through the autoencoder's weights and the scale of its latents")
    torch.manual_seed(seed)
    model, perception = settings.build(), PerceptionEncoder()
    optimiser = torch.optim.Adam(model.parameters(), settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, settings.steps, pct_start=0.1)
    critic = PatchDiscriminator(spatial_dims=2, channels=32, in_channels=1, num_layers_d=3)
    critic_optimiser = torch.optim.Adam(critic.parameters(), settings.learning_rate)
    judge = PatchAdversarialLoss(criterion="least_squares")
    parts = {
        "model": model,
        "optimiser": optimiser,
        "schedule": schedule,
        "critic": critic,
        "critic_optimiser": critic_optimiser,
    }
    losses: list[dict[str, float]] = []
    if saved := load_state(state):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        losses = saved["losses"]

    written = time.monotonic()
    with tqdm(total=settings.steps, initial=len(losses), desc="autoencoder", unit="step") as bar:
        for step in range(len(losses), settings.steps):
            rng = np.random.default_rng([seed, step])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            slices = _random_slices(patients, settings.volumes, settings.slices, rng)
            drawn, penalty = model.training_pass(slices, generator)
            terms = {
                "l1": functional.l1_loss(drawn, slices),
                "l2": settings.l2 * functional.mse_loss(drawn, slices),
                settings.regularisation.kind: settings.regularisation.weight * penalty,
            }
            if settings.perceptual:
                half = len(slices) // 2  # half of the slices teach as much for half of the cost
                features = perception.perceptual_features(torch.cat([drawn[:half], slices[:half]]))
                pairs = (feature.chunk(2) for feature in features)
                terms["perceptual"] = settings.perceptual * sum(
                    (functional.mse_loss(a, b, reduction="sum") / a[:, 0].numel() for a, b in pairs), torch.zeros(())
                )
            if settings.adversarial:
                critic.requires_grad_(False)
                terms["adversarial"] = settings.adversarial * judge(critic(drawn)[-1], True, for_discriminator=False)
                critic.requires_grad_(True)
            optimiser.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimiser.step()
            schedule.step()
            if settings.adversarial:
                real, fake = critic(slices)[-1], critic(drawn.detach())[-1]
                critic_optimiser.zero_grad()
                (
                    0.5 * (judge(real, True, for_discriminator=True) + judge(fake, False, for_discriminator=True))
                ).backward()
                critic_optimiser.step()
            losses.append({"step": step} | {name: term.item() for name, term in terms.items()})
            bar.update()
            bar.set_postfix(l1=f"{losses[-1]['l1']:.4f}")
            if time.monotonic() - written > save_every:
                save_state(state, losses=losses, **{name: part.state_dict() for name, part in parts.items()})
                written = time.monotonic()
    model.eval()
    _set_latent_scale(model, patients, np.random.default_rng([seed, settings.steps]))
    return model, losses


def _random_slices(patients: Patients, volumes: int, slices: int, rng: np.random.Generator) -> Tensor:
    """(slices, 1, 96, 96) random slices, padding among them, of `volumes` random volumes."""
    chosen = rng.choice(len(patients.owners), min(volumes, len(patients.owners)), replace=False)
    stack = rearrange(torch.from_numpy(patients.images(chosen)), "v d h w -> (v d) 1 h w")
    return stack[torch.from_numpy(rng.choice(len(stack), min(slices, len(stack)), replace=False))]


@torch.no_grad()
def _set_latent_scale(model: Autoencoder, patients: Patients, rng: np.random.Generator) -> None:
    """Standardise latents by the mean and deviation of each channel over 64 public volumes."""
    chosen = rng.choice(len(patients.owners), min(64, len(patients.owners)), replace=False)
    latents = model.encode(torch.from_numpy(patients.images(chosen)))
    model.latent_std.copy_(latents.std(dim=(0, 2, 3, 4)))
    model.latent_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))


@torch.no_grad()
def reconstruct(model: Autoencoder, images: np.ndarray) -> np.ndarray:
    """What is left of float32 volumes (n, 13, 96, 96) after encoding and decoding."""
    batches = torch.from_numpy(images).split(8)
    return torch.cat([model.decode(model.encode(batch)) for batch in tqdm(batches, desc="reconstruct")]).numpy()
