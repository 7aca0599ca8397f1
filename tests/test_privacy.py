"""The mechanism, property by property, and its accounting against independent code."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness, epsilon_pld, public_ledger

SEEDED = Randomness(0, simulated=True)


def plan(**changes: float) -> PrivatePlan:
    """A plan with no calibration behind it, to test the arithmetic of a step."""
    terms = {"n_patients": 50, "expected_batch": 10, "steps": 5, "clip": 0.5, "draws": 1, "epsilon": 1.0}
    return PrivatePlan(**(terms | {"delta": 1e-5, "noise_multiplier": 0.0} | changes))  # type: ignore[arg-type]


def loss_of(weights: Tensor, targets: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """Each patient pulls the weights to a target of their own."""
    return lambda patient, generator: (weights * targets[patient]).sum()


@given(scale=st.floats(1e-6, 1e6), clip=st.floats(1e-3, 1e3), size=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_no_patient_contributes_more_than_the_clip(scale: float, clip: float, size: int) -> None:
    weights = torch.zeros(size, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = scale * (weights[0].sum() - 3 * weights[1].sum())
    contribution = plan(clip=clip).clipped(loss, weights)
    norm = torch.cat([part.flatten() for part in contribution]).double().norm().item()
    assert norm <= clip * (1 + 1e-5)
    before = scale * math.sqrt(size + 18)
    assert norm == pytest.approx(min(before, clip), rel=1e-4)


@given(patient=st.integers(0, 49), scale=st.sampled_from([1e-3, 1.0, 1e4, math.inf, math.nan]))
@settings(deadline=None, max_examples=30)
def test_neighbouring_cohorts_differ_by_at_most_the_clip(patient: int, scale: float) -> None:
    weights, targets = torch.zeros(7, requires_grad=True), torch.randn(50, 7)
    changed = targets.clone()
    changed[patient] *= scale
    terms = plan()
    first = terms.gradient(3, [weights], loss_of(weights, targets), SEEDED)[0]
    second = terms.gradient(3, [weights], loss_of(weights, changed), SEEDED)[0]
    # replacing one patient is one removal and one addition
    assert (first - second).norm() <= 2 * terms.clip / terms.expected_batch + 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_contributes_zero(bad: float) -> None:
    weights = torch.ones(3, requires_grad=True)
    assert not plan().clipped((weights * bad).sum(), [weights])[0].any()


def test_one_patients_draws_do_not_depend_on_who_else_is_in_the_lot() -> None:
    drawn: dict[int, float] = {}
    weights = torch.zeros(1, requires_grad=True)

    def remember(patient: int, generator: torch.Generator) -> Tensor:
        drawn.setdefault(patient, torch.rand(1, generator=generator).item())
        return weights.sum()

    plan(n_patients=50).gradient(2, [weights], remember, SEEDED)
    alone = dict(drawn)
    drawn.clear()
    plan(n_patients=50, expected_batch=40).gradient(2, [weights], remember, SEEDED)
    assert alone
    assert all(drawn[patient] == value for patient, value in alone.items())


def test_lots_are_poisson() -> None:
    terms = plan(n_patients=200, expected_batch=40)
    lots = [terms.sample_lot(SEEDED.generator(step, 0)) for step in range(2000)]
    sizes = torch.tensor([float(len(lot)) for lot in lots])
    # Binomial(200, 0.2): mean 40, standard deviation 5.66; a shuffled batch has none
    assert sizes.mean() == pytest.approx(40, abs=4 * 5.66 / 2000**0.5)
    assert sizes.std() == pytest.approx(5.66, rel=0.06)
    joined = torch.bincount(torch.tensor([p for lot in lots for p in lot]), minlength=200) / 2000
    assert (joined - 0.2).abs().max() < 5 * math.sqrt(0.16 / 2000)
    assert all(len(set(lot)) == len(lot) for lot in lots)


def test_the_divisor_is_the_expected_batch_whatever_the_lot() -> None:
    terms, weights = plan(clip=100.0), torch.zeros(1, requires_grad=True)
    for step in range(5):
        n = len(terms.sample_lot(SEEDED.generator(step, 0)))
        gradient = terms.gradient(step, [weights], lambda patient, generator: weights.sum(), SEEDED)[0]
        assert gradient.item() == pytest.approx(n / terms.expected_batch, rel=1e-5)


def test_an_empty_lot_still_takes_a_noisy_step() -> None:
    terms = plan(n_patients=10**6, expected_batch=1e-9, noise_multiplier=1.0)
    weights = torch.zeros(1000, requires_grad=True)

    def nobody(patient: int, generator: torch.Generator) -> Tensor:
        raise AssertionError("nobody is in an empty lot")

    gradient = terms.gradient(0, [weights], nobody, SEEDED)[0]
    assert (gradient * terms.expected_batch).std() == pytest.approx(terms.clip, rel=0.1)


def test_the_noise_has_the_accounted_deviation_and_is_fresh_each_step() -> None:
    terms, weights = plan(noise_multiplier=2.5), torch.zeros(40_000, requires_grad=True)
    noises = [terms.gradient(s, [weights], lambda p, g: (0 * weights).sum(), SEEDED)[0] for s in (0, 1)]
    for noise in noises:
        assert noise.std() * terms.expected_batch == pytest.approx(2.5 * terms.clip, rel=0.02)
    assert torch.corrcoef(torch.stack(noises))[0, 1].abs() < 0.03


def test_a_seed_for_real_patients_is_refused() -> None:
    with pytest.raises(PrivacyError, match="seed: 3"):
        Randomness(3, simulated=False)


def test_the_systems_entropy_never_repeats_itself() -> None:
    real = Randomness(None, simulated=False)
    draws = {torch.rand(1, generator=real.generator(0, 0)).item() for _ in range(20)}
    assert len(draws) == 20


@pytest.mark.parametrize("epsilon", [0.5, 1, 10])
def test_a_plan_spends_its_budget_and_no_more(epsilon: float) -> None:
    terms = PrivatePlan.for_budget(epsilon, 1e-5, n_patients=480, expected_batch=48, steps=20, clip=0.3, draws=1)
    spent = epsilon_pld(terms.noise_multiplier, terms.sampling_rate, terms.steps, terms.delta)
    assert 0.985 * epsilon <= spent <= 1.005 * epsilon
    ledger = terms.ledger(SEEDED, tuned="all", private_data="a", public_data="b")
    assert ledger.epsilon >= spent
    assert ledger.epsilon == pytest.approx(epsilon, rel=0.005)
    assert ledger.unit == "patient"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0}, "epsilon: 0 must be above 0"),
        ({"epsilon": math.nan}, "epsilon: nan must be above 0"),
        ({"delta": 0.01}, "delta: 0.01 must lie between 0 and 1/N = 1/100"),
        ({"n_patients": 5}, "expected_batch: 10 must be below N = 5"),
        ({"draws": 0}, "draws: 0"),
        ({"clip": 0}, "clip: 0"),
        ({"clip": math.inf}, "clip: inf"),
        ({"steps": 0}, "steps: 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes: dict[str, float], message: str) -> None:
    terms = {"epsilon": 1, "delta": 1e-5, "n_patients": 100, "expected_batch": 10, "steps": 2, "clip": 1, "draws": 1}
    with pytest.raises(ParameterError, match=message):
        PrivatePlan.for_budget(**(terms | changes))  # type: ignore[arg-type]


def test_without_privacy_the_ledger_promises_nothing(tmp_path) -> None:
    terms = PrivatePlan.for_budget(math.inf, 1e-5, n_patients=100, expected_batch=10, steps=2, clip=1, draws=1)
    ledger = terms.ledger(SEEDED, tuned="all", private_data="a", public_data="b")
    assert ledger.guarantee == "none"
    ledger.save(tmp_path / "privacy.json")
    assert Ledger.load(tmp_path / "privacy.json") == ledger


def test_a_model_without_its_ledger_is_refused(tmp_path) -> None:
    with pytest.raises(PrivacyError, match="no ledger"):
        Ledger.load(tmp_path / "privacy.json")
    public_ledger("acdc").save(tmp_path / "privacy.json")
    assert Ledger.load(tmp_path / "privacy.json").guarantee == "public data only"


def test_accountants_that_disagree_make_no_claim() -> None:
    honest = PrivatePlan.for_budget(1, 1e-5, n_patients=480, expected_batch=48, steps=20, clip=0.3, draws=1)
    terms = PrivatePlan(**(honest.__dict__ | {"noise_multiplier": honest.noise_multiplier / 2}))
    with pytest.raises(PrivacyError, match="no claim"):
        terms.ledger(SEEDED, tuned="all", private_data="a", public_data="b")
