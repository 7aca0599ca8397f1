"""The ledger: what a model's training spent, bound to its weights and recomputed whenever it is read."""

import hashlib
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.privacy import accounting
from cardiac_ldm.privacy.accounting import AGREEMENT, Mechanism, Stated, terms_of


class Standing(Stated):
    """What all private runs on the same patients spent together: the most that any one patient has, at one delta."""

    runs: int
    epsilon: float
    delta: float


class Ledger(Stated):
    """`privacy.json`: what a model's training spent, in the terms of NIST SP 800-226 and arXiv 2303.00654.

    together: of real patients, what their record said when this run began, itself included. run: its identity there.
    weights: SHA-256 of each file of weights that it speaks of, by name.
    """

    guarantee: Literal["patient-level DP", "none", "public data only"]
    adjacency: str
    n_units: int
    epsilon: float
    delta: float
    epsilon_pld: float
    epsilon_rdp: float
    mechanisms: tuple[Mechanism, ...]
    randomness: str
    simulated: bool = False
    private_data: str
    public_data: str
    version: str
    date: str
    run: str = ""
    together: Standing | None = None
    weights: dict[str, str] = Field(default={})
    sampler: str = "Poisson over units, independent in every step"
    accountant: str = "PRV (opacus), checked with PLD (dp-accounting)"
    released: str = "final weights and their exponential moving average; no loss, norm, count or example"

    @classmethod
    def state(
        cls,
        mechanisms: tuple[Mechanism, ...],
        n_units: int,
        budget: float | None,
        delta: float,
        **words: Any,  # noqa: ANN401
    ) -> "Ledger":
        """What `mechanisms` spend together on the same `n_units` places for patients.

        With a budget, the budget is stated: what is spent is a little less. words: randomness, simulated (else the
        patients are real), private_data, public_data.

        Raises:
            PrivacyError: more than `budget` is spent, or the two accountants disagree by more than 1.5 %.
        """
        terms = terms_of(mechanisms)
        stated = check = renyi = math.inf if mechanisms else 0.0
        if terms and all(sigma > 0 for sigma, _, _ in terms):
            check, renyi = accounting.epsilon_pld(terms, delta), accounting.epsilon_rdp(terms, delta)
            claim = accounting.epsilon_prv(terms, delta, check)
            check = accounting.epsilon_held(terms, delta, claim)
            if abs(claim - check) > AGREEMENT * min(claim, check):
                raise PrivacyError(f"epsilon: PRV says {claim:.4f} and PLD {check:.4f}: they disagree, so no claim")
            if budget is not None and claim > (1 + AGREEMENT) * budget:
                raise PrivacyError(f"epsilon: {claim:.4f} would be spent, above the budget of {budget}; no claim")
            stated = max(claim, check, budget or 0.0)
        return cls(
            guarantee=_guarantee(stated, mechanisms),
            adjacency="zero-out: one patient with all volumes, or an empty place instead; "
            f"there are {n_units} places, fixed and public",
            n_units=n_units,
            epsilon=stated,
            delta=delta,
            epsilon_pld=check,
            epsilon_rdp=renyi,
            mechanisms=mechanisms,
            version=version("cardiac-ldm"),
            date=datetime.now(UTC).date().isoformat(),
            **words,
        )

    @classmethod
    def compose(cls, ledgers: Sequence["Ledger"]) -> Standing:
        """What models that learnt from the same private patients spent together, at the smallest of their deltas.

        Raises:
            PrivacyError: they are about other patients: then there is no joint claim.
        """
        delta = min(ledger.delta for ledger in ledgers)
        if len(met := {ledger.private_data for ledger in ledgers}) > 1:
            raise PrivacyError(f"private_data: {' and '.join(sorted(met))}: these ledgers don't compose")
        terms = accounting.merged(m for ledger in ledgers for m in ledger.mechanisms)
        return Standing(runs=len(ledgers), epsilon=accounting.epsilon_pld(terms, delta), delta=delta)

    def same_run(self, other: "Ledger") -> bool:
        """Whether both state one plan for the same patients; other libraries calibrate the noise a little otherwise."""
        fields = {"n_units", "delta", "randomness", "simulated", "private_data", "public_data"}
        any_noise, both = {"noise_multiplier": 0.0}, (self, other)
        plans = [(x.model_dump(include=fields), [m.model_copy(update=any_noise) for m in x.mechanisms]) for x in both]
        noise = [[x.epsilon, *(m.noise_multiplier for m in x.mechanisms)] for x in both]
        return plans[0] == plans[1] and all(map(partial(math.isclose, rel_tol=1e-3), *noise))

    def bound(self, *weights: Path) -> "Ledger":
        """This ledger, of these files of weights, or of what will have these names with the suffix .safetensors."""
        digests = {path.with_suffix(".safetensors").name: _digest(path) for path in weights}
        return self.model_copy(update={"weights": digests})

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
        """Read a ledger; what it states is computed anew from its mechanisms, and the weights beside it are hashed.

        Raises:
            PrivacyError: there is none, it states less than its mechanisms spend (by more than 1.5 %), or the weights
                beside it are not those that it was written for: then nothing is known of what they reveal.
        """
        if not path.exists():
            raise PrivacyError(f"{path}: no ledger beside the weights, so nobody knows what they reveal; retrain")
        try:
            ledger = cls.model_validate_json(path.read_text())
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            raise PrivacyError(f"{path}: {field} is missing or wrong; restore the ledger that this run left") from error
        terms, spent = accounting.merged(ledger.mechanisms), math.inf if ledger.mechanisms else 0.0
        if terms and all(sigma > 0 for sigma, _, _ in terms):
            spent = accounting.epsilon_held(terms, ledger.delta, ledger.epsilon, 1e-3)
        fine = {
            "epsilon": ledger.epsilon >= (1 - AGREEMENT) * spent,
            "simulated": not (ledger.simulated and ledger.run),
            "guarantee": ledger.guarantee == _guarantee(spent, ledger.mechanisms),
            "n_units": all(math.isclose(m.sampling_rate * ledger.n_units, m.expected_batch) for m in ledger.mechanisms),
        }
        fine |= {x.name: ledger.weights.get(x.name) == _digest(x) for x in path.parent.glob("*.safetensors")}
        if wrong := [name for name, holds in fine.items() if not holds]:
            raise PrivacyError(f"{path}: {wrong[0]} isn't what it was written for; restore what this run left")
        return ledger


def _guarantee(epsilon: float, mechanisms: tuple[Mechanism, ...]) -> Any:  # noqa: ANN401
    return "patient-level DP" if mechanisms and math.isfinite(epsilon) else "none" if mechanisms else "public data only"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def public_ledger(public_data: str) -> Ledger:
    """The ledger of a model that never met a private patient."""
    words = {"randomness": "none", "private_data": "none", "public_data": public_data}
    return Ledger.state((), 0, None, 0.0, **words)
