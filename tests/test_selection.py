"""Public patients who are chosen privately: one bounded, noisy measurement, and everything else follows from it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cardiac_ldm.cohort import Patients, load_manifest
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import Ledger, Mechanism, PrivatePlan, Randomness, Record, epsilon_pld
from cardiac_ldm.study import Study
from cardiac_ldm.training import selection as room
from cardiac_ldm.training.finetune import FinetuneSettings, finetune
from cardiac_ldm.training.selection import Selection, SelectionSettings, features, measured, tilted
from tests.test_finetune import ENTROPY, HOSPITAL, NARROW, PROFILE, SEEDED, latents_of, made_up

CHOSEN = SelectionSettings(share=0.5, doubt=1.0, steps=3, learning_rate=1e-3)


def recipe(**changes: object) -> FinetuneSettings:
    return FinetuneSettings.model_validate(PROFILE.finetune.model_dump() | {"selection": CHOSEN, **changes})


def mechanism(noise: float, places: int = 12) -> Mechanism:
    return CHOSEN.mechanism(math.inf, 1e-3, places).model_copy(update={"noise_multiplier": noise})


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Patients:
    return made_up(tmp_path_factory.mktemp("public") / "twelve", (2, 1, 3) * 4, load_manifest("phantom_public"))


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Patients:
    return made_up(tmp_path_factory.mktemp("private") / "twelve", (2, 1, 3) * 4)


def selection(public: Patients, settings: SelectionSettings = CHOSEN) -> Selection:
    return Selection(settings, public, latents_of(public), PROFILE.pretrain, 0)


def trained(
    folder: Path, public: Patients, private: Patients, settings: FinetuneSettings | None = None, epsilon: float = 5
) -> tuple[Denoiser, Ledger]:
    torch.manual_seed(1)
    model, settings = NARROW.build(1), settings or recipe()
    given = private, latents_of(private), settings.plan(epsilon, 1e-3, 12), settings, SEEDED, folder, "public"
    return model, finetune(model, *given, selection=selection(public, settings.selection or CHOSEN))


def noting(seen: list[np.ndarray], function: Callable[..., np.ndarray], number: int) -> Callable[..., np.ndarray]:
    """The function, which notes the argument of this number."""

    def noted(*given: Any) -> np.ndarray:
        seen.append(given[number])
        return function(*given)

    return noted


# --- The measurement ---


def test_a_patient_counts_once_whatever_their_volumes_are(private: Patients) -> None:
    latents = latents_of(private)
    found = features(private, latents)
    assert found.shape == (12, 16 + 16 + 3 + 3)
    alone = private.subset(np.array([1]))
    np.testing.assert_allclose(features(alone, latents[2:3])[0], found[1])
    many = features(private.subset(np.array([0])), np.repeat(latents[2:3], 2, axis=0))
    np.testing.assert_allclose(many[0], found[1])


@pytest.mark.parametrize("size", [1.0, 1e9, np.inf, np.nan])
def test_no_patient_moves_the_measured_sum_by_more_than_the_noise_is_made_for(size: float) -> None:
    rows = np.random.default_rng(0).normal(size=(12, 40))
    rows[3] *= size
    without = np.delete(rows, 3, axis=0)
    moved = 12 * (measured(rows, mechanism(0), SEEDED) - measured(without, mechanism(0), SEEDED))
    assert np.linalg.norm(moved) <= math.sqrt(40)


def test_noise_is_as_large_as_the_ledger_says() -> None:
    rows = np.zeros((12, 10_000))
    found = measured(rows, mechanism(3.0), SEEDED)
    assert np.std(found) == pytest.approx(3 * math.sqrt(10_000) / 12, rel=0.03)
    assert not np.array_equal(found, measured(rows, mechanism(3.0), Randomness(6, simulated=True)))


def test_what_public_patients_share_does_not_swallow_what_tells_them_apart(
    public: Patients, private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat, others = latents_of(public), latents_of(private)
    flat[:, :, 0] = 0.25  # a slice that no public heart reaches, and every private one does
    seen: list[np.ndarray] = []
    monkeypatch.setattr(room, "pretrain", lambda *_: None)
    monkeypatch.setattr(room, "measured", noting(seen, measured, 0))
    plan = recipe().plan(math.inf, 1e-3, 12)
    replace(selection(public), latents=flat).teach(NARROW.build(1), private, others, plan, SEEDED, tmp_path)
    assert np.median(np.linalg.norm(seen[0], axis=1)) < 3 * math.sqrt(seen[0].shape[1])


def test_nobody_and_patients_without_volumes_are_measured_as_empty_places(private: Patients) -> None:
    nobody = private.subset(np.array([], int))
    assert features(nobody, latents_of(private)).shape == (0, 38)
    assert not measured(np.full((2, 38), np.nan), mechanism(0), SEEDED).any()


def test_an_empty_place_has_the_public_mean() -> None:
    np.testing.assert_allclose(measured(np.ones((6, 4)), mechanism(0), SEEDED), 0.5, rtol=1e-5)


def test_more_patients_than_places_are_refused() -> None:
    with pytest.raises(PrivacyError, match="more patients than the 12 places that the ledger accounts for"):
        measured(np.zeros((13, 4)), mechanism(1.0), SEEDED)


def test_the_plan_pays_for_the_measurement_first() -> None:
    (first, last) = recipe().mechanisms(2.0, 24)
    assert (first.stage, first.sampling_rate, first.expected_batch, first.steps) == ("selection", 1.0, 24, 1)
    terms = [(m.noise_multiplier, m.sampling_rate, m.steps) for m in (first, last)]
    assert epsilon_pld(tuple(terms[:1]), PROFILE.finetune.delta) == pytest.approx(1.0, rel=0.01)
    assert epsilon_pld(tuple(terms), PROFILE.finetune.delta) == pytest.approx(2.0, rel=0.02)
    (alone,) = recipe(selection=None).mechanisms(2.0, 24)
    assert last.noise_multiplier > alone.noise_multiplier


def test_too_small_a_budget_for_both_is_found_before_anything_is_trained() -> None:
    recipe(selection=None).check(0.012, "phantom_private", 24, secret=False)
    with pytest.raises(ParameterError, match=r"selection.share: 0.5 of epsilon 0.012 is below 0.01"):
        recipe().check(0.012, "phantom_private", 24, secret=False)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0, 20.0, math.inf])
def test_every_sensible_budget_has_a_plan(epsilon: float) -> None:
    settings = recipe(steps=20, expected_batch=192)
    settings.check(epsilon, "phantom_private", 4000, secret=False)
    assert (settings.plan(epsilon, 1e-5, 4000).noise_multiplier > 0) == math.isfinite(epsilon)


# --- The choice ---


def test_chances_come_near_to_the_mean_and_no_nearer_than_they_are_told() -> None:
    rows = np.random.default_rng(0).normal(size=(400, 5))
    mean = np.array([0.5, -0.3, 0.0, 0.0, 0.2])
    close, far = tilted(rows, mean, 1e-6), tilted(rows, mean, 1e6)
    np.testing.assert_allclose(close @ rows, mean, atol=1e-3)
    np.testing.assert_allclose(far, 1 / 400, rtol=1e-3)
    some = tilted(rows, mean, 1.0)
    t = np.linalg.lstsq(rows - rows.mean(axis=0), np.log(some) - np.log(some).mean(), rcond=None)[0]
    np.testing.assert_allclose(mean - some @ rows, t, atol=1e-3)  # the optimum: what is left is doubt times the tilt


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_chosen_teach_in_proportion(
    noise: float, public: Patients, private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    means: list[np.ndarray] = []
    monkeypatch.setattr(room, "pretrain", lambda *args: given.append(args))
    monkeypatch.setattr(room, "tilted", noting(means, tilted, 1))
    plan = replace(recipe().plan(math.inf, 1e-3, 12), before=(mechanism(noise),))
    start = NARROW.build(1)
    selection(public).teach(start, private, latents_of(private), plan, SEEDED, tmp_path)
    ((who, _, model, settings, seed, state, chances),) = given
    assert who is public
    assert model is start
    assert (settings.steps, settings.learning_rate, settings.further, seed) == (3, 1e-3, (), 0)
    assert state == tmp_path / "selected.pt"
    rows, others = (features(x, latents_of(x)) for x in (public, private))
    centre, spread = rows.mean(axis=0), rows.std(axis=0)
    exact = measured((others - centre) / spread, mechanism(0), SEEDED)
    uncertain = noise * math.sqrt(len(exact)) / 12
    assert np.std(means[0] - exact) == pytest.approx(uncertain, rel=0.4)
    expected = tilted((rows - centre) / spread, means[0], 1.0 + uncertain**2)
    np.testing.assert_allclose(np.bincount(public.patient_index, chances), expected, rtol=1e-6)
    assert np.ptp(chances[: public.offsets[1]]) == 0
    assert chances.sum() == pytest.approx(1)


def test_private_patients_are_nobody_to_choose_from(
    private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "features", lambda *_: pytest.fail("they were looked at"))
    with pytest.raises(PrivacyError, match="public"):
        trained(tmp_path, private, private)


# --- The training ---


def test_a_training_states_both_and_keeps_nothing_of_the_way(
    public: Patients, private: Patients, tmp_path: Path
) -> None:
    model, ledger = trained(tmp_path, public, private)
    assert [m.stage for m in ledger.mechanisms] == ["selection", "denoiser"]
    assert ledger.epsilon <= 5 * 1.015
    assert sorted(path.name for path in tmp_path.iterdir()) == ["privacy.json", "weights.safetensors"]
    assert Ledger.load(tmp_path / "privacy.json") == ledger
    other, _ = trained(tmp_path, public, private)  # read, not trained again
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name])


def test_a_killed_training_measures_nobody_twice(
    public: Patients, private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "whole", public, private)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PrivatePlan, "gradient", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", public, private)
    assert Ledger.load(tmp_path / "killed" / "privacy.json").mechanisms
    monkeypatch.setattr(room, "measured", killed)
    trained(tmp_path / "killed", public, private)
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name])


def test_the_ledger_is_there_before_anybody_is_measured(
    public: Patients, private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(*_: object) -> np.ndarray:
        assert [m.stage for m in Ledger.load(tmp_path / "privacy.json").mechanisms] == ["selection", "denoiser"]
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "measured", seen)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, public, private)


def test_a_measurement_that_no_plan_accounts_for_is_not_taken(
    public: Patients, private: Patients, tmp_path: Path
) -> None:
    settings, own = recipe(), mechanism(1.0)
    others = [(), (own, own)]
    others += [(own.model_copy(update={name: value}),) for name, value in (("sampling_rate", 0.5), ("steps", 2))]
    others += [(mechanism(1.0, places=6),)]
    for before in others:
        plan = replace(settings.plan(5, 1e-3, 12), before=before)
        with pytest.raises(PrivacyError, match="doesn't account"):
            selection(public).teach(NARROW.build(1), private, latents_of(private), plan, SEEDED, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_plan_for_others_is_refused_before_anybody_is_measured(
    public: Patients, private: Patients, tmp_path: Path
) -> None:
    settings = recipe()
    given = private, latents_of(private), settings.plan(5, 1e-3, 13), settings, SEEDED, tmp_path, "public"
    with pytest.raises(ParameterError, match="has 12 patients, the plan is for 13"):
        finetune(NARROW.build(1), *given, selection=selection(public))
    assert not [*tmp_path.iterdir()]


def test_what_others_chose_is_not_gone_on_with(
    public: Patients, private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "pretrain", lambda *_: None)
    plan, latents = recipe().plan(5, 1e-3, 12), latents_of(private)
    given = latents, plan, SEEDED, tmp_path
    selection(public).teach(NARROW.build(1), private, *given)
    others = private.subset(np.arange(12)[::-1])
    longer = selection(public, CHOSEN.model_copy(update={"steps": 4}))
    for chooser, chosen in ((selection(public), others), (longer, private)):
        with pytest.raises(ParameterError, match=r"selection.npz: was left by other patients or settings"):
            chooser.teach(NARROW.build(1), chosen, *given)
    monkeypatch.setattr(room, "is_first_process", lambda: False)
    monkeypatch.setattr(room, "measured", lambda *_: pytest.fail("another process measured too"))
    selection(public).teach(NARROW.build(1), private, *given)


def test_real_patients_are_not_measured_off_their_record(
    public: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "features", lambda *_: pytest.fail("they were looked at"))
    secret, settings = made_up(tmp_path / "secret", manifest=HOSPITAL), recipe()
    given = secret, latents_of(secret), settings.plan(5, 1e-3, 12), settings
    for randomness, says in ((ENTROPY, "hospital weren't charged"), (SEEDED, "hospital are real; their noise must be")):
        with pytest.raises(PrivacyError, match=says):
            finetune(NARROW.build(1), *given, randomness, tmp_path / "run", "public", selection=selection(public))


def test_real_patients_are_charged_and_measured_once_and_nothing_of_them_is_shown_or_left(
    hospital: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "record"))
    monkeypatch.setattr(room, "_ROWS", 1)  # so few would have no bar
    there = Study(hospital.parameters)
    there.runs, there.public, there.private = hospital.runs, hospital.public, hospital.private
    there.profile = hospital.profile.model_copy(update={"finetune": recipe()})
    counted: list[np.ndarray] = []
    monkeypatch.setattr(room, "measured", noting(counted, measured, 0))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PrivatePlan, "gradient", killed)
        with pytest.raises(KeyboardInterrupt):
            there.finetuned(2)
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "lost"))
    with pytest.raises(PrivacyError, match="doesn't know this model"):  # else they were measured, and charged, again
        there.finetuned(2)
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "record"))
    run = there.finetuned(2)
    assert (len(counted), len(Record().spends)) == (1, 1)
    assert run.ledger.randomness.endswith("operating system's entropy")
    assert run.ledger.sampler.endswith("selection: none, every place takes part")
    assert not [*run.folder.glob("select*")]
    shown = "".join(capfd.readouterr())
    assert "features of phantom_public" in shown
    assert "features of hospital" not in shown


@pytest.mark.parametrize("with_settings", [True, False])
def test_a_recipe_and_what_it_is_given_agree(
    with_settings: bool, public: Patients, private: Patients, tmp_path: Path
) -> None:
    settings = recipe() if with_settings else recipe(selection=None)
    given = private, latents_of(private), settings.plan(5, 1e-3, 12), settings, SEEDED, tmp_path, "public"
    with pytest.raises(ParameterError, match="give both or neither"):
        finetune(NARROW.build(1), *given, selection=None if with_settings else selection(public))


def test_a_study_gives_what_its_recipe_asks_for(study: Study, tmp_path: Path) -> None:
    there = Study(study.parameters)
    there.runs, there.public, there.private = tmp_path, study.public, study.private
    there.profile = study.profile.model_copy(update={"finetune": recipe()})
    run = there.finetuned(2)
    assert [m.stage for m in run.ledger.mechanisms] == ["selection", "denoiser"]
    assert run.key != study.finetuned(2).key


def test_budgets_and_runs_have_noise_of_their_own(
    public: Patients, private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[np.ndarray] = []
    monkeypatch.setattr(room, "pretrain", lambda *_: None)
    monkeypatch.setattr(room, "tilted", noting(kept, tilted, 1))
    longer = CHOSEN.model_copy(update={"steps": 4})
    for number, (epsilon, run, settings) in enumerate(
        [(5.0, "a", CHOSEN), (6.0, "a", CHOSEN), (5.0, "b", CHOSEN), (5.0, "a", longer)]
    ):
        plan = replace(recipe().plan(epsilon, 1e-3, 12), before=(mechanism(1.0),))
        folder, own = tmp_path / str(number), Randomness(5, simulated=True, run=run)
        folder.mkdir()
        selection(public, settings).teach(NARROW.build(1), private, latents_of(private), plan, own, folder)
    assert len({mean.tobytes() for mean in kept}) == 4
