"""The private table of attributes: what protects patients in it, what it costs, and that it's a possible population."""

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import norm, spearmanr

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy import Ledger, Randomness, Record, epsilon_pld, epsilon_prv
from cardiac_ldm.privacy import table as room
from cardiac_ldm.privacy.accounting import merged, terms_of
from cardiac_ldm.privacy.table import FREE, Table, TablePlan, fit, rows_of, tabulate
from cardiac_ldm.report.statement import privacy_statement
from cardiac_ldm.study import Study
from cardiac_ldm.training.selection import SelectionSettings
from tests.test_guarantee import ward

LOW, HIGH = (np.array([getattr(ATTRIBUTES[ATTRIBUTE_NAMES.index(x)], side) for x in FREE]) for side in ("low", "high"))
SIMULATED = Randomness(0, simulated=True)


def population(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Rows of made-up patients, in the middle of all ranges; LVEDV and BMI go together (0.8)."""
    z = np.random.default_rng(seed).standard_normal((n, len(FREE)))
    z[:, FREE.index("BMI")] = 0.8 * z[:, 0] + 0.6 * z[:, FREE.index("BMI")]
    rows = LOW + (HIGH - LOW) * norm.cdf(0.5 * z + shift)
    rows[:, FREE.index("SEX")] = rows[:, FREE.index("SEX")] > 0.5
    rows[:, FREE.index("DEPTH")] = rows[:, FREE.index("DEPTH")].round()
    return rows


def sums(rows: np.ndarray, plan: TablePlan, monkeypatch: pytest.MonkeyPatch, densities: Any = None) -> list[np.ndarray]:
    """What is measured of rows before the noise, in units of each measurement's norm."""
    found: list[np.ndarray] = []

    def kept(n: int, deviation: float, generator: object) -> np.ndarray:
        total = inspect.currentframe().f_back.f_locals["total"]  # type: ignore[union-attr]
        found.append(total * plan.noise_multiplier / deviation)
        return np.zeros(n)

    with monkeypatch.context() as patch:
        patch.setattr(room, "gaussian", kept)
        if densities is not None:  # what is measured second depends on the first; it's composed as of adaptive ones
            patch.setattr(room, "_tilted", lambda prior, *rest: prior)
        plan.measure(rows, population(50, 9), SIMULATED)
    return found


@settings(max_examples=40, deadline=None)
@given(
    row=arrays.arrays(float, len(FREE), elements=st.floats(-1e6, 1e6) | st.just(math.nan)),
    seed=st.integers(0, 5),
)
def test_a_patient_moves_each_measurement_by_its_norm_at_most(row: np.ndarray, seed: int) -> None:
    plan, others = TablePlan(30, 1.0, 1e-5, 5.0), population(20, seed)
    with pytest.MonkeyPatch.context() as patch:
        without, with_them = (sums(rows, plan, patch, "fixed") for rows in (others, np.vstack([others, row])))
    for one, other in zip(without, with_them, strict=True):
        assert np.linalg.norm(one - other) <= 1 + 1e-9


def test_noise_is_what_the_ledger_says_and_on_every_cell_empty_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, drawn = TablePlan(40, 1.0, 1e-5, 5.0), list[tuple[int, float]]()
    real = room.gaussian

    def kept(n: int, deviation: float, generator: np.random.Generator) -> np.ndarray:
        drawn.append((n, deviation))
        return real(n, deviation, generator)

    monkeypatch.setattr(room, "gaussian", kept)
    measured: list[np.ndarray] = []
    whole = room.fit

    def fitting(rows: np.ndarray, noisy: Any = None, *rest: Any) -> Table:
        if noisy is None:
            return whole(rows)

        def seen(*given: Any) -> np.ndarray:
            measured.append(noisy(*given))
            return measured[-1]

        return whole(rows, seen, *rest)

    monkeypatch.setattr(room, "fit", fitting)
    nobody = np.empty((0, len(FREE)))
    plan.measure(nobody, population(50, 9), SIMULATED)
    n_answers = 1 + len(FREE) + sum(1 if name == "SEX" else 8 for name in FREE)
    assert drawn == [(n_answers, 2.8 * 5.0), (55, 8.0 * 5.0)]
    for answers, (_, deviation) in zip(measured, drawn, strict=True):
        assert (answers != 0).all()  # of an empty cohort each answer is noise
        assert answers.std() == pytest.approx(deviation, rel=0.3)


def test_a_patient_with_many_volumes_is_one_row(study: Study) -> None:
    patients = study.private.split("train")
    rows = rows_of(patients)
    assert rows.shape == (len(patients), len(FREE))
    assert len(patients.attributes) > len(patients)
    first = patients.attributes[patients.offsets[3] : patients.offsets[4]]
    for j, name in enumerate(FREE):
        assert rows[3, j] == pytest.approx(np.nanmean(first[:, ATTRIBUTE_NAMES.index(name)]))


def test_a_row_a_volume_is_refused(study: Study) -> None:
    patients = study.private.split("train")
    by_volume = patients.attributes[:, [ATTRIBUTE_NAMES.index(name) for name in FREE]].astype(float)
    with pytest.raises(PrivacyError, match="one row a patient"):
        TablePlan(patients.places, 1.0, 1e-5, 5.0).measure(by_volume, population(50, 9), SIMULATED)


def test_ranges_are_public_and_one_outlier_moves_none() -> None:
    rows, plan = population(200, 1), TablePlan(201, math.inf, 1e-5, 0.0)
    far = np.vstack([rows, np.full((1, len(FREE)), 1e9)])
    at_the_edge = np.vstack([rows, HIGH])
    one, other = (plan.measure(x, population(50, 9), SIMULATED) for x in (far, at_the_edge))
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name))


