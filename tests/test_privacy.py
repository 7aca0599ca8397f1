"""The mechanism, property by property, and its accounting against independent code."""

import csv
import json
import math
import runpy
import secrets
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from einops import repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtr
from torch import Tensor, nn

from benchmarks.volume_level import epsilon_of_group
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy import Ledger, Mechanism, PrivatePlan, Randomness, epsilon_pld, public_ledger
from cardiac_ldm.privacy.accounting import Terms, _compose, calibrate, epsilon_held, epsilon_prv, terms_of
from cardiac_ldm.privacy.dpsgd import gaussian
from cardiac_ldm.privacy.planning import propose
from cardiac_ldm.profile import Profile
from cardiac_ldm.report import verify
from cardiac_ldm.training.pretrain import random_loss

SEEDED = Randomness(0, simulated=True)
WORDS = {"stage": "denoiser", "tuned": "all", "private_data": "hospital (train)", "public_data": "acdc"}


def plan(**changes: Any) -> PrivatePlan:
    """A plan with no calibration behind it, to test the arithmetic of a step."""
    terms = {"n_patients": 50, "expected_batch": 10, "steps": 5, "clip": 0.5, "draws": 1, "epsilon": 1.0}
    return PrivatePlan(**(terms | {"delta": 1e-5, "noise_multiplier": 0.0} | changes))


def stage(noise_multiplier: float, rate: float, steps: int, name: str = "denoiser") -> Mechanism:
    """A stage of training, as a ledger lists it."""
    return Mechanism(
        stage=name,
        tuned="all",
        noise_multiplier=noise_multiplier,
        sampling_rate=rate,
        steps=steps,
        expected_batch=1,
        clip=1.0,
        draws=1,
    )


def ledger_of(*stages: Mechanism, **changes: Any) -> Ledger:
    """The ledger of these stages, without a budget."""
    terms: dict[str, Any] = {
        "n_units": 500,
        "budget": None,
        "delta": 1e-5,
        "randomness": "ChaCha20",
    }
    words = {"private_data": "hospital", "public_data": "acdc"}
    return Ledger.state(stages, **(terms | words | changes))


def by_dp_accounting(terms: Terms, delta: float, interval: float = 2e-4) -> float:
    """Epsilon of composed Poisson-subsampled Gaussian mechanisms, by Google's library and nothing of ours."""
    accountant = PLDAccountant(value_discretization_interval=interval)
    for noise_multiplier, rate, steps in terms:
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise_multiplier)), steps)
    return float(accountant.get_epsilon(delta))


# --- One unit's contribution ---------------------------------------------------------------------------------------


def roughened(network: nn.Module) -> nn.Module:
    """Move layers off their zero initialisation, so that all parameters get a gradient."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network


def networks() -> dict[str, tuple[list[nn.Parameter], Callable[[int, int, torch.Generator], Tensor]]]:
    """Small real networks: what they tune, and one unit's mean loss over its volumes and noise draws."""
    torch.manual_seed(0)
    linear = roughened(nn.Linear(6, 3))
    convolutional = roughened(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 1, 3)))
    profile = Profile.load(str(Path(__file__).parent / "tiny.yaml"))
    denoiser, adapted = profile.denoiser.build(2), profile.denoiser.build(2)
    low_rank = adapted.tunable("lora-2")

    def regression(network: nn.Module, shape: tuple[int, ...]) -> Callable[[int, int, torch.Generator], Tensor]:
        return lambda volumes, draws, source: (
            network(torch.randn(volumes * draws, *shape, generator=source)).square().mean()
        )

    def diffusion(network: Any) -> Callable[[int, int, torch.Generator], Tensor]:
        def loss(volumes: int, draws: int, source: torch.Generator) -> Tensor:
            latents = torch.randn(volumes, 2, 3, 4, 4, generator=source)
            attributes = torch.full((volumes * draws, 14), torch.nan)
            return random_loss(network, repeat(latents, "v ... -> (v k) ...", k=draws), attributes, source)

        return lambda volumes, draws, source: loss(volumes, draws, source).mean()

    return {
        "linear": (list(linear.parameters()), regression(linear, (6,))),
        "convolutions": (list(convolutional.parameters()), regression(convolutional, (1, 4, 8, 8))),
        "denoiser": (list(roughened(denoiser).parameters()), diffusion(denoiser)),
        "low-rank denoiser": (list(low_rank.values()), diffusion(roughened(adapted))),
    }


NETWORKS = networks()


