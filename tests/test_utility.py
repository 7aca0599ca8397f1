"""Training on made-up hearts and testing on others: what's learnt, the regression, pairs of arms, and bad input."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import linalg, ndimage, stats
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Volumes, measure_attributes
from cardiac_ldm.errors import CohortError, ParameterError, PrivacyError
from cardiac_ldm.evaluation import utility as module
from cardiac_ldm.evaluation.utility import (
    PENALTIES,
    Utility,
    compare_training_sets,
    labelled_volumes,
    ridge,
    tabulate_training_sets,
    training_patients,
    utility,
)
from cardiac_ldm.settings import TrainingSettings
from tests.miniatures import PHASES, heart

ESED, LVEDV = (ATTRIBUTE_NAMES.index(name) for name in ("ESED", "LVEDV"))
SHORT: Any = {
    "segmenter": TrainingSettings(steps=1, batch=1, learning_rate=1e-3),
    "phase": TrainingSettings(steps=1, batch=1, learning_rate=1e-3),
    "resamples": 20,
    "seed": 0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small convolutions gain nothing from a second thread and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hearts(n_patients, seed=0, name="hearts") -> Volumes:
    """Miniature hearts of various sizes on the study's grid, and their measured LVEDV."""
    images, labels = (np.zeros((2 * n_patients, *GRID.shape), dtype) for dtype in (np.float32, np.uint8))
    attributes = np.full((2 * n_patients, len(ATTRIBUTE_NAMES)), np.nan, np.float32)
    scales = np.random.default_rng(seed).uniform(1.5, 2, n_patients)
    for patient, scale in enumerate(scales):
        for row, phase in enumerate(PHASES, 2 * patient):
            for stack, drawn in zip((images, labels), heart(phase, 100 * seed + patient), strict=True):
                zoomed = ndimage.zoom(drawn.T, (1, scale, scale), order=0)
                top, left = (GRID.size - zoomed.shape[1]) // 2, (GRID.size - zoomed.shape[2]) // 2
                field = np.s_[3:9, top : top + zoomed.shape[1], left : left + zoomed.shape[2]]
                stack[row][field] = zoomed / (500 if stack is images else 1)
            attributes[row, ESED] = phase == "ED"
        measured = measure_attributes({"ED": labels[2 * patient]}, GRID.spacing_mm)
        attributes[2 * patient : 2 * patient + 2, LVEDV] = measured["LVEDV"]
    return Volumes(name, images.clip(0, 1), attributes, np.repeat(np.arange(n_patients), 2), labels)


def reached(train, test, **settings) -> Utility:
    (found,) = utility([train], test, **SHORT | settings)
    return found


@pytest.fixture(scope="module")
def real():
    return hearts(8, seed=1, name="real")


@pytest.fixture(scope="module")
def trained(real):
    budgets = {
        "segmenter": TrainingSettings(steps=16, batch=2, learning_rate=1e-2),
        "phase": TrainingSettings(steps=80, batch=4, learning_rate=3e-3),
    }
    return reached(hearts(14), real, **budgets)


def value_of(rows, metric, attribute=None):
    chosen = rows[
        (rows.metric == metric) & (rows.attribute.isna() if attribute is None else rows.attribute == attribute)
    ]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_what_was_learnt_serves_on_others(trained):
    assert trained.name == "hearts"
    assert value_of(trained.rows, "Dice", "LV").value > 0.5
    assert value_of(trained.rows, "phase accuracy").value > 0.7
    assert value_of(trained.rows, "R2", "LVEDV").value > 0.5
    error = value_of(trained.rows, "mean absolute error", "LVEDV")
    assert error.unit == "mL"
    assert 0 < error.low <= error.value <= error.high < trained.outcomes.LVEDV.std()


