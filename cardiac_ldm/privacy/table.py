"""A private table of attributes: what the private patients' population looks like, under the guarantee of their models.

A row is a patient, whatever volumes they have. Two Gaussian mechanisms, each of which sees every patient once, measure
a fixed workload: moments of every attribute, then products of pairs of normal scores. Densities that match the first
and a Gaussian copula of the second are a table, of which any number of patients is drawn. Both start from the public
patients' table and leave it as far as what was measured stands out of its noise. Ranges, bins, moments and bounds are
fixed and public: nothing of them is learnt from a private patient.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize
from scipy.special import logsumexp, ndtr, ndtri

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, Patients, require_public
from cardiac_ldm.cohort.requests import with_end_systole
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy.accounting import Mechanism, calibrate, require_reachable
from cardiac_ldm.privacy.budget import require_charged
from cardiac_ldm.privacy.dpsgd import Randomness, gaussian
from cardiac_ldm.privacy.ledger import Ledger

FREE = ("LVEDV", "LVEF", "RVEDV", "RVEF", "MYOESTHICK", "MYOEDTHICK", "AGE", "SEX", "BMI", "ANGLE", "DEPTH")
"""What a row holds. End-systolic volumes follow from these, so that they're below end-diastolic ones; ESED is no
patient's but a volume's."""
SHARE = 0.1
"""The part of a release's epsilon that its table gets, unless told otherwise."""
FILE = "table.safetensors"

_FREE = [ATTRIBUTE_NAMES.index(name) for name in FREE]
_LOW, _HIGH = (np.array([getattr(ATTRIBUTES[i], side) for i in _FREE], float) for side in ("low", "high"))
_LEVELS = {"SEX": 2, "DEPTH": 10}
"""Attributes that take whole values; the others' ranges are cut into `_BINS`."""
_BINS, _MOMENTS = 64, 8
_PAIRS = np.triu_indices(len(FREE), 1)
_MARGINAL_NORM, _PAIR_NORM = 2.8, 8.0
"""A patient's answers are scaled down to these norms, where they are above."""
_DOUBT, _MISSING_SPREAD, _PAIR_SPREAD = 3.0, 0.3, 0.3
"""How far private densities, missing shares and correlations are thought to be from public ones. The first, and the
norms, were chosen on `phantom_rehearsal`."""


def rows_of(patients: Patients) -> np.ndarray:
    """One row a patient, float64 (n, 11) in the order of FREE: means over their volumes, NaN where none has a value."""
    values, known = patients.attributes[:, _FREE].astype(float), np.zeros((len(patients), len(FREE)))
    total, there = np.zeros_like(known), ~np.isnan(values)
    np.add.at(known, patients.patient_index, there)
    np.add.at(total, patients.patient_index, np.where(there, values, 0.0))
    return np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)


