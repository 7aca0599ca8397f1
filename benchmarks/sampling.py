"""How few steps a sampler needs: `python -m benchmarks.sampling [--patients N]`.

The `laptop` profile's public model (the one that is shipped) draws both volumes of public validation patients, so
nothing is chosen on a test split: by ancestral sampling (DDPM) over all T = 150 steps, by DDIM, by DPM-Solver++(2M),
and by its form that adds noise in every step (SDE). All start from the same noise. Every few patients are drawn by each
sampler in turn, so that whatever else the machine does falls on all of them alike; what was drawn is kept with the time
it took, so a killed run resumes. The distance from the patients' volumes stands beside DDPM's on the same half-samples.
Most of an hour on one core.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler
from torch import Tensor
from tqdm import tqdm

from benchmarks import keep
from benchmarks.acdc import RUNS
from cardiac_ldm.cohort import Patients, Volumes
from cardiac_ldm.evaluation.control import agreement, phase_accuracy, read_anatomy
from cardiac_ldm.evaluation.features import N_SLICES, slice_features
from cardiac_ldm.evaluation.fidelity import frechet_distance
from cardiac_ldm.evaluation.intervals import Estimate, bootstrap, half_samples, rows_of
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.models.diffusion import SCHEDULES, TIMESTEPS, Diffusion, Sampler, sample_ddim
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.study import Study

GUIDANCE = 1.0
TOGETHER = 4
"""Patients whom a sampler draws before the next one does."""


@torch.no_grad()
def sample_ddpm(
    model: Diffusion,
    noise: Tensor,
    attributes: Tensor,
    guidance: float,
    steps: int,
    callback: Callable[[], object] | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239) over all T steps: latents (b, c, d, h, w) from `noise`.

    The noise of its steps is torch's own.
    """
    x, sampler = noise, DDPMScheduler(TIMESTEPS, clip_sample=False, **SCHEDULES[model.schedule])
    for t in range(steps - 1, -1, -1):
        x, _ = sampler.step(model.guided(x, t, attributes, guidance), t, x)
        if callback:
            callback()
    return x


