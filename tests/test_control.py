"""What's measured beside what was asked for, the guard, and the tidy metrics."""

import json
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation.control import agreement, phase_accuracy, phase_order, read_anatomy
from cardiac_ldm.evaluation.metrics import Metrics, compare, measure, measure_real

VOXEL_ML = np.prod(GRID.spacing_mm) / 1000
GREY = np.array([0.0, 0.25, 0.5, 1.0], np.float32)


class ByGrey(nn.Module):
    """A segmenter that's always right on images whose grey value is the label's."""

    def forward(self, images):
        return -(images[:, None] - torch.from_numpy(GREY)[None, :, None, None, None]).abs()


class ByCavity(nn.Module):
    """A classifier that calls a volume with more than 4,000 bright voxels end-diastolic."""

    def forward(self, images):
        full = (images > 0.9).sum(dim=(1, 2, 3)) - 4000.0
        return torch.stack([-full, full], dim=1)


BY_GREY: Any = ByGrey()
BY_CAVITY: Any = ByCavity()


def hearts(n_patients, seed=0) -> tuple[Any, Any, Any]:
    """Square hearts of known volumes, and attributes that tell them exactly."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((2 * n_patients, 13, 96, 96), np.uint8)
    attributes = np.full((2 * n_patients, 14), np.nan, np.float32)
    for patient in range(n_patients):
        for row, esed, widths in ((2 * patient, 1, (26, 34)), (2 * patient + 1, 0, (12, 20))):
            width = rng.integers(*widths)
            labels[row, 2:11, 20 : 24 + width, 40 : 44 + width] = 2
            labels[row, 2:11, 22 : 22 + width, 42 : 42 + width] = 3
            labels[row, 2:11, 22 : 22 + width, 10 : 10 + rng.integers(10, 28)] = 1
            attributes[row, ATTRIBUTE_NAMES.index("ESED")] = esed
        ed, es = labels[2 * patient], labels[2 * patient + 1]
        for name, volume, label in (("LVEDV", ed, 3), ("LVESV", es, 3), ("RVEDV", ed, 1), ("RVESV", es, 1)):
            value = (volume == label).sum() * VOXEL_ML
            attributes[2 * patient : 2 * patient + 2, ATTRIBUTE_NAMES.index(name)] = value
    return GREY[labels], attributes, np.repeat(np.arange(n_patients), 2)


def patients(role="public", simulated=False) -> Any:
    """Just enough of a split of patients."""
    images, attributes, owners = hearts(8, seed=1)
    return SimpleNamespace(
        name="squares",
        role=role,
        secret=role == "private" and not simulated,
        attributes=attributes,
        owners=owners,
        images=lambda v: images[v],
    )


@pytest.fixture(scope="module")
def table():
    return read_anatomy(*hearts(10), BY_GREY, BY_CAVITY, progress=False)


def test_a_perfect_segmenter_measures_what_was_asked(table):
    for name in ("LVEDV", "LVESV", "RVEDV", "RVESV"):
        statistics, n_patients = agreement(table, name)
        everyone = np.arange(10)
        assert n_patients == 10
        assert statistics["correlation"](everyone) == pytest.approx(1)
        assert statistics["bias"](everyone) == pytest.approx(0, abs=1e-3)
        assert statistics["mean absolute error"](everyone) == pytest.approx(0, abs=1e-3)


def test_end_diastole_is_not_compared_with_end_systole(table):
    measured = table.set_index(["owner", "attribute"]).measured
    assert (measured.xs("LVEDV", level=1) > 2 * measured.xs("LVESV", level=1)).all()


def test_agreement_is_scipys_and_leaves_out_what_is_not_known():
    rng = np.random.default_rng(0)
    asked, measured = rng.normal(150, 30, 12), rng.normal(140, 30, 12)
    asked[3], measured[7] = np.nan, np.nan
    table = pd.DataFrame({"owner": range(12), "attribute": "LVEDV", "asked": asked, "measured": measured})
    statistics, n_patients = agreement(table, "LVEDV")
    kept = np.isfinite(asked + measured)
    assert n_patients == 10
    assert statistics["correlation"](np.arange(10)) == pytest.approx(stats.pearsonr(asked[kept], measured[kept])[0])
    assert statistics["bias"](np.arange(10)) == pytest.approx((measured - asked)[kept].mean())


def test_phase_accuracy_counts_volumes_and_resamples_patients(table):
    accuracy, n_patients = phase_accuracy(table)
    assert n_patients == 10
    assert accuracy(np.arange(10)) == 1
    wrong = table.copy()
    wrong.loc[(wrong.owner == 3) & (wrong.attribute == "ESED"), "measured"] = 1
    accuracy, _ = phase_accuracy(wrong)
    assert accuracy(np.arange(10)) == pytest.approx(19 / 20)
    assert accuracy(np.array([3, 3])) == pytest.approx(1 / 2)


def test_phase_order_compares_a_patient_with_itself(table):
    esed = table.attribute == "ESED"
    alike = table.copy()
    alike.loc[esed, "measured"] = 0.6 + 0.2 * table.asked[esed]  # every volume looks like end-diastole
    assert phase_accuracy(alike)[0](np.arange(10)) == 0.5
    order, n_patients = phase_order(alike)
    assert (order(np.arange(10)), n_patients) == (1, 10)
    alike.loc[esed & (table.owner == 3), "measured"] = 0.6
    order, _ = phase_order(alike)
    assert order(np.arange(10)) == pytest.approx(0.9)
    assert order(np.array([3, 3])) == 0


def test_phase_order_leaves_out_who_has_one_phase(table):
    one = table[~((table.attribute == "ESED") & (table.owner == 3) & (table.asked == 0))]
    assert phase_order(one)[1] == 9


def test_a_missing_phase_is_named():
    images, attributes, owners = hearts(2)
    attributes[3, ATTRIBUTE_NAMES.index("ESED")] = np.nan
    with pytest.raises(ParameterError, match=r"ESED is missing for volumes \[3\]"):
        read_anatomy(images, attributes, owners, BY_GREY, BY_CAVITY, progress=False)


@pytest.fixture(scope="module")
def real():
    return measure_real(patients(), BY_GREY, BY_CAVITY, seed=0, progress=False)


def compared(images, attributes, owners, real):
    synthetic = measure(images, attributes, owners, BY_GREY, BY_CAVITY, name="synthetic", seed=0, progress=False)
    metrics = compare(synthetic, real, resamples=50, half_sample_pairs=10, seed=0, progress=False)
    return metrics, pd.DataFrame(metrics.model_dump()["rows"]).set_index(["metric", "attribute"])


def test_metrics_are_tidy_and_survive_json(real):
    metrics, rows = compared(*hearts(9), real)
    assert Metrics.model_validate_json(metrics.model_dump_json()) == metrics
    assert rows.index.is_unique
    assert {"FD-EffNet", "KID", "MS-SSIM", "phase accuracy", "correlation", "bias"} <= set(
        rows.index.get_level_values(0)
    )
    assert rows.loc[("correlation", "LVEDV"), "value"] == pytest.approx(1)
    assert rows.loc[("correlation", "LVEDV"), "reference"] == pytest.approx(1)
    assert rows.loc[("bias", "LVEDV"), "unit"] == "mL"
    defined = rows.dropna(subset=["value", "low", "high"])
    assert (defined.low <= defined.value + 1e-9).all()
    assert (defined.value <= defined.high + 1e-9).all()
    assert (metrics.n_requests, metrics.n_real_patients, metrics.reference_cohort) == (9, 8, "squares")


def test_noise_shows_in_the_distances(real):
    images, attributes, owners = hearts(8)
    noisy = (images + np.random.default_rng(0).normal(0, 0.2, images.shape)).clip(0, 1).astype(np.float32)
    _, clean = compared(images, attributes, owners, real)
    _, rows = compared(noisy, attributes, owners, real)
    for metric in ("FD-EffNet", "KID"):
        assert rows.loc[(metric, None)].value.item() > clean.loc[(metric, None)].value.item()
        assert rows.loc[(metric, None)].low.item() > rows.loc[(metric, None)].reference.item()


def test_blank_images_give_null_and_no_crash(real):
    images, attributes, owners = hearts(8)
    metrics, rows = compared(np.zeros_like(images), attributes, owners, real)
    row = rows.loc[("correlation", "LVEDV")]
    assert row[["value", "low", "high"]].isna().all()
    assert rows.loc[("correlation", "MYOEDTHICK"), "n_patients"] == 0
    assert "NaN" not in metrics.model_dump_json()
    assert "NaN" not in json.dumps(metrics.model_dump())


def test_metrics_follow_from_the_seed(real):
    again = pickle.loads(pickle.dumps(real))
    assert compared(*hearts(8), real)[0] == compared(*hearts(8), again)[0]


def test_few_patients_and_diverged_images_are_refused():
    images, attributes, owners = hearts(7)
    with pytest.raises(ParameterError, match="7 patients"):
        measure(images, attributes, owners, BY_GREY, BY_CAVITY, name="synthetic", seed=0, progress=False)
    images, attributes, owners = hearts(8)
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(ParameterError, match="finite"):
        measure(images, attributes, owners, BY_GREY, BY_CAVITY, name="synthetic", seed=0, progress=False)


def test_real_private_patients_are_refused_and_simulated_ones_are_not(real):
    with pytest.raises(PrivacyError, match="squares"):
        measure_real(patients("private", simulated=False), BY_GREY, BY_CAVITY, seed=0, progress=False)
    simulated = measure_real(patients("private", simulated=True), BY_GREY, BY_CAVITY, seed=0, progress=False)
    assert simulated.n_patients == real.n_patients
