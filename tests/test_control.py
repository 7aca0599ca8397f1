"""What's measured beside what was asked for, what moves with what, hearts beyond the range, and the guards."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Volumes, measure_attributes
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation.control import (
    CALIBRATED,
    MOVES,
    STEPS,
    agreement,
    base_conditions,
    beyond_range,
    calibration,
    counterfactuals,
    draw_levels,
    ladder,
    magnified,
    moved,
    phase_accuracy,
    phase_order,
    public_span,
    read_anatomy,
    response,
)
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import public_ledger
from cardiac_ldm.study import Run, Study

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


def hearts(n_patients, seed=0) -> Volumes:
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
    return Volumes("synthetic", GREY[labels], attributes, np.repeat(np.arange(n_patients), 2))


def patients(role="public", simulated=False) -> Any:
    """Just enough of a split of patients."""
    volumes = hearts(8, seed=1)
    return SimpleNamespace(
        name="squares",
        split="test",
        role=role,
        secret=role == "private" and not simulated,
        attributes=volumes.attributes,
        patient_index=volumes.patient_index,
        groups=["NOR", None] * 4,
        images=lambda v: volumes.images[v],
    )


@pytest.fixture(scope="module")
def table():
    return read_anatomy(hearts(10), BY_GREY, BY_CAVITY)


def test_a_perfect_segmenter_measures_what_was_asked(table):
    for name in ("LVEDV", "LVESV", "RVEDV", "RVESV"):
        statistics, n_patients = agreement(table, name)
        everyone = np.arange(10)
        assert n_patients == 10
        assert statistics["correlation"](everyone) == pytest.approx(1)
        assert statistics["bias"](everyone) == pytest.approx(0, abs=1e-3)
        assert statistics["mean absolute error"](everyone) == pytest.approx(0, abs=1e-3)


def test_end_diastole_is_not_compared_with_end_systole(table):
    measured = table.set_index(["patient", "attribute"]).measured
    assert (measured.xs("LVEDV", level=1) > 2 * measured.xs("LVESV", level=1)).all()


def test_agreement_is_scipys_and_leaves_out_what_is_not_known():
    rng = np.random.default_rng(0)
    requested, measured = rng.normal(150, 30, 12), rng.normal(140, 30, 12)
    requested[3], measured[7] = np.nan, np.nan
    table = pd.DataFrame({"patient": range(12), "attribute": "LVEDV", "requested": requested, "measured": measured})
    statistics, n_patients = agreement(table, "LVEDV")
    kept = np.isfinite(requested + measured)
    assert n_patients == 10
    assert statistics["correlation"](np.arange(10)) == pytest.approx(stats.pearsonr(requested[kept], measured[kept])[0])
    assert statistics["bias"](np.arange(10)) == pytest.approx((measured - requested)[kept].mean())


def test_phase_accuracy_counts_volumes_and_resamples_patients(table):
    accuracy, n_patients = phase_accuracy(table)
    assert n_patients == 10
    assert accuracy(np.arange(10)) == 1
    wrong = table.copy()
    wrong.loc[(wrong.patient == 3) & (wrong.attribute == "ESED"), "measured"] = 1
    accuracy, _ = phase_accuracy(wrong)
    assert accuracy(np.arange(10)) == pytest.approx(19 / 20)
    assert accuracy(np.array([3, 3])) == pytest.approx(1 / 2)


def test_phase_order_compares_a_patient_with_itself(table):
    esed = table.attribute == "ESED"
    alike = table.copy()
    alike.loc[esed, "measured"] = 0.6 + 0.2 * table.requested[esed]  # every volume looks like end-diastole
    assert phase_accuracy(alike)[0](np.arange(10)) == 0.5
    order, n_patients = phase_order(alike)
    assert (order(np.arange(10)), n_patients) == (1, 10)
    alike.loc[esed & (table.patient == 3), "measured"] = 0.6
    order, _ = phase_order(alike)
    assert order(np.arange(10)) == pytest.approx(0.9)
    assert order(np.array([3, 3])) == 0


def test_phase_order_leaves_out_who_has_one_phase(table):
    one = table[~((table.attribute == "ESED") & (table.patient == 3) & (table.requested == 0))]
    assert phase_order(one)[1] == 9


def test_a_missing_phase_is_named():
    volumes = hearts(2)
    volumes.attributes[3, ATTRIBUTE_NAMES.index("ESED")] = np.nan
    with pytest.raises(ParameterError, match=r"ESED is missing for volumes \[3\]"):
        read_anatomy(volumes, BY_GREY, BY_CAVITY)


def obedient(attributes, patient_index, drags=0.0) -> pd.DataFrame:
    """What a perfect reader says of a model that draws what is asked, but lets LVEDV and SEX drag RVEDV along."""
    rows = []
    for row, owner in zip(attributes[::2].astype(float), patient_index[::2], strict=True):
        requested = dict(zip(ATTRIBUTE_NAMES, row, strict=True))
        for name in MEASURED:
            measured = requested[name] + (
                drags * (requested["LVEDV"] + 20 * requested["SEX"]) if name == "RVEDV" else 0
            )
            rows.append((owner, name, requested[name], measured))
        rows += [(owner, "ESED", phase, phase) for phase in (1.0, 0.0)]
    return pd.DataFrame(rows, columns=["patient", "attribute", "requested", "measured"])


MEASURED = ("LVEDV", "LVESV", "LVEF", "RVEDV", "RVESV", "RVEF", "MYOESTHICK", "MYOEDTHICK", "ANGLE")
FOLLOW = {("LVEDV", "LVESV"), ("LVEF", "LVESV"), ("RVEDV", "RVESV"), ("MYOEDTHICK", "MYOESTHICK")}


def conditions(n_patients=9) -> tuple[Any, Any]:
    """Patients of whom everything is known, with ejection fractions that fit their volumes."""
    rng = np.random.default_rng(3)
    some = {name: rng.uniform(*span, n_patients) for name, span in SPANS.items()}
    for side in ("LV", "RV"):
        some[f"{side}ESV"] = some[f"{side}EDV"] * (1 - some[f"{side}EF"] / 100)
    attributes = np.repeat(np.stack([some[name] for name in ATTRIBUTE_NAMES], axis=1), 2, axis=0)
    attributes[:, ATTRIBUTE_NAMES.index("ESED")] = np.tile([1, 0], n_patients)
    attributes[:, ATTRIBUTE_NAMES.index("SEX")] = np.repeat(np.arange(n_patients) % 2, 2)
    return attributes.astype(np.float32), np.repeat(np.arange(n_patients), 2)


SPANS = {
    **{"LVEDV": (100, 200), "LVESV": (0, 1), "LVEF": (40, 65), "RVEDV": (110, 210), "RVESV": (0, 1), "RVEF": (40, 60)},
    **{"MYOESTHICK": (9, 14), "MYOEDTHICK": (6, 9), "AGE": (40, 70), "SEX": (0, 1), "BMI": (20, 30), "ESED": (0, 1)},
    **{"ANGLE": (140, 200), "DEPTH": (8, 10)},
}


def steered(drags=0.0) -> tuple[pd.DataFrame, Any, Any]:
    attributes, patient_index = conditions()
    requested = {"nothing": attributes} | counterfactuals(attributes)
    tables = [obedient(some, patient_index, drags).assign(moved=name) for name, some in requested.items()]
    return pd.concat(tables), attributes, patient_index


def test_the_slope_is_scipys():
    rng = np.random.default_rng(0)
    requested = rng.normal(150, 30, 30)
    table = pd.DataFrame({"patient": range(30), "attribute": "LVEDV", "requested": requested})
    table["measured"] = 70 + 0.5 * requested + rng.normal(0, 5, 30)
    table.loc[4, "measured"] = np.nan
    known = table.dropna()
    statistics, n_patients = agreement(table, "LVEDV")
    assert n_patients == 29
    expected = stats.linregress(known.requested, known.measured).slope
    assert statistics["slope"](np.arange(29)) == pytest.approx(expected)
    assert np.isnan(statistics["slope"](np.array([3, 3])))


def test_calibration_bins_hold_equally_many_who_ask_for_about_the_same():
    requested = np.random.default_rng(1).permutation(np.arange(100.0, 140.0))
    table = pd.DataFrame(
        {"patient": range(40), "attribute": "LVEDV", "requested": requested, "measured": 50 + requested / 2}
    )
    everything = calibration(table, 4, resamples=50, seed=0).set_index("attribute")
    assert list(dict.fromkeys(everything.index)) == list(CALIBRATED)
    assert everything.loc["ANGLE", ["requested", "measured"]].isna().all()
    bins = everything.loc["LVEDV"]
    assert list(bins.n_patients) == [10] * 4
    np.testing.assert_allclose(bins.requested, [104.5, 114.5, 124.5, 134.5])
    np.testing.assert_allclose(bins.measured, 50 + bins.requested / 2)
    assert ((bins.low < bins.measured) & (bins.measured < bins.high)).all()
    nine, few = (
        calibration(some, 9, resamples=50, seed=0).query("attribute == 'LVEDV'") for some in (table, table[:7])
    )
    assert list(nine.n_patients) == [8] * 5
    assert list(few.n_patients) == [7]
    assert few.measured.isna().all()


def test_base_requests_are_pairs_of_phases_spread_over_the_split():
    split = patients()
    attributes, patient_index = base_conditions(split, 8)
    np.testing.assert_array_equal(patient_index, np.repeat(np.arange(8), 2))
    np.testing.assert_array_equal(attributes[:, ATTRIBUTE_NAMES.index("ESED")], [1, 0] * 8)
    split.attributes, split.patient_index = hearts(17).attributes, hearts(17).patient_index
    lvedv = ATTRIBUTE_NAMES.index("LVEDV")
    np.testing.assert_array_equal(base_conditions(split, 9)[0][::2, lvedv], split.attributes[::4, lvedv])


def test_too_few_base_requests_and_real_private_patients_are_refused():
    split = patients()
    split.attributes[3, ATTRIBUTE_NAMES.index("ESED")] = 1
    with pytest.raises(ParameterError, match=r"squares: 7 patients \(test\) have both phases"):
        base_conditions(split, 8)
    with pytest.raises(ParameterError, match="5 are wanted"):
        base_conditions(patients(), 5)
    with pytest.raises(PrivacyError, match="squares"):
        base_conditions(patients("private", simulated=False), 8)
    assert len(base_conditions(patients("private", simulated=True), 8)[1]) == 16


@pytest.mark.parametrize("name", [*MOVES, "RVEF"])
def test_what_is_moved_takes_along_what_physics_ties_to_it_and_nothing_else(name):
    attributes, _ = conditions()
    before, after = (dict(zip(ATTRIBUTE_NAMES, a.T, strict=True)) for a in (attributes, moved(attributes, name, 4)))
    np.testing.assert_allclose(after[name], before[name] + 4, rtol=1e-6)
    for side in ("LV", "RV"):
        full, empty = after[f"{side}EDV"], after[f"{side}ESV"]
        np.testing.assert_allclose(after[f"{side}EF"], 100 * (full - empty) / full, rtol=1e-5)
    changed = {n for n in ATTRIBUTE_NAMES if not np.allclose(before[n], after[n], rtol=1e-6)}
    assert changed == {name} | {b for a, b in {*FOLLOW, ("RVEF", "RVESV")} if a == name}


def test_everybody_is_moved_towards_the_middle_and_what_not_all_know_is_not_moved():
    attributes, _ = conditions()
    requested = counterfactuals(attributes)
    assert set(requested) == set(MOVES)
    sex, lvef, lvedv = (ATTRIBUTE_NAMES.index(name) for name in ("SEX", "LVEF", "LVEDV"))
    np.testing.assert_array_equal(requested["SEX"][:, sex], 1 - attributes[:, sex])
    step = np.where(attributes[:, lvef] < 45, 1, -1) * STEPS["LVEF"]
    assert len(set(step)) == 2
    np.testing.assert_allclose(requested["LVEF"][:, lvef], attributes[:, lvef] + step, rtol=1e-6)
    np.testing.assert_allclose(requested["LVEDV"][:, lvedv], attributes[:, lvedv] + STEPS["LVEDV"], rtol=1e-6)
    attributes[4:6, sex] = np.nan
    assert set(counterfactuals(attributes)) == set(MOVES) - {"SEX"}


def test_an_obedient_model_responds_by_one_step_where_it_was_moved_and_not_elsewhere():
    found: Any = response(*steered(), resamples=50, seed=0)
    assert len(found) == len(MOVES) * len(MEASURED)
    np.testing.assert_allclose(found.change, found.requested, atol=1e-3)
    for row in found.itertuples():
        if row.moved == row.attribute:
            assert row.change_steps == pytest.approx(1, abs=1e-4)
            assert row.change == pytest.approx(STEPS[row.attribute], abs=1e-3)
        elif (row.moved, row.attribute) not in FOLLOW:
            assert abs(row.change_steps) < 1e-4
        else:
            assert abs(row.change_steps) > 0.1
    assert (found.n_patients == 9).all()
    assert ((found.low_steps <= found.change_steps + 1e-9) & (found.change_steps <= found.high_steps + 1e-9)).all()


def test_what_drags_another_along_shows_beside_the_diagonal():
    found: Any = response(*steered(drags=0.3), resamples=50, seed=0).set_index(["moved", "attribute"])
    cell = found.loc[("LVEDV", "RVEDV")]
    assert cell.change == pytest.approx(0.3 * STEPS["LVEDV"], abs=1e-3)
    assert cell.change_steps == pytest.approx(0.3 * STEPS["LVEDV"] / STEPS["RVEDV"], abs=1e-4)
    assert cell.requested == pytest.approx(0, abs=1e-4)
    assert found.loc[("SEX", "RVEDV")].change == pytest.approx(0.3 * 20, abs=1e-4)
    assert found.loc[("AGE", "RVEDV")].change == pytest.approx(0, abs=1e-4)


def test_a_response_that_too_few_patients_show_is_not_defined():
    table, *base = steered()
    table.loc[(table.moved == "LVEDV") & (table.patient < 2), "measured"] = np.nan
    found: Any = response(table, *base, resamples=50, seed=0).set_index("moved")
    assert (found.loc["LVEDV"].n_patients == 7).all()
    assert found.loc["LVEDV", ["change", "low", "high"]].isna().all(axis=None)
    assert found.loc["RVEDV", ["change", "low", "high"]].notna().all(axis=None)
    table.loc[(table.moved == "LVEF") & (table.patient == 2), "measured"] = np.nan
    eight = response(table, *base, resamples=50, seed=0).set_index("moved").loc["LVEF"]
    assert (eight.n_patients == 8).all()
    np.testing.assert_allclose(eight.change, eight.requested, atol=1e-3)  # both over the patients who can be measured


def square(attributes, patient_index) -> Volumes:
    """Square hearts with the left ventricular volume, and about the wall thickness, that were requested."""
    labels = np.zeros((len(attributes), *GRID.shape), np.uint8)
    for volume, row in zip(labels, attributes, strict=True):
        phase = "ED" if row[ATTRIBUTE_NAMES.index("ESED")] else "ES"
        width = round(np.sqrt(row[ATTRIBUTE_NAMES.index(f"LV{phase}V")] / 9 / VOXEL_ML))
        wall = round(row[ATTRIBUTE_NAMES.index(f"MYO{phase}THICK")] / GRID.spacing_mm[1])
        volume[2:11, 20 - wall : 20 + width + wall, 40 - wall : 40 + width + wall] = 2
        volume[2:11, 20 : 20 + width, 40 : 40 + width] = 3
    return Volumes("squares", GREY[labels], attributes, patient_index)


def test_a_dial_shows_each_level_that_was_requested_from_one_noise_with_what_was_measured():
    split, drawn = patients(), []
    split.attributes, split.patient_index = conditions()
    split.attributes[:2, ATTRIBUTE_NAMES.index("LVEF")] = np.nan  # the second is the first of whom all is known

    def draw(attributes, patient_index):
        drawn.append(tuple(patient_index))
        return square(attributes, patient_index)

    volumes, found = draw_levels(split, draw, BY_GREY, BY_CAVITY)
    assert drawn == [(1, 1)] * 15
    assert list(dict.fromkeys(zip(found.attribute, found.phase, strict=True))) == [
        *(("LVEDV", "ED"), ("LVEF", "ES"), ("MYOEDTHICK", "ED"))
    ]
    for name, rows in found.groupby("attribute"):
        np.testing.assert_allclose(np.diff(rows.requested), STEPS[str(name)])
        assert np.corrcoef(rows.requested, rows.measured)[0, 1] > 0.98
    lvedv = found[found.attribute == "LVEDV"]
    np.testing.assert_allclose(lvedv.measured, lvedv.requested, rtol=0.06)
    cavity = (volumes.images == GREY[3]).sum(axis=(1, 2, 3))
    assert (np.diff(cavity[:5]) > 0).all()  # larger ventricles
    assert (np.diff(cavity[5:10]) < 0).all()  # emptier ones at end-systole
    assert len(set(cavity[10:])) == 1
    split.attributes[:, ATTRIBUTE_NAMES.index("LVEF")] = np.nan
    with pytest.raises(ParameterError, match="none of 9 patients has all of LVEDV, LVEF, MYOEDTHICK"):
        draw_levels(split, draw, BY_GREY, BY_CAVITY)


def test_a_magnified_request_is_what_a_magnified_heart_measures():
    images = hearts(1).images
    labels = {phase: np.searchsorted(GREY, images[row]) for row, phase in enumerate(("ED", "ES"))}
    cut = {phase: np.delete(volume, [2, 3, 4, 5, 6], axis=0) for phase, volume in labels.items()}  # room for twice 4
    small = measure_attributes(cut, GRID.spacing_mm)
    large = measure_attributes({p: np.kron(v, np.ones((2, 2, 2), int)) for p, v in cut.items()}, GRID.spacing_mm)
    row = np.array([[small.get(name, 1) for name in ATTRIBUTE_NAMES]])
    after = dict(zip(ATTRIBUTE_NAMES, magnified(row, large["LVEDV"])[0], strict=True))
    assert large["LVEDV"] == pytest.approx(8 * small["LVEDV"])
    for name, value in large.items():
        assert after[name] == pytest.approx(value, rel=1e-5), name
    assert [after[name] for name in ("AGE", "SEX", "ESED")] == [1, 1, 1]
    assert magnified(row, 9000)[0, ATTRIBUTE_NAMES.index("DEPTH")] == 13


def test_hearts_are_asked_for_on_both_sides_of_the_public_ones():
    np.testing.assert_allclose(ladder(50, 400), [20, 32.5, 45, 50, 100, 200, 400, 440, 540, 640])
    split = patients()
    split.attributes = np.nan_to_num(split.attributes, nan=7)
    lvedv = split.attributes[:, ATTRIBUTE_NAMES.index("LVEDV")]
    assert public_span(split)["LVEDV"] == (lvedv.min(), lvedv.max())
    for simulated in (True, False):
        with pytest.raises(PrivacyError, match="squares is private"):
            public_span(patients("private", simulated=simulated))


def test_a_model_that_draws_no_heart_beyond_the_public_ones_shows():
    attributes, patient_index = conditions()
    tables = []
    for level in ladder(60, 300):
        table = obedient(magnified(attributes, level), patient_index)
        table["measured"] = table.measured.where(table.attribute != "LVEDV", table.measured.clip(60, 300))
        tables.append(table.assign(level=level))
    found: Any = beyond_range(pd.concat(tables), {"LVEDV": (60, 300)}, resamples=50, seed=0)
    lvedv = found[found.attribute == "LVEDV"]
    assert list(lvedv["where"]) == ["below"] * 3 + ["inside"] * 4 + ["above"] * 3
    np.testing.assert_allclose(lvedv.requested, lvedv.level, rtol=1e-5)
    np.testing.assert_allclose(lvedv.measured, lvedv.level.clip(60, 300), rtol=1e-5)
    rvedv = found[found.attribute == "RVEDV"]
    np.testing.assert_allclose(rvedv.measured, rvedv.requested, rtol=1e-5)
    assert set(found.attribute) == {"LVEDV", "RVEDV", "MYOEDTHICK"}


def test_the_stages_draw_every_request_from_the_same_noise_and_leave_tables(tmp_path, monkeypatch):
    drawn = []

    def read(self, run, epsilon, attributes, patient_index):
        public_ledger("squares").save(run.folder / "privacy.json")
        drawn.append(tuple(patient_index))
        both = np.repeat(attributes, 2, axis=0) if len(set(patient_index)) == len(patient_index) else attributes
        return obedient(both, np.repeat(np.unique(patient_index), 2))

    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    study = Study(Parameters(profile=str(Path(__file__).parent / "tiny.yaml")))
    public_ledger("squares").save(tmp_path / "privacy.json")
    split = patients()
    split.attributes, split.patient_index = conditions()
    study.public = study.reference_cohort = SimpleNamespace(key="c", split=lambda name: split)  # type: ignore[assignment]
    monkeypatch.setattr(Study, "anatomy", Run("anatomy", "b", tmp_path))
    monkeypatch.setattr(Study, "finetuned", lambda self, epsilon: Run("finetune", "a", tmp_path))
    monkeypatch.setattr(Study, "_read_drawn", read)
    (tmp_path / "metrics.json").write_text(json.dumps({"span": public_span(split)}))
    monkeypatch.setattr(Study, "pretrained", Run("pretrain", "c", tmp_path))

    run = study.counterfactual(1)
    assert len(drawn) == 1 + len(MOVES)
    assert set(drawn) == {tuple(np.repeat(np.arange(9), 2))}
    found: Any = pd.read_csv(run.folder / "response.csv")
    np.testing.assert_allclose(found.change, found.requested, atol=1e-3)
    assert len(pd.read_csv(run.folder / "anatomy.csv")) == 9 * len(drawn) * (len(MEASURED) + 2)
    assert len(run.metrics["rows"]) == len(found)
    assert run.ledger.guarantee == public_ledger("").guarantee
    drawn.clear()
    run = study.beyond_range(1)
    assert drawn == [tuple(np.arange(9))] * 10
    found = pd.read_csv(run.folder / "beyond.csv")
    np.testing.assert_allclose(found.measured, found.requested, rtol=1e-5)
    assert "NaN" not in json.dumps(run.metrics)