def test_rows_are_of_test_patients(trained):
    assert trained.rows.n_patients.eq(8).all()
    assert len(trained.outcomes) == 8
    assert not trained.outcomes.isna().any(axis=None)
    assert set(trained.rows.metric) == {"Dice", "phase accuracy", "R2", "mean absolute error"}
    outcomes = trained.outcomes
    assert value_of(trained.rows, "Dice", "RV").value == pytest.approx(outcomes["Dice RV"].mean())
    errors = (outcomes.LVEDV - outcomes["predicted LVEDV"]).to_numpy()
    assert value_of(trained.rows, "mean absolute error", "LVEDV").value == pytest.approx(np.abs(errors).mean())
    r2 = 1 - errors @ errors / (7 * stats.tstd(outcomes.LVEDV) ** 2)
    assert value_of(trained.rows, "R2", "LVEDV").value == pytest.approx(r2, rel=1e-5)


def test_hearts_labelled_at_random_serve_less_and_the_pair_says_so(trained, real):
    train = hearts(14, name="shuffled")
    attributes = train.attributes.copy()
    attributes[:, LVEDV] = np.repeat(np.random.default_rng(0).permutation(attributes[::2, LVEDV]), 2)
    shuffled = reached(replace(train, attributes=attributes), real)
    rows = compare_training_sets(trained, shuffled, resamples=200, seed=0)
    for metric, attribute in (("Dice", "LV"), ("R2", "LVEDV")):
        worth, ours, theirs = (value_of(some, metric, attribute) for some in (rows, trained.rows, shuffled.rows))
        assert worth.value == pytest.approx(ours.value - theirs.value)
        assert worth.low > 0
    assert value_of(rows, "mean absolute error", "LVEDV").high < 0


class ByPlace(nn.Module):
    """A classifier that knows the phases of volumes by their order, but for the third."""

    def __init__(self, phases):
        super().__init__()
        self.phases = torch.from_numpy(phases)

    def forward(self, images):
        first, self.phases = self.phases[: len(images)], self.phases[len(images) :]
        return nn.functional.one_hot(first.long(), 2).float()


class ByTruth(nn.Module):
    """A segmenter that knows the labels of volumes by their order."""

    def __init__(self, labels):
        super().__init__()
        self.labels = torch.from_numpy(labels)

    def forward(self, images):
        first, self.labels = self.labels[: len(images)], self.labels[len(images) :]
        return nn.functional.one_hot(first.long(), 4).movedim(-1, 1).float()


def test_volumes_count_for_their_patient_and_what_is_not_known_does_not(monkeypatch, real):
    attributes, labels, truth = real.attributes.copy(), real.labels.copy(), real.labels.copy()
    phases = attributes[:, ESED].copy()
    phases[2] = 0  # of patient 1, who's at end-diastole
    attributes[5, ESED] = np.nan  # of patient 2
    truth[[6, 7]] = np.where(truth[[6, 7]] == 1, 0, truth[[6, 7]])  # patient 3 has no RV
    labels[8] = 0  # of patient 4, not found
    monkeypatch.setattr(module, "fit_segmenter", lambda *_, **__: (ByTruth(labels), []))
    monkeypatch.setattr(module, "fit_phase_classifier", lambda *_, **__: (ByPlace(np.delete(phases, 5)), []))
    found = reached(hearts(8), replace(real, attributes=attributes, labels=truth))
    assert found.outcomes.phase.tolist() == [1, 0.5, 1, 1, 1, 1, 1, 1]
    assert found.outcomes["Dice LV"].tolist() == [1, 1, 1, 1, 0.5, 1, 1, 1]
    assert np.isnan(found.outcomes["Dice RV"][3])
    rv = value_of(found.rows, "Dice", "RV")
    assert rv.n_patients == 7
    assert rv[["value", "low", "high"]].isna().all()
    assert value_of(found.rows, "phase accuracy").value == pytest.approx(7.5 / 8)


