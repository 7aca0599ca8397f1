"""Accounting: the noise that a budget asks for, and the ledger that states what was spent.

Claims come from Opacus' PRV accountant (Gopi et al., arXiv 2106.02848); dp-accounting's privacy loss distributions
(Koskela et al., arXiv 1906.03049) check every one of them with independent code. Renyi DP (Mironov, arXiv 1702.07476)
is stated beside them for comparison with older work.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import dp_accounting
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from pydantic import BaseModel, ConfigDict, field_validator
from scipy.optimize import brentq
from scipy.stats import binom, norm

from cardiac_ldm.errors import ParameterError, PrivacyError

Unit = Literal["patient", "volume"]
Terms = tuple[tuple[float, float, int], ...]
"""What accountants need of each mechanism that touched the data: noise multiplier, sampling rate, steps."""

AGREEMENT = 0.015
_PRV_ERROR = 0.002
_INTERVAL = 1e-4
_MOST_NOISE = 1e4


@cache
def epsilon_prv(terms: Terms, delta: float, scale: float) -> float:
    """Upper bound on epsilon of Poisson-subsampled Gaussian mechanisms, composed; at most 0.4 % of `scale` too high."""
    accountant = PRVAccountant()
    accountant.history = list(terms)
    return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR * scale))


@cache
def epsilon_pld(terms: Terms, delta: float, interval: float = _INTERVAL) -> float:
    """The same epsilon, pessimistic too, from dp-accounting's PLD for adding or removing one unit."""
    return _compose(PLDAccountant(value_discretization_interval=interval), terms, delta)


@cache
def epsilon_rdp(terms: Terms, delta: float) -> float:
    """The same epsilon as Renyi DP bounds it: valid, and looser."""
    return _compose(RdpAccountant(orders=[*range(2, 129), 256, 512, 1024]), terms, delta)


def _compose(accountant: PLDAccountant | RdpAccountant, terms: Terms, delta: float) -> float:
    for noise_multiplier, rate, steps in terms:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))


@cache
def epsilon_of_group(terms: Terms, delta: float, size: int) -> float:
    """Epsilon of `size` units together, such as all volumes of a patient where the unit is the volume.

    Each joins a lot on its own, so a step sees Binomial(size, q) of them: a mixture of Gaussians (PLD, dp-accounting).
    """
    total = None
    for noise_multiplier, rate, steps in terms:
        step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
            noise_multiplier,
            sensitivities=range(size + 1),
            sampling_probs=binom.pmf(range(size + 1), size, rate),
            value_discretization_interval=10 * _INTERVAL,
        ).self_compose(steps)
        total = step if total is None else total.compose(step)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP (Dong et al., arXiv 1905.02383): states too little here, so it only starts a search."""

    def excess(epsilon: float) -> float:
        tail = norm.logcdf(-epsilon / mu - mu / 2) + epsilon
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(min(tail, 0.0)) - delta)

    return brentq(excess, 0.0, mu * mu + 20 * mu) if excess(0.0) > 0 else 0.0


def calibrate(epsilon: float, delta: float, rate: float, steps: int, before: Terms = ()) -> float:
    """The noise multiplier of `steps` steps at sampling rate `rate` that, after `before`, spend `epsilon` and no more.

    Raises:
        ParameterError: `before` leaves nothing of the budget, or no multiplier below 10,000 is enough.
    """
    interval = 1e-3 if steps <= 300 else 2e-4  # coarser is safe: PLD rounds up

    def excess(log_sigma: float, measure: Callable[[Terms], float]) -> float:
        return measure((*before, (math.exp(log_sigma), rate, steps))) - epsilon

    def gdp(terms: Terms) -> float:
        return _epsilon_gdp(terms, delta)

    def pld(terms: Terms) -> float:
        return epsilon_pld(terms, delta, interval)

    if before and pld(before) >= epsilon:
        raise ParameterError(f"epsilon: {epsilon} is spent before this stage begins; give the stage before it less")
    require_reachable(epsilon, delta, rate, steps, before)
    lowest, highest = math.log(0.13), math.log(_MOST_NOISE)
    guess = brentq(excess, lowest, highest, args=(gdp,)) if excess(lowest, gdp) > 0 else lowest
    low, high = guess - 0.03, guess + 0.03
    while excess(high, pld) > 0:
        low, high = high, high + 0.1
    while low > lowest and excess(low, pld) < 0:
        low, high = low - 0.1, low
    found = brentq(excess, low, high, args=(pld,), xtol=2e-4) if low > lowest else high
    while excess(found, lambda terms: epsilon_prv(terms, delta, epsilon)) > 0:
        found += 0.0005
    return math.exp(found)


def require_reachable(epsilon: float, delta: float, rate: float, steps: int, before: Terms = ()) -> None:
    """Raise ParameterError where no noise multiplier that `calibrate` tries is enough."""
    if _epsilon_gdp((*before, (_MOST_NOISE, rate, steps)), delta) > epsilon:
        raise ParameterError(f"epsilon: {epsilon} can't be reached in {steps} steps; ask for fewer steps")


def _epsilon_gdp(terms: Terms, delta: float) -> float:
    """Epsilon as the central limit has it (Bu et al., arXiv 1911.11607): near, not safe."""
    return _gaussian_epsilon(math.sqrt(sum(t * q * q * math.expm1(min(s**-2, 60)) for s, q, t in terms)), delta)


def affordable_steps(epsilon: float, delta: float, rate: float, noise_multiplier: float) -> int:
    """The most steps that `epsilon` pays for at this noise multiplier and sampling rate; 0 where not even one."""

    def fits(steps: int) -> bool:
        return epsilon_prv(((noise_multiplier, rate, steps),), delta, epsilon) <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Mechanism(BaseModel):
    """One stage of training on private data: `steps` Poisson-subsampled Gaussian mechanisms."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    stage: str
    tuned: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    expected_batch: int
    clip: float
    clipping: Literal["fixed", "normalised"]
    draws: int


