"""Frechet and kernel distance against closed forms and other implementations; their intervals over patients."""

import warnings

import numpy as np
import pytest
import torch
from monai.metrics import FIDMetric
from scipy import linalg, stats

from cardiac_ldm.evaluation.fidelity import KernelDistance, frechet_distance
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
        owners = np.repeat(np.arange(10), 5)
        ours.append(KernelDistance(x, owners, y, owners)(np.arange(10), np.arange(10)))
        slices = np.arange(50)
        naive.append(KernelDistance(x, slices, y, slices)(slices, slices))
    error = np.std(ours) / np.sqrt(len(ours))
    assert abs(np.mean(ours)) < 3 * error
    assert np.mean(naive) > 10 * error


def test_half_samples_of_a_mean_have_the_classical_interval():
    first, second = RNG(0).normal(0, 1, 60), RNG(1).normal(2, 2, 60)
    estimate = half_samples(
        lambda a, b: second[b].mean() - first[a].mean(), 60, 60, 30, pairs=4000, seed=0, progress=False
    )
    error = np.sqrt(first.var(ddof=1) / 60 + second.var(ddof=1) / 60)
    assert estimate.value == pytest.approx(second.mean() - first.mean(), abs=0.02)
    assert estimate.high - estimate.value == pytest.approx(1.96 * error, rel=0.05)
    assert estimate.n_patients == 30


def test_half_samples_repeat_nobody_and_the_floors_parts_are_disjoint():
    def distance(a, b):
        assert len(a) == len(b) == 7
        assert len({*a, *b}) == 14
        return 0.0

    half_samples(distance, 15, None, 7, pairs=20, seed=0, progress=False)


def test_floor_and_distance_of_cohorts_alike_agree():
    pool = RNG(0).normal(size=(80, 6))

    def between(x, y):
        return lambda a, b: frechet_distance(x[a], y[b])

    floor = half_samples(between(pool[:40], pool[:40]), 40, None, 20, pairs=100, seed=0, progress=False)
    ours = half_samples(between(pool[40:], pool[:40]), 40, 40, 20, pairs=100, seed=0, progress=False)
    assert ours.low < floor.value < ours.high
    whole = frechet_distance(pool[40:], pool[:40])
    assert floor.value > 1.3 * whole


def test_bootstrap_of_a_mean_has_the_students_interval():
    sample = RNG(0).normal(3, 2, 200)
    estimate = bootstrap(lambda patients: sample[patients].mean(), 200, resamples=2000, seed=0)
    low, high = stats.t.interval(0.95, 199, sample.mean(), stats.sem(sample))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.03)
    assert (estimate.value, estimate.n_patients) == (pytest.approx(sample.mean()), 200)
