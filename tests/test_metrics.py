"""All measures in one tidy list: units, references, groups, small cohorts, pairs of models."""

import json
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn

from benchmarks import tradeoff
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Volumes
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation import measured as anatomy_networks
from cardiac_ldm.evaluation import metrics as module
from cardiac_ldm.evaluation.measured import groups_of, measure, measure_real
from cardiac_ldm.evaluation.metrics import compare, differences, estimate
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
        patch.setattr(anatomy_networks, "AnatomyEncoder", Averages)
        yield


@pytest.fixture(scope="module")
def real():
    return measure_real(patients(), BY_GREY, BY_CAVITY, seed=0)


def seen(volumes, **settings):
    return measure(volumes, BY_GREY, BY_CAVITY, seed=0, **settings)


def blurred(volumes) -> Volumes:
    noise = np.random.default_rng(0).normal(0, 0.2, volumes.images.shape)
    return replace(volumes, images=(volumes.images + noise).clip(0, 1).astype(np.float32), name="bad")


def compared(volumes, real):
    synthetic = seen(volumes)
    metrics = compare(estimated(synthetic, real), estimated(real, real), synthetic, real, epsilon=math.inf)
    rows = pd.DataFrame(metrics["rows"]).fillna({"attribute": "", "grouping": ""})
    return metrics, rows[rows.grouping == ""].set_index(["metric", "attribute"])


def estimated(cohort, real):
    size = min(cohort.n_patients, real.n_patients) // 2
    return estimate(cohort, real, size=size, resamples=50, half_sample_pairs=10, seed=0)


def test_metrics_are_tidy_and_survive_json(real):
    metrics, rows = compared(hearts(9), real)
    assert json.loads(json.dumps(metrics)) == metrics
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
    assert (metrics["n_requests"], metrics["n_real_patients"], metrics["reference_cohort"]) == (9, 8, "squares")
    assert (metrics["model"], metrics["epsilon"]) == ("synthetic", "inf")


def test_noise_shows_in_the_distances(real):
    (_, clean), (_, rows) = (compared(volumes, real) for volumes in (hearts(8), blurred(hearts(8))))
    for metric in ("FD-EffNet", "KID"):
        assert rows.loc[(metric, "")].value.item() > clean.loc[(metric, "")].value.item()
        assert rows.loc[(metric, "")].low.item() > rows.loc[(metric, "")].reference.item()


def test_blank_images_give_null_and_no_crash(real):
    metrics, rows = compared(replace(hearts(8), images=np.zeros((16, 13, 96, 96), np.float32)), real)
    row = rows.loc[("correlation", "LVEDV")]
    assert row[["value", "low", "high"]].isna().all()
    assert rows.loc[("correlation", "MYOEDTHICK"), "n_patients"] == 0
    json.dumps(metrics, allow_nan=False)


def test_metrics_follow_from_the_seed(real):
    again = pickle.loads(pickle.dumps(real))
    assert compared(hearts(8), real)[0] == compared(hearts(8), again)[0]


def test_few_patients_and_requests_without_a_volume_are_refused():
    with pytest.raises(ParameterError, match="synthetic: 7 patients with volumes, numbered to 6; at least 8"):
        seen(hearts(7))
    with pytest.raises(ParameterError, match="synthetic: 8 patients with volumes, numbered to 8"):
        seen(replace(hearts(8), patient_index=1 + hearts(8).patient_index))


def test_real_private_patients_are_refused_and_simulated_ones_are_not(real):
    with pytest.raises(PrivacyError, match="squares"):
        measure_real(patients("private", simulated=False), BY_GREY, BY_CAVITY, seed=0)
    simulated = measure_real(patients("private", simulated=True), BY_GREY, BY_CAVITY, seed=0)
    assert simulated.n_patients == real.n_patients


def test_a_measure_that_needs_more_patients_says_so_with_the_number(real):
    with pytest.warns(UserWarning, match=r"squares: 4 patients in a half-sample are too few for precision \(6\)"):
        found = estimated(real, real)
    coverage = found.set_index("metric").loc["coverage"]
    assert math.isnan(coverage.value)
    assert coverage.n_patients == 4


