"""Accounting: the noise that a budget asks for, and the ledger that states what was spent.

Claims come from Opacus' PRV accountant (Gopi et al., arXiv 2106.02848); dp-accounting's privacy loss distributions
(Koskela et al., arXiv 1906.03049) check every one of them with independent code.
"""

import math
import os
from functools import cache
from pathlib import Path
from typing import Literal

import dp_accounting
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant
from pydantic import BaseModel, ConfigDict

from cardiac_ldm.errors import ParameterError, PrivacyError

RELATIVE_TOLERANCE = 0.004
AGREEMENT = 0.015


@cache
def epsilon_prv(noise_multiplier: float, sampling_rate: float, steps: int, delta: float, error: float) -> float:
    """Upper bound on epsilon, at most `2 error` above the truth, of `steps` Poisson-subsampled Gaussian mechanisms."""
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sampling_rate, steps)]
    return float(accountant.get_epsilon(delta, eps_error=error))


@cache
def epsilon_pld(noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """The same epsilon, pessimistic too, from dp-accounting's PLD for adding or removing one unit."""
    accountant = PLDAccountant(value_discretization_interval=1e-3 if steps <= 1000 else 1e-4)
    step = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return float(accountant.compose(step, steps).get_epsilon(delta))


def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier (to 0.4 % of epsilon) whose PRV epsilon is at most `epsilon`, by bisection.

    Raises:
        ParameterError: no multiplier below 10,000 reaches `epsilon`.
    """
    error = min(0.01, RELATIVE_TOLERANCE / 4 * epsilon)
    low, high = 0.0, 1.0
    while (reached := epsilon_prv(high, sampling_rate, steps, delta, error)) > epsilon:
        low, high = high, 2 * high
        if high > 1e4:
            raise ParameterError(f"epsilon: {epsilon} can't be reached in {steps} steps; ask for fewer steps")
    while epsilon - reached > RELATIVE_TOLERANCE * epsilon:
        middle = (low + high) / 2
        spent = epsilon_prv(middle, sampling_rate, steps, delta, error) if middle > 0.2 else math.inf
        if spent > epsilon:
            low = middle
        else:
            high, reached = middle, spent
        if high - low < 1e-4:
            break
    return high


class Ledger(BaseModel):
    """`privacy.json`: what a model's training spent, in the terms of NIST SP 800-226 and arXiv 2303.00654."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    guarantee: Literal["patient-level DP", "none", "public data only"]
    unit: Literal["patient"] = "patient"
    adjacency: str = "add or remove one patient with all volumes; the number of patients is public (the manifest's)"
    epsilon: float
    delta: float
    epsilon_pld: float
    noise_multiplier: float
    sampling_rate: float
    expected_batch: int
    n_patients: int
    steps: int
    clip: float
    draws: int
    sampler: str = "Poisson over patients"
    accountant: str = "PRV (opacus), checked with PLD (dp-accounting)"
    randomness: str
    tuned: str
    private_data: str
    public_data: str
    tuning_runs: str = "none on private data: all settings come from the profile"
    released: str = "final weights and their exponential moving average; no loss, norm, count or example"

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


def public_ledger(public_data: str) -> Ledger:
    """The ledger of a model that never met a private patient."""
    return Ledger(
        guarantee="public data only",
        epsilon=0.0,
        delta=0.0,
        epsilon_pld=0.0,
        noise_multiplier=0.0,
        sampling_rate=0.0,
        expected_batch=0,
        n_patients=0,
        steps=0,
        clip=0.0,
        draws=0,
        sampler="none",
        accountant="none",
        randomness="none",
        tuned="none",
        private_data="none",
        public_data=public_data,
    )
