"""Diffusion in latent space: the two schedules, the loss and the samplers (MONAI's schedulers do the arithmetic)."""

from collections.abc import Callable
from typing import Literal

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

ScheduleName = Literal["paper", "modern"]

_SCHEDULES: dict[str, dict[str, object]] = {
    # Daum et al., arXiv 2407.16405: T = 150, linear betas 1e-4 .. 7e-2, noise prediction
    "paper": {"schedule": "linear_beta", "beta_start": 1e-4, "beta_end": 7e-2, "prediction_type": "epsilon"},
    # Salimans and Ho, arXiv 2202.00512 (velocity); Nichol and Dhariwal, arXiv 2102.09672 (cosine)
    "modern": {"schedule": "cosine", "prediction_type": "v_prediction"},
}
TIMESTEPS = 150
Sampler = Callable[[nn.Module, ScheduleName, Tensor, Tensor, float, int, Callable[[], object] | None], Tensor]
"""Model, schedule, noise, attributes, guidance, steps and callback to latents: `sample_ddim` and those like it."""


def schedule(name: ScheduleName) -> DDPMScheduler:
    """The `paper` or the `modern` noise schedule with T = 150 steps."""
    return DDPMScheduler(TIMESTEPS, clip_sample=False, **_SCHEDULES[name])


def drop_attributes(attributes: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Hide all attributes (b, n) of a share `rate` of the rows, for classifier-free guidance (arXiv 2207.12598)."""
    hidden = torch.rand(len(attributes), 1, generator=generator) < rate
    return attributes.masked_fill(hidden, torch.nan)


def diffusion_loss(
    model: nn.Module, noising: DDPMScheduler, latents: Tensor, attributes: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Squared error of the prediction, one value a row.

    Args:
        latents, noise: (b, c, d, h, w); attributes: (b, n); timesteps: (b,) integers below T.

    Returns:
        (b,) mean over a row of |target - model(x_t, t, a)|^2; the target is the noise or, with `v_prediction`,
        v = sqrt(alpha_t) noise - sqrt(1 - alpha_t) x_0.
    """
    noisy = noising.add_noise(latents, noise, timesteps)
    target = noise if noising.prediction_type == "epsilon" else noising.get_velocity(latents, noise, timesteps)
    return (model(noisy, timesteps, attributes).float() - target).square().flatten(1).mean(1)


def min_snr_weight(noising: DDPMScheduler, timesteps: Tensor, ceiling: float) -> Tensor:
    """Weights (b,) of `diffusion_loss` at timesteps (b,): min(SNR, ceiling) / SNR of an error of noise.

    Of an error of velocity it's min(SNR, ceiling) / (SNR + 1) (Hang et al., arXiv 2303.09556).
    """
    kept = noising.alphas_cumprod[timesteps]
    snr = kept / (1 - kept)
    return snr.clamp(max=ceiling) / (snr if noising.prediction_type == "epsilon" else snr + 1)


def _guided(model: nn.Module, x: Tensor, t: Tensor, attributes: Tensor, guidance: float) -> Tensor:
    """(1 + g) * conditional - g * unconditional; one forward pass when g is 0."""
    if guidance == 0:
        return model(x, t, attributes)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([attributes, torch.full_like(attributes, torch.nan)]))
    conditional, unconditional = both.chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


@torch.no_grad()
def sample_ddpm(
    model: nn.Module,
    name: ScheduleName,
    noise: Tensor,
    attributes: Tensor,
    guidance: float,
    generator: torch.Generator,
    callback: Callable[[], object] | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239) over all T steps: latents (b, c, d, h, w) from `noise`."""
    x, sampler = noise, schedule(name)
    for t in range(TIMESTEPS - 1, -1, -1):
        prediction = _guided(model, x, torch.full((len(x),), t), attributes, guidance)
        x, _ = sampler.step(prediction, t, x, generator=generator)
        if callback:
            callback()
    return x


@torch.no_grad()
def sample_ddim(
    model: nn.Module,
    name: ScheduleName,
    noise: Tensor,
    attributes: Tensor,
    guidance: float,
    steps: int,
    callback: Callable[[], object] | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al., arXiv 2010.02502) in `steps` steps that end at T - 1: latents from `noise`."""
    offset = TIMESTEPS // steps - 1
    sampler = DDIMScheduler(TIMESTEPS, clip_sample=False, steps_offset=offset, **_SCHEDULES[name])
    sampler.set_timesteps(steps)
    x = noise
    for t in sampler.timesteps.tolist():
        prediction = _guided(model, x, torch.full((len(x),), t), attributes, guidance)
        x, _ = sampler.step(prediction, t, x)
        if callback:
            callback()
    return x


@torch.no_grad()
def sample_dpm_solver(
    model: nn.Module,
    name: ScheduleName,
    noise: Tensor,
    attributes: Tensor,
    guidance: float,
    steps: int,
    callback: Callable[[], object] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) in `steps` steps: latents from `noise`.

    With lambda = log(alpha / sigma), h_i = lambda_i - lambda_{i-1}, r_i = h_{i-1} / h_i and z ~ N(0, I),

        x_i = (sigma_i / sigma_{i-1}) a x_{i-1} + alpha_i (1 - a e^{-h_i}) D_i + sigma_i (1 - a^2)^{1/2} z,
        D_i = x_theta(x_{i-1}) + (x_theta(x_{i-1}) - x_theta(x_{i-2})) / 2 r_i,

    a = 1 solves the probability flow ODE (algorithm 2) and, where there is a generator, a = e^{-h_i} solves the SDE.
    The first step, which has no x_{i-2}, and the last, whose h is infinite, take D_i = x_theta(x_{i-1}). Timesteps are
    evenly spaced from T - 1 on ("trailing"; Lin et al., arXiv 2305.08891).
    """
    sampler, x = schedule(name), noise
    timesteps = torch.linspace(TIMESTEPS, 0, steps + 1)[:-1].round().long() - 1
    kept = sampler.alphas_cumprod[timesteps]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    h = (alpha / sigma).log().diff()
    a = torch.ones_like(h) if generator is None else torch.exp(-h)
    seen: list[Tensor] = []
    for i, t in enumerate(timesteps.tolist()):
        prediction = _guided(model, x, torch.full((len(x),), t), attributes, guidance)
        of_noise = sampler.prediction_type == "epsilon"
        seen.append((x - sigma[i] * prediction) / alpha[i] if of_noise else alpha[i] * x - sigma[i] * prediction)
        if i + 1 < steps:
            d = seen[i] if i == 0 else seen[i] + h[i] / (2 * h[i - 1]) * (seen[i] - seen[i - 1])
            x = sigma[i + 1] / sigma[i] * a[i] * x + alpha[i + 1] * (1 - a[i] * torch.exp(-h[i])) * d
            if generator:
                x += sigma[i + 1] * (1 - a[i] ** 2).sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if callback:
            callback()
    return seen[-1]