def test_groups_come_from_the_attributes_and_are_judged_at_equal_numbers(monkeypatch):
    monkeypatch.setattr(module, "MIN_PATIENTS", 4)
    volumes = hearts(12)
    attributes, patient_index = volumes.attributes, volumes.patient_index
    sex, age = (ATTRIBUTE_NAMES.index(name) for name in ("SEX", "AGE"))
    attributes[:, sex] = patient_index >= 5
    attributes[:, age] = np.where(patient_index < 4, 49.9, np.where(patient_index < 8, 50, np.nan))
    groups = groups_of(attributes, patient_index, ["HCM"] * 12)
    assert groups.sex.tolist() == ["female"] * 5 + ["male"] * 7
    assert groups.age.tolist() == ["under 50"] * 4 + ["50 to 64"] * 4 + [None] * 4
    cohort = seen(volumes, diseases=["HCM"] * 12)
    found = estimate(cohort, cohort, size=6, resamples=20, half_sample_pairs=3, seed=0)
    grouped = found[found.grouping != ""]
    distances = grouped[grouped.metric == "FD-EffNet"].set_index("group").n_patients.to_dict()
    assert distances == {"female": 2, "male": 2, "under 50": 2, "50 to 64": 2}  # one disease has nobody to be held to
    errors = grouped[(grouped.metric == "mean absolute error") & (grouped.grouping == "sex")]
    expected = {(a, g) for a in module.GROUPED for g in ("female", "male")}
    assert set(zip(errors.attribute, errors.group, strict=True)) == expected


def test_models_are_compared_request_by_request(real):
    good, bad = seen(replace(hearts(9), name="good")), seen(blurred(hearts(9)))
    settings: dict[str, Any] = {"size": 4, "resamples": 20, "half_sample_pairs": 6, "seed": 0}
    same = differences(good, good, real, **settings)
    assert (same[["value", "low", "high"]].fillna(0) == 0).all(axis=None)
    better = differences(good, bad, real, **settings).set_index("metric").value
    assert better["FD-EffNet"] < 0
    swapped = differences(bad, good, real, **settings).set_index("metric").value
    assert swapped["KID"] == pytest.approx(-better["KID"])
    others = seen(replace(hearts(9, seed=5), name="others"))
    with pytest.raises(ParameterError, match="others: wasn't asked for what good was"):
        differences(good, others, real, **settings)


def test_metrics_json_says_of_each_row_what_is_measured_beside_what(real):
    metrics, _ = compared(hearts(8), real)
    assert list(metrics) == [
        *("model", "epsilon", "reference_cohort", "reference_simulated", "n_requests", "n_real_patients"),
        *("rows", "sizes"),
    ]
    for row in metrics["rows"]:
        assert list(row) == [
            *("metric", "attribute", "grouping", "group", "value", "low", "high", "n_patients", "unit"),
            *("reference", "reference_low", "reference_high", "reference_kind", "better"),
        ]
        assert (row["reference_kind"], row["better"]) == module.JUDGEMENTS[row["metric"]]
        assert row["attribute"] is None or row["attribute"] in ATTRIBUTE_NAMES
    assert metrics["sizes"] == []


def test_how_a_distance_shrinks_with_more_patients_is_kept_of_both_sides():
    cohort = seen(hearts(12))
    found = estimated(cohort, cohort)
    metrics = compare(found, found, cohort, cohort, epsilon=None)
    assert [(point["cohort"], point["n_patients"]) for point in metrics["sizes"]] == [
        (cohort, n) for cohort in ("synthetic", "real") for n in (6, 3, 2)
    ]
    (extrapolated,) = [row for row in metrics["rows"] if row["metric"] == "FD-EffNet extrapolated"]
    assert extrapolated["value"] == extrapolated["reference"] < metrics["sizes"][0]["value"]
    assert metrics["epsilon"] is None


def test_a_sweep_says_what_part_of_two_bounds_a_budget_reaches_over_seeds_and_patients():
    worth = np.array([-1.0, -2.0, -3.0, -6.0])
    points = {
        tradeoff.Point(1, 0): worth / 2,
        tradeoff.Point(1, 1): worth / 2,
        tradeoff.Point(math.inf, 0): worth,
        tradeoff.Point(math.inf, start=tradeoff.CONVERGED): 4 * worth,
        tradeoff.Point(10, start="from scratch"): -worth,
    }
    arms = tradeoff.summary([tradeoff.row(point, "", changes) for point, changes in points.items()])
    private, without = arms["budgets"]
    assert (private["epsilon"], private["seeds"], private["change"], private["less_no_noise"]) == ("1", 2, -1.5, 1.5)
    assert private["change_low"] < -1.5 < private["change_high"]
    # in pairs: whoever is drawn, the part is the same
    for end in ("", "_low", "_high"):
        assert (private["closed_no_noise" + end], private["closed_all" + end]) == pytest.approx((50, 12.5))
        assert without["closed_no_noise" + end] == 100
    (converged,), (scratch,) = arms["converged"], arms["from_scratch"]
    assert converged["change"] == -12
    assert "closed_all" not in scratch
    other = [
        tradeoff.row(tradeoff.Point(math.inf, seed), "", changes) for seed, changes in ((0, worth), (1, 2 * worth))
    ]
    (unsure,) = tradeoff.summary(other)["budgets"]
    assert unsure["change_low"] < -6 < -3 < unsure["change_high"]  # of either seed alone and of few patients
    assert unsure["closed_no_noise_low"] == 100  # not a comparison