def test_a_patient_who_is_not_there_and_a_missing_value_are_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TablePlan(40, 1.0, 1e-5, 5.0)
    unknown = np.full((10, len(FREE)), np.nan)
    first, second = sums(unknown, plan, monkeypatch)
    assert (second == 0).all()
    assert (first[: 1 + len(FREE)] > 0).all()
    assert (first[1 + len(FREE) :] == 0).all()


@pytest.mark.parametrize("epsilon", [0.1, 10.0])
def test_the_ledger_of_table_and_training_agrees_between_accountants(epsilon: float) -> None:
    plan = TablePlan.for_budget(room.SHARE * epsilon, 1e-5, 400)
    assert epsilon_pld(terms_of(plan.mechanisms), 1e-5) <= room.SHARE * epsilon * 1.001
    training = plan.mechanisms[0].model_copy(
        update={"stage": "denoiser", "tuned": "edges", "sampling_rate": 0.1, "expected_batch": 40, "steps": 50}
    )
    training = training.model_copy(update={"noise_multiplier": {0.1: 12.0, 1.0: 1.8, 10.0: 0.7}[epsilon]})
    both = (*plan.mechanisms, training)
    words = {"randomness": "", "private_data": "mine (train)", "public_data": "", "simulated": True}
    ledger = Ledger.state(both, 400, None, 1e-5, **words)
    prv = epsilon_prv(terms_of(both), 1e-5, ledger.epsilon)
    assert ledger.epsilon_pld == pytest.approx(prv, rel=0.015)
    alone = [epsilon_pld(terms_of([m]), 1e-5) for m in both]
    assert max(alone) < ledger.epsilon < sum(alone)


def test_the_gaussian_mechanism_is_accounted_exactly() -> None:
    plan = TablePlan.for_budget(1.0, 1e-5, 400)
    mu, epsilon = math.sqrt(2) / plan.noise_multiplier, 1.0
    delta = norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)  # Balle, Wang 2018
    assert delta == pytest.approx(1e-5, rel=0.05)


def test_a_seed_is_refused_for_real_patients_and_noise_is_new_every_time() -> None:
    with pytest.raises(PrivacyError, match="seed"):
        Randomness(0, simulated=False)
    plan, rows, public = TablePlan(100, 1.0, 1e-5, 5.0), population(100, 1), population(50, 9)
    fresh = [plan.measure(rows, public, Randomness(None, simulated=False)).correlation for _ in range(2)]
    assert (fresh[0] != fresh[1]).any()
    seeded = [plan.measure(rows, public, SIMULATED).correlation for _ in range(2)]
    assert (seeded[0] == seeded[1]).all()


