"""Audits: lower bounds on epsilon from an attack on a run, to hold against the upper bound that its ledger states.

A correct mechanism stays below its stated epsilon; a bound above it proves a defect, one below it proves nothing.
Audits with `canary_scores` alone touch no patient. Losses and scores of real patients are private: what is computed
from them has no noise and stays with the holder of the patients.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import beta, binom, binomtest, norm, rankdata
from torch import Tensor

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.privacy.accounting import Ledger, _gaussian_epsilon
from cardiac_ldm.privacy.dpsgd import PrivatePlan, Randomness

SIGNIFICANCE = 0.05
"""All bounds and intervals hold with a confidence of 95 %."""

GUESSES = ((1 / 2, 1 / 2), (1 / 16, 1 / 16), (1 / 4, 0.0), (1 / 32, 0.0))
"""Parts of the canaries, by score, that are guessed in (from the top) and out (from the bottom); the rest abstain."""

RANKS = (0.5, 0.2, 0.05, 0.01)
"""Thresholds lie at these parts of the scores of canaries that were left out, from the top."""

EXCESS = 1e3
"""A canary's gradient is this many times as long as the clip, so that a clip that is missing or too large shows."""

UnitLoss = Callable[[int, torch.Generator], Tensor | None]
LotLoss = Callable[[Sequence[int]], UnitLoss]


class Rate(NamedTuple):
    """A rate or an area under a curve, with its 95 % interval."""

    value: float
    low: float
    high: float


# --- Epsilon from the scores of canaries -----------------------------------------------------------------------------


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
    order, m, bounds = _order(scores, included, delta), len(scores), [0.0]
    if binomtest(int(included.sum()), m).pvalue < 1e-6:
        raise ParameterError(f"included: {included.sum()} of {m} is not what fair coins give; draw who is in by coins")
    for top, bottom in GUESSES:
        k_in, k_out = int(top * m), int(bottom * m)
        correct = int(included[order[m - k_in :]].sum() + (~included[order[:k_out]]).sum())

        def excess(epsilon: float, guesses: int = k_in + k_out, correct: int = correct) -> float:
            return p_value(m, guesses, correct, epsilon, delta) - SIGNIFICANCE / len(GUESSES)

        if excess(0.0) < 0:
            bounds.append(brentq(excess, 0.0, 50.0))  # at 50 every guess is right and the p-value is 1
    return max(bounds)


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
    _check_finite("scores", scores)
    return np.lexsort((np.random.default_rng(0).permutation(len(scores)), scores))


def _check_finite(name: str, values: np.ndarray) -> None:
    if bad := np.size(values) - int(np.isfinite(values).sum()):
        raise ParameterError(f"{name}: {bad} of {np.size(values)} are not finite; mend what they were computed from")


BOUNDS: dict[str, Callable[[np.ndarray, np.ndarray, float], float]] = {
    "one run": one_run_bound,
    "thresholds": threshold_bound,
    "Gaussian": gaussian_bound,
}
"""The three bounds, by how much they assume."""


# --- Canaries that a plan trains on ----------------------------------------------------------------------------------