class Ledger(BaseModel):
    """`privacy.json`: what a model's training spent, in the terms of NIST SP 800-226 and arXiv 2303.00654.

    tuning_runs: what a person has stated of earlier runs on these patients; training knows nothing of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    guarantee: Literal["patient-level DP", "volume-level DP", "none", "public data only"]
    unit: Unit
    adjacency: str
    n_units: int
    epsilon: float
    delta: float
    epsilon_pld: float
    epsilon_rdp: float
    epsilon_patient: float
    mechanisms: tuple[Mechanism, ...]
    randomness: str
    private_data: str
    public_data: str
    sampler: str = "Poisson over units, independent in every step"
    accountant: str = "PRV (opacus), checked with PLD (dp-accounting)"
    tuning_runs: str | None = None
    released: str = "final weights and their exponential moving average; no loss, norm, count or example"

    @field_validator("tuning_runs")
    @classmethod
    def _unless_nobody_said_it(cls, said: str | None) -> str | None:
        """Nothing, of ledgers from the time when they said this unasked."""
        return None if said == "none on private data: all settings come from the profile" else said

    @classmethod
    def state(
        cls,
        mechanisms: tuple[Mechanism, ...],
        *,
        unit: Unit,
        n_units: int,
        volumes: int,
        budget: float | None,
        delta: float,
        randomness: str,
        private_data: str,
        public_data: str,
    ) -> "Ledger":
        """What `mechanisms` spend together on the same `n_units` units; `volumes` is the most that a patient gives.

        With a budget, the budget is stated: what is spent is a little less.

        Raises:
            PrivacyError: more than `budget` is spent, or the two accountants disagree by more than 1.5 %.
        """
        terms = terms_of(mechanisms)
        stated = check = renyi = patient = math.inf if mechanisms else 0.0
        if terms and all(sigma > 0 for sigma, _, _ in terms):
            check, renyi = epsilon_pld(terms, delta), epsilon_rdp(terms, delta)
            claim = epsilon_prv(terms, delta, check)
            if abs(claim - check) > AGREEMENT * min(claim, check):
                raise PrivacyError(f"epsilon: PRV says {claim:.4f} and PLD {check:.4f}: they disagree, so no claim")
            if budget is not None and claim > (1 + AGREEMENT) * budget:
                raise PrivacyError(f"epsilon: {claim:.4f} would be spent, above the budget of {budget}; no claim")
            stated = max(claim, check, budget or 0.0)
            patient = stated if unit == "patient" else max(stated, epsilon_of_group(terms, delta, volumes))
        levels: dict[Unit, Literal["patient-level DP", "volume-level DP"]] = {
            "patient": "patient-level DP",
            "volume": "volume-level DP",
        }
        what = levels[unit] if math.isfinite(stated) else "none"
        every = " with all volumes" if unit == "patient" else f" of a patient's {volumes} at most"
        return cls(
            guarantee=what if mechanisms else "public data only",
            unit=unit,
            adjacency=f"add or remove one {unit}{every}; the number of patients is public (the manifest's)",
            n_units=n_units,
            epsilon=stated,
            delta=delta,
            epsilon_pld=check,
            epsilon_rdp=renyi,
            epsilon_patient=patient,
            mechanisms=mechanisms,
            randomness=randomness,
            private_data=private_data,
            public_data=public_data,
        )

    @classmethod
    def compose(cls, ledgers: Sequence["Ledger"]) -> "Ledger":
        """What several models that learnt from the same private patients spent together; each stage counts once.

        Raises:
            PrivacyError: they are about volumes, another cohort or another delta: then there is no joint claim.
        """
        first = ledgers[0]
        if first.unit != "patient":
            raise PrivacyError("unit: volume: what several models reveal together is stated for patients alone")
        for ledger in ledgers:
            for field in ("unit", "n_units", "private_data", "delta"):
                if getattr(ledger, field) != getattr(first, field):
                    raise PrivacyError(
                        f"{field}: {getattr(first, field)} and {getattr(ledger, field)}: these ledgers don't compose"
                    )
        return cls.state(
            tuple(mechanism for ledger in ledgers for mechanism in ledger.mechanisms),
            volumes=1,
            budget=None,
            **first.model_dump(include={"unit", "n_units", "delta", "randomness", "private_data", "public_data"}),
        )

    def save(self, path: Path) -> None:
        """Write atomically, synced to the disk: a ledger must never be behind the weights."""
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.write(self.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Read a ledger.

        Raises:
            PrivacyError: there is none: a model without its ledger is not used for a release.
        """
        if not path.exists():
            raise PrivacyError(
                f"{path}: no ledger beside the weights, so nothing is known of what they reveal; retrain"
            )
        return cls.model_validate_json(path.read_text())


def terms_of(mechanisms: tuple[Mechanism, ...]) -> Terms:
    """The numbers that accountants need of these mechanisms."""
    return tuple((m.noise_multiplier, m.sampling_rate, m.steps) for m in mechanisms)


def public_ledger(public_data: str) -> Ledger:
    """The ledger of a model that never met a private patient."""
    return Ledger.state(
        (),
        unit="patient",
        n_units=0,
        volumes=0,
        budget=None,
        delta=0.0,
        randomness="none",
        private_data="none",
        public_data=public_data,
    )
