"""Accounting: the noise that a budget asks for, and the epsilon of mechanisms that touched the same patients.

Claims come from Opacus' PRV accountant (Gopi et al., arXiv 2106.02848); dp-accounting's privacy loss distributions
(Koskela et al., arXiv 1906.03049) check every one of them with independent code. Renyi DP (Mironov, arXiv 1702.07476)
is stated beside them for comparison with older work.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from pydantic import BaseModel, ConfigDict
from scipy.optimize import brentq
from scipy.stats import norm

from cardiac_ldm.errors import ParameterError

Terms = tuple[tuple[float, float, int], ...]
"""What accountants need of each mechanism that touched the data: noise multiplier, sampling rate, steps."""

AGREEMENT = 0.015
"""Relative difference that is allowed between two accountants, and between a ledger and its recomputation."""
LEAST, MOST = 0.01, 100.0
"""Below, accountants' grids take all memory; above, a finite epsilon promises nothing that could be said of anybody."""
_PRV_ERROR = 0.002
_MOST_NOISE = 1e4


@cache
def epsilon_prv(terms: Terms, delta: float, scale: float) -> float:
    """Upper bound on epsilon of Poisson-subsampled Gaussian mechanisms, composed; at most 0.4 % of `scale` too high."""
    accountant = PRVAccountant()
    accountant.history = list(terms)
    with np.errstate(divide="ignore"):  # a sampling rate of 1 is meant: its logarithms are infinite, and right
        return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR * max(scale, LEAST)))


def epsilon_pld(terms: Terms, delta: float, interval: float = 1e-4) -> float:
    """The same epsilon, pessimistic too, from dp-accounting's PLD for adding or removing one unit."""
    return _epsilon_pld(terms, delta, interval)


@cache  # which takes an interval that is given for another than the same that isn't
def _epsilon_pld(terms: Terms, delta: float, interval: float) -> float:
    return _compose(PLDAccountant(value_discretization_interval=interval), terms, delta)


def epsilon_held(terms: Terms, delta: float, stated: float, interval: float = 1e-4) -> float:
    """PLD's epsilon to hold against what is stated: of many steps a coarse grid, which rounds up, says far too much.

    So the grid is refined while rounding alone may have lifted it above.
    """
    most = 3 * math.sqrt(sum(steps for *_, steps in terms))
    while stated < (1 - AGREEMENT) * (found := epsilon_pld(terms, delta, interval)) < stated + most * interval:
        if interval < 2e-5:
            break
        interval /= 10
    return found


@cache
def epsilon_rdp(terms: Terms, delta: float) -> float:
    """The same epsilon as Renyi DP bounds it: valid, and looser."""
    return _compose(RdpAccountant(orders=[*range(2, 129), 256, 512, 1024]), terms, delta)


def _compose(accountant: PLDAccountant | RdpAccountant, terms: Terms, delta: float) -> float:
    for noise_multiplier, rate, steps in terms:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP (Dong et al., arXiv 1905.02383): states too little here, so it only starts a search."""

    def excess(epsilon: float) -> float:
        tail = norm.logcdf(-epsilon / mu - mu / 2) + epsilon
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(min(tail, 0.0)) - delta)

    return brentq(excess, 0.0, mu * mu + 20 * mu) if excess(0.0) > 0 else 0.0


@cache
def calibrate(epsilon: float, delta: float, rate: float, steps: int, before: Terms = ()) -> float:
    """The noise multiplier of `steps` steps at sampling rate `rate` that, after `before`, spend `epsilon` and no more.

    Raises:
        ParameterError: `before` leaves nothing of the budget, or no multiplier below 10,000 is enough.
    """
    interval = 1e-3 if steps <= 300 else 2e-4  # coarser is safe: PLD rounds up
    gdp, pld = partial(_epsilon_gdp, delta=delta), partial(epsilon_pld, delta=delta, interval=interval)

    def excess(log_sigma: float, measure: Callable[[Terms], float]) -> float:
        return measure((*before, (math.exp(log_sigma), rate, steps))) - epsilon

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
    while excess(found, partial(epsilon_prv, delta=delta, scale=epsilon)) > 0:
        found += 0.0005
    return math.exp(found)


def require_reachable(epsilon: float, delta: float, rate: float, steps: int, before: Terms = ()) -> None:
    """Raise ParameterError where a budget is senseless, or no noise multiplier that `calibrate` tries is enough."""
    if not LEAST <= epsilon <= MOST and not math.isinf(epsilon):
        raise ParameterError(f"epsilon: {epsilon} protects nobody or teaches nothing; ask for {LEAST} to {MOST:g}")
    if _epsilon_gdp((*before, (_MOST_NOISE, rate, steps)), delta) > epsilon:
        raise ParameterError(f"epsilon: {epsilon} can't be reached in {steps} steps; ask for fewer steps")


def _epsilon_gdp(terms: Terms, delta: float) -> float:
    """Epsilon as the central limit has it (Bu et al., arXiv 1911.11607): near, not safe."""
    parts = (t * (s**-2 if q == 1 else q * q * math.expm1(min(s**-2, 60))) for s, q, t in terms)
    return _gaussian_epsilon(math.sqrt(sum(parts)), delta)


class Stated(BaseModel):
    """What is written down, and not changed afterwards; terms that only an earlier version wrote are passed over."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Mechanism(Stated):
    """One stage of training on private data: `steps` Poisson-subsampled Gaussian mechanisms."""

    stage: str
    tuned: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    expected_batch: int
    clip: float
    draws: int


def terms_of(mechanisms: Iterable[Mechanism]) -> Terms:
    """The numbers that accountants need of these mechanisms."""
    return tuple((m.noise_multiplier, m.sampling_rate, m.steps) for m in mechanisms)


def merged(mechanisms: Iterable[Mechanism]) -> Terms:
    """The same, like ones joined and in one order: many runs of one recipe then cost accountants no more than one."""
    steps: Counter[tuple[float, float]] = Counter()
    for noise_multiplier, rate, n in terms_of(mechanisms):
        steps[noise_multiplier, rate] += n
    return tuple((*kind, n) for kind, n in sorted(steps.items()))
