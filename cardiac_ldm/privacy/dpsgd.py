r"""The mechanism: DP-SGD whose unit is the patient (Abadi et al., arXiv 1607.00133).

One step of a plan with N patients, expected batch B, clip C and noise multiplier sigma computes

    g = 1/B * ( sum over sampled patients of clip_C(grad of the patient's loss) + N(0, sigma^2 C^2 I) )

where every patient is sampled on their own with probability q = B/N (Poisson), a patient's loss is the mean over all
their volumes and K noise draws of each, and clip_C(v) = v min(1, C / |v|). Adding or removing one patient moves the sum
by at most C, whatever their volumes are: that is all that the accountant needs. A plan holds what is public; patients
enter as arguments of its one method. Sampler, divisor, clip and noise can't differ from the accounted ones, because
nothing else draws, divides, clips or adds noise.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy.accounting import AGREEMENT, Ledger, calibrate, epsilon_pld, epsilon_prv


class Randomness:
    """Where sampling and noise come from: the operating system for real patients, a seed for simulated ones only.

    Args:
        seed: None for the operating system's entropy, fresh at every call and stored nowhere.
        simulated: whether the private patients are simulated.

    Raises:
        PrivacyError: a seed is given for real patients: noise that can be reproduced is no noise.
    """

    def __init__(self, seed: int | None, *, simulated: bool) -> None:
        if seed is not None and not simulated:
            raise PrivacyError(f"seed: {seed} would make the noise on real private patients reproducible; leave it out")
        self.seed = seed

    def __str__(self) -> str:
        return "operating system's entropy" if self.seed is None else f"seed {self.seed}: simulated patients only"

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """A generator for one purpose at one step; a seeded one depends on nothing else: a resumed run repeats it."""
        if self.seed is None:
            return torch.Generator().manual_seed(secrets.randbits(63))
        mixed = np.random.SeedSequence([self.seed, step, purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(mixed[0] >> np.uint64(1)))


LOT, NOISE, FIRST_PATIENT = 0, 1, 2
"""Purposes of randomness: who joins, the noise on the sum, and from the last on each patient's own draws."""


@dataclass(frozen=True)
class PrivatePlan:
    """All that is public about a private training run; `for_budget` finds the noise multiplier.

    An infinite epsilon is the non-private run to compare with: same sampler and loop, no clipping and no noise.
    """

    n_patients: int
    expected_batch: int
    steps: int
    clip: float
    draws: int
    epsilon: float
    delta: float
    noise_multiplier: float

    @classmethod
    def for_budget(
        cls, epsilon: float, delta: float, *, n_patients: int, expected_batch: int, steps: int, clip: float, draws: int
    ) -> "PrivatePlan":
        """The plan that spends at most (epsilon, delta).

        Raises:
            ParameterError: a setting is out of its range; the message names it.
        """
        checks = [
            (epsilon > 0, "epsilon", epsilon, "must be above 0 (inf trains without privacy)"),
            (0 < delta < 1 / max(n_patients, 1), "delta", delta, f"must lie between 0 and 1/N = 1/{n_patients}"),
            (0 < expected_batch < n_patients, "expected_batch", expected_batch, f"must be below N = {n_patients}"),
            (steps >= 1, "steps", steps, "must be at least 1"),
            (0 < clip < math.inf, "clip", clip, "must be a positive number"),
            (draws >= 1, "draws", draws, "must be at least 1"),
        ]
        for fine, name, value, rule in checks:
            if not fine:
                raise ParameterError(f"{name}: {value} {rule}")
        private = math.isfinite(epsilon)
        sigma = calibrate(epsilon, delta, expected_batch / n_patients, steps) if private else 0.0
        return cls(n_patients, expected_batch, steps, clip if private else math.inf, draws, epsilon, delta, sigma)

    @property
    def sampling_rate(self) -> float:
        """The probability q = B/N with which each patient joins a lot."""
        return self.expected_batch / self.n_patients

    def ledger(self, randomness: Randomness, *, tuned: str, private_data: str, public_data: str) -> Ledger:
        """What the whole plan spends; written before the first step, so that it never states too little.

        Raises:
            PrivacyError: the two accountants disagree by more than 1.5 %.
        """
        spent, check = math.inf, math.inf
        if math.isfinite(self.epsilon):
            terms = (self.noise_multiplier, self.sampling_rate, self.steps, self.delta)
            check = epsilon_pld(*terms)
            spent = max(check, epsilon_prv(*terms, error=0.001 * self.epsilon))
            if spent > (1 + AGREEMENT) * min(self.epsilon, check):
                raise PrivacyError(f"epsilon: PRV says {spent:.4f}, PLD {check:.4f}, the plan {self.epsilon}; no claim")
        return Ledger(
            guarantee="patient-level DP" if math.isfinite(spent) else "none",
            epsilon=max(spent, self.epsilon),
            delta=self.delta,
            epsilon_pld=check,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            expected_batch=self.expected_batch,
            n_patients=self.n_patients,
            steps=self.steps,
            clip=self.clip,
            draws=self.draws,
            randomness=str(randomness),
            tuned=tuned,
            private_data=private_data,
            public_data=public_data,
        )

    def gradient(
        self,
        step: int,
        parameters: Sequence[Tensor],
        patient_loss: Callable[[int, torch.Generator], Tensor],
        randomness: Randomness,
    ) -> list[Tensor]:
        """The private gradient of one step, one tensor a parameter.

        `patient_loss(patient, generator)` is the scalar mean loss over all of one patient's volumes and noise draws.
        A patient whose gradient is not finite contributes zero. An empty lot gives noise alone. The divisor is the
        expected batch, never the realised one.
        """
        total = [torch.zeros_like(p) for p in parameters]
        for patient in self.sample_lot(randomness.generator(step, LOT)):
            loss = patient_loss(patient, randomness.generator(step, FIRST_PATIENT + patient))
            for sum_, clipped in zip(total, self.clipped(loss, parameters), strict=True):
                sum_ += clipped
        noise = randomness.generator(step, NOISE)
        for sum_ in total:
            if self.noise_multiplier > 0:
                sum_ += self.noise_multiplier * self.clip * torch.randn(sum_.shape, generator=noise)
            sum_ /= self.expected_batch
        return total

    def sample_lot(self, generator: torch.Generator) -> list[int]:
        """Indices of the patients of one lot: each joins on their own with probability q; the lot may be empty."""
        joins = torch.rand(self.n_patients, generator=generator, dtype=torch.float64) < self.sampling_rate
        return joins.nonzero().flatten().tolist()

    def clipped(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of one patient's `loss`, scaled to a norm of at most C; zeros where it is not finite."""
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in gradient]))
        if not torch.isfinite(norm):
            return [torch.zeros_like(p) for p in parameters]
        scale = min(1.0, self.clip / (norm.item() + 1e-12))
        return [scale * g for g in gradient]