@dataclass(frozen=True)
class Table:
    """A population: of each of the 11 attributes of FREE its density and how often it's missing, and their copula.

    densities: float64 (11, 64), each row sums to 1; attributes of fewer levels use the first. missing: (11,).
    correlation: (11, 11), of the normal scores.
    """

    densities: np.ndarray
    missing: np.ndarray
    correlation: np.ndarray

    @classmethod
    def of_public(cls, public: Patients) -> "Table":
        """The table of public patients. Raises PrivacyError for others."""
        require_public(public, "their attributes, without noise")
        return fit(rows_of(public))

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draw patients: float32 (n, 14) in the order of ATTRIBUTES, NaN where missing, and for ESED always.

        Everything lies in the public ranges. End-systolic volumes are what ejection fractions leave of end-diastolic
        ones, within their own range; ejection fractions are then those of the volumes.
        """
        scores = ndtr(rng.multivariate_normal(np.zeros(len(FREE)), self.correlation, n, method="eigh"))
        within, gone = rng.random(scores.shape), rng.random(scores.shape) < self.missing
        drawn = np.full((n, len(ATTRIBUTES)), np.nan)
        for j, name in enumerate(FREE):
            cumulated = np.cumsum(self.densities[j])
            levels = np.minimum(np.searchsorted(cumulated / cumulated[-1], scores[:, j]), _n_levels(name) - 1)
            place = levels / (_LEVELS[name] - 1) if name in _LEVELS else (levels + within[:, j]) / _BINS
            drawn[:, _FREE[j]] = np.where(gone[:, j], np.nan, _LOW[j] + place * (_HIGH[j] - _LOW[j]))
        return with_end_systole(drawn)

    def save(self, path: Path) -> None:
        """Write as safetensors, synced before it replaces another."""
        temporary = path.with_suffix(".tmp")
        save_file({name: np.ascontiguousarray(value) for name, value in vars(self).items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def load(cls, folder: Path) -> "Table":
        """The table in a folder; it must have its ledger, and be what that was written for. Raises PrivacyError."""
        Ledger.load(folder / "privacy.json")
        return cls(**load_file(folder / FILE))


@dataclass(frozen=True)
class TablePlan:
    """All that is public about a private table; `for_budget` finds the noise multiplier. Patients are arguments.

    n_patients: N, the manifest's places. An infinite epsilon is the table without noise, to compare with.
    """

    n_patients: int
    epsilon: float
    delta: float
    noise_multiplier: float

    @classmethod
    def for_budget(cls, epsilon: float, delta: float, n_patients: int) -> "TablePlan":
        """The plan that spends (epsilon, delta) and no more.

        Raises:
            ParameterError: a setting is out of its range; the message names it.
        """
        _require_sensible(epsilon, delta, n_patients)
        sigma = 0.0 if math.isinf(epsilon) else calibrate(epsilon, delta, 1.0, 2)
        return cls(n_patients, epsilon, delta, sigma)

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Two measurements of everybody, composed: as two steps whose batch is all places."""
        everybody = {"sampling_rate": 1.0, "expected_batch": self.n_patients, "clip": 1.0, "draws": 1}
        described = {"stage": "attributes", "tuned": "table", "noise_multiplier": self.noise_multiplier, "steps": 2}
        return (Mechanism.model_validate(described | everybody),)

    def ledger(self, randomness: Randomness, *, private_data: str, public_data: str) -> Ledger:
        """What the whole plan spends; written before anything is measured."""
        return Ledger.state(
            self.mechanisms,
            self.n_patients,
            self.epsilon,
            self.delta,
            randomness=str(randomness),
            simulated=randomness.simulated,
            private_data=private_data,
            public_data=public_data,
            sampler="none: every place takes part in both measurements",
            released="the fitted table, from which attributes are drawn; no count, mean or row",
        )

    def measure(self, rows: np.ndarray, public: np.ndarray, randomness: Randomness) -> Table:
        """The table of `rows`, float64 (n, 11), one a patient; `public` are those of public patients.

        Raises:
            PrivacyError: there are more rows than places: somebody has two, or the ledger is for fewer patients.
        """
        if len(rows) > self.n_patients:
            raise PrivacyError(
                f"rows: there are more of them than the {self.n_patients} places that the ledger accounts for; give "
                "one row a patient"
            )

        def noisy(step: int, answers: np.ndarray, norm: float) -> np.ndarray:
            """The sum of each patient's answers, none of which has more than `norm`, with noise: `norm` times sigma."""
            own = np.linalg.norm(answers, axis=1, keepdims=True)
            total = (answers * np.minimum(1.0, norm * (1 - 2**-20) / np.maximum(own, 1e-12))).sum(axis=0)
            if self.noise_multiplier == 0:
                return total
            return total + gaussian(len(total), norm * self.noise_multiplier, randomness.generator(step, 1))

        return fit(rows, noisy, self.noise_multiplier, self.n_patients, fit(public))


@dataclass(frozen=True)
class TableRecipe:
    """A budget's table, as the record asks for it: see `spending`."""

    delta: float

    def check(self, epsilon: float, cohort: str, n_patients: int, secret: bool) -> None:
        """Find, before anything is prepared, what would stop the table of a budget.

        Raises:
            PrivacyError: real patients wouldn't be protected.
            ParameterError: a setting is out of its range.
        """
        if secret and math.isinf(epsilon):
            raise PrivacyError(f"epsilon: inf on {cohort} would reveal real private patients; give a finite one")
        _require_sensible(epsilon, self.delta, n_patients)

    def plan(self, epsilon: float, places: int) -> TablePlan:
        """The plan of a budget."""
        return TablePlan.for_budget(epsilon, self.delta, places)

    def mechanisms(self, epsilon: float, places: int) -> tuple[Mechanism, ...]:
        """What it spends."""
        return self.plan(epsilon, places).mechanisms


def _require_sensible(epsilon: float, delta: float, n_patients: int) -> None:
    """Raise ParameterError where no table can be measured with so much, before it's planned, which takes seconds."""
    if not 0 < delta < 1 / max(n_patients, 1):
        raise ParameterError(f"delta: {delta} must lie between 0 and 1/N = 1/{n_patients}")
    require_reachable(epsilon, delta, 1.0, 2)