def test_volumes_without_labels_teach_all_but_segmentation(monkeypatch, trained, real):
    monkeypatch.setattr(module, "fit_segmenter", None)
    blank = reached(replace(hearts(14), name="blank", labels=None), real)
    missing = blank.rows.value.isna()
    assert missing.equals(blank.rows.metric == "Dice")
    assert blank.outcomes.index.equals(trained.outcomes.index)
    for first, second in ((trained, blank), (blank, trained)):  # whichever of the two lacks them
        assert compare_training_sets(first, second, resamples=20, seed=0).value.isna().equals(missing)


def test_everything_follows_from_the_seed(real):
    train = hearts(8)
    runs = [reached(train, real, seed=seed).outcomes["Dice LV"] for seed in (3, 3, 4)]
    assert runs[0].equals(runs[1])
    assert not runs[0].equals(runs[2])


def test_features_of_the_test_patients_are_read_once_for_all_arms(monkeypatch, real):
    read, features = [], module.volume_features

    def counted(images):
        read.append(images)
        return features(images)

    monkeypatch.setattr(module, "volume_features", counted)
    both = utility([hearts(8), hearts(8, seed=2, name="others")], real, **SHORT)
    assert [found.name for found in both] == ["hearts", "others"]
    assert sum(np.array_equal(images, real.images[::2]) for images in read) == 1
    assert len(read) == 3
    alone = reached(hearts(8, seed=2, name="others"), real)
    pd.testing.assert_frame_equal(both[1].rows, alone.rows)


@pytest.mark.parametrize(("n", "d"), [(30, 5), (12, 40)])
def test_ridge_is_scipys_least_squares_with_the_penalty_that_leaving_one_out_chooses(n, d):
    rng = np.random.default_rng(n + d)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 9, d) + 5
    y = x @ rng.normal(size=d) / d + rng.normal(size=n) * 2 + 100
    z = (x - x.mean(axis=0)) / x.std(axis=0)

    def fitted(rows, penalty):
        """Slopes and intercept by least squares with rows of the penalty's root, the intercept's without."""
        design = np.vstack([np.c_[z[rows], np.ones(len(rows))], np.sqrt(penalty) * np.eye(d + 1)[:d]])
        return linalg.lstsq(design, np.r_[y[rows], np.zeros(d)])[0]

    def left_out(penalty):
        others = [np.delete(np.arange(n), i) for i in range(n)]
        return np.mean([(y[i] - np.r_[z[i], 1] @ fitted(rows, penalty)) ** 2 for i, rows in enumerate(others)])

    best = min(d * PENALTIES, key=left_out)
    assert d * PENALTIES[0] < best < d * PENALTIES[-1]
    new = rng.normal(size=(6, d)) * 3 + 5
    expected = np.c_[(new - x.mean(axis=0)) / x.std(axis=0), np.ones(6)] @ fitted(np.arange(n), best)
    np.testing.assert_allclose(ridge(x, y)(new), expected, rtol=1e-9)


def test_ridge_bears_features_that_never_change():
    x = np.c_[np.arange(10.0), np.full(10, 3.0)].astype(np.float32)
    np.testing.assert_allclose(ridge(x, 2 * x[:, 0] + 1)(x), 2 * x[:, 0] + 1, atol=0.02)


def made_up(name, predicted, truth, dice):
    columns = ["Dice RV", "Dice myocardium", "Dice LV", "phase"]
    outcomes = pd.DataFrame(dict.fromkeys(columns, dice) | {"LVEDV": truth, "predicted LVEDV": predicted})
    return Utility(name, outcomes, pd.DataFrame())


def test_arms_are_compared_patient_by_patient():
    rng = np.random.default_rng(0)
    truth, dice = rng.normal(150, 30, 40), rng.uniform(0, 0.9, 40)
    perfect, blind = made_up("a", truth, truth, dice + 0.1), made_up("b", np.full(40, truth.mean()), truth, dice)
    rows = compare_training_sets(perfect, blind, resamples=200, seed=0)
    assert value_of(rows, "R2", "LVEDV").value == pytest.approx(1)
    assert value_of(rows, "mean absolute error", "LVEDV").value == pytest.approx(-np.abs(truth - truth.mean()).mean())
    better = value_of(rows, "Dice", "LV")
    assert (better.low, better.value, better.high) == pytest.approx((0.1, 0.1, 0.1))  # alike for every patient
    assert better.n_patients == 40


