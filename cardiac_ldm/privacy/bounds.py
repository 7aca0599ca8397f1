"""Lower bounds on epsilon from the scores of canaries, to hold against the upper bound that a ledger states.

A correct mechanism stays below its stated epsilon; a bound above it proves a defect, one below it proves nothing.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri
from scipy.stats import beta, binom, binomtest, norm

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.privacy.accounting import _gaussian_epsilon

SIGNIFICANCE = 0.05
"""All bounds and intervals hold with a confidence of 95 %."""

GUESSES = ((1 / 2, 1 / 2), (1 / 16, 1 / 16), (1 / 4, 0.0), (1 / 32, 0.0))
"""Parts of the canaries, by score, that are guessed in (from the top) and out (from the bottom); the rest abstain."""

RANKS = (0.5, 0.2, 0.05, 0.01)
"""Thresholds lie at these parts of the scores of canaries that were left out, from the top."""


def p_value(n_canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The highest probability of `correct` or more right guesses in one run that (epsilon, delta)-DP allows.

    Theorem 5.2 of Steinke, Nasr and Jagielski (arXiv 2305.08846): with W ~ Binomial(guesses, e^eps / (1 + e^eps)) it is
    P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i. Each of the m canaries was included by a fair coin of its own;
    how the outputs depend on each other doesn't matter.

    Raises:
        ParameterError: not 0 <= correct <= guesses <= n_canaries.
    """
    if not 0 <= correct <= guesses <= n_canaries:
        raise ParameterError(f"correct: {correct} of {guesses} guesses on {n_canaries} canaries; count them again")
    accuracy = expit(epsilon)
    tail = float(binom.sf(correct - 1, guesses, accuracy))
    if delta == 0 or correct == 0:
        return tail
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    return min(1.0, tail + 2 * n_canaries * delta * float((below / np.arange(1, correct + 1)).max()))


def one_run_bound(scores: np.ndarray, included: np.ndarray, delta: float) -> float:
    """Lower bound on epsilon at `delta` from one run, valid however much its canaries depend on each other.

    The best of `GUESSES`, each at a quarter of the significance (Bonferroni), so that the choice is paid for. Any score
    of the run's output will do. Scores of several runs may be joined where every canary is in one run only: together
    they are one run on all canaries. No more than about log(m / 5) can be shown, and of a Gaussian mechanism that
    spends 10 about 4, with 2000 canaries or 20,000: loose, but free of assumptions.

    Args:
        scores: (m,), higher for canaries that are more probably in.
        included: bool (m,), drawn by independent fair coins before the run.
        delta: of the claim that is audited; 0 for pure DP.

    Raises:
        ParameterError: an argument is out of range, or `included` is not what fair coins give.
    """
    m = len(scores)
    found = _guessed(scores, included, delta, lambda k, correct, epsilon: p_value(m, k, correct, epsilon, delta), 50.0)
    return max(found, default=0.0)  # at 50 every guess is right and the p-value is 1


def _guessed(
    scores: np.ndarray,
    included: np.ndarray,
    delta: float,
    likely: Callable[[int, int, float], float],
    highest: float,
    xtol: float = 1e-9,
) -> list[float]:
    """What each of `GUESSES` shows, where it shows anything: the largest value at which its success is unlikely.

    likely: guesses, right ones, value -> the probability of so many right ones. highest: where it's 1.
    """
    order, m, found = _order(scores, included, delta), len(scores), []
    if binomtest(int(included.sum()), m).pvalue < 1e-6:
        raise ParameterError(f"included: {included.sum()} of {m} is not what fair coins give; draw who is in by coins")
    for top, bottom in GUESSES:
        k_in, k_out = int(top * m), int(bottom * m)
        correct = int(included[order[m - k_in :]].sum() + (~included[order[:k_out]]).sum())
        excess = lambda x, k=k_in + k_out, right=correct: likely(k, right, x) - SIGNIFICANCE / len(GUESSES)  # noqa: E731
        if excess(0.0) < 0:
            found.append(brentq(excess, 0.0, highest, xtol=xtol))
    return found


def f_p_value(n_canaries: int, guesses: int, correct: int, blow_up_inverse: Callable[[float], float]) -> float:
    """The highest probability of `correct` or more right guesses in one run that f-DP allows.

    Algorithm 3 of Mahloujifar, Melis and Chaudhuri (arXiv 2410.22235). With p_j the chance of j right guesses, r_i the
    sum of p_j j / m over j >= i and h_i that of p_j (k - j) / m, f-DP has h_(i-1) >= g(r_i), where g is the inverse of
    1 - f: a tail that is likely makes every smaller number of right guesses likely too, until no chance is left.

    Args:
        blow_up_inverse: g: the least probability of an event whose probability is x for the neighbouring cohort.

    Raises:
        ParameterError: not 0 <= correct <= guesses <= n_canaries.
    """
    if not 0 <= correct <= guesses <= n_canaries:
        raise ParameterError(f"correct: {correct} of {guesses} guesses on {n_canaries} canaries; count them again")

    def left(tail: float) -> float:
        r, h = tail * correct / n_canaries, tail * (guesses - correct) / n_canaries
        for i in range(correct - 1, -1, -1):
            least = max(h, blow_up_inverse(r))
            r, h = r + i / (guesses - i) * (least - h), least
            if r + h > guesses / n_canaries:
                return -1.0
        return guesses / n_canaries - r - h

    if correct == 0 or left(1.0) >= 0:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-4 * high and high > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) >= 0 else (low, middle)
    return high