def tabulate(
    patients: Patients, public: Patients, plan: TablePlan, randomness: Randomness, folder: Path, public_data: str
) -> Ledger:
    """Measure a plan on private patients; leaves `table.safetensors` and `privacy.json` in `folder`.

    A folder with its table is read, not measured again: that would spend the budget twice. One with its ledger alone
    was charged, and nobody has seen what it measured: it's gone on with.

    Raises:
        PrivacyError: the public patients aren't, the folder's ledger isn't of this table, or real patients weren't
            charged for it.
        ParameterError: `folder` holds another plan's, or the plan is for another number of patients.
    """
    require_public(public, "their attributes, without noise")
    if patients.places != plan.n_patients:
        raise ParameterError(f"n_patients: {plan.n_patients}, but {patients.name} has {patients.places} places")
    path, table, unbound = (folder / name for name in ("privacy.json", FILE, "table.unbound"))
    ledger = plan.ledger(randomness, private_data=f"{patients.name} ({patients.split})", public_data=public_data)
    if path.exists():
        known = Ledger.load(path)
        if not known.same_run(ledger):
            raise ParameterError(f"{path}: was left by a run with other settings; give this one its own folder")
        ledger = known if table.exists() else known.bound()
        plan = replace(plan, noise_multiplier=ledger.mechanisms[0].noise_multiplier)
    if not table.exists():
        require_charged(patients, randomness, ledger)
        ledger.save(path)
        plan.measure(rows_of(patients), rows_of(public), randomness).save(unbound)
        ledger = ledger.bound(unbound)
        ledger.save(path)
        unbound.replace(table)
    return ledger


def composed(ledgers: Sequence[Ledger], epsilon: float) -> Ledger:
    """The ledger of a release: all mechanisms of its table's and its model's ledgers, within a budget of `epsilon`.

    A public model's has none, and adds its weights.

    Raises:
        PrivacyError: together they spend more, or are of other patients.
    """
    private = [ledger for ledger in ledgers if ledger.mechanisms]
    if len(ledgers) == 1 or not private:
        return ledgers[-1]
    first = private[0]
    if len({(ledger.private_data, ledger.n_units, ledger.delta) for ledger in private}) > 1:
        raise PrivacyError(f"{first.private_data}: table and model are of other patients or deltas; they don't compose")
    shared = {name: getattr(first, name) for name in ("randomness", "simulated", "private_data", "public_data")}
    mechanisms = tuple(m for ledger in private for m in ledger.mechanisms)
    both = Ledger.state(mechanisms, first.n_units, epsilon, first.delta, **shared)
    weights = {name: digest for ledger in ledgers for name, digest in ledger.weights.items()}
    said = {
        name: "; ".join(f"{ledger.mechanisms[-1].stage}: {getattr(ledger, name)}" for ledger in private)
        for name in ("sampler", "released")
    }
    runs = " ".join(ledger.run for ledger in private).strip()
    return both.model_copy(update=said | {"weights": weights, "run": runs, "date": max(x.date for x in private)})


Noisy = Callable[[int, np.ndarray, float], np.ndarray]


def _exactly(step: int, answers: np.ndarray, norm: float) -> np.ndarray:
    return answers.sum(axis=0)


def fit(
    rows: np.ndarray,
    noisy: Noisy = _exactly,
    noise_multiplier: float = 0.0,
    places: int | None = None,
    prior: Table | None = None,
) -> Table:
    """The table of rows (n, 11), which enter through sums alone that `noisy` gives: of public ones exact.

    prior: the table to start from; else flat densities without correlations.
    """
    places, prior = places or len(rows), prior or _flat()
    levels, there = _levels(rows), ~np.isnan(rows)
    # first measurement: who is there, whose values are missing, and moments of those that aren't
    parts = [np.ones((len(rows), 1)), ~there]
    parts += [_moments(name)[levels[:, j]] * there[:, j, None] for j, name in enumerate(FREE)]
    answers = noisy(0, np.concatenate(parts, axis=1, dtype=float), _MARGINAL_NORM)
    noise = _MARGINAL_NORM * noise_multiplier
    n = min(float(_between(answers[0], noise**2, places, (0.1 * places) ** 2)), places)
    spread = (noise / n) ** 2 + 1e-9
    missing = np.array(
        [_share(share / n, spread, of_public) for share, of_public in zip(answers[1:12], prior.missing, strict=True)]
    )
    densities, rest = np.zeros((len(FREE), _BINS)), answers[12:]
    for j, name in enumerate(FREE):
        moments, present = _moments(name), max(n * (1 - missing[j]), 1.0)
        own, rest = rest[: moments.shape[1]] / present, rest[moments.shape[1] :]
        weights = moments.max(axis=0) ** 2
        errors = (noise / present) ** 2 + weights / (2 * present)
        densities[j, : len(moments)] = _tilted(prior.densities[j, : len(moments)], moments, own, errors)
    # second measurement: products of pairs of the scores that these densities give
    scores, explained = _normal_scores(densities)
    values = np.where(there, np.take_along_axis(scores, levels.T, axis=1).T, 0.0)
    products = noisy(1, values[:, _PAIRS[0]] * values[:, _PAIRS[1]], _PAIR_NORM)
    counted = n * np.outer(explained * (1 - missing), explained * (1 - missing))[_PAIRS]
    counted = np.maximum(counted, 1.0)
    errors = (_PAIR_NORM * noise_multiplier / counted) ** 2 + 1 / counted
    pairs = _between(products / counted, errors, prior.correlation[_PAIRS], _PAIR_SPREAD**2)
    return Table(densities, missing, _nearest_correlation(pairs))


