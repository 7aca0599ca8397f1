r"""The mechanism: DP-SGD whose unit is the patient (Abadi et al., arXiv 1607.00133).

One step of a plan with N patients, expected batch B, clip C and noise multiplier sigma computes

    g = 1/B * ( sum over sampled patients of clip_C(grad of the patient's loss) + N(0, sigma^2 C^2 I) )

where each of N places is sampled on its own with probability q = B/N (Poisson), and its patient's loss is the mean over
all their volumes and K noise draws of each. An empty place contributes nothing: to empty one moves the sum by at most C
whatever the volumes were, and that is all that the accountant needs. A plan holds what is public; patients enter as
arguments of its methods. Sampler, divisor, clip and noise can't differ from the accounted ones, because nothing else
draws, divides, clips or adds noise.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from randomgen import ChaCha
from torch import Tensor, distributed

from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy.accounting import Mechanism, calibrate, terms_of
from cardiac_ldm.privacy.ledger import Ledger


class Randomness:
    """Where sampling and noise come from: the ChaCha20 cipher, keyed afresh for every step and purpose.

    The key is the operating system's entropy for real patients, and a hash of a seed for simulated ones only.

    Args:
        seed: None for the operating system's entropy, fresh at every call and stored nowhere.
        simulated: whether the private patients are simulated.
        run: which run and stage it is for: two runs of one seed share no batch and no noise, or they don't compose.

    Raises:
        PrivacyError: a seed is given for real patients: noise that can be reproduced is no noise.
    """

    def __init__(self, seed: int | None, *, simulated: bool, run: str = "") -> None:
        if seed is not None and not simulated:
            raise PrivacyError(f"seed: {seed} would make the noise on real private patients reproducible; leave it out")
        self.seed, self.simulated, self.run = seed, simulated, run

    def __str__(self) -> str:
        origin = "operating system's entropy" if self.seed is None else f"seed {self.seed}: simulated patients only"
        return f"ChaCha20, keyed by the {origin}"

    def generator(self, step: int, purpose: int) -> np.random.Generator:
        """A generator for one purpose at one step; a seeded one depends on nothing else: a resumed run repeats it."""
        if self.seed is None:
            return np.random.Generator(ChaCha(key=secrets.randbits(256)))
        own = self.run if purpose < _FIRST_UNIT else ""
        digest = hashlib.sha256(f"{self.seed}/{step}/{purpose}{own}".encode()).digest()
        return np.random.Generator(ChaCha(key=int.from_bytes(digest, "big")))

    def draws(self, step: int, unit: int) -> torch.Generator:
        """For one unit's timesteps and diffusion noise, whoever else is in the batch; these need not be secret."""
        return torch.Generator().manual_seed(int(self.generator(step, _FIRST_UNIT + unit).integers(2**63)))


UnitLoss = Callable[[int, torch.Generator], Tensor | None]
_BATCH, _NOISE, _FIRST_UNIT = 0, 1, 2
TOGETHER = ("cuda",)
"""Kinds of device on which several patients' gradients are taken at once, where their loss gives them so."""


class UnitGradients(Protocol):
    """What gives several units' gradients at once."""

    def gradients(self, units: Sequence[int], draws: Callable[[int], torch.Generator]) -> Iterator[Tensor]:
        """Unclipped gradients, float32 (n, d) of some units at a time; of an empty place, none."""
        ...