def test_every_arm_stands_alone_and_beyond_each_other_baseline():
    truth = np.arange(10.0)
    training_sets = {name: made_up(name, truth + error, truth, 0.5) for name, error in (("a", 0), ("b", 1), ("c", 3))}
    with_rows = [
        replace(training_set, rows=module._rows([training_set.outcomes], 20, 0))
        for training_set in training_sets.values()
    ]
    table = tabulate_training_sets(with_rows, with_rows[:2], resamples=20, seed=0)
    errors = table[table.metric == "mean absolute error"]
    found = {(row.training_set, row.against): row.value for row in errors.itertuples()}
    alone = {("a", ""): 0, ("b", ""): 1, ("c", ""): 3}
    assert found == alone | {("a", "b"): -1, ("b", "a"): 1, ("c", "a"): 3, ("c", "b"): 2}


def test_arms_tested_on_others_are_not_compared():
    truth = np.arange(10.0)
    with pytest.raises(ParameterError, match="synthetic: wasn't tested on the patients of real"):
        compare_training_sets(
            made_up("real", truth, truth, 1), made_up("synthetic", truth, truth + 1, 1), resamples=2, seed=0
        )


def patients(secret=False, labelled=True) -> Any:
    """Just enough of a split of patients."""
    volumes = hearts(2)
    labels: Any = volumes.labels
    return SimpleNamespace(
        name="ward",
        split="test",
        secret=secret,
        labelled=np.full(2, labelled),
        attributes=volumes.attributes,
        patient_index=volumes.patient_index,
        images=lambda rows: volumes.images[rows],
        labels=lambda rows: labels[rows],
    )


def test_patients_give_their_volumes_unless_they_are_secret_or_nobody_labelled_them():
    volumes = labelled_volumes(patients())
    np.testing.assert_array_equal(volumes.labels, hearts(2).labels)
    assert volumes.name == "ward"
    with pytest.raises(PrivacyError, match=r"ward holds real private .* labels and images of private patients"):
        labelled_volumes(patients(secret=True))
    with pytest.raises(CohortError, match="utility"):
        labelled_volumes(patients(labelled=False))


class Names(list[str]):
    """Patients of whom some are labelled."""

    name, split, labelled = "ward", "train", np.arange(9) < 7

    def subset(self, indices):
        chosen = Names(self[i] for i in indices)
        chosen.labelled = self.labelled[indices]
        return chosen


def test_training_patients_are_drawn_by_the_seed_from_those_who_are_labelled():
    ward: Any = Names("abcdefghi")
    some = [training_patients(ward, 4, seed) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert {*training_patients(ward, 9, 0)} == {*"abcdefg"}
    ward.labelled = np.zeros(9, bool)
    with pytest.raises(CohortError, match="a measure of utility"):
        training_patients(ward, 4, 0)


def test_too_little_to_train_or_test_on_is_named(real):
    few, train = hearts(7, name="few"), hearts(8)
    for training_set, test in ((few, real), (train, few)):
        with pytest.raises(ParameterError, match="few: 7 patients; give at least 8"):
            reached(training_set, test)
    with pytest.raises(ParameterError, match="real: has no labels; test on patients whose labels were given"):
        reached(train, replace(real, labels=None))
    attributes = train.attributes.copy()
    attributes[0, LVEDV] = np.nan
    with pytest.raises(ParameterError, match="hearts: 7 patients at end-diastole whose LVEDV is known"):
        reached(replace(train, attributes=attributes), real)
    attributes = np.where(np.arange(14) == ESED, 1, train.attributes).astype(np.float32)
    with pytest.raises(ParameterError, match=r"hearts: no volume at end-systole \(ESED = 0\)"):
        reached(replace(train, attributes=attributes), real)
