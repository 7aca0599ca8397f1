"""MS-SSIM between different patients of the same phase, and which hearts nobody has."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Volumes
from cardiac_ldm.evaluation.diversity import (
    SCALE_WEIGHTS,
    attribute_neighbours,
    mean_similarity,
    similarity_of_pairs,
)


def cohort(n_patients, spread, seed=0) -> Volumes:
    """Blobs at random places: ED and ES of one patient are the same volume."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:96, :96]
    centres = 48 + rng.uniform(-spread, spread, (n_patients, 2))
    blobs = np.stack([np.exp(-((y - a) ** 2 + (x - b) ** 2) / 200) for a, b in centres]).astype(np.float32)
    images = np.repeat(np.repeat(blobs[:, None], 13, axis=1), 2, axis=0)
    attributes = np.full((2 * n_patients, len(ATTRIBUTE_NAMES)), np.nan, np.float32)
    attributes[:, ATTRIBUTE_NAMES.index("ESED")] = np.tile([1.0, 0.0], n_patients)
    return Volumes("blobs", images, attributes, np.repeat(np.arange(n_patients), 2))


def test_only_different_patients_are_compared():
    similarity = similarity_of_pairs(cohort(9, 20), seed=0)
    assert np.isnan(np.diag(similarity)).all()
    assert np.isfinite(similarity).sum(axis=1).min() >= 8
    np.testing.assert_array_equal(similarity, similarity.T)


def test_only_the_same_phase_is_compared():
    volumes = cohort(9, 0)
    volumes.images[1::2] = 1 - volumes.images[1::2]
    similarity = similarity_of_pairs(volumes, seed=0)
    np.testing.assert_allclose(similarity[np.isfinite(similarity)], 1, atol=1e-5)


def test_similarity_is_monais_on_slices_3_to_9():
    volumes = cohort(3, 15)
    volumes.images[:] *= np.linspace(0.5, 1, 13, dtype=np.float32)[:, None, None]
    similarity = similarity_of_pairs(volumes, partners=1, seed=0)
    a, b = (torch.from_numpy(volumes.images[i, 3:10])[None] for i in (0, 2))
    expected = MultiScaleSSIMMetric(spatial_dims=2, weights=SCALE_WEIGHTS)(a, b)
    assert similarity[0, 1] == pytest.approx(float(expected), abs=1e-6)


def test_a_cohort_of_copies_is_less_diverse():
    varied, copies = (similarity_of_pairs(cohort(8, s), seed=0) for s in (25, 1))
    everyone = np.arange(8)
    assert mean_similarity(copies, everyone) > 0.9 > mean_similarity(varied, everyone) + 0.1


def test_repeated_patients_weigh_double_and_never_meet_themselves():
    similarity = np.array([[np.nan, 0.2, 0.6], [0.2, np.nan, 0.4], [0.6, 0.4, np.nan]])
    assert mean_similarity(similarity, np.array([0, 1, 2])) == pytest.approx(0.4)
    assert mean_similarity(similarity, np.array([0, 0, 1])) == pytest.approx(0.2)
    assert np.isnan(mean_similarity(similarity, np.array([1, 1, 1])))


def anatomy(n_patients, seed, spread=1.0) -> pd.DataFrame:
    """What a segmenter reads from hearts of two attributes that go together, in units of very different size."""
    rng = np.random.default_rng(seed)
    lvedv = 150 + 30 * spread * rng.standard_normal(n_patients)
    thickness = 0.008 + 0.001 * spread * rng.standard_normal(n_patients) + 1e-5 * (lvedv - 150)
    columns = {"LVEDV": lvedv, "MYOEDTHICK": thickness, "ESED": np.ones(n_patients)}
    return pd.concat(
        [
            pd.DataFrame({"patient": range(n_patients), "attribute": name, "requested": np.nan, "measured": values})
            for name, values in columns.items()
        ]
    )


def coverage(synthetic, real, size=15):
    return attribute_neighbours("coverage", synthetic, real, size=size, pairs=20, seed=0)


