"""Audits: bounds against closed forms and simulations, the real mechanism whole and broken, attacks by loss."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from dp_accounting import get_epsilon_gaussian
from scipy import stats
from torch import Tensor

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.membership import attacks, auc, membership, true_positive_rate
from cardiac_ldm.privacy import PrivatePlan, Randomness, dpsgd
from cardiac_ldm.privacy.bounds import (
    f_one_run_bound,
    f_p_value,
    gaussian_bound,
    one_run_bound,
    p_value,
    threshold_bound,
)
from cardiac_ldm.privacy.canaries import canary_scores, draw_canaries, evidence, with_canaries

DELTA = 1e-5
SEEDED = Randomness(0, simulated=True)
Bound = Callable[[np.ndarray, np.ndarray, float], float]
BOUNDS: list[Bound] = [one_run_bound, threshold_bound, gaussian_bound]


def randomised_response(rng: np.random.Generator, m: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of canaries that each tell whether they're in, rightly with probability e^eps / (1 + e^eps)."""
    included = rng.random(m) < 0.5
    right = rng.random(m) < 1 / (1 + math.exp(-epsilon))
    return np.where(right == included, 1.0, 0.0), included


def gaussian_mechanism(rng: np.random.Generator, m: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of canaries that are each counted once, with noise of deviation 1 / mu."""
    included = rng.random(m) < 0.5
    return included + rng.normal(0, 1 / mu, m), included


def limit(successes: int, trials: int, confidence: float, side: Literal["greater", "less"]) -> float:
    """Clopper and Pearson's one-sided limit of a rate, by SciPy."""
    interval = stats.binomtest(successes, trials, alternative=side).proportion_ci(confidence, "exact")
    return float(interval.low if side == "greater" else interval.high)


# --- Bounds against closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "guesses", "correct", "delta", "printed"),
    [  # printed in arXiv 2305.08846, appendix D and section 7
        (100, 100, 75, 1e-4, 0.699),
        (1000, 100, 75, 1e-4, 0.673),
        (100_000, 1510, 1439, 1e-5, 2.675),
    ],
)
def test_the_p_value_of_one_run_is_5_percent_at_the_epsilons_that_its_authors_print(
    m: int, guesses: int, correct: int, delta: float, printed: float
) -> None:
    assert (
        p_value(m, guesses, correct, printed - 0.001, delta)
        < 0.05
        < p_value(m, guesses, correct, printed + 0.001, delta)
    )


@pytest.mark.parametrize(("m", "guesses", "correct"), [(12, 12, 12), (12, 9, 7), (30, 5, 4), (8, 8, 1), (8, 8, 0)])
@pytest.mark.parametrize("odds", [1, 3])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 1000), Fraction(1, 10)])
def test_the_p_value_is_the_theorems_in_exact_fractions(
    m: int, guesses: int, correct: int, odds: int, delta: Fraction
) -> None:
    right = Fraction(odds, odds + 1)
    chance = [math.comb(guesses, k) * right**k * (1 - right) ** (guesses - k) for k in range(guesses + 1)]
    slope = max((sum(chance[correct - i : correct], Fraction()) / i for i in range(1, correct + 1)), default=Fraction())
    exact = min(Fraction(1), sum(chance[correct:], Fraction()) + 2 * m * delta * slope)
    assert p_value(m, guesses, correct, math.log(odds), float(delta)) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("m", "guesses", "correct"), [(1, 1, 1), (10, 10, 9), (100, 100, 80), (1000, 1000, 760), (1000, 300, 240)]
)
def test_the_p_value_of_f_dp_is_the_binomial_tail_of_randomised_response_or_a_little_more(
    m: int, guesses: int, correct: int
) -> None:
    def inverse(x: float) -> float:
        return max(x * math.exp(-1), 1 - math.exp(1) * (1 - x))  # of min(e x, 1 - (1 - x) / e)

    exact = stats.binom.sf(correct - 1, guesses, 1 / (1 + math.exp(-1)))  # what epsilon = 1 reaches
    assert exact <= f_p_value(m, guesses, correct, inverse) <= 1.25 * exact


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_the_p_value_of_f_dp_is_the_gaussians_for_a_single_guess(mu: float) -> None:
    found = f_p_value(1, 1, 1, lambda x: float(stats.norm.cdf(stats.norm.ppf(min(x, 1.0)) - mu)))
    assert found == pytest.approx(stats.norm.cdf(mu / 2), abs=1e-3)