@torch.no_grad()
def sample_dpm_solver(
    model: Diffusion,
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
    x = noise
    timesteps = torch.linspace(TIMESTEPS, 0, steps + 1)[:-1].round().long() - 1
    alphas_cumprod = model.alphas_cumprod[timesteps].to(x.device)
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    h = (alpha / sigma).log().diff()
    a = torch.ones_like(h) if generator is None else torch.exp(-h)
    seen: list[Tensor] = []
    for i, t in enumerate(timesteps.tolist()):
        prediction = model.guided(x, t, attributes, guidance)
        clean = (x - sigma[i] * prediction) / alpha[i] if model.predicts_noise else alpha[i] * x - sigma[i] * prediction
        seen.append(clean)
        if i + 1 < steps:
            d = seen[i] if i == 0 else seen[i] + h[i] / (2 * h[i - 1]) * (seen[i] - seen[i - 1])
            x = sigma[i + 1] / sigma[i] * a[i] * x + alpha[i + 1] * (1 - a[i] * torch.exp(-h[i])) * d
            if generator:
                fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
                x += sigma[i + 1] * (1 - a[i] ** 2).sqrt() * fresh
        if callback:
            callback()
    return seen[-1]


class Timed:
    """A sampler, and the core seconds that it has taken."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.core_seconds = sampler, 0.0

    def __call__(self, *arguments: object) -> Tensor:
        """Sample."""
        start = time.process_time()
        latents = self.sampler(*arguments)  # type: ignore[arg-type]
        self.core_seconds += time.process_time() - start
        return latents


BASELINE = f"DDPM, {TIMESTEPS} steps"
SAMPLERS: dict[str, tuple[Sampler, int]] = {BASELINE: (sample_ddpm, TIMESTEPS)}
SAMPLERS |= {f"DDIM, {steps} steps": (sample_ddim, steps) for steps in (8, 15, 20)}
SAMPLERS |= {f"DPM-Solver++(2M), {steps} steps": (sample_dpm_solver, steps) for steps in (8, 15, 20)}
ANEW = partial(sample_dpm_solver, generator=torch.default_generator)
SAMPLERS |= {f"SDE-DPM-Solver++(2M), {steps} steps": (ANEW, steps) for steps in (15, 20)}


def draw(study: Study, patients: Patients) -> dict[str, tuple[np.ndarray, list[float]]]:
    """By sampler, volumes (n, 13, 96, 96), drawn now or before, and each part's core seconds a volume of sampling."""
    drawing = partial(
        synthesise,
        study.load_autoencoder(),
        study.denoiser(study.pretrained),
        guidance=GUIDANCE,
        seed=0,
        batch=2 * TOGETHER,
    )
    said = f"{study.pretrained.key} {study.autoencoder.key} {patients.path.name} {GUIDANCE}"
    folder = RUNS / "sampling" / hashlib.sha256(said.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, tuple[list[np.ndarray], list[float]]] = {name: ([], []) for name in SAMPLERS}
    parts = [np.flatnonzero(patients.patient_index // TOGETHER == i) for i in range(-(-len(patients) // TOGETHER))]
    for i, rows in enumerate(tqdm(parts, desc="parts")):
        for name, (sampler, steps) in SAMPLERS.items():
            stem = f"{name.replace(', ', '-').replace(' ', '-')}-{i}-{len(rows)}"
            volumes, took = folder / f"{stem}.npz", folder / f"{stem}.json"
            if not took.exists():
                torch.manual_seed(i)
                timed = Timed(sampler)
                drawing(patients.attributes[rows], patients.patient_index[rows], steps=steps, sampler=timed).save(
                    volumes
                )
                took.write_text(json.dumps(timed.core_seconds / len(rows)))
            drawn[name][0].append(Volumes.load(volumes).images)
            drawn[name][1].append(json.loads(took.read_text()))
    return {name: (np.concatenate(volumes), seconds) for name, (volumes, seconds) in drawn.items()}


def main() -> None:
    """Draw, read and compare; keep one row a sampler."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--patients", type=int, default=50, help="of the validation split; 50 unless told")
    study = Study(Parameters(profile="laptop"))
    patients = study.public.split("validation")[: arguments.parse_args().patients]
    settings, n = study.profile.evaluation, len(patients)
    drawn, rows_by_patient = draw(study, patients), rows_of(np.repeat(patients.patient_index, N_SLICES))
    real = slice_features(patients.images(np.arange(len(patients.patient_index))))
    features = {name: slice_features(volumes) for name, (volumes, _) in drawn.items()}

    def distance(name: str, some: np.ndarray, others: np.ndarray) -> float:
        ours, theirs = (np.concatenate([rows_by_patient[p] for p in part]) for part in (some, others))
        return frechet_distance(features[name][ours], real[theirs])

    def in_halves(statistic: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
        pairs = settings.half_sample_pairs
        return half_samples(statistic, n, n, n // 2, pairs=pairs, seed=0)

    def over_ddpm(name: str, some: np.ndarray, others: np.ndarray) -> float:
        return distance(name, some, others) / distance(BASELINE, some, others)

    rows = []
    for name, (volumes, seconds) in drawn.items():
        cohort = Volumes(name, volumes, patients.attributes, patients.patient_index)
        anatomy = read_anatomy(cohort, *study.anatomy_networks)
        (volume, n_known), (phase, n_phased) = agreement(anatomy, "LVEDV"), phase_accuracy(anatomy)
        ratios = np.divide(seconds, drawn[BASELINE][1])
        found = {
            "FD-EffNet": in_halves(partial(distance, name)),
            "FD-EffNet over DDPM's": in_halves(partial(over_ddpm, name)),
            "correlation LVEDV": bootstrap(volume["correlation"], n_known, resamples=settings.resamples, seed=0),
            "phase accuracy": bootstrap(phase, n_phased, resamples=settings.resamples, seed=0),
        }
        about = {"sampler": name, "steps": SAMPLERS[name][1], "core_seconds_a_volume": float(np.mean(seconds))}
        about |= {"time_over_ddpm": float(np.median(ratios)), "of_parts": [float(ratios.min()), float(ratios.max())]}
        rows.append(about | {metric: asdict(estimate) for metric, estimate in found.items()})
    keep("sampling", run=study.pretrained.key, guidance=GUIDANCE, validation_patients=n, rows=rows)


if __name__ == "__main__":
    main()
