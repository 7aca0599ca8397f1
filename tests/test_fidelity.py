"""Distances and neighbourhoods against closed forms and other implementations; their intervals over patients."""

import warnings

import numpy as np
import pytest
import torch
from monai.metrics import FIDMetric
from prdc import compute_prdc
from scipy import linalg, stats

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation import fidelity
from cardiac_ldm.evaluation.fidelity import (
    KernelDistance,
    NeighbourMeasures,
    frechet_distance,
    frechet_infinity,
    paper_fid,
)
from cardiac_ldm.evaluation.intervals import bootstrap, half_samples

RNG = np.random.default_rng


def correlated(rng, n, d):
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize(("n", "m"), [(200, 150), (150, 400)])
def test_frechet_distance_is_scipys_and_monais(n, m):
    first, second = correlated(RNG(0), n, 20), correlated(RNG(1), m, 20)
    root = linalg.sqrtm(np.cov(first.T) @ np.cov(second.T)).real
    gap = first.mean(axis=0) - second.mean(axis=0)
    textbook = gap @ gap + np.trace(np.cov(first.T) + np.cov(second.T) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(textbook, rel=1e-9)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        monai = FIDMetric()(torch.from_numpy(first), torch.from_numpy(second))
    assert frechet_distance(first, second) == pytest.approx(float(monai), rel=1e-9)


def test_frechet_distance_with_fewer_slices_than_features():
    first, second = correlated(RNG(2), 15, 40), correlated(RNG(3), 25, 40)
    root = linalg.sqrtm(np.cov(first.T))
    overlap = np.sqrt(linalg.eigvalsh(root @ np.cov(second.T) @ root.T).clip(0)).sum()
    gap = first.mean(axis=0) - second.mean(axis=0)
    textbook = gap @ gap + np.trace(np.cov(first.T)) + np.trace(np.cov(second.T)) - 2 * overlap
    assert frechet_distance(first, second) == pytest.approx(textbook, rel=1e-4)


def test_frechet_distance_of_diagonal_gaussians_has_the_closed_form():
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
    first, second = signs * [1, 2] + [0, 0], signs * [3, 5] + [1, -2]
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + (3 - 1) ** 2 + (5 - 2) ** 2)


def test_frechet_distance_to_itself_is_zero_and_order_does_not_matter():
    first, second = RNG(0).normal(size=(420, 1280)).astype(np.float32), RNG(1).normal(size=(400, 1280))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))
    assert frechet_distance(first, first + np.float32(0.5)) == pytest.approx(1280 * 0.25, rel=1e-4)