def gaussian(n: int, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """(n,) float64 normal noise that withstands attacks on floating-point numbers.

    Four draws are averaged, so that the low bits of the output give none of them away, and a first one is thrown away
    (Holohan and Braghin, arXiv 2107.10138, as in Opacus' secure mode).
    """
    generator.standard_normal()
    total = generator.standard_normal(n)
    for _ in range(3):
        total += generator.standard_normal(n)
    return total * (deviation / 2)


@contextmanager
def a_core_each(device: torch.device) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` whose calls run side by side, each on one core of a CPU; results come in the order of the arguments."""
    threads = torch.get_num_threads()
    if device.type != "cpu":
        yield map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class PrivatePlan:
    """All that is public about a private training stage; `for_budget` finds the noise multiplier.

    n_patients: N, the manifest's places. expected_batch: B patients. clip: C. draws: K noise draws a volume. before:
    earlier stages on the same patients, which spend from the same budget. An infinite epsilon is the non-private run
    to compare with: same sampler and loop, no clipping and no noise.

    Raises:
        ParameterError: a setting is out of its range; the message names it.
    """

    n_patients: int
    expected_batch: int
    steps: int
    clip: float
    draws: int
    epsilon: float
    delta: float
    noise_multiplier: float
    before: tuple[Mechanism, ...] = ()

    def __post_init__(self) -> None:
        n = self.n_patients
        checks = [
            (self.epsilon > 0, "epsilon", self.epsilon, "must be above 0 (inf trains without privacy)"),
            (0 < self.delta < 1 / max(n, 1), "delta", self.delta, f"must lie between 0 and 1/N = 1/{n}"),
            (0 < self.expected_batch <= n, "expected_batch", self.expected_batch, f"must be 1 to N = {n}"),
            (self.steps >= 1, "steps", self.steps, "must be at least 1"),
            (0 < self.clip < math.inf or self.clip == self.epsilon, "clip", self.clip, "must be a positive number"),
            (self.draws >= 1, "draws", self.draws, "must be at least 1"),
            (self.noise_multiplier >= 0, "noise_multiplier", self.noise_multiplier, "must be at least 0"),
        ]
        for fine, name, value, rule in checks:
            if not fine:
                raise ParameterError(f"{name}: {value} {rule}")

    @classmethod
    def for_budget(
        cls,
        epsilon: float,
        delta: float,
        *,
        n_patients: int,
        expected_batch: int,
        steps: int,
        clip: float,
        draws: int,
        before: tuple[Mechanism, ...] = (),
    ) -> "PrivatePlan":
        """The plan that, with what `before` spent, spends (epsilon, delta) and no more."""
        settings = (n_patients, expected_batch, steps, clip, draws, epsilon, delta)
        plan = cls(*settings, noise_multiplier=0.0, before=before)
        if math.isinf(epsilon):
            return replace(plan, clip=math.inf)
        sigma = calibrate(epsilon, delta, plan.sampling_rate, steps, terms_of(before))
        return replace(plan, noise_multiplier=sigma)

    @property
    def sampling_rate(self) -> float:
        """The probability q with which each joins a batch: the expected batch over all places, whatever its size."""
        return self.expected_batch / self.n_patients

    def mechanisms(self, stage: str, tuned: str) -> tuple[Mechanism, ...]:
        """What came before, and this stage."""
        names = Mechanism.model_fields.keys() - {"stage", "tuned"}
        return (*self.before, Mechanism(stage=stage, tuned=tuned, **{name: getattr(self, name) for name in names}))

    def ledger(self, randomness: Randomness, *, stage: str, tuned: str, private_data: str, public_data: str) -> Ledger:
        """What the whole plan spends; written before the first step, so that it never states too little."""
        data = {"private_data": private_data, "public_data": public_data, "simulated": randomness.simulated}
        if whole := [m.stage for m in self.before if m.sampling_rate == 1]:
            poisson = Ledger.model_fields["sampler"].default
            data["sampler"] = f"{poisson}; {', '.join(whole)}: none, every place takes part"
        return Ledger.state(
            self.mechanisms(stage, tuned), self.n_patients, self.epsilon, self.delta, randomness=str(randomness), **data
        )

    def gradient(
        self,
        step: int,
        parameters: Sequence[Tensor],
        unit_loss: UnitLoss | UnitGradients,
        randomness: Randomness,
    ) -> Tensor:
        """The private gradient of one step: float32 (d,), the parameters' gradients end to end.

        `unit_loss(unit, generator)` is the scalar mean loss over all of one unit's volumes and noise draws, or None for
        a unit without volumes; on a CPU it is called from as many threads as torch uses, one core each, because one
        patient is too little work for several cores. On a GPU, where that is too little too, a loss that has a method
        `gradients(units, draws)` gives those of several, (n, d) a time, and one that has nothing else does everywhere.
        An empty batch gives noise alone. Under
        torch.distributed the first process draws batch and noise, every process takes its share of it, and all get
        the same gradient.

        Raises:
            PrivacyError: `step` is not one of those that the plan accounts for.
        """
        if not 0 <= step < self.steps:
            raise PrivacyError(f"step: {step} is not one of the {self.steps} that the ledger accounts for; no gradient")
        device, several = parameters[0].device, distributed.is_initialized()
        rank, processes = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
        joins = torch.from_numpy(self.sample_batch(randomness.generator(step, _BATCH))).to(device)
        if several:
            distributed.broadcast(joins, 0)
        batch = joins.nonzero().flatten().tolist()[rank::processes]
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=device)

        def of(loss_of: UnitLoss, unit: int) -> Tensor | None:
            loss = loss_of(unit, randomness.draws(step, unit))
            return None if loss is None else self.clipped(loss, parameters)

        at_once = getattr(unit_loss, "gradients", None)
        if at_once and (device.type in TOGETHER or not callable(unit_loss)):
            for gradients in at_once(batch, partial(randomness.draws, step)):
                total += self.clipped_rows(gradients).sum(dim=0, dtype=torch.float64)
        elif callable(unit_loss):
            with a_core_each(device) as spread:
                for gradient in spread(partial(of, unit_loss), batch):
                    if gradient is not None:
                        total += gradient
        if several:
            distributed.reduce(total, 0)
        if rank == 0 and self.noise_multiplier > 0:
            generator = randomness.generator(step, _NOISE)
            for part in total.split(2**20):
                noise = gaussian(len(part), self.noise_multiplier * self.clip, generator)
                part += torch.from_numpy(noise).to(device)
        if several:
            distributed.broadcast(total, 0)
        return (total / self.expected_batch).float()

    def sample_batch(self, generator: np.random.Generator) -> np.ndarray:
        """Bool (n_patients,): each joins the batch on their own with probability q; the batch may be empty."""
        return generator.random(self.n_patients) < self.sampling_rate

    def clipped(self, loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The gradient of one unit's `loss`, float32 (d,), scaled to a norm of at most C; zeros if it is not finite."""
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in parts]).float()
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
        if not math.isfinite(norm):
            return torch.zeros_like(gradient)
        room = self.clip * (1 - 2**-20)  # rounding must not carry the norm above C
        return gradient.div_(max(1.0, norm / room))  # a factor below 1e-38 would lose digits in float32, and C its hold

    def clipped_rows(self, gradients: Tensor) -> Tensor:
        """The same of several units' gradients, float32 (n, d): each row is clipped alone."""
        norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
        excess = (norms / (self.clip * (1 - 2**-20))).clamp(min=1).float()
        return torch.where(norms.isfinite()[:, None], gradients / excess[:, None], 0.0)