def recall(synthetic, real, size=15):
    return attribute_neighbours("recall", synthetic, real, size=size, pairs=20, seed=0)


def test_halves_of_one_cohort_cover_each_other_as_the_closed_form_says():
    expected = 15 / (15 + 14)  # any of a real heart's 14 + 15 others is its nearest alike
    found = []
    for seed in range(30):
        real = anatomy(30, seed)
        estimate = coverage(real, real)
        assert estimate.n_patients == 15
        found.append(estimate.value)
    assert abs(np.mean(found) - expected) < 3 * np.std(found, ddof=1) / 30**0.5
    alike = [coverage(anatomy(30, 100 + seed), anatomy(30, seed)).value for seed in range(30)]
    assert abs(np.mean(alike) - expected) < 3 * np.std(alike, ddof=1) / 30**0.5


def test_copies_of_one_heart_cover_hardly_anybody():
    real, copies = anatomy(40, 0), anatomy(40, 1, spread=0.001)
    covered = coverage(copies, real, size=20)
    assert covered.high < coverage(anatomy(40, 1), real, size=20).low
    assert covered.value < 0.1
    assert recall(copies, real, size=20).value == 0
    far = anatomy(40, 1)
    far["measured"] *= 3
    assert coverage(far, real, size=20).value == recall(far, real, size=20).value == 0


def test_hearts_that_are_all_too_ordinary_are_recalled_less_than_real_halves_are():
    real = anatomy(40, 0)
    alike, ordinary = (recall(anatomy(40, 1, spread), real, size=20) for spread in (1, 0.4))
    assert ordinary.high < alike.low
    assert abs(recall(real, real, size=20).value - alike.value) < 0.15


def test_attributes_that_do_not_go_together_cover_fewer():
    real, shuffled = anatomy(60, 0), anatomy(60, 1)
    for table in (real, shuffled):
        lvedv, thickness = (table.attribute == name for name in ("LVEDV", "MYOEDTHICK"))
        table.loc[thickness, "measured"] = table.measured[lvedv].to_numpy() / 1000
    shuffled.loc[shuffled.attribute == "LVEDV", "patient"] = np.random.default_rng(0).permutation(60)
    assert coverage(shuffled, real, size=30).high < coverage(real, real, size=30).low


def test_units_do_not_matter():
    real, synthetic = anatomy(30, 0), anatomy(30, 1)
    before = coverage(synthetic, real).value
    for table in (real, synthetic):
        table.loc[table.attribute == "MYOEDTHICK", "measured"] *= 1000
    assert coverage(synthetic, real).value == pytest.approx(before)


def test_a_synthetic_heart_that_lacks_a_structure_covers_nobody_and_a_real_one_does_not_count():
    real, broken = anatomy(30, 0), anatomy(30, 1)
    thickness = broken.attribute == "MYOEDTHICK"
    whole = coverage(broken, real).value
    broken.loc[thickness & (broken.patient < 2), "measured"] = np.nan
    assert recall(broken, real).value < 0.99
    broken.loc[thickness & (broken.patient % 3 > 0), "measured"] = np.nan
    assert coverage(broken, real).value < whole - 0.1
    broken.loc[thickness, "measured"] = np.nan
    assert coverage(broken, real).value == 0
    assert math.isnan(recall(broken, real).value)
    real.loc[thickness & (real.patient < 10), "measured"] = np.nan
    assert coverage(anatomy(30, 1), real).n_patients == coverage(real, real).n_patients == 10


def test_too_few_patients_give_no_coverage():
    assert math.isnan(coverage(anatomy(7, 1), anatomy(40, 0)).value)
    assert coverage(anatomy(8, 1), anatomy(40, 0)).n_patients == 4
    nobody = anatomy(40, 0)
    nobody.loc[nobody.attribute != "ESED", "measured"] = np.nan
    assert math.isnan(coverage(anatomy(40, 1), nobody).value)