def textbook_kid(x, y):
    """One pair at a time, straight from the definition."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    xx = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return xx + yy - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_with_one_slice_a_patient_is_the_textbooks():
    x, y = RNG(0).normal(size=(12, 5)), RNG(1).normal(0.5, size=(9, 5))
    everyone = KernelDistance(x, np.arange(12), y, np.arange(9))(np.arange(12), np.arange(9))
    assert everyone == pytest.approx(textbook_kid(x, y))
    some, others = np.array([3, 1, 7]), np.array([0, 8])
    part = KernelDistance(x, np.arange(12), y, np.arange(9))(some, others)
    assert part == pytest.approx(textbook_kid(x[some], y[others]))


def test_kid_is_zero_on_average_between_patients_alike_although_their_slices_cluster():
    rng, ours, naive = RNG(0), [], []
    for _ in range(200):
        x, y = (np.repeat(rng.normal(size=(10, 3)), 5, axis=0) + rng.normal(0, 0.1, size=(50, 3)) for _ in range(2))
        patient_index = np.repeat(np.arange(10), 5)
        ours.append(KernelDistance(x, patient_index, y, patient_index)(np.arange(10), np.arange(10)))
        slices = np.arange(50)
        naive.append(KernelDistance(x, slices, y, slices)(slices, slices))
    error = np.std(ours) / np.sqrt(len(ours))
    assert abs(np.mean(ours)) < 3 * error
    assert np.mean(naive) > 10 * error


def with_polar_root(first, second):
    """The paper's FID by another way: with S1 S2 = W P, W orthogonal and P its modulus, U s^(1/2) V' is W P^(1/2)."""
    s_1, s_2 = np.cov(first.T), np.cov(second.T)
    orthogonal, modulus = linalg.polar(s_1 @ s_2)
    values, vectors = linalg.eigh(modulus)
    root = orthogonal @ (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return np.abs(first.mean(axis=0) - second.mean(axis=0)).mean() + np.trace(s_1 + s_2 - 2 * root)


@pytest.mark.parametrize(("n", "m"), [(200, 150), (15, 25), (15, 150)])
def test_papers_fid_takes_the_root_from_the_singular_vectors(n, m):
    first, second = correlated(RNG(4), n, 20), correlated(RNG(5), m, 20)
    assert paper_fid(first, second) == pytest.approx(with_polar_root(first, second), rel=1e-5)
    assert paper_fid(first, second) == pytest.approx(paper_fid(second, first))
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    assert paper_fid(first, second) > frechet_distance(first, second)


def test_papers_fid_differs_from_the_textbooks_in_the_means_alone_where_covariances_commute():
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)
    first, second = signs * [1, 2] + [0, 0], signs * [3, 5] + [1, -2]
    assert paper_fid(first, second) == pytest.approx((1 + 2) / 2 + (3 - 1) ** 2 + (5 - 2) ** 2)


@pytest.mark.parametrize("degrees", [0, 30, 80])
def test_papers_fid_is_the_larger_where_covariances_do_not_commute(degrees):
    cosine = np.cos(np.radians(degrees))
    one, other = np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]]) / np.sqrt(2)
    first, second = np.stack([one, -one]), np.stack([other, -other])
    assert frechet_distance(first, second) == pytest.approx(2 - 2 * cosine)
    assert paper_fid(first, second) == pytest.approx(2 - 2 * cosine**1.5)


def cohorts(rng, n, d, slices):
    """Two cohorts of n patients with that many slices each, alike among themselves, whose distance is known."""
    patient_index = np.repeat(np.arange(n), slices)
    x, y = (
        np.repeat(rng.normal(size=(n, d)), slices, axis=0) * np.sqrt(0.75) + rng.normal(size=(n * slices, d)) / 2
        for _ in range(2)
    )
    return x, patient_index, 1.5 * y + 0.3, d * (0.3**2 + (1.5 - 1) ** 2)


def test_frechet_infinity_of_gaussians_is_their_distance_and_its_interval_holds_it():
    estimates, smallest, held = [], [], []
    for seed in range(25):
        x, patient_index, y, truth = cohorts(RNG(seed), 60, 4, slices=2)
        table, estimate = frechet_infinity(x, patient_index, y, patient_index, size=30, pairs=20, seed=seed)
        estimates.append(estimate.value)
        smallest.append(table.value[0])
        held.append(estimate.low < truth < estimate.high)
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 3 * error
    assert np.mean(smallest) > truth + 3 * error
    assert np.mean(held) >= 0.88
    assert estimate.high - estimate.low < 10 * np.std(estimates)


def test_frechet_infinity_of_a_cohort_with_itself_is_zero():
    x, patient_index, _, _ = cohorts(RNG(0), 120, 4, slices=3)
    table, estimate = frechet_infinity(x, patient_index, x, patient_index, size=60, pairs=20, seed=0)
    assert estimate.low < 0 < estimate.high
    whole = half_samples(
        lambda some, others: frechet_distance(x[np.isin(patient_index, some)], x[np.isin(patient_index, others)]),
        120,
        None,
        60,
        pairs=20,
        seed=0,
    )
    assert table.to_numpy()[0] == pytest.approx([60, whole.value, whole.low, whole.high])
    assert whole.low > 0


def test_frechet_infinity_is_the_intercept_of_distances_between_disjoint_parts(monkeypatch):
    seen = []

    def line(first, second):
        seen.append((sorted(first[:, 0]), sorted(second[:, 0])))
        return 7 + 30 / (len(first) / 2)

    monkeypatch.setattr(fidelity, "frechet_distance", line)
    patient_index = np.repeat(np.arange(20), 2)
    patients = patient_index[:, None].astype(float)
    table, estimate = frechet_infinity(patients, patient_index, patients, patient_index, size=9, pairs=2, seed=0)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((7, 7, 7))
    assert table.n_patients.tolist() == [9, 4, 3]
    assert table.value.tolist() == pytest.approx([7 + 30 / 9, 7 + 30 / 4, 7 + 30 / 3])
    assert [len(first) // 2 for first, _ in seen] == [9, 4, 4, 3, 3, 3] * 2
    for calls in (seen[0:1], seen[1:3], seen[3:6]):
        met = [patient for call in calls for side in call for patient in side]
        assert all(met.count(patient) == 2 for patient in met)  # the two slices of each, once


@pytest.mark.parametrize("k", [1, 4])
def test_neighbour_measures_with_one_slice_a_patient_are_prdcs(k):
    rng = RNG(0)
    synthetic, real = rng.normal(size=(60, 5)) + 0.5, rng.normal(size=(45, 5)) * 1.3
    measures = NeighbourMeasures(synthetic, np.arange(60), real, np.arange(45), k=k)
    some, others = rng.permutation(60)[:31], rng.permutation(45)[:27]
    for ours, theirs in ((np.arange(60), np.arange(45)), (some, others)):
        textbook = compute_prdc(real[theirs], synthetic[ours], nearest_k=k)
        assert measures(ours, theirs)._asdict() == pytest.approx(textbook)
        assert not {0, 1} & set(textbook.values())


def test_neighbour_measures_of_points_on_a_line():
    real, synthetic = np.arange(10.0)[:, None], np.array([[0.5], [100.0]])
    measures = NeighbourMeasures(synthetic, np.arange(2), real, np.arange(10), k=1)
    assert measures(np.arange(2), np.arange(10)) == pytest.approx((1 / 2, 1, 2 / 2, 2 / 10))


def test_more_slices_of_the_same_patients_change_no_neighbourhood():
    rng = RNG(0)
    synthetic, real = rng.normal(size=(20, 3)) + 0.5, rng.normal(size=(20, 3))
    everyone = np.arange(20)
    alone = NeighbourMeasures(synthetic, everyone, real, everyone, k=3)(everyone, everyone)
    patient_index = np.repeat(everyone, rng.integers(1, 6, 20))
    copied = NeighbourMeasures(synthetic[patient_index], patient_index, real[patient_index], patient_index, k=3)(
        everyone, everyone
    )
    assert copied == pytest.approx(alone)
    assert 0 < alone.coverage < 1
    patient_index = np.repeat(everyone, 5)
    slices = np.arange(100)
    naive = NeighbourMeasures(synthetic[patient_index], slices, real[patient_index], slices, k=3)(slices, slices)
    assert naive.coverage == naive.precision == 0


def test_density_and_coverage_of_cohorts_alike_have_the_closed_form_although_slices_cluster():
    n, m, k, ours, naive = 12, 9, 3, [], []
    for seed in range(200):
        rng = RNG(seed)
        x, y = (
            np.repeat(rng.normal(size=(size, 3)), 5, axis=0) + rng.normal(0, 0.5, size=(5 * size, 3)) for size in (m, n)
        )
        patient_index = [np.repeat(np.arange(size), 5) for size in (m, n)]
        ours.append(NeighbourMeasures(x, patient_index[0], y, patient_index[1], k=k)(np.arange(m), np.arange(n)))
        slices = np.arange(5 * m), np.arange(5 * n)
        naive.append(NeighbourMeasures(x, slices[0], y, slices[1], k=k)(*slices))
    coverage = 1 - np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    mean, error = np.mean(ours, axis=0), np.std(ours, axis=0) / np.sqrt(len(ours))
    assert abs(mean[2] - 1) < 3 * error[2]
    assert abs(mean[3] - coverage) < 3 * error[3]
    assert np.mean(naive, axis=0)[3] < coverage - 10 * error[3]


FEW, SLICES = np.zeros((1, 4)), np.zeros((6, 4))
BROKEN = np.where(np.arange(6)[:, None] == 2, np.inf, SLICES)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (FEW, "1 slices; it needs at least 2"),
        (np.zeros((6, 5)), r"\(6, 5\) and \(6, 4\); .* same encoder"),
        (np.zeros(6), r"\(6,\) and \(6, 4\)"),
        (BROKEN, "1 of 6 slices have features that aren't finite"),
        (np.where(np.isfinite(BROKEN), BROKEN, np.nan), "1 of 6"),
    ],
)
@pytest.mark.parametrize(
    ("metric", "measure"),
    [
        ("Frechet distance", frechet_distance),
        ("paper's FID", paper_fid),
        ("KID", lambda x, y: KernelDistance(x, np.arange(len(x)), y, np.arange(len(y)))),
        ("precision, recall", lambda x, y: NeighbourMeasures(x, np.arange(len(x)), y, np.arange(len(y)))),
        (
            "Frechet distance extrapolated",
            lambda x, y: frechet_infinity(x, np.arange(len(x)), y, np.arange(len(y)), size=6, pairs=2, seed=0),
        ),
    ],
)
def test_features_that_no_measure_can_take_are_named(metric, measure, first, message):
    for sides in ((first, SLICES), (SLICES, first)):
        with pytest.raises(ParameterError, match=metric) as error:
            measure(*sides)
        if sides[0] is first:
            error.match(message)


def test_too_few_patients_are_an_error_that_says_how_many():
    features, patient_index = RNG(0).normal(size=(20, 2)), np.repeat(np.arange(10), 2)
    both = features, patient_index, features + 1, patient_index
    with pytest.raises(ParameterError, match="KID: 1 patients; it needs at least 2"):
        KernelDistance(*both)(np.arange(1), np.arange(5))
    with pytest.raises(ParameterError, match="k = 5: 5 patients; it needs at least 6"):
        NeighbourMeasures(*both)(np.arange(6), np.arange(5))
    with pytest.raises(ParameterError, match="extrapolated: 5 patients; it needs at least 6"):
        frechet_infinity(*both, size=5, pairs=2, seed=0)
    with pytest.raises(ParameterError, match="extrapolated: 10 patients; it needs at least 11"):
        frechet_infinity(*both, size=11, pairs=2, seed=0)
    with pytest.raises(ParameterError, match="extrapolated: 5 patients; it needs at least 6"):
        frechet_infinity(features, patient_index, features, patient_index, size=6, pairs=2, seed=0)


def test_half_samples_of_a_mean_have_the_classical_interval():
    first, second = RNG(0).normal(0, 1, 60), RNG(1).normal(2, 2, 60)
    estimate = half_samples(lambda a, b: second[b].mean() - first[a].mean(), 60, 60, 30, pairs=4000, seed=0)
    error = np.sqrt(first.var(ddof=1) / 60 + second.var(ddof=1) / 60)
    assert estimate.value == pytest.approx(second.mean() - first.mean(), abs=0.02)
    assert estimate.high - estimate.value == pytest.approx(1.96 * error, rel=0.05)
    assert estimate.n_patients == 30


def test_half_samples_repeat_nobody_and_the_floors_parts_are_disjoint():
    def distance(a, b):
        assert len(a) == len(b) == 7
        assert len({*a, *b}) == 14
        return 0.0

    half_samples(distance, 15, None, 7, pairs=20, seed=0)


def test_floor_and_distance_of_cohorts_alike_agree():
    pool = RNG(0).normal(size=(80, 6))

    def between(x, y):
        return lambda a, b: frechet_distance(x[a], y[b])

    floor = half_samples(between(pool[:40], pool[:40]), 40, None, 20, pairs=100, seed=0)
    ours = half_samples(between(pool[40:], pool[:40]), 40, 40, 20, pairs=100, seed=0)
    assert ours.low < floor.value < ours.high
    whole = frechet_distance(pool[40:], pool[:40])
    assert floor.value > 1.3 * whole


def test_bootstrap_of_a_mean_has_the_students_interval():
    sample = RNG(0).normal(3, 2, 200)
    estimate = bootstrap(lambda patients: sample[patients].mean(), 200, resamples=2000, seed=0)
    low, high = stats.t.interval(0.95, 199, sample.mean(), stats.sem(sample))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.03)
    assert (estimate.value, estimate.n_patients) == (pytest.approx(sample.mean()), 200)