def test_the_bound_of_f_dp_in_one_run_shows_more_than_the_one_without_a_shape_and_holds() -> None:
    rng, exceeded = np.random.default_rng(8), 0
    truth = get_epsilon_gaussian(1 / 2.0, DELTA)
    for _ in range(20):
        run = gaussian_mechanism(rng, 300, 2.0)
        exceeded += f_one_run_bound(*run, DELTA) > truth
    assert exceeded <= stats.binom.ppf(0.999, 20, 0.05)
    run = gaussian_mechanism(rng, 4000, 2.0)
    assert 1.2 * one_run_bound(*run, DELTA) < f_one_run_bound(*run, DELTA) < truth


def test_a_run_that_gives_everybody_away_shows_what_its_number_of_canaries_can_and_pays_for_the_choice() -> None:
    included = np.random.default_rng(0).permutation(1000) < 500  # every guess is right
    chance = (0.05 / 4) ** (1 / 1000)  # four numbers of guesses are tried
    assert one_run_bound(included.astype(float), included, 0.0) == pytest.approx(math.log(chance / (1 - chance)))
    found, false = limit(500, 500, 1 - 0.05 / 8, "greater"), limit(5, 500, 1 - 0.05 / 8, "less")
    assert threshold_bound(included.astype(float), included, 0.0) == pytest.approx(math.log((1 - false) / (1 - found)))


