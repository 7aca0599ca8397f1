"""MS-SSIM between different patients of the same phase."""

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric

from cardiac_ldm.evaluation.diversity import SCALE_WEIGHTS, mean_similarity, similarity_of_pairs


def cohort(n_patients, spread, seed=0):
    """Blobs at random places: ED and ES of one patient are the same volume."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:96, :96]
    centres = 48 + rng.uniform(-spread, spread, (n_patients, 2))
    blobs = np.stack([np.exp(-((y - a) ** 2 + (x - b) ** 2) / 200) for a, b in centres]).astype(np.float32)
    images = np.repeat(np.repeat(blobs[:, None], 13, axis=1), 2, axis=0)
    return images, np.repeat(np.arange(n_patients), 2), np.tile([1.0, 0.0], n_patients)


def test_only_different_patients_are_compared():
    similarity = similarity_of_pairs(*cohort(9, 20), seed=0, progress=False)
    assert np.isnan(np.diag(similarity)).all()
    assert np.isfinite(similarity).sum(axis=1).min() >= 8
    np.testing.assert_array_equal(similarity, similarity.T)


def test_only_the_same_phase_is_compared():
    images, owners, phases = cohort(9, 0)
    images[phases == 0] = 1 - images[phases == 0]
    similarity = similarity_of_pairs(images, owners, phases, seed=0, progress=False)
    np.testing.assert_allclose(similarity[np.isfinite(similarity)], 1, atol=1e-5)


def test_similarity_is_monais_on_slices_3_to_9():
    images, owners, phases = cohort(3, 15)
    images = images * np.linspace(0.5, 1, 13, dtype=np.float32)[:, None, None]
    similarity = similarity_of_pairs(images, owners, phases, partners=1, seed=0, progress=False)
    a, b = (torch.from_numpy(images[i, 3:10])[None] for i in (0, 2))
    expected = MultiScaleSSIMMetric(spatial_dims=2, weights=SCALE_WEIGHTS)(a, b)
    assert similarity[0, 1] == pytest.approx(float(expected), abs=1e-6)


def test_a_cohort_of_copies_is_less_diverse():
    varied, copies = (similarity_of_pairs(*cohort(8, s), seed=0, progress=False) for s in (25, 1))
    everyone = np.arange(8)
    assert mean_similarity(copies, everyone) > 0.9 > mean_similarity(varied, everyone) + 0.1


def test_repeated_patients_weigh_double_and_never_meet_themselves():
    similarity = np.array([[np.nan, 0.2, 0.6], [0.2, np.nan, 0.4], [0.6, 0.4, np.nan]])
    assert mean_similarity(similarity, np.array([0, 1, 2])) == pytest.approx(0.4)
    assert mean_similarity(similarity, np.array([0, 0, 1])) == pytest.approx(0.2)
    assert np.isnan(mean_similarity(similarity, np.array([1, 1, 1])))
