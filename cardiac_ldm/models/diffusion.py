"""Diffusion in latent space: the two schedules, the loss and the sampler (MONAI's schedulers do the arithmetic)."""

from collections.abc import Callable
from typing import Literal

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

ScheduleName = Literal["paper", "modern"]

SCHEDULES: dict[str, dict[str, object]] = {
    # Daum et al., arXiv 2407.16405: T = 150, linear betas 1e-4 .. 7e-2, noise prediction
    "paper": {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 7e-2, "prediction_type": "epsilon"},
    # Salimans and Ho, arXiv 2202.00512 (velocity); Nichol and Dhariwal, arXiv 2102.09672 (cosine)
    "modern": {"schedule": "cosine", "prediction_type": "v_prediction"},
}
TIMESTEPS = 150


class Diffusion(nn.Module):
    """A network that predicts, together with the schedule of T = 150 steps on which it does: its loss and guidance.

    Its `forward` takes noisy latents x_t (b, c, d, h, w), timesteps (b,) and attributes (b, n), and predicts the noise
    or, where `predicts_noise` is false, the velocity v = sqrt(alpha_t) noise - sqrt(1 - alpha_t) x_0. The schedule is
    no part of the weights.
    """

    def __init__(self, schedule: ScheduleName) -> None:
        super().__init__()
        self.schedule = schedule
        with torch.device("cpu"):  # also where the network is built without memory
            self._noising = DDPMScheduler(TIMESTEPS, clip_sample=False, **SCHEDULES[schedule])
        self.predicts_noise = self._noising.prediction_type == "epsilon"

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) the variance that is left of the data at each timestep."""
        return self._noising.alphas_cumprod

    def loss(self, latents: Tensor, attributes: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Squared error of the prediction, one value a row.

        Args:
            latents, noise: (b, c, d, h, w); attributes: (b, n); timesteps: (b,) integers below T.

        Returns:
            (b,) mean over a row of |target - model(x_t, t, a)|^2.
        """
        noisy = self._noising.add_noise(latents, noise, timesteps)
        target = noise if self.predicts_noise else self._noising.get_velocity(latents, noise, timesteps)
        return (self(noisy, timesteps, attributes).float() - target).square().flatten(1).mean(1)

    def min_snr_weight(self, timesteps: Tensor, ceiling: float) -> Tensor:
        """Weights (b,) of the loss at timesteps (b,): min(SNR, ceiling) / SNR of an error of noise.

        Of an error of velocity it's min(SNR, ceiling) / (SNR + 1) (Hang et al., arXiv 2303.09556).
        """
        alpha = self.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alpha / (1 - alpha)
        return snr.clamp(max=ceiling) / (snr if self.predicts_noise else snr + 1)

    def guided(self, x: Tensor, t: int, attributes: Tensor, guidance: float) -> Tensor:
        """(1 + g) * conditional - g * unconditional prediction of x (b, c, d, h, w); one forward pass when g is 0."""
        timesteps = torch.full((len(x),), t, device=x.device)
        if guidance == 0:
            return self(x, timesteps, attributes)
        unknown = torch.full_like(attributes, torch.nan)
        both = self(torch.cat([x, x]), torch.cat([timesteps, timesteps]), torch.cat([attributes, unknown]))
        conditional, unconditional = both.chunk(2)
        return (1 + guidance) * conditional - guidance * unconditional


Sampler = Callable[[Diffusion, Tensor, Tensor, float, int, Callable[[], object] | None], Tensor]
"""Model, noise, attributes, guidance, steps and callback to latents: `sample_ddim` and those like it."""


def drop_attributes(attributes: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Hide all attributes (b, n) of a share `rate` of the rows, for classifier-free guidance (arXiv 2207.12598)."""
    hidden = torch.rand(len(attributes), 1, generator=generator) < rate
    return attributes.masked_fill(hidden, torch.nan)


@torch.no_grad()
def sample_ddim(
    model: Diffusion,
    noise: Tensor,
    attributes: Tensor,
    guidance: float,
    steps: int,
    callback: Callable[[], object] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al., arXiv 2010.02502) in `steps` steps that end at T - 1: latents from `noise`."""
    offset = TIMESTEPS // steps - 1
    sampler = DDIMScheduler(TIMESTEPS, clip_sample=False, steps_offset=offset, **SCHEDULES[model.schedule])
    sampler.set_timesteps(steps)
    x = noise
    for t in sampler.timesteps.tolist():
        x, _ = sampler.step(model.guided(x, t, attributes, guidance), t, x)
        if callback:
            callback()
    return x