@given(
    name=st.sampled_from(list(NETWORKS)),
    volumes=st.integers(1, 3),
    draws=st.integers(1, 4),
    log_scale=st.floats(-30, 38),
    log_clip=st.floats(-5, 3),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_no_unit_contributes_more_than_the_clip_whatever_its_gradient(
    name: str, volumes: int, draws: int, log_scale: float, log_clip: float, seed: int
) -> None:
    parameters, loss = NETWORKS[name]
    terms = plan(clip=10**log_clip, draws=draws)
    value = loss(volumes, draws, torch.Generator().manual_seed(seed)) * 10**log_scale
    contribution = terms.clipped(value, parameters)
    assert contribution.shape == (sum(p.numel() for p in parameters),)
    assert contribution.double().norm().item() <= terms.clip


def test_rounding_does_not_carry_a_huge_gradient_above_the_clip() -> None:
    terms, weights = plan(clip=1e-3), torch.zeros(3, requires_grad=True)
    for log_scale in np.linspace(30, 38.5, 1000):  # C over the norm ends below float32's normal numbers
        contribution = terms.clipped((weights * 10**log_scale).sum(), [weights])
        assert contribution.double().norm().item() <= terms.clip
        (row,) = terms.clipped_rows(torch.full((1, 3), 10**log_scale))
        assert row.double().norm().item() <= terms.clip


@given(log_norm=st.floats(-8, 38), log_clip=st.floats(-5, 3), size=st.integers(1, 40))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_clipping_is_the_stated_formula_and_keeps_the_direction(log_norm: float, log_clip: float, size: int) -> None:
    weights, direction = torch.zeros(size, requires_grad=True), torch.randn(size)
    gradient = direction / direction.norm() * 10**log_norm
    norm = gradient.double().norm().item()
    terms = plan(clip=10**log_clip)
    factor = min(1.0, terms.clip / norm)
    if factor > 1e-38:  # else beyond float32: nothing is contributed, or what fits
        contribution = terms.clipped((weights * gradient).sum(), [weights]).double()
        assert torch.allclose(contribution, factor * gradient.double(), rtol=1e-5, atol=0)


@given(
    patient=st.integers(0, 49),
    log_scale=st.floats(-3, 37),
    noise=st.sampled_from([0.0, 3.0]),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_neighbouring_cohorts_differ_by_at_most_the_clip_and_meet_the_same_lot(
    patient: int, log_scale: float, noise: float
) -> None:
    terms, weights = plan(noise_multiplier=noise), torch.zeros(7, requires_grad=True)
    targets = torch.randn(50, 7)
    targets[patient] *= 10**log_scale

    def gradient(with_patient: bool) -> tuple[Tensor, list[int]]:
        batch = []

        def loss(unit: int, generator: torch.Generator) -> Tensor | None:
            batch.append(unit)
            return (weights * targets[unit]).sum() if with_patient or unit != patient else None

        return terms.gradient(3, [weights], loss, SEEDED), batch

    (one, batch), (other, same_lot) = gradient(True), gradient(False)
    rounding = 2**-23 * (one.norm() + other.norm())  # of the float32 that a step is handed out in
    assert (one.double() - other.double()).norm() <= terms.clip / terms.expected_batch + rounding
    assert batch == same_lot
    assert patient in batch or torch.equal(one, other)


def test_who_else_is_in_the_lot_changes_no_ones_draws() -> None:
    weights = torch.zeros(1, requires_grad=True)

    def draws(expected_batch: int) -> dict[int, float]:
        drawn: dict[int, float] = {}

        def remember(unit: int, generator: torch.Generator) -> Tensor:
            drawn[unit] = torch.rand(1, generator=generator).item()
            return weights.sum()

        plan(expected_batch=expected_batch).gradient(2, [weights], remember, SEEDED)
        return drawn

    few, many = draws(10), draws(40)
    assert 0 < len(few) < len(many)
    assert len(set(many.values())) == len(many)
    assert all(many[unit] == value for unit, value in few.items())


def test_units_share_the_cores_of_a_cpu_and_the_gradient_is_the_same_on_any_number_of_them() -> None:
    weights, before = torch.randn(50, requires_grad=True), torch.get_num_threads()

    def on(cores: int) -> tuple[Tensor, set[int]]:
        torch.set_num_threads(cores)
        seen, together = set[int](), threading.Barrier(cores)

        def loss(unit: int, generator: torch.Generator) -> Tensor:
            if threading.get_ident() not in seen:
                seen.add(threading.get_ident())
                together.wait(timeout=60)
            assert torch.get_num_threads() == 1
            return (weights.sigmoid() * torch.randn(50, generator=generator)).sum()

        gradient = plan(expected_batch=40).gradient(2, [weights], loss, SEEDED)
        assert torch.get_num_threads() == cores
        return gradient, seen

    try:
        (one, alone), (several, shared) = on(1), on(3)
    finally:
        torch.set_num_threads(before)
    assert len(alone) == 1
    assert len(shared) == 3
    assert torch.equal(one, several)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_contributes_zero_and_nobody_is_told(
    bad: float, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    terms, weights = plan(noise_multiplier=1.0), torch.ones(3, requires_grad=True)
    assert not terms.clipped((weights * torch.tensor([1.0, bad, 1.0])).sum(), [weights]).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken = terms.gradient(1, [weights], lambda unit, generator: (weights * bad).sum(), SEEDED)
    absent = terms.gradient(1, [weights], lambda unit, generator: None, SEEDED)
    assert torch.equal(broken, absent)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# --- Sampling ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches() -> np.ndarray:
    """Bool (3000 steps, 200 patients): who joins, each with probability 0.2."""
    terms = plan(n_patients=200, expected_batch=40, steps=3000)
    return np.stack([terms.sample_batch(SEEDED.generator(step, 0)) for step in range(3000)])


def test_every_patient_joins_at_the_accounted_rate(batches: np.ndarray) -> None:
    joined = batches.sum(axis=0)
    z = (joined - 3000 * 0.2) / math.sqrt(3000 * 0.2 * 0.8)
    assert abs(z).max() < 4.5
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_lot_sizes_are_binomial(batches: np.ndarray) -> None:
    sizes, binomial = batches.sum(axis=1), stats.binom(200, 0.2)
    assert sizes.mean() == pytest.approx(40, abs=4 * binomial.std() / math.sqrt(3000))
    assert sizes.var() == pytest.approx(binomial.var(), rel=4 * math.sqrt(2 / 3000))  # a shuffled batch has none
    edges = np.array([0, 32, 35, 37, 39, 41, 43, 45, 48, 201])
    expected = 3000 * np.diff(binomial.cdf(edges - 1))
    assert stats.chisquare(np.histogram(sizes, edges)[0], expected * 3000 / expected.sum()).pvalue > 1e-3


def test_patients_join_independently_of_each_other_and_of_the_step_before(batches: np.ndarray) -> None:
    pairs = np.corrcoef(batches.T)[np.triu_indices(200, 1)] * math.sqrt(3000)
    assert abs(pairs).max() < 5.5  # of 19,900 pairs
    assert pairs.var() == pytest.approx(1, abs=0.06)
    follow = [np.corrcoef(batches[1:, p], batches[:-1, p])[0, 1] for p in range(200)]
    assert max(map(abs, follow)) * math.sqrt(2999) < 4.5


def test_the_divisor_is_the_expected_batch_whatever_the_lot() -> None:
    terms, weights = plan(clip=100.0, steps=40), torch.zeros(1, requires_grad=True)
    sizes = []
    for step in range(40):
        batch: list[int] = []

        def loss(unit: int, generator: torch.Generator, batch: list[int] = batch) -> Tensor:
            batch.append(unit)
            return weights.sum()

        gradient = terms.gradient(step, [weights], loss, SEEDED)
        assert gradient.item() == pytest.approx(len(batch) / 10, rel=1e-6)
        sizes.append(len(batch))
    assert len(set(sizes)) > 5


def test_an_empty_lot_still_takes_a_noisy_step() -> None:
    terms, weights = plan(expected_batch=1, steps=30, noise_multiplier=1.0), torch.zeros(4000, requires_grad=True)
    empty = 0
    for step in range(30):
        batch: list[int] = []
        # a loss of zero: whoever is in the lot adds nothing
        gradient = terms.gradient(step, [weights], lambda unit, _, batch=batch: batch.append(unit), SEEDED)  # type: ignore[misc]
        if not batch:
            empty += 1
            assert gradient.double().std().item() == pytest.approx(terms.clip, rel=0.06)
    assert 3 <= empty <= 20  # 36 % of 30 expected


# --- Noise ---------------------------------------------------------------------------------------------------------


def test_the_noise_is_gaussian_with_the_accounted_deviation_and_fresh_everywhere() -> None:
    size = 2**20 + 50_000  # more than one block of the noise
    terms, weights = plan(noise_multiplier=2.5, clip=0.3), torch.zeros(size, requires_grad=True)
    first, second = (terms.gradient(s, [weights], lambda unit, _: None, SEEDED).double() for s in (0, 1))
    deviation = 2.5 * 0.3 / 10
    for noise in (first, second):
        assert noise.var().item() == pytest.approx(deviation**2, rel=4 * math.sqrt(2 / size))
        assert noise.mean().item() == pytest.approx(0, abs=4 * deviation / math.sqrt(size))
        assert stats.kstest(noise[:: size // 30_000], "norm", (0, deviation)).pvalue > 1e-3
    pairs = {
        "of two steps": (first, second),
        "of neighbouring coordinates": (first[1:], first[:-1]),
        "of two blocks": (first[: size - 2**20], first[2**20 :]),
    }
    for which, (a, b) in pairs.items():
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 4 / math.sqrt(len(a)), which


def test_a_draw_of_noise_is_an_average_that_gives_no_single_draw_away() -> None:
    drawn = gaussian(50_000, 1.7, SEEDED.generator(4, 1))
    singles = SEEDED.generator(4, 1).standard_normal(300_000)
    assert drawn.std() == pytest.approx(1.7, rel=4 / math.sqrt(2 * 50_000))
    assert stats.kstest(drawn, "norm", (0, 1.7)).pvalue > 1e-3
    for scale in (1.7, 1.7 / 2, 1.0):
        assert not np.isin(drawn, scale * singles).any()
    assert abs(np.corrcoef(drawn, singles[1:50_001])[0, 1]) < 0.55  # a quarter of the variance, not all of it


# --- Randomness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "block", "stream"),
    [
        (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
        (bytes(32), 1, "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"),
        (bytes(31) + b"\x01", 1, "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"),
        (b"\x00\xff" + bytes(30), 2, "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"),
    ],
)
def test_the_generator_is_chacha20_as_in_rfc_8439_keyed_by_256_bits_of_the_system(
    key: bytes, block: int, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = []

    def system(bits: int) -> int:
        requested.append(bits)
        return int.from_bytes(key, "little")

    monkeypatch.setattr(secrets, "randbits", system)
    raw: Any = Randomness(None, simulated=False).generator(0, 0).bit_generator
    keystream = raw.random_raw(8 * (block + 1)).astype("<u8").tobytes()
    assert keystream[64 * block :][:32].hex() == stream  # appendix A.1 of the RFC
    assert requested == [256]


def test_a_seed_for_real_patients_is_refused() -> None:
    with pytest.raises(PrivacyError, match="seed: 3 would make the noise on real private patients reproducible"):
        Randomness(3, simulated=False)
    assert "operating system's entropy" in str(Randomness(None, simulated=False))
    assert "seed 3: simulated patients only" in str(Randomness(3, simulated=True))


def test_the_systems_entropy_never_repeats_itself() -> None:
    real = Randomness(None, simulated=False)
    assert len({real.generator(0, 0).random() for _ in range(100)}) == 100
    weights, terms = torch.zeros(5, requires_grad=True), plan(noise_multiplier=1.0)
    steps = [terms.gradient(0, [weights], lambda unit, _: None, real) for _ in range(2)]
    assert not (steps[0] == steps[1]).any()


def test_a_seed_repeats_each_step_and_purpose_and_no_other() -> None:
    first, again, other = Randomness(7, simulated=True), Randomness(7, simulated=True), Randomness(8, simulated=True)
    places = [(step, purpose) for step in range(12) for purpose in range(12)]  # 1/11 and 11/1 are not the same
    values = {place: first.generator(*place).random() for place in places}
    assert all(again.generator(*place).random() == value for place, value in reversed(values.items()))
    assert len(set(values.values()) | {other.generator(*place).random() for place in places}) == 2 * len(places)


# --- Accounting ----------------------------------------------------------------------------------------------------


def random_settings(rng: np.random.Generator) -> tuple[dict[str, Any], float]:
    """Settings of a plan that somebody might run, and the noise multiplier that mu-GDP would give it."""
    while True:
        n = round(math.exp(rng.uniform(math.log(100), math.log(30_000))))
        batch = max(1, round(n * math.exp(rng.uniform(math.log(0.003), math.log(0.5)))))
        steps, epsilon = int(5000 * rng.random() ** 4) + 1, math.exp(rng.uniform(math.log(0.2), math.log(20)))
        delta = 10 ** rng.uniform(-3, -0.1) / n

        def excess(mu: float, epsilon: float = epsilon, delta: float = delta) -> float:
            return ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta

        mu = brentq(excess, 1e-3, 30)
        noise = math.log1p((mu * n / batch) ** 2 / steps) ** -0.5  # mu^2 = steps q^2 (exp(1 / sigma^2) - 1)
        costly = noise < 1.2 or math.sqrt(steps) > 40 * epsilon  # to account for: most of these are left out
        if 0.003 <= batch / n <= 0.5 and 0.5 <= noise <= 500 and (not costly or rng.random() < 0.12):
            break
    return {"epsilon": epsilon, "delta": delta, "n_patients": n, "expected_batch": batch, "steps": steps}, noise


@pytest.mark.slow
def test_the_stated_epsilon_of_200_random_plans_is_dp_accountings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cardiac_ldm.privacy.accounting.epsilon_rdp", lambda terms, delta: math.inf)  # not asked here
    rng, ratios = np.random.default_rng(2024), []
    for number in range(200):
        terms, noise = random_settings(rng)
        if number < 10:
            private = PrivatePlan.for_budget(**terms, clip=1.0, draws=1)
            stated = private.ledger(SEEDED, **WORDS)
        else:
            private = PrivatePlan(**terms, clip=1.0, draws=1, noise_multiplier=noise)
            this = stage(noise, private.sampling_rate, private.steps)
            stated = ledger_of(this, delta=private.delta, n_units=private.n_patients)
        used = (private.noise_multiplier, private.sampling_rate, private.steps)
        assert stated.mechanisms[0].noise_multiplier == private.noise_multiplier
        interval = 2e-4 if used[0] > 1 else 4e-4  # ours is 1e-4
        ratios.append(stated.epsilon / by_dp_accounting((used,), private.delta, interval))
        assert 0.995 <= ratios[-1] <= 1.015, terms
    assert len(ratios) == 200


@pytest.mark.parametrize(
    ("batch", "epochs", "epsilon", "sigma"),
    [  # N = 5,000, delta = 1e-5
        (256, 30, 1, 4.745),  # dp-accounting PLD (Opacus' PRV search stops anywhere within 0.01 of epsilon)
        (256, 30, 3, 1.921),  # Opacus PRV get_noise_multiplier
        (256, 30, 10, 0.917),  # Opacus PRV get_noise_multiplier
        (1024, 150, 10, 2.885),  # Opacus PRV get_noise_multiplier
    ],
)
def test_the_noise_of_a_budget_is_opacus_and_googles(batch: int, epochs: int, epsilon: float, sigma: float) -> None:
    found = calibrate(epsilon, 1e-5, batch / 5000, round(epochs * 5000 / batch))
    assert found == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.5, 0.3, 60), (4.0, 0.2, 200)])
def test_noise_and_epsilon_answer_each_other(epsilon: float, rate: float, steps: int) -> None:
    sigma = calibrate(epsilon, 1e-5, rate, steps)
    spent = epsilon_prv(((sigma, rate, steps),), 1e-5, epsilon)
    assert 0.995 * epsilon <= spent <= epsilon
    assert epsilon_prv(((0.99 * sigma, rate, steps),), 1e-5, epsilon) > epsilon


def test_without_privacy_the_ledger_promises_nothing(tmp_path: Path) -> None:
    terms = PrivatePlan.for_budget(math.inf, 1e-5, n_patients=100, expected_batch=10, steps=2, clip=1, draws=1)
    ledger = terms.ledger(SEEDED, **WORDS)
    assert (ledger.guarantee, ledger.epsilon) == ("none", math.inf)
    assert plan(noise_multiplier=0.0).ledger(SEEDED, **WORDS).guarantee == "none"  # whatever the budget says
    ledger.save(tmp_path / "privacy.json")
    assert Ledger.load(tmp_path / "privacy.json") == ledger


def test_a_model_without_its_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="no ledger"):
        Ledger.load(tmp_path / "privacy.json")
    public_ledger("acdc").save(tmp_path / "privacy.json")
    assert Ledger.load(tmp_path / "privacy.json").guarantee == "public data only"


def test_a_ledger_asks_each_accountant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compose(accountant: Any, *given: Any) -> float:
        asked.append(type(accountant).__name__)
        return _compose(accountant, *given)

    monkeypatch.setattr("cardiac_ldm.privacy.accounting._compose", compose)
    ledger_of(stage(3.14, 0.15, 9))
    assert sorted(asked) == ["PLDAccountant", "RdpAccountant"]


def test_accountants_that_disagree_make_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = stage(2.0, 0.1, 20)
    assert ledger_of(honest).guarantee == "patient-level DP"
    for factor in (0.98, 1.02):
        monkeypatch.setattr(
            "cardiac_ldm.privacy.accounting.epsilon_prv",
            lambda terms, delta, scale, factor=factor: factor * epsilon_pld(terms, delta),
        )
        with pytest.raises(PrivacyError, match=r"PRV says .* and PLD .*: they disagree, so no claim"):
            ledger_of(honest)


def test_a_small_budget_over_many_steps_is_held_against_a_grid_that_is_fine_enough(tmp_path: Path) -> None:
    many = plan(epsilon=0.1, n_patients=4000, expected_batch=51, steps=2344, noise_multiplier=19.3)
    honest = many.ledger(SEEDED, **WORDS)
    assert honest.epsilon == 0.1
    assert epsilon_pld(terms_of(honest.mechanisms), 1e-5, 1e-3) > 0.11  # what a coarse one rounds up to
    honest.save(tmp_path / "privacy.json")
    assert Ledger.load(tmp_path / "privacy.json") == honest
    said = json.loads((tmp_path / "privacy.json").read_text())
    assert not [*verify.spent(said)]
    assert [*verify.spent(said | {"simulated": False})] == [
        "it doesn't say what all models of these patients spent together"  # of real patients a record counts them
    ]
    less = said | {"epsilon": 0.09}
    assert "that is stated" in next(verify.spent(less))
    (tmp_path / "privacy.json").write_text(json.dumps(less))
    with pytest.raises(PrivacyError, match="epsilon isn't what it was written for"):
        Ledger.load(tmp_path / "privacy.json")


def test_a_grid_is_refined_where_rounding_may_be_all_that_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    many = stage(20.0, 0.0128, 2344)
    for spent, found in ((0.3, 0.302), (0.1, 0.1002)):
        monkeypatch.setattr(
            "cardiac_ldm.privacy.accounting.epsilon_pld",
            lambda terms, delta, interval=1e-4, spent=spent: spent + 20 * interval,
        )
        assert epsilon_held(terms_of([many]), 1e-5, 0.1) == pytest.approx(found)  # 0.302 is above, whatever the grid
    monkeypatch.setattr("cardiac_ldm.privacy.accounting.epsilon_prv", lambda terms, delta, scale: 0.1)
    assert ledger_of(many).epsilon_pld == pytest.approx(0.1002)


def test_a_plan_that_would_exceed_its_budget_makes_no_claim() -> None:
    with pytest.raises(PrivacyError, match=r"would be spent, above the budget of 1\.0; no claim"):
        plan(noise_multiplier=1.0).ledger(SEEDED, **WORDS)


# --- Composition ---------------------------------------------------------------------------------------------------


def test_two_stages_share_one_budget() -> None:
    terms: dict[str, Any] = {
        "delta": 1e-5,
        "n_patients": 400,
        "expected_batch": 40,
        "steps": 200,
        "clip": 1.0,
        "draws": 1,
    }
    first = plan(**terms, noise_multiplier=6.0, epsilon=2.0).ledger(SEEDED, **(WORDS | {"stage": "decoder"}))
    alone = PrivatePlan.for_budget(4.0, **terms)
    second = PrivatePlan.for_budget(4.0, before=first.mechanisms, **terms)
    both = second.ledger(SEEDED, **WORDS)
    assert [m.stage for m in both.mechanisms] == ["decoder", "denoiser"]
    assert second.noise_multiplier > alone.noise_multiplier
    assert both.epsilon == pytest.approx(4.0, rel=0.005)
    spent = by_dp_accounting(tuple((m.noise_multiplier, m.sampling_rate, m.steps) for m in both.mechanisms), 1e-5)
    assert 0.985 * 4.0 <= spent <= 4.0


def test_a_budget_that_is_spent_already_leaves_nothing_for_another_stage() -> None:
    before = (stage(2.0, 0.2, 60, "decoder"),)
    with pytest.raises(ParameterError, match=r"epsilon: 2\.0 is spent before this stage begins"):
        PrivatePlan.for_budget(2.0, 1e-5, n_patients=400, expected_batch=40, steps=30, clip=1.0, draws=1, before=before)


def test_models_of_the_same_patients_compose() -> None:
    one, other = stage(3.0, 0.1, 30), stage(4.0, 0.2, 20)
    both = Ledger.compose([ledger_of(one), ledger_of(other)])
    truth = by_dp_accounting(((3.0, 0.1, 30), (4.0, 0.2, 20)), 1e-5)
    assert 0.995 * truth <= both.epsilon <= 1.015 * truth
    assert max(ledger_of(one).epsilon, ledger_of(other).epsilon) < both.epsilon
    assert both.epsilon < ledger_of(one).epsilon + ledger_of(other).epsilon
    stricter = ledger_of(other, delta=1e-7, n_units=501)  # whatever each states, they are charged at one delta
    assert Ledger.compose([ledger_of(one), stricter]).epsilon == pytest.approx(
        by_dp_accounting(((3.0, 0.1, 30), (4.0, 0.2, 20)), 1e-7), rel=0.015
    )


def test_ledgers_about_other_patients_do_not_compose() -> None:
    one = ledger_of(stage(2.0, 0.1, 20))
    other = one.model_copy(update={"private_data": "clinic"})
    with pytest.raises(PrivacyError, match="private_data: clinic and hospital: these ledgers don't compose"):
        Ledger.compose([one, other])


# --- What a claim about volumes means ------------------------------------------------------------------------------


def epsilon_by_fourier(sigma: float, rate: float, steps: int, delta: float, size: int) -> float:
    """Epsilon of `size` units together, from scratch: the privacy loss on a grid, composed by Fourier transform.

    With them a step adds Binomial(size, rate) clips to its noise, without them none (arXiv 2401.10294).
    """
    half, bins, members = 40.0, 2**17, np.arange(size + 1)[:, None]
    grid, width = np.linspace(-half, half, bins, endpoint=False), 2 * half / bins
    edges = np.linspace(-14 * sigma, 14 * sigma + size, 100_001)
    middle, weight = (edges[1:] + edges[:-1]) / 2, stats.binom.pmf(members, size, rate)
    loss = logsumexp((2 * members * middle - members**2) / (2 * sigma**2), axis=0, b=weight)
    with_them = sum(w * np.diff(stats.norm.cdf(edges, k, sigma)) for k, w in enumerate(weight.flatten()))
    found = 0.0
    for losses, probability in ((loss, with_them), (-loss, np.diff(stats.norm.cdf(edges, 0, sigma)))):
        below, part = np.divmod((losses + half) / width, 1)
        at = below.astype(int)
        mass = np.bincount(at, probability * (1 - part), bins) + np.bincount(at + 1, probability * part, bins)
        total = np.roll(np.fft.irfft(np.fft.rfft(np.roll(mass, -bins // 2)) ** steps, bins), bins // 2)

        def excess(epsilon: float, total: np.ndarray = total) -> float:
            return float((total * -np.expm1(np.minimum(epsilon - grid, 0))).sum() - delta)

        found = max(found, brentq(excess, 0, 0.9 * half, xtol=1e-5))
    return found


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "size"), [(3.0, 0.1, 200, 1), (3.0, 0.1, 200, 2), (3.0, 0.05, 200, 3)]
)
def test_the_epsilon_of_a_group_agrees_with_a_computation_from_scratch(
    sigma: float, rate: float, steps: int, size: int
) -> None:
    found = epsilon_of_group(sigma, rate, steps, 1e-5, size)
    assert found == pytest.approx(epsilon_by_fourier(sigma, rate, steps, 1e-5, size), rel=1e-3)


def test_a_group_of_one_is_a_unit_and_a_group_that_always_joins_is_a_larger_step() -> None:
    unit = (2.0, 0.1, 100)
    assert epsilon_of_group(*unit, 1e-5, 1) == pytest.approx(epsilon_pld((unit,), 1e-5), rel=1e-3)
    assert epsilon_of_group(20.0, 1.0, 100, 1e-5, 2) == pytest.approx(
        by_dp_accounting(((10.0, 1.0, 100),), 1e-5, 1e-3), rel=1e-3
    )


@pytest.mark.parametrize(("sigma", "per_volume", "per_patient"), [(0.9905, 9.26, 22.3), (5.703, 0.91, 1.95)])
def test_two_volumes_cost_a_patient_more_than_twice_the_stated_epsilon(
    sigma: float, per_volume: float, per_patient: float
) -> None:
    rate, steps = 256 / 20_000, round(150 * 20_000 / 256)  # 20,000 volumes, lots of 256, 150 epochs, delta = 1e-5
    assert by_dp_accounting(((sigma, rate, steps),), 1e-5, 4e-4) == pytest.approx(per_volume, rel=0.005)
    assert epsilon_of_group(sigma, rate, steps, 1e-5, 2) == pytest.approx(per_patient, rel=0.01)


def test_what_an_earlier_version_wrote_is_read_and_a_claim_about_volumes_is_not(tmp_path: Path) -> None:
    ledger, path = ledger_of(stage(2.0, 0.1, 20), n_units=10), tmp_path / "privacy.json"
    written = ledger.model_dump(mode="json") | {"unit": "patient", "epsilon_patient": ledger.epsilon}
    written["mechanisms"][0]["clipping"] = "fixed"
    path.write_text(json.dumps(written))
    assert Ledger.load(path) == ledger
    path.write_text(json.dumps(written | {"unit": "volume", "guarantee": "volume-level DP"}))
    with pytest.raises(PrivacyError, match="guarantee is missing or wrong"):
        Ledger.load(path)


def test_a_ledger_is_of_patients_with_all_their_volumes() -> None:
    ledger = ledger_of(stage(2.0, 0.1, 20))
    assert ledger.epsilon_rdp >= ledger.epsilon >= ledger.epsilon_pld
    assert ledger.adjacency == (
        "zero-out: one patient with all volumes, or an empty place instead; there are 500 places, fixed and public"
    )


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0}, r"epsilon: 0 must be above 0 \(inf trains without privacy\)"),
        ({"epsilon": -1.0}, r"epsilon: -1\.0 must be above 0"),
        ({"epsilon": math.nan}, "epsilon: nan must be above 0"),
        ({"delta": 0.0}, r"delta: 0\.0 must lie between 0 and 1/N = 1/100"),
        ({"delta": 0.01}, r"delta: 0\.01 must lie between 0 and 1/N = 1/100"),
        ({"delta": 0.02}, r"delta: 0\.02 must lie between 0 and 1/N"),
        ({"delta": math.nan}, "delta: nan must lie between 0 and 1/N"),
        ({"n_patients": 5}, "expected_batch: 10 must be 1 to N = 5"),
        ({"n_patients": 9}, "expected_batch: 10 must be 1 to N = 9"),
        ({"n_patients": 0}, "expected_batch: 10 must be 1 to N = 0"),
        ({"expected_batch": 0}, "expected_batch: 0 must be 1 to N = 100"),
        ({"draws": 0}, "draws: 0 must be at least 1"),
        ({"clip": 0}, "clip: 0 must be a positive number"),
        ({"clip": -1.0}, r"clip: -1\.0 must be a positive number"),
        ({"clip": math.inf}, "clip: inf must be a positive number"),
        ({"clip": math.nan}, "clip: nan must be a positive number"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    terms: dict[str, Any] = {
        "epsilon": 1,
        "delta": 1e-5,
        "n_patients": 100,
        "expected_batch": 10,
        "steps": 2,
        "clip": 1,
        "draws": 1,
    }
    with pytest.raises(ParameterError, match=f"^{message}"):
        PrivatePlan.for_budget(**(terms | changes))


@pytest.mark.parametrize("changes", [{"noise_multiplier": -1.0}, {"noise_multiplier": math.nan}])
def test_a_plan_written_by_hand_is_checked_alike(changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"^{next(iter(changes))}: "):
        plan(**changes)


@pytest.mark.parametrize("step", [-1, 5, 6])
def test_a_step_that_is_not_accounted_for_is_refused(step: int) -> None:
    weights = torch.zeros(1, requires_grad=True)
    with pytest.raises(PrivacyError, match=f"step: {step} is not one of the 5 that the ledger accounts for"):
        plan().gradient(step, [weights], lambda unit, generator: weights.sum(), SEEDED)


def test_a_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"epsilon: 0\.01 can't be reached in 100000000 steps; ask for fewer"):
        calibrate(0.01, 1e-9, 0.5, 10**8)


# --- Planning ------------------------------------------------------------------------------------------------------

OFFER: dict[str, Any] = {"n_patients": 80, "n_parameters": 10_000, "hours": 0.3, "seconds_per_patient": 0.9}


def test_proposals_fill_the_hours_and_come_in_the_order_of_their_signal() -> None:
    table = propose(1.0, 1e-5, **OFFER)
    assert set(table.expected_batch) == {16, 32}  # 1,200 gradients; 64 would be 18 steps
    assert (table.expected_batch * table.steps <= 1200).all()
    assert (table.expected_batch * (table.steps + 1) > 1200).all()
    noise = table.noise_multiplier * math.sqrt(10_000)  # the norm of N(0, sigma^2 I) in 10,000 dimensions
    assert table.signal_to_noise.tolist() == pytest.approx((table.expected_batch / noise).tolist())
    assert table.of_run.tolist() == pytest.approx((table.signal_to_noise * table.steps**0.5).tolist())
    assert table.of_run.is_monotonic_increasing
    for sigma, batch, steps in table[["noise_multiplier", "expected_batch", "steps"]].itertuples(index=False):
        spent = epsilon_pld(((float(sigma), batch / OFFER["n_patients"], int(steps)),), 1e-5)
        assert 0.99 < spent <= 1.0


def test_everybody_in_every_step_is_proposed_too() -> None:
    table = propose(1.0, 1e-5, **(OFFER | {"n_patients": 31}))
    assert table[["expected_batch", "steps"]].to_numpy().tolist() == [[31, 38]]
    assert set(propose(1.0, 1e-5, **(OFFER | {"hours": 0.7})).expected_batch) == {16, 32, 80}


@pytest.mark.parametrize(("changes", "fewest"), [({"hours": 0.1}, 16), ({"n_patients": 31, "hours": 0.1}, 31)])
def test_too_few_hours_are_one_sentence(changes: dict[str, Any], fewest: int) -> None:
    with pytest.raises(ParameterError, match=rf"hours: .* hold .* gradients of .* 30 steps of {fewest} are") as raised:
        propose(3.0, 1e-5, **(OFFER | changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["epsilon", *OFFER])
def test_an_offer_that_is_no_positive_number_is_named(name: str, wrong: float) -> None:
    with pytest.raises(ParameterError, match=f"{name}: {wrong} must be a positive number"):
        propose(**({"epsilon": 1.0, "delta": 1e-5} | OFFER | {name: wrong}))


def test_planning_is_a_command_that_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "cardiac_ldm.privacy.__main__"
    requested = "--epsilon 1 --n-patients 60 --n-parameters 10000 --hours 0.2 --seconds-per-patient 0.9"
    monkeypatch.setattr(sys, "argv", [module, "plan", *requested.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("cardiac_ldm.privacy", run_name="__main__")
    assert not ended.value.code
    head, row, _, what, columns, three, *_ = capsys.readouterr().out.splitlines()
    assert what.startswith("Several runs of the last line")
    assert columns.split() == ["runs", "composed", "selected", "one_run"]
    assert three.split()[0] == "3"
    assert "noise_multiplier" in head
    assert next(csv.reader([row.strip()], delimiter=" ", skipinitialspace=True))[:2] == ["16", "50"]