def f_one_run_bound(scores: np.ndarray, included: np.ndarray, delta: float) -> float:
    """Lower bound on epsilon at `delta` from one run of a mechanism that is taken to be mu-GDP: mu is what is bounded.

    Like `one_run_bound` it needs no independence of the canaries; like `gaussian_bound` it assumes the shape of the
    loss, and so shows more. Guesses, significance, args and errors are those of `one_run_bound`; delta must be above 0.
    """
    if delta == 0:
        raise ParameterError("delta: 0 holds for no Gaussian mechanism; give the delta of the ledger")

    def likely(guesses: int, correct: int, mu: float) -> float:
        return f_p_value(len(scores), guesses, correct, lambda x: float(ndtr(ndtri(min(x, 1.0)) - mu)))

    found = _guessed(scores, included, delta, likely, 40.0, xtol=1e-3)
    return max((_gaussian_epsilon(mu, delta) for mu in found), default=0.0)


def threshold_bound(scores: np.ndarray, included: np.ndarray, delta: float) -> float:
    """Lower bound on epsilon at `delta` from the rates at which thresholds on the scores find canaries.

    An (epsilon, delta)-DP mechanism has TPR <= e^eps FPR + delta and 1 - FPR <= e^eps (1 - TPR) + delta (Kairouz et
    al., arXiv 1311.0776); the bound takes the Clopper-Pearson limits of both rates. It assumes that canaries are
    independent trials, which those of `canary_scores` are if the mechanism adds independent noise and samples
    independently, and patients of one model are not. It can't exceed about log(n / 5) for n canaries on each side.

    Args and errors as for `one_run_bound`, but `included` may be drawn in any way.
    """
    low, high = _rates(included[_order(scores, included, delta)])
    ratios = np.stack([(low - delta) / high, (1 - high - delta) / (1 - low)])
    return math.log(max(1.0, ratios.max()))


def gaussian_bound(scores: np.ndarray, included: np.ndarray, delta: float) -> float:
    """Lower bound on epsilon at `delta` of a mechanism that is taken to be mu-GDP, where mu is what is bounded.

    mu >= Phi^-1(TPR) - Phi^-1(FPR) at every threshold (Dong, Roth and Su, arXiv 1905.02383), with the Clopper-Pearson
    limits of both rates; epsilon(delta) is the closed form of the Gaussian mechanism (Balle and Wang, arXiv
    1805.06530). Much tighter than the other bounds, and it assumes more: independent trials, as `threshold_bound` does,
    and that a threshold's mu holds for the tail that delta is about. Exactly so for the Gaussian mechanism; composed
    subsampled Gaussians have a heavier tail, so that for them it states less than they spend.

    Args and errors as for `threshold_bound`; delta must be above 0.
    """
    low, high = _rates(included[_order(scores, included, delta)])
    if delta == 0:
        raise ParameterError("delta: 0 holds for no Gaussian mechanism; give the delta of the ledger")
    mu = float((norm.ppf(low) - norm.ppf(high)).max())
    return _gaussian_epsilon(mu, delta) if mu > 0 else 0.0


def _rates(included: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower limits of TPR and upper limits of FPR at all thresholds, which hold together; bool (m,) by rising score.

    A threshold is one of the left-out scores. The false positives above it are then exactly those that Clopper and
    Pearson's limit is made for (the rate is a beta variable), and the canaries that are in don't depend on it.
    """
    outside = np.flatnonzero(~included)[::-1]
    n_in, n_out = len(included) - len(outside), len(outside)
    false = np.array([int(rank * n_out) for rank in RANKS])
    true = np.array([included[threshold:].sum() for threshold in outside[false]])
    each = SIGNIFICANCE / (2 * len(RANKS))
    return _lower_limit(true, n_in, each), 1 - _lower_limit(n_out - false, n_out, each)


def _lower_limit(successes: np.ndarray, trials: int, significance: float) -> np.ndarray:
    """One-sided lower limits of a rate (Clopper and Pearson, Biometrika 26:404, 1934)."""
    return np.where(successes == 0, 0.0, beta.ppf(significance, np.maximum(successes, 1), trials - successes + 1))


def _order(scores: np.ndarray, included: np.ndarray, delta: float) -> np.ndarray:
    """Canaries by rising score, ties by lot: were they left in place, the order of the arguments could give them away.

    Raises:
        ParameterError: an argument is out of range.
    """
    if scores.ndim != 1 or included.shape != scores.shape:
        raise ParameterError(f"included: shape {included.shape} for scores of {scores.shape}; give both (m,)")
    if included.dtype != bool:
        raise ParameterError(f"included: {included.dtype} must be bool: whether each canary was in")
    if not included.any() or included.all():
        raise ParameterError(f"included: {included.sum()} of {len(included)} are in; some must be in and some left out")
    if not 0 <= delta < 1:
        raise ParameterError(f"delta: {delta} must be at least 0 and below 1")
    check_finite("scores", scores)
    return np.lexsort((np.random.default_rng(0).permutation(len(scores)), scores))


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise ParameterError where some values aren't finite."""
    if bad := np.size(values) - int(np.isfinite(values).sum()):
        raise ParameterError(f"{name}: {bad} of {np.size(values)} are not finite; mend what they were computed from")


BOUNDS: dict[str, Callable[[np.ndarray, np.ndarray, float], float]] = {
    "one run": one_run_bound,
    "one run, f-DP": f_one_run_bound,
    "thresholds": threshold_bound,
    "Gaussian": gaussian_bound,
}
"""The bounds, by how much they assume."""