@pytest.mark.parametrize(
    ("epsilon", "delta", "message"),
    [(0.001, 1e-5, "epsilon"), (101.0, 1e-5, "epsilon"), (math.nan, 1e-5, "epsilon"), (1.0, 0.01, "delta")],
)
def test_a_setting_out_of_range_is_named(epsilon: float, delta: float, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        TablePlan.for_budget(epsilon, delta, 400)


def tables() -> dict[str, Table]:
    """Populations with and without noise, one of whom nothing is known, and one at the edge of all ranges."""
    public, rows = population(300, 2, -0.5), population(300, 1)
    rows[:150, FREE.index("RVEDV")] = np.nan
    edges = np.where(np.random.default_rng(0).random((300, len(FREE))) < 0.5, LOW, HIGH)
    return {
        "noisy": TablePlan(300, 0.1, 1e-5, 40.0).measure(rows, public, SIMULATED),
        "exact": TablePlan(300, math.inf, 1e-5, 0.0).measure(rows, public, SIMULATED),
        "public": fit(public),
        "unknown": fit(np.full((300, len(FREE)), np.nan)),
        "edges": fit(edges),
    }


@pytest.mark.parametrize("kind", ["noisy", "exact", "public", "unknown", "edges"])
def test_physics_holds_in_what_is_sampled(kind: str) -> None:
    drawn = tables()[kind].sample(4000, np.random.default_rng(0))
    assert drawn.shape == (4000, len(ATTRIBUTES))
    assert drawn.dtype == np.float32
    column = dict(zip(ATTRIBUTE_NAMES, drawn.T, strict=True))
    assert np.isnan(column["ESED"]).all()
    for side in ("LV", "RV"):
        full, empty, fraction = (column[side + what] for what in ("EDV", "ESV", "EF"))
        known = ~np.isnan(empty)
        assert (empty[known] < full[known]).all()
        np.testing.assert_allclose(fraction[known], (100 * (1 - empty / full))[known], rtol=1e-4)
    for attribute in ATTRIBUTES:
        values = column[attribute.name][~np.isnan(column[attribute.name])]
        assert ((values >= attribute.low) & (values <= attribute.high)).all(), attribute.name
    for name in ("SEX", "DEPTH"):
        values = column[name][~np.isnan(column[name])]
        assert (values == values.round()).all()


def test_a_table_without_noise_is_the_population() -> None:
    rows = population(4000, 1)
    rows[:1000, FREE.index("AGE")] = np.nan
    drawn = TablePlan(4000, math.inf, 1e-5, 0.0).measure(rows, population(50, 9, 1.0), SIMULATED)
    sampled = drawn.sample(8000, np.random.default_rng(0))
    got = sampled[:, [ATTRIBUTE_NAMES.index(name) for name in FREE]]
    np.testing.assert_allclose(
        np.nanmean(got, 0), np.nanmean(rows, 0), atol=float(0.03 * (HIGH - LOW).max()), rtol=0.03
    )
    assert np.isnan(got).mean(axis=0) == pytest.approx(np.isnan(rows).mean(axis=0), abs=0.02)
    pair = [0, FREE.index("BMI")]
    true, found = spearmanr(*rows[:, pair].T)[0], spearmanr(*got[:, pair].T)[0]
    assert true - 0.15 < found < true + 0.03  # norms shorten the answers of patients far from the middle


def test_where_noise_drowns_everything_the_public_table_stays() -> None:
    public = population(400, 2, -0.7)
    table = TablePlan(30, 0.01, 1e-5, 350.0).measure(population(30, 1, 0.7), public, SIMULATED)
    np.testing.assert_allclose(table.densities, fit(public).densities, atol=0.005)
    np.testing.assert_allclose(table.correlation, fit(public).correlation, atol=0.05)
    assert (table.missing == 0).all()


# --- Real patients: charged first, bound to a ledger, counted together ---


@pytest.fixture
def real(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """A study of real private patients, as far as the library can tell, whose runs and record are empty."""
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "record"))

    def made(**changes: Any) -> Study:
        there = ward(study, tmp_path, "1", changes.pop("spend", True), **changes)
        there.runs = tmp_path / "runs"
        return there

    return made


def test_nothing_is_measured_before_it_is_agreed_to_and_charged(
    real: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PrivacyError, match="set the parameter spend to True"):
        real(spend=False).table(1)
    assert not Record().spends
    charged: list[int] = []
    measure = TablePlan.measure

    def watched(self: TablePlan, *given: Any) -> Table:
        charged.append(len(Record().spends))
        return measure(self, *given)

    monkeypatch.setattr(TablePlan, "measure", watched)
    study = real()
    table = study.table(1)
    assert charged == [1]
    (spend,) = Record().spends
    run = study.tabulated(1)
    assert charged == [1]  # it's there: not measured, and not charged, again
    assert spend.mechanisms == run.ledger.mechanisms
    assert [(m.stage, m.sampling_rate, m.steps) for m in spend.mechanisms] == [("attributes", 1.0, 2)]
    assert len(spend.people) == len(study.private.split("train"))
    assert run.ledger.randomness.endswith("operating system's entropy")
    np.testing.assert_array_equal(real(spend=False).table(1).correlation, table.correlation)
    said = privacy_statement(run.ledger, study.together())
    assert "| mechanism: attributes | Gaussian mechanism: 2 measurements" in said