def test_bounds_from_thresholds_are_clopper_and_pearsons_limits_put_into_the_definitions() -> None:
    rng = np.random.default_rng(3)
    scores, included = gaussian_mechanism(rng, 600, 1.7)
    outside, each = np.sort(scores[~included])[::-1], 0.05 / 8
    ratios, mus = [1.0], []
    for false in (len(outside) // 2, len(outside) // 5, len(outside) // 20, len(outside) // 100):
        found = int((scores[included] > outside[false]).sum())
        low = limit(found, int(included.sum()), 1 - each, "greater")
        high = limit(false, len(outside), 1 - each, "less")
        ratios += [(low - 0.01) / high, (1 - high - 0.01) / (1 - low)]
        mus.append(stats.norm.ppf(low) - stats.norm.ppf(high))
    assert threshold_bound(scores, included, 0.01) == pytest.approx(math.log(max(ratios)))
    assert gaussian_bound(scores, included, 0.01) == pytest.approx(get_epsilon_gaussian(1 / max(mus), 0.01), rel=1e-6)


# --- Bounds against mechanisms of known epsilon ----------------------------------------------------------------------


def test_bounds_on_randomised_response_exceed_the_truth_in_at_most_5_percent_of_runs() -> None:
    rng, exceeded = np.random.default_rng(1), np.zeros(2)
    for _ in range(120):
        run = randomised_response(rng, 200, 1.0)
        exceeded += [one_run_bound(*run, 0.0) > 1.0, threshold_bound(*run, 0.0) > 1.0]
    assert (exceeded <= stats.binom.ppf(0.999, 120, 0.05)).all()


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_bounds_on_the_gaussian_mechanism_exceed_the_truth_in_at_most_5_percent_of_runs(mu: float) -> None:
    rng, truth, exceeded = np.random.default_rng(2), get_epsilon_gaussian(1 / mu, DELTA), np.zeros(2)
    for _ in range(400):
        run = gaussian_mechanism(rng, 300, mu)
        exceeded += [gaussian_bound(*run, DELTA) > truth, threshold_bound(*run, DELTA) > truth]
    assert (exceeded <= stats.binom.ppf(0.999, 400, 0.05)).all()


@pytest.mark.parametrize("epsilon", [1.0, 2.0])
def test_bounds_on_randomised_response_come_near_the_truth(epsilon: float) -> None:
    run = randomised_response(np.random.default_rng(5), 4000, epsilon)
    assert 0.8 * epsilon < one_run_bound(*run, 0.0) <= epsilon
    assert 0.8 * epsilon < threshold_bound(*run, 0.0) <= epsilon


def test_the_gaussian_bound_on_the_gaussian_mechanism_comes_near_the_truth() -> None:
    run, truth = gaussian_mechanism(np.random.default_rng(6), 4000, 2.0), get_epsilon_gaussian(0.5, DELTA)
    assert 0.85 * truth < gaussian_bound(*run, DELTA) <= truth
    assert one_run_bound(*run, DELTA) < 0.6 * truth


@pytest.mark.parametrize("bound", BOUNDS)
def test_scores_that_tell_nothing_show_nothing_whatever_the_order_of_the_canaries(bound: Bound) -> None:
    included = np.arange(1000) % 2 == 1
    for order in (np.arange(1000), np.argsort(included, kind="stable"), np.argsort(~included, kind="stable")):
        assert bound(np.zeros(1000), included[order], DELTA) == 0.0
        assert bound(1.0 * included[order], included[order], DELTA) > 3


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_larger_delta_shows_a_smaller_epsilon(bound: Bound) -> None:
    run = gaussian_mechanism(np.random.default_rng(7), 1000, 2.0)
    shown = [bound(*run, delta) for delta in (1e-7, 1e-3, 0.02, 0.2)]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > shown[-1]


# --- The mechanism ---------------------------------------------------------------------------------------------------


@cache
def plan_for(epsilon: float, expected_batch: int = 400, steps: int = 8) -> PrivatePlan:
    """A plan of 800 units, all of them canaries."""
    return PrivatePlan.for_budget(
        epsilon, DELTA, n_patients=800, expected_batch=expected_batch, steps=steps, clip=0.3, draws=1
    )


def attacked(plan: PrivatePlan) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of a canary per unit, without a model."""
    weights = torch.zeros(plan.n_patients, requires_grad=True)
    return canary_scores(plan, [weights], SEEDED, np.random.default_rng(0), n_canaries=plan.n_patients)


whole = cache(attacked)
"""The same, of the mechanism as it is."""


@pytest.mark.parametrize(("epsilon", "least"), [(1.0, 0.0), (10.0, 3.0)])
def test_the_mechanism_keeps_below_its_stated_epsilon(epsilon: float, least: float) -> None:
    run = whole(plan_for(epsilon))
    assert max(bound(*run, DELTA) for bound in BOUNDS) <= epsilon
    assert gaussian_bound(*run, DELTA) >= least
    assert one_run_bound(*run, DELTA) >= least / 3


def test_a_run_without_privacy_lights_up() -> None:
    run = attacked(plan_for(math.inf))
    assert min(bound(*run, DELTA) for bound in BOUNDS) > 3


def a_tenth_of_the_noise(patch: pytest.MonkeyPatch) -> None:
    honest = dpsgd.gaussian
    patch.setattr(dpsgd, "gaussian", lambda n, deviation, generator: honest(n, deviation / 10, generator))


def no_clip(patch: pytest.MonkeyPatch) -> None:
    def unclipped(plan: PrivatePlan, loss: Tensor, parameters: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    patch.setattr(PrivatePlan, "clipped", unclipped)


def everyone_in_every_lot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrivatePlan, "sample_batch", lambda plan, generator: np.ones(plan.n_patients, dtype=bool))


@pytest.mark.parametrize(
    ("defect", "plan", "bounds"),
    [
        (a_tenth_of_the_noise, {"epsilon": 1.0}, BOUNDS),
        (a_tenth_of_the_noise, {"epsilon": 10.0}, [gaussian_bound]),  # 800 canaries can't show 10 otherwise
        (no_clip, {"epsilon": 1.0}, BOUNDS),
        (no_clip, {"epsilon": 10.0}, [gaussian_bound]),
        (everyone_in_every_lot, {"epsilon": 1.0, "expected_batch": 40, "steps": 4}, BOUNDS),
    ],
)
def test_a_broken_mechanism_exceeds_the_epsilon_that_it_states(
    defect: Callable[[pytest.MonkeyPatch], None],
    plan: dict[str, Any],
    bounds: list[Bound],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stated = plan_for(**plan)
    assert all(bound(*whole(stated), DELTA) <= stated.epsilon for bound in bounds)
    defect(monkeypatch)
    broken = attacked(stated)
    assert all(bound(*broken, DELTA) > stated.epsilon for bound in bounds)


def noiseless(**changes: Any) -> PrivatePlan:
    """A plan of 60 units whose every contribution shows."""
    terms = {"n_patients": 60, "expected_batch": 20, "steps": 6, "clip": 0.5, "draws": 1, "epsilon": 1.0}
    return PrivatePlan(**(terms | {"delta": DELTA, "noise_multiplier": 0.0} | changes))


@pytest.mark.parametrize("changes", [{}, {"clip": 1e-4}, {"clip": math.inf, "epsilon": math.inf}])
def test_without_noise_a_canary_that_is_in_scores_the_lots_that_it_joined_and_one_left_out_nothing(
    changes: dict[str, Any],
) -> None:
    plan = noiseless(**changes)
    parameters = [torch.randn(7, 10, requires_grad=True), torch.randn(103, requires_grad=True)]  # 173 = 40 * 4 + 13
    seen = []

    def patient(unit: int, generator: torch.Generator) -> None:
        seen.append(unit)

    scores, included = canary_scores(
        plan, parameters, SEEDED, np.random.default_rng(1), n_canaries=40, unit_loss=patient
    )
    joined = sum(plan.sample_batch(SEEDED.generator(step, 0)).astype(int) for step in range(6))
    assert isinstance(joined, np.ndarray)
    assert set(seen) == {unit for unit in range(20) if joined[unit]}  # the last 40 of 60 units are canaries
    assert 10 < included.sum() < 30
    assert scores == pytest.approx(np.where(included, joined[20:], 0), abs=1e-4)


def test_patients_beside_canaries_contribute_what_they_did_and_meet_the_same_lots() -> None:
    plan, weights = noiseless(noise_multiplier=2.0), torch.ones(30, requires_grad=True)
    target = torch.randn(60, 30)

    def patient(unit: int, generator: torch.Generator) -> Tensor:
        return (weights * target[unit]).sum()

    _, signs = draw_canaries(10, [weights], np.random.default_rng(0))
    alone = plan.gradient(2, [weights], lambda u, g: patient(u, g) if u < 50 else None, SEEDED)
    beside = plan.gradient(2, [weights], with_canaries(patient, np.zeros(10, bool), signs, plan, [weights]), SEEDED)
    assert torch.equal(alone, beside)
    joined = plan.sample_batch(SEEDED.generator(2, 0))[50:]
    assert joined.any()
    beside = plan.gradient(2, [weights], with_canaries(patient, np.ones(10, bool), signs, plan, [weights]), SEEDED)
    added = (beside - alone).reshape(10, 3) * torch.from_numpy(signs)
    expected = joined[:, None] * (0.5 / 20 / math.sqrt(3)) * np.ones(3)
    assert added.numpy() == pytest.approx(expected, abs=1e-6)


def test_canaries_are_drawn_by_fair_coins_that_are_independent_of_their_signs() -> None:
    included, signs = draw_canaries(20_000, [torch.zeros(100_000)], np.random.default_rng(8))
    assert signs.shape == (20_000, 5)
    assert abs(included.sum() - 10_000) < 4 * math.sqrt(5000)
    assert abs(signs).min() == 1
    assert abs(np.corrcoef(included, signs[:, 0])[0, 1]) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("noise", [0.6, 4.0])
def test_evidence_is_the_log_ratio_of_the_densities_of_a_canary_in_and_out(noise: float) -> None:
    plan = noiseless(noise_multiplier=noise)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (5, 4))
    x = np.array([-2.0, -0.3, 0.0, 0.8, 3.0])
    gradient = torch.from_numpy(np.append(x[:, None] * signs / 2, 99.0) * 0.5 / 20)  # unit directions, clip, batch
    inside = 2 / 3 * stats.norm.pdf(x, 0, noise) + 1 / 3 * stats.norm.pdf(x, 1, noise)
    assert evidence(gradient, signs, plan) == pytest.approx(np.log(inside / stats.norm.pdf(x, 0, noise)))


def test_where_everybody_joins_evidence_is_that_of_the_gaussian_alone() -> None:
    plan, x = noiseless(n_patients=20, expected_batch=20, noise_multiplier=2.0), np.array([-2.0, 0.0, 3.0])
    gradient = torch.from_numpy(x * 0.5 / 20)
    assert evidence(gradient, np.ones((3, 1)), plan) == pytest.approx((x - 0.5) / 4)


def test_evidence_shows_more_than_the_sum_where_noise_is_low_and_lots_are_small() -> None:
    plan, rng, m = noiseless(n_patients=4000, expected_batch=192, noise_multiplier=0.55), np.random.default_rng(9), 4000
    included = rng.random(m) < 0.5
    joins = (rng.random((40, m)) < plan.sampling_rate) & included
    x = joins + rng.normal(0, 0.55, (40, m))
    likely = sum(evidence(torch.from_numpy(row * 0.5 / 192), np.ones((m, 1)), plan) for row in x)
    assert isinstance(likely, np.ndarray)
    for bound in BOUNDS:
        assert bound(likely, included, DELTA) > 1.5 * bound(x.sum(axis=0), included, DELTA)


# --- Membership inference --------------------------------------------------------------------------------------------


def test_the_area_under_the_curve_is_mann_and_whitneys_ties_counted_half() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 12, 70) + 1.0, rng.integers(0, 12, 45) * 1.0
    found = auc(members, others)
    pairs = members[:, None] - others
    assert found.value == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean())
    assert found.value == pytest.approx(stats.mannwhitneyu(members, others).statistic / (70 * 45))
    assert found.low < found.value < found.high


@pytest.mark.parametrize(("n", "m", "shift"), [(25, 25, 0.0), (40, 200, 0.0), (25, 25, 2.5), (15, 100, -1.0)])
def test_the_interval_of_the_area_holds_the_truth_in_95_percent_of_cohorts(n: int, m: int, shift: float) -> None:
    rng, truth = np.random.default_rng(1), stats.norm.cdf(shift / math.sqrt(2))
    rates = [auc(rng.normal(shift, 1, n), rng.normal(0, 1, m)) for _ in range(400)]
    held = sum(rate.low <= truth <= rate.high for rate in rates)
    assert stats.binom.ppf(0.001, 400, 0.94) <= held <= 398


def test_patients_who_can_be_told_apart_or_not_at_all_have_intervals_with_a_width() -> None:
    above, below = np.arange(20) + 100.0, np.arange(20.0)
    assert auc(above, below)[::2] == (1.0, 1.0)
    assert 0.8 < auc(above, below).low < 0.95
    assert auc(below, above)[:2] == (0.0, 0.0)
    assert 0.05 < auc(below, above).high < 0.2


@pytest.mark.parametrize("at", [0.01, 0.05, 0.3])
def test_the_true_positive_rate_is_at_the_false_positive_rate_asked_for(at: float) -> None:
    rng = np.random.default_rng(2)
    members, others = rng.normal(1, 1, 300), rng.normal(0, 1, 500)
    found, thresholds = true_positive_rate(members, others, at), np.concatenate([members, others])
    fitting = [t for t in thresholds if (others > t).mean() <= at]
    assert found.value == max((members > t).mean() for t in fitting)
    interval = stats.binomtest(round(300 * found.value), 300).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == (interval.low, interval.high)


def test_an_attack_on_patients_who_are_alike_finds_nobody() -> None:
    rng = np.random.default_rng(3)
    found = membership(rng.normal(0, 1, 3000), rng.normal(0, 1, 3000))
    assert set(found) == {"auc", "tpr_at_fpr_0.01", "tpr_at_fpr_0.001"}
    assert found["auc"].low < 0.5 < found["auc"].high
    assert found["auc"].high - found["auc"].low < 0.04
    assert 0.003 < found["tpr_at_fpr_0.01"].value < 0.02
    assert found["tpr_at_fpr_0.001"].value < 0.006
    assert true_positive_rate(np.zeros(100), np.zeros(100), 0.01).value == 0.0  # nobody stands out from ties


def test_an_attack_on_a_model_that_remembers_lights_up() -> None:
    rng = np.random.default_rng(4)
    found = membership(rng.normal(5, 1, 200), rng.normal(0, 1, 1000))
    assert found["auc"].low > 0.97
    assert found["tpr_at_fpr_0.01"].low > 0.9
    assert found["tpr_at_fpr_0.001"].low > 0.7


def test_a_rate_that_the_patients_are_too_few_for_is_not_a_number() -> None:
    found = membership(np.arange(50.0), np.arange(999.0))
    assert math.isfinite(found["tpr_at_fpr_0.01"].value)
    assert all(map(math.isnan, found["tpr_at_fpr_0.001"]))
    assert math.isfinite(membership(np.arange(50.0), np.arange(1000.0))["tpr_at_fpr_0.001"].value)


def test_a_reference_shows_members_whom_differences_between_patients_hide() -> None:
    rng, n = np.random.default_rng(5), 400
    difficulty, member = rng.normal(0, 8, 2 * n), np.arange(2 * n) < n
    losses = difficulty + rng.normal(0, 1, 2 * n) - 1.5 * member
    reference = difficulty + rng.normal(0, 1, 2 * n)
    found = attacks((losses[member], losses[~member]), (reference[member], reference[~member]))
    assert (found["n_members"], found["n_others"]) == (n, n)
    rates = {(row["attack"], row["measure"]): row["value"] for row in found["membership"]}
    below = auc((reference - losses)[member], (reference - losses)[~member]).value
    assert rates["loss below the public model's", "auc"] == pytest.approx(below)
    assert rates["loss", "auc"] < 0.6 < 0.7 < below
    assert {attack for attack, _ in rates} == {"loss", "loss below the public model's"}
    alone = attacks((losses[member], losses[~member]))["membership"]
    assert alone == [row for row in found["membership"] if row["attack"] == "loss"]


# --- What is refused -------------------------------------------------------------------------------------------------

COINS = np.arange(100) % 2 == 0
SCORES = np.linspace(-1, 1, 100)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("scores", "included", "delta", "message"),
    [
        (SCORES[:99], COINS, DELTA, r"included: shape \(100,\) for scores of \(99,\); give both \(m,\)"),
        (SCORES.reshape(10, 10), COINS.reshape(10, 10), DELTA, r"included: shape \(10, 10\) for scores of \(10, 10\)"),
        (SCORES, COINS.astype(int), DELTA, "included: int64 must be bool: whether each canary was in"),
        (SCORES, np.ones(100, bool), DELTA, "included: 100 of 100 are in; some must be in and some left out"),
        (SCORES, np.zeros(100, bool), DELTA, "included: 0 of 100 are in"),
        (SCORES, COINS, 1.0, r"delta: 1\.0 must be at least 0 and below 1"),
        (SCORES, COINS, -0.1, r"delta: -0\.1 must be at least 0 and below 1"),
        (SCORES, COINS, math.nan, "delta: nan must be at least 0 and below 1"),
        (np.where(SCORES > 0.95, np.nan, SCORES), COINS, DELTA, "scores: 3 of 100 are not finite; mend what"),
        (np.where(SCORES > 0.95, np.inf, SCORES), COINS, DELTA, "scores: 3 of 100 are not finite; mend what"),
    ],
)
def test_scores_that_bound_nothing_are_refused_by_name(
    bound: Bound, scores: np.ndarray, included: np.ndarray, delta: float, message: str
) -> None:
    with pytest.raises(ParameterError, match=f"^{message}"):
        bound(scores, included, delta)


def test_a_bound_that_needs_fair_coins_or_noise_says_so() -> None:
    members = np.arange(1000) < 800
    for bound in (one_run_bound, f_one_run_bound):
        with pytest.raises(ParameterError, match=r"^included: 800 of 1000 is not what fair coins give; draw who is in"):
            bound(np.arange(1000.0), members, DELTA)
    assert threshold_bound(1.0 * members, members, DELTA) > 2
    with pytest.raises(
        ParameterError, match=r"^delta: 0 holds for no Gaussian mechanism; give the delta of the ledger"
    ):
        gaussian_bound(SCORES, COINS, 0)


@pytest.mark.parametrize(("m", "guesses", "correct"), [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_guesses_that_can_not_have_been_made_are_refused(m: int, guesses: int, correct: int) -> None:
    with pytest.raises(ParameterError, match=f"^correct: {correct} of {guesses} guesses on {m} canaries; count them"):
        p_value(m, guesses, correct, 1.0, DELTA)


@pytest.mark.parametrize(
    ("n_canaries", "message"),
    [
        (0, "n_canaries: 0 don't fit into 70 parameters; take 1 to 70"),
        (71, "n_canaries: 71 don't fit into 70 parameters; take 1 to 70"),
        (61, "n_canaries: 61 exceed the plan's 60 units; take fewer"),
    ],
)
def test_canaries_that_a_plan_has_no_room_for_are_refused(n_canaries: int, message: str) -> None:
    with pytest.raises(ParameterError, match=f"^{message}"):
        canary_scores(
            noiseless(),
            [torch.zeros(70, requires_grad=True)],
            SEEDED,
            np.random.default_rng(0),
            n_canaries=n_canaries,
        )


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            lambda: auc(np.zeros(0), SCORES),
            r"members: shape \(0,\) must be \(n,\), one score a patient, of at least one",
        ),
        (lambda: auc(SCORES, np.zeros((2, 2))), r"others: shape \(2, 2\) must be \(n,\)"),
        (
            lambda: auc(SCORES, np.array([1, np.nan])),
            "others: 1 of 2 are not finite; mend what they were computed from",
        ),
        (
            lambda: true_positive_rate(SCORES, SCORES[:99], 0.01),
            r"others: 99 non-members can't show a false positive rate of 0\.01; give 100",
        ),
        (lambda: true_positive_rate(SCORES, SCORES, 0.001), r"others: 100 non-members .* of 0\.001; give 1000"),
        (lambda: true_positive_rate(SCORES, SCORES, 0.0), r"at: 0\.0 must lie between 0 and 1: a false positive rate"),
        (lambda: true_positive_rate(SCORES, SCORES, 1.0), r"at: 1\.0 must lie between 0 and 1"),
        (
            lambda: attacks((SCORES, SCORES), (SCORES, SCORES[:99])),
            r"references: \[\(100,\), \(99,\)\] must be of the same patients as the losses",
        ),
        (lambda: attacks((SCORES + np.nan, SCORES)), "members: 100 of 100 are not finite"),
        (lambda: attacks((SCORES, SCORES), (SCORES, np.full(100, np.inf))), "others: 100 of 100 are not finite"),
    ],
)
def test_attacks_without_the_patients_that_they_need_are_refused_by_name(
    attack: Callable[[], object], message: str
) -> None:
    with pytest.raises(ParameterError, match=f"^{message}"):
        attack()
