"""Two violations of latent diffusion systems that let one patient change what all others contribute: for showing that.

No stage that trains uses them. Each gives the `batch_loss` that `privacy.canaries.sensitivity` takes.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.nn import functional

from cardiac_ldm.cohort import Patients, require_public
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import PrivatePlan
from cardiac_ldm.privacy.canaries import BatchLoss, sensitivity
from cardiac_ldm.privacy.dpsgd import UnitLoss
from cardiac_ldm.training.pretrain import random_loss

_CRITIC_STEPS, _CRITIC_RATE = 5, 2e-3
_MIDDLE = slice(6, 7)
"""The one slice of a volume that the critic sees: enough to show what it does."""


def sensitivities(
    patients: Patients,
    autoencoder: Autoencoder,
    denoiser: Denoiser,
    clip: float,
) -> pd.DataFrame:
    """How far the last of these patients moves the sum of the others' clipped gradients, by the loss: in clips.

    Columns loss ("the mechanism", and the two violations), added (their scan as it is, or inverted: a guarantee holds
    for any) and sensitivity.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "exact gradients of private patients")
    n, first = len(patients), patients.offsets[:-1]
    autoencoder, denoiser = autoencoder.cpu(), denoiser.cpu()  # eight gradients, summed there
    plan = PrivatePlan(n + 1, 1, 1, clip, 1, 1.0, 1 / (n + 2), noise_multiplier=0.0)
    rows, attributes, weights = [], patients.attributes[first], list(denoiser.parameters())
    for added in ("a usual scan", "an inverted scan"):
        volumes = patients.images(first)
        if added == "an inverted scan":
            volumes[-1] = 1 - volumes[-1]
        with torch.no_grad():
            latents = autoencoder.encode(torch.from_numpy(volumes)).numpy()
        own, scaled = (scaled_by_batch(denoiser, latents, attributes, of_batch) for of_batch in (False, True))
        judged = judged_by_batch(autoencoder, volumes[:, _MIDDLE]), list(autoencoder.decoder_parameters().values())
        losses: dict[str, tuple[BatchLoss, list[nn.Parameter]]] = {
            "the mechanism": (own, weights),
            "latents scaled by the batch": (scaled, weights),
            "a critic that learnt from the batch": judged,
        }
        for loss, (batch_loss, tuned) in losses.items():
            found = sensitivity(plan, tuned, batch_loss, range(n - 1), n - 1)
            rows.append({"loss": loss, "added": added, "sensitivity": found})
    return pd.DataFrame(rows)


def scaled_by_batch(model: Denoiser, latents: np.ndarray, attributes: np.ndarray, of_batch: bool = True) -> BatchLoss:
    """The diffusion loss on latents that are divided by the standard deviation of the batch's own.

    So Rombach et al. (arXiv 2112.10752, appendix G) take it from their first batch. Without `of_lot` the latents stay
    as they are, and the loss is the mechanism's.

    Args:
        latents: (n, c, d, h, w), one volume a patient; attributes: (n, 14).
    """

    def batch_loss(batch: Sequence[int]) -> UnitLoss:
        scale = float(latents[list(batch)].std()) if of_batch else 1.0

        def unit_loss(unit: int, generator: torch.Generator) -> Tensor:
            rows = torch.from_numpy(latents[[unit, unit]]) / scale
            return random_loss(model, rows, torch.from_numpy(attributes[[unit, unit]]), generator).mean()

        return unit_loss

    return batch_loss


def judged_by_batch(model: Autoencoder, volumes: np.ndarray) -> BatchLoss:
    """The L1 and adversarial loss of an autoencoder whose critic has just learnt from the batch, real and drawn.

    Args:
        volumes: (n, d, 96, 96) in [0, 1], one a patient.
    """
    judge = PatchAdversarialLoss(criterion="least_squares")
    real = rearrange(torch.from_numpy(volumes), "n d h w -> n d 1 h w")

    def drawn(unit: int) -> Tensor:
        return model.draw(model.moments(real[unit])[0])

    def batch_loss(batch: Sequence[int]) -> UnitLoss:
        with torch.random.fork_rng(devices=()):  # the critic starts alike for every batch
            torch.manual_seed(0)
            critic = PatchDiscriminator(spatial_dims=2, channels=32, in_channels=1, num_layers_d=3, norm="INSTANCE")
        optimiser = torch.optim.Adam(critic.parameters(), _CRITIC_RATE, betas=(0.0, 0.99))
        with torch.no_grad():
            fakes = torch.cat([drawn(unit) for unit in batch])
        for _ in range(_CRITIC_STEPS):
            on_real = judge(critic(real[list(batch)].flatten(0, 1))[-1], True, for_discriminator=True)
            on_fake = judge(critic(fakes)[-1], False, for_discriminator=True)
            optimiser.zero_grad()
            (on_real + on_fake).backward()
            optimiser.step()
        critic.requires_grad_(False)

        def unit_loss(unit: int, generator: torch.Generator) -> Tensor:
            ours = drawn(unit)
            opinion = judge(critic(ours)[-1], True, for_discriminator=False)
            return functional.l1_loss(ours, real[unit]) + opinion

        return unit_loss

    return batch_loss