def test_a_table_counts_in_the_joint_statement_and_in_the_budget(real: Callable[..., Study]) -> None:
    study = real()
    runs = [study.tabulated(epsilon) for epsilon in (1, 2)]
    together = study.together()
    assert together is not None
    assert together.runs == 2
    exact = epsilon_pld(merged(m for run in runs for m in run.ledger.mechanisms), 1e-5)
    assert together.epsilon == pytest.approx(exact, rel=1e-3)
    with pytest.raises(PrivacyError, match="more than the manifest's budget"):
        study.tabulated(9.9)
    assert len(Record().spends) == 2
    with pytest.raises(PrivacyError, match="inf on hospital would reveal"):
        study.tabulated(math.inf)


def test_a_look_before_spending_counts_tables(real: Callable[..., Study]) -> None:
    study = real()
    said = study.would_spend((2,), (1,))
    assert said is not None
    assert re.match(r"hospital \(model and table of attributes\): this spends 2\.[1-9]\d of", said)
    assert re.match(r"hospital: this spends (1\.9\d|2\.00) of", str(study.would_spend((2,))))
    said = study.would_spend(tables=(1,))
    assert re.match(r"hospital \(table of attributes\): this spends (0\.99|1\.00) of", str(said))
    study.tabulated(1)
    assert study.would_spend(tables=(1,)) is None
    said = study.would_spend((2,), (1,))  # the model alone, on top of the table
    assert re.match(r"hospital: this spends 1\.\d\d of .*; (0\.99|1\.00) are spent by 1 run", str(said))


def test_a_table_is_what_its_ledger_was_written_for(real: Callable[..., Study]) -> None:
    folder = real().tabulated(1).folder
    assert folder.stat().st_mode & 0o077 == 0
    kept = (folder / "table.safetensors").read_bytes()
    other = fit(population(50, 3))
    other.save(folder / "table.safetensors")
    with pytest.raises(PrivacyError, match=r"table\.safetensors isn't what it was written for"):
        Table.load(folder)
    (folder / "table.safetensors").write_bytes(kept)
    path = folder / "privacy.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"epsilon": 0.2}))
    with pytest.raises(PrivacyError, match="epsilon isn't what it was written for"):
        Table.load(folder)
    path.unlink()
    with pytest.raises(PrivacyError, match="no ledger"):
        Table.load(folder)


def test_a_kill_after_the_charge_is_gone_on_with_and_charged_once(
    real: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Table, "save", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            real().tabulated(1)
    assert len(Record().spends) == 1
    run = real().tabulated(1)
    assert len(Record().spends) == 1
    assert run.ledger.weights.keys() == {"table.safetensors"}


def test_a_table_of_simulated_patients_is_counted_with_their_models(study: Study, tmp_path: Path) -> None:
    there = Study(study.parameters)
    there.runs, there.public, there.private = tmp_path, study.public, study.private
    run = there.tabulated(1)
    together = there.together()
    assert together is not None
    assert (together.runs, together.epsilon) == (1, pytest.approx(1, rel=0.01))
    assert run.ledger.simulated
    places = there.private.split("train").places
    chosen = SelectionSettings(share=0.5, doubt=1, steps=1, learning_rate=1e-3)
    for selection in (None, chosen):
        recipe = there.profile.finetune.model_copy(update={"selection": selection})
        there.profile = there.profile.model_copy(update={"finetune": recipe})
        of_training = there.beside_table(1, 0.1)
        mechanisms = TablePlan.for_budget(0.1, recipe.delta, places).mechanisms
        training = recipe.mechanisms(of_training, places)
        assert 0.985 <= epsilon_pld(merged((*mechanisms, *training)), recipe.delta) <= 1.001
        assert 0.9 < of_training < 1  # less is lost than the share


def test_private_patients_never_make_the_public_table(study: Study, tmp_path: Path) -> None:
    private = study.private.split("train")
    with pytest.raises(PrivacyError, match="is private"):
        Table.of_public(private)
    plan = TablePlan(private.places, 1.0, 1e-5, 5.0)
    with pytest.raises(PrivacyError, match="is private"):
        tabulate(private, private, plan, SIMULATED, tmp_path, "none")
    assert not [*tmp_path.iterdir()]


def test_a_folder_of_another_plan_is_refused(study: Study, tmp_path: Path) -> None:
    private, public = study.private.split("train"), study.public.split("train")
    plan = TablePlan.for_budget(1.0, 1e-5, private.places)
    tabulate(private, public, plan, SIMULATED, tmp_path, "phantom_public")
    other = TablePlan.for_budget(2.0, 1e-5, private.places)
    with pytest.raises(ParameterError, match="other settings"):
        tabulate(private, public, other, SIMULATED, tmp_path, "phantom_public")
    with pytest.raises(ParameterError, match="n_patients"):
        tabulate(private, public, TablePlan.for_budget(1.0, 1e-5, 999), SIMULATED, tmp_path, "phantom_public")