def _flat() -> Table:
    densities = np.zeros((len(FREE), _BINS))
    for j, name in enumerate(FREE):
        densities[j, : _n_levels(name)] = 1 / _n_levels(name)
    return Table(densities, np.zeros(len(FREE)), np.eye(len(FREE)))


def _n_levels(name: str) -> int:
    return _LEVELS.get(name, _BINS)


def _levels(rows: np.ndarray) -> np.ndarray:
    """The bin of every value, int64 (n, 11); a value beyond its range is in the last one, and a missing one in 0."""
    place = np.nan_to_num(np.clip((rows - _LOW) / (_HIGH - _LOW), 0, 1))
    n = np.array([_n_levels(name) for name in FREE])
    whole = np.array([name in _LEVELS for name in FREE])
    return np.where(whole, np.rint(place * (n - 1)), np.minimum(np.floor(place * n), n - 1)).astype(np.int64)


def _moments(name: str) -> np.ndarray:
    """cos(pi k u) / k over an attribute's bins, (n_levels, moments): k = 1 alone tells two levels apart.

    The weights 1 / k bound a patient's norm however many moments there are; smooth densities need the high ones least.
    """
    n = _n_levels(name)
    places = np.arange(n) / (n - 1) if name in _LEVELS else (np.arange(n) + 0.5) / n
    k = np.arange(1, min(_MOMENTS, n - 1) + 1)
    return np.cos(np.pi * np.outer(places, k)) / k


def _tilted(prior: np.ndarray, moments: np.ndarray, measured: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The density p that minimises (E_p[moments] - measured)^2 / 2 errors + KL(p, prior).

    It's prior * exp(moments @ tilt) / Z: maximum entropy with quadratic slack (Dudik, Phillips and Schapire, JMLR 8,
    2007). Its convex dual is minimised.
    """
    log_prior, slack = np.log(np.maximum(prior, 1e-12)), errors * _DOUBT

    def dual(tilt: np.ndarray) -> tuple[float, np.ndarray]:
        logits = log_prior + moments @ tilt
        density = np.exp(logits - (normaliser := logsumexp(logits)))
        return normaliser - tilt @ measured + tilt**2 @ slack / 2, moments.T @ density - measured + slack * tilt

    tilt = minimize(dual, np.zeros(moments.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    logits = log_prior + moments @ tilt
    return np.exp(logits - logsumexp(logits))


def _normal_scores(densities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of a standard normal variable in every bin, (11, 64), and the deviation of these means, (11,)."""
    edges = np.clip(np.cumsum(np.pad(densities, ((0, 0), (1, 0))), axis=1), 0, 1)
    heights = np.exp(-(ndtri(edges) ** 2) / 2) / math.sqrt(2 * math.pi)
    mass = np.maximum(densities, 1e-9)
    scores = np.clip((heights[:, :-1] - heights[:, 1:]) / mass, -4, 4)
    return scores, np.sqrt((mass * scores**2).sum(axis=1))


def _between(
    measured: np.ndarray | float, error: np.ndarray | float, prior: np.ndarray | float, spread: float
) -> np.ndarray:
    """What is measured and what was thought before, each by its precision (variances: error, spread)."""
    return np.asarray((measured * spread + prior * error) / (error + spread))


def _share(measured: float, error: float, prior: float) -> float:
    """How many are missing: nobody, or all, where noise could have made up the difference to that."""
    share = float(_between(measured, error, prior, _MISSING_SPREAD**2))
    doubt = min(0.5, 3.5 * math.sqrt(error * _MISSING_SPREAD**2 / (error + _MISSING_SPREAD**2)))
    return 0.0 if share < doubt else 1.0 if share > 1 - doubt else share


def _nearest_correlation(pairs: np.ndarray) -> np.ndarray:
    """A correlation matrix near these pairs: negative eigenvalues become small, the diagonal 1."""
    matrix = np.eye(len(FREE))
    matrix[_PAIRS] = np.clip(pairs, -0.99, 0.99)
    matrix = matrix + matrix.T - np.eye(len(FREE))
    values, vectors = np.linalg.eigh(matrix)
    matrix = (vectors * np.maximum(values, 1e-3)) @ vectors.T
    scale = np.sqrt(np.diag(matrix))
    return matrix / np.outer(scale, scale)