def draw_canaries(
    n_canaries: int, parameters: Sequence[Tensor], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Who is in, bool (m,) by fair coins, and along what: +-1, float64 (m, s), each row in its own s parameters.

    The parameters, end to end, are cut into m blocks. Canaries share none, so they don't hide each other; all but the
    last few parameters are in one, so that noise which doesn't reach them all shows.

    Raises:
        ParameterError: there are fewer parameters than canaries, or no canaries.
    """
    size = sum(p.numel() for p in parameters)
    if not 0 < n_canaries <= size:
        raise ParameterError(f"n_canaries: {n_canaries} don't fit into {size} parameters; take 1 to {size}")
    return rng.random(n_canaries) < 0.5, rng.choice([-1.0, 1.0], (n_canaries, size // n_canaries))


def with_canaries(
    unit_loss: UnitLoss, included: np.ndarray, signs: np.ndarray, plan: PrivatePlan, parameters: Sequence[Tensor]
) -> UnitLoss:
    """A `unit_loss` for `PrivatePlan.gradient` in which the last m of the plan's units are canaries.

    A canary that is in has a gradient along its signs, `EXCESS` times as long as the clip. One that was left out
    contributes nothing, though lots are drawn with it as with everyone: the plan stays what it is.

    Args:
        unit_loss: of the other units; not called for canaries.
        included: bool (m,), and signs: (m, s), as `draw_canaries` gives them for `parameters`.

    Raises:
        ParameterError: there are more canaries than units.
    """
    first, block = plan.n_units - len(included), signs.shape[1]
    if first < 0:
        raise ParameterError(f"n_canaries: {len(included)} exceed the plan's {plan.n_units} units; take fewer")
    length = EXCESS * max(plan.clip, 1.0) if math.isfinite(plan.clip) else 1.0
    directions = torch.from_numpy(signs / math.sqrt(block))

    def loss(unit: int, generator: torch.Generator) -> Tensor | None:
        canary = unit - first
        if canary < 0:
            return unit_loss(unit, generator)
        if not included[canary]:
            return None
        own = torch.cat([p.flatten() for p in parameters])[canary * block : (canary + 1) * block]
        return length * own @ directions[canary].to(own)

    return loss


def evidence(gradient: Tensor, signs: np.ndarray, plan: PrivatePlan) -> np.ndarray:
    """How much likelier a private gradient (d,) is if each canary is in than if it was left out: float64 (m,).

    The log-likelihood ratio log(1 - q + q exp((x - 1/2) / sigma^2)) of its component x along the canary's direction,
    in clips: summed over steps, no score finds canaries more surely (Neyman and Pearson). With much noise the sum is
    as good as that of x; at noise multipliers below 1 and small lots it shows twice the epsilon. Without noise, x.
    """
    clip = plan.clip if math.isfinite(plan.clip) else 1.0
    blocks = gradient[: signs.size].cpu().double().numpy().reshape(signs.shape)
    x = (blocks * signs).sum(axis=1) * plan.expected_batch / (clip * math.sqrt(signs.shape[1]))
    if plan.noise_multiplier == 0:
        return x
    rate = plan.sampling_rate
    return np.logaddexp(math.log1p(-rate), math.log(rate) + (x - 0.5) / plan.noise_multiplier**2)


def canary_scores(
    plan: PrivatePlan,
    parameters: Sequence[Tensor],
    randomness: Randomness,
    rng: np.random.Generator,
    *,
    n_canaries: int,
    unit_loss: UnitLoss = lambda unit, generator: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run all steps of a plan with canaries and score each by the evidence of all private gradients.

    The gradients are those of `PrivatePlan.gradient`, unchanged, at parameters that stay where they are: an optimiser
    would see nothing else. With the `unit_loss` of patients this spends the plan's budget, as training does.

    Args:
        parameters: for an audit without a model, `[torch.zeros(n_canaries, requires_grad=True)]`.
        rng: draws the coins and directions, before the first step.
        n_canaries: m; `plan.n_units` where there is nobody else.
        unit_loss: of the plan's other units; nobody's unless given.

    Returns:
        scores: float64 (m,).
        included: bool (m,).

    Raises:
        ParameterError: there are fewer units or parameters than canaries, or no canaries.
    """
    included, signs = draw_canaries(n_canaries, parameters, rng)
    loss, scores = with_canaries(unit_loss, included, signs, plan, parameters), np.zeros(n_canaries)
    for step in range(plan.steps):
        scores += evidence(plan.gradient(step, parameters, loss, randomness), signs, plan)
    return scores, included


def ledger_scores(
    ledger: Ledger, seed: int, *, n_canaries: int = 2000, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of canaries who are alone in the mechanisms that a ledger states, in all of them or in none.

    Every unit is a canary; where a cohort has fewer than `n_canaries`, the run is repeated with new ones until they
    are as many. No patient is touched, so the seed may be known.

    Args:
        noise: factor of the noise multiplier; below 1 the ledger states too little, which an audit should show.

    Returns:
        scores: float64 (m,), m at least `n_canaries`; the evidence of all mechanisms together.
        included: bool (m,).

    Raises:
        ParameterError: no private patient trained the model.
    """
    if not ledger.mechanisms:
        raise ParameterError("epsilon: 0 is the public model, which met no private patient; audit one above 0")
    rng, n, runs = np.random.default_rng(seed), ledger.n_units, []
    for _ in range(math.ceil(n_canaries / n)):
        coins, total = int(rng.integers(2**63)), np.zeros(n)
        for m in ledger.mechanisms:
            terms = (n, m.expected_batch, m.steps, m.clip, m.draws, ledger.epsilon, ledger.delta)
            plan = PrivatePlan(*terms, noise_multiplier=noise * m.noise_multiplier, clipping=m.clipping)
            fresh = Randomness(int(rng.integers(2**63)), simulated=True)
            weights = torch.zeros(n, requires_grad=True)
            scores, included = canary_scores(plan, [weights], fresh, np.random.default_rng(coins), n_canaries=n)
            total += scores
        runs.append((total, included))
    joined, coins_of_all = map(np.concatenate, zip(*runs, strict=True))
    return joined, coins_of_all


# --- The bound that everything rests on ------------------------------------------------------------------------------


def sensitivity(
    plan: PrivatePlan, parameters: Sequence[Tensor], lot_loss: LotLoss, lot: Sequence[int], added: int, seed: int = 0
) -> float:
    """How far one more unit moves the sum of a lot's clipped gradients, in clips: what must not exceed 1.

    |sum over lot and added - sum over lot| / C. Where a unit's loss depends on nobody else, it's the norm of what the
    added one contributes, which is clipped. Where it does, the others' contributions move too, each by up to 2.

    Args:
        lot_loss: gives the `unit_loss` of a lot; the mechanism's own is the same for every lot.
        seed: of the units' noise draws, the same with and without the added one.
    """
    randomness = Randomness(seed, simulated=True)

    def total(units: Sequence[int]) -> Tensor:
        loss, summed = lot_loss(units), torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for unit in units:
            found = loss(unit, randomness.draws(0, unit))
            if found is not None:
                summed += plan.clipped(found, parameters)
        return summed

    return float(torch.linalg.vector_norm(total([*lot, added]) - total(lot))) / plan.clip


# --- Membership inference from losses --------------------------------------------------------------------------------


def calibrated(losses: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Scores (n,) of membership from losses, corrected for how hard each patient is to models that never saw them.

    (mean of references - loss) / their standard deviation: offline LiRA (Carlini et al., arXiv 2112.03570). Of one
    reference, such as the public model, the difference alone (Watson et al., arXiv 2111.08440). The attack without
    references is the score -loss.

    Args:
        losses: (n,) of the patients under the model that is attacked.
        references: (k, n) of the same patients under models that none of them trained.

    Raises:
        ParameterError: the shapes don't fit, a loss is not finite, or all references give a patient the same loss.
    """
    if losses.ndim != 1 or references.ndim != 2 or not len(references) or references.shape[1:] != losses.shape:
        raise ParameterError(f"references: {references.shape} must be (k, n) for the losses' (n,) = {losses.shape}")
    _check_finite("losses", losses)
    _check_finite("references", references)
    gap = references.mean(axis=0) - losses
    if len(references) == 1:
        return gap
    spread = references.std(axis=0, ddof=1)
    if not spread.all():
        raise ParameterError(f"references: {(spread == 0).sum()} patients have the same loss under all; give one model")
    return gap / spread


def auc(members: np.ndarray, others: np.ndarray) -> Rate:
    """The probability that a member scores above a non-member, ties counted half: the area under the ROC curve.

    Mann and Whitney's U over n m. The interval is Newcombe's (Stat. Med. 25:559, 2006, method 5), which also holds
    where the two separate. It assumes that patients are drawn independently and speaks of the one model attacked.

    Args:
        members: scores (n,), higher for those that are more probably members.
        others: scores (m,).

    Raises:
        ParameterError: scores are missing or not finite.
    """
    n, m = _check_sides(members, others)
    area = float(rankdata(np.concatenate([members, others]))[:n].sum() - n * (n + 1) / 2) / (n * m)
    spare, z = (n + m) / 2 - 1, norm.ppf(1 - SIGNIFICANCE / 2)

    def outside(t: float) -> float:
        variance = t * (1 - t) * (1 + spare * (1 - t) / (2 - t) + spare * t / (1 + t)) / (n * m)
        return (area - t) ** 2 - z * z * variance

    low = brentq(outside, 0.0, min(area, 1 - 1e-9)) if area > 0 else 0.0
    high = brentq(outside, max(area, 1e-9), 1.0) if area < 1 else 1.0
    return Rate(area, low, high)


def true_positive_rate(members: np.ndarray, others: np.ndarray, at: float) -> Rate:
    """The part of the members that score above all but a part `at` of the non-members; higher scores are members'.

    The interval is Clopper and Pearson's, given the threshold: that others would have put it elsewhere is not in it.

    Raises:
        ParameterError: there are fewer than 1 / at non-members, or scores are missing or not finite.
    """
    n, m = _check_sides(members, others)
    if not 0 < at < 1:
        raise ParameterError(f"at: {at} must lie between 0 and 1: a false positive rate")
    if m < _needed(at):
        raise ParameterError(f"others: {m} non-members can't show a false positive rate of {at}; give {_needed(at)}")
    threshold = np.sort(others)[::-1][int(at * m + 1e-9)]
    found = int((members > threshold).sum())
    limits = binomtest(found, n).proportion_ci(1 - SIGNIFICANCE, "exact")
    return Rate(found / n, float(limits.low), float(limits.high))


def membership(members: np.ndarray, others: np.ndarray) -> dict[str, Rate]:
    """What an attack's scores of members (n,) and others (m,) tell: auc, tpr_at_fpr_0.01 and tpr_at_fpr_0.001.

    A rate is NaN where there are too few non-members to show it.
    """
    rates = {"auc": auc(members, others)}
    for at in (0.01, 0.001):
        enough = len(others) >= _needed(at)
        rates[f"tpr_at_fpr_{at}"] = true_positive_rate(members, others, at) if enough else Rate(*3 * [math.nan])
    return rates


def _needed(at: float) -> int:
    return math.ceil(1 / at - 1e-9)


def _check_sides(members: np.ndarray, others: np.ndarray) -> tuple[int, int]:
    for name, side in (("members", members), ("others", others)):
        if side.ndim != 1 or not len(side):
            raise ParameterError(f"{name}: shape {side.shape} must be (n,), one score a patient, of at least one")
        _check_finite(name, side)
    return len(members), len(others)
