"""All measures in one tidy list: units, references, groups, small cohorts, pairs of models."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation import metrics as module
from cardiac_ldm.evaluation.metrics import Metrics, compare, differences, estimate, groups_of, measure, measure_real
from tests.test_control import BY_CAVITY, BY_GREY, hearts, patients


class Averages(nn.Module):
    """Stands for the segmenter's way down, which a fake segmenter doesn't have."""

    def __init__(self, segmenter: object) -> None:
        super().__init__()

    def forward(self, slices):
        return slices.reshape(len(slices), 16, -1).mean(dim=2)


@pytest.fixture(scope="module", autouse=True)
def _no_way_down():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AnatomyEncoder", Averages)
        yield


@pytest.fixture(scope="module")
def real():
    return measure_real(patients(), BY_GREY, BY_CAVITY, seed=0, progress=False)


def compared(images, attributes, owners, real):
    synthetic = measure(images, attributes, owners, BY_GREY, BY_CAVITY, name="synthetic", seed=0, progress=False)
    metrics = compare(
        *(estimated(cohort, real) for cohort in (synthetic, real)),
        model="synthetic",
        epsilon=math.inf,
        reference_cohort=real.name,
        n_requests=synthetic.n_patients,
        n_real_patients=real.n_patients,
    )
    rows = pd.DataFrame(metrics.model_dump()["rows"])
    return metrics, rows[rows.grouping.isna()].set_index(["metric", "attribute"])


def estimated(cohort, real):
    size = min(cohort.n_patients, real.n_patients) // 2
    return estimate(cohort, real, size=size, resamples=50, half_sample_pairs=10, seed=0, progress=False)


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


def test_a_measure_that_needs_more_patients_says_so_with_the_number(real):
    with pytest.warns(UserWarning, match=r"squares: 4 patients in a half-sample are too few for precision \(6\)"):
        found = estimated(real, real)
    coverage = found.of[module.Measure("coverage")]
    assert math.isnan(coverage.value)
    assert coverage.n_patients == 4


def test_groups_come_from_the_attributes_and_are_judged_at_equal_numbers(monkeypatch):
    monkeypatch.setattr(module, "MIN_PATIENTS", 4)
    images, attributes, owners = hearts(12)
    sex, age = (ATTRIBUTE_NAMES.index(name) for name in ("SEX", "AGE"))
    attributes[:, sex] = owners >= 5
    attributes[:, age] = np.where(owners < 4, 49.9, np.where(owners < 8, 50, np.nan))
    groups = groups_of(attributes, owners, ["HCM"] * 12)
    assert groups.sex.tolist() == ["female"] * 5 + ["male"] * 7
    assert groups.age.tolist() == ["under 50"] * 4 + ["50 to 64"] * 4 + [None] * 4
    cohort = measure(
        images, attributes, owners, BY_GREY, BY_CAVITY, name="s", seed=0, diseases=["HCM"] * 12, progress=False
    )
    found = estimate(cohort, cohort, size=6, resamples=20, half_sample_pairs=3, seed=0, progress=False).of
    distances = {what.group: e.n_patients for what, e in found.items() if what.grouping and what.metric == "FD-EffNet"}
    assert distances == {"female": 2, "male": 2, "under 50": 2, "50 to 64": 2}  # one disease has nobody to be held to
    errors = [w for w in found if w.metric == "mean absolute error" and w.grouping == "sex"]
    assert {(w.attribute, w.group) for w in errors} == {(a, g) for a in module.GROUPED for g in ("female", "male")}


def test_models_are_compared_request_by_request(real):
    images, attributes, owners = hearts(9)
    rng = np.random.default_rng(0)
    noisy = (images + rng.normal(0, 0.2, images.shape)).clip(0, 1).astype(np.float32)
    good, bad = (
        measure(some, attributes, owners, BY_GREY, BY_CAVITY, name=name, seed=0, progress=False)
        for name, some in (("good", images), ("bad", noisy))
    )
    settings: dict[str, Any] = {"size": 4, "resamples": 20, "half_sample_pairs": 6, "seed": 0, "progress": False}
    same = differences(good, good, real, **settings)
    assert (same[["value", "low", "high"]].fillna(0) == 0).all(axis=None)
    better = differences(good, bad, real, **settings).set_index("metric").value
    assert better["FD-EffNet"] < 0
    swapped = differences(bad, good, real, **settings).set_index("metric").value
    assert swapped["KID"] == pytest.approx(-better["KID"])
    others = measure(*hearts(9, seed=5), BY_GREY, BY_CAVITY, name="others", seed=0, progress=False)
    with pytest.raises(ParameterError, match="others: wasn't asked for what good was"):
        differences(good, others, real, **settings)


def test_shapes_that_do_not_fit_are_named():
    images, attributes, owners = hearts(8)
    with pytest.raises(ParameterError, match=r"synthetic: images \(16, 13, 96, 96\), attributes \(16, 13\)"):
        measure(images, attributes[:, :13], owners, BY_GREY, BY_CAVITY, name="synthetic", seed=0, progress=False)


def test_what_is_wrong_in_metrics_json_is_refused(real):
    metrics, _ = compared(*hearts(8), real)
    said = metrics.model_dump(mode="json")
    assert said["epsilon"] == "inf"
    for change in ({"epsilon": "ten"}, {"rows": [said["rows"][0] | {"extra": 1}]}):
        with pytest.raises(ValidationError):
            Metrics.model_validate(said | change)
    assert set(Metrics.model_json_schema()["$defs"]) == {"Row", "SizePoint"}
