"""Parameters, profiles, and the stages' folders."""

import json
import math
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml

from cardiac_ldm.cohort import Manifest, Patient
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.parameters import CompareParameters, FinetuneParameters, ModelParameters, Parameters
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness, epsilon_pld
from cardiac_ldm.profile import PROFILES, Profile
from cardiac_ldm.report.tables import utility_rows
from cardiac_ldm.study import Study
from tests.conftest import TINY


@pytest.mark.parametrize("epsilon", [0, -2, math.nan, "ten", None, True])
def test_finetuning_refuses_a_budget_that_is_none(epsilon: object) -> None:
    with pytest.raises(ParameterError, match=r"epsilon: .*must be a number above 0"):
        FinetuneParameters.read({"epsilon": epsilon})


def test_other_notebooks_take_zero_for_the_public_model() -> None:
    parameters = ModelParameters.read({"epsilon": 0})
    assert parameters.epsilon == 0
    with pytest.raises(ParameterError, match="at least 0"):
        ModelParameters.read({"epsilon": -0.1})


def test_budgets_are_read_in_rising_order() -> None:
    parameters = CompareParameters.read({"epsilons": "10, inf,0, 1"})
    assert parameters.budgets == (0, 1, 10, math.inf)
    with pytest.raises(ParameterError, match="'one' must be a number"):
        CompareParameters.read({"epsilons": "0, one"})


def test_a_mistyped_parameter_is_named_and_corrected() -> None:
    with pytest.raises(ParameterError, match=r"epsilom: no such parameter; did you mean epsilon\?"):
        FinetuneParameters.read({"epsilon": 1, "epsilom": 2})
    with pytest.raises(ParameterError, match=r"seed: 1\.5"):
        Parameters.read({"seed": 1.5})


def test_what_a_notebook_holds_besides_parameters_is_ignored() -> None:
    namespace = {"In": [""], "Out": {}, "_i1": "", "exit": print, "Parameters": Parameters, "seed": 3, "json": json}
    assert Parameters.read(namespace).seed == 3


def test_errors_show_as_one_sentence_in_a_notebook() -> None:
    assert ParameterError("seed: no")._render_traceback_() == ["ParameterError: seed: no"]


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ParameterError, match=r"profile: there is no .quik.; choose .*demo"):
        Profile.load("quik")


def test_a_profile_with_a_typo_names_the_file_and_the_field(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "tiny.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("expected_batch", "expected_bach"))
    with pytest.raises(ParameterError, match=r"mine\.yaml: .*finetune\.expected_bach: is no setting"):
        Profile.load(str(path))
    path.write_text("a: [")
    with pytest.raises(ParameterError, match=r"mine\.yaml"):
        Profile.load(str(path))


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_builds_steps_once_and_is_accounted_for(name: str) -> None:
    profile = Profile.load(name)
    autoencoder = profile.autoencoder.build()
    size = 96 // autoencoder.reduction
    model = profile.denoiser.build(profile.autoencoder.latent_channels)
    latents = torch.randn(1, profile.autoencoder.latent_channels, 13, size, size)
    model(latents, torch.tensor([7]), torch.full((1, 14), torch.nan)).square().mean().backward()
    recipe, n_patients = profile.finetune, profile.patients["private"].train
    plan = recipe.plan(10, recipe.delta, n_patients)
    terms = ((plan.noise_multiplier, plan.sampling_rate, plan.steps),)
    assert 9.85 <= epsilon_pld(terms, plan.delta, 1e-3) <= 10.05


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    return Study(Parameters(profile=str(Path(__file__).parent / "tiny.yaml")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_the_run_of_real_private_patients_shows_and_leaves_only_what_is_private(
    runs: Path,
    tmp_path: Path,
    make_acdc_patient: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(runs))
    names = [f"patient{number:03d}" for number in range(10)]
    for name in names:
        make_acdc_patient(name)
    manifest = {"name": "hospital", "role": "private", "simulated": False, "licence": "none", "citation": "none"}
    manifest |= {"budget": {"epsilon": 10, "delta": 1e-5}}
    splits = {"train": names[:8], "validation": names[8:9], "test": names[9:]}
    path = tmp_path / "hospital.yaml"
    path.write_text(yaml.safe_dump(manifest | {"reader": {"kind": "acdc"}, "root": "acdc", "splits": splits}))
    study = Study(FinetuneParameters(profile=str(TINY), cohort_private=str(path), epsilon=3, spend=True))
    assert study.private.split("train").secret
    _ = study.pretrained
    capfd.readouterr()
    run = study.finetuned(3)
    shown = capfd.readouterr()
    spends, runs_it = shown.out.splitlines()
    unknown = "Whether it helps isn't known: no rehearsal had this recipe and at most 8 patients"
    said = f"hospital: this spends 2.99 of (10, 1e-05); 0.00 are spent by 0 run(s). {unknown}. It's recorded in "
    assert spends.startswith(said)
    assert runs_it == f"finetune: not done yet with these settings; running it in {run.folder.name}"
    bars = {re.sub(":.*", "", part) for part in re.split(r"[\r\n]", shown.err) if part.strip()}
    assert bars <= {"held-out loss", "encode phantom_public"}  # both are about public patients
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "lock",
        "metrics.json",
        "privacy.json",
        "settings.yaml",
        "weights.safetensors",
    ]
    assert set(run.metrics) == {"epsilon"}
    assert study.held_out_loss(3).metrics["n_patients"] == len(study.public.split("test"))
    assert run.ledger.randomness == "ChaCha20, keyed by the operating system's entropy"
    assert (run.ledger.guarantee, run.ledger.n_units) == ("patient-level DP", 8)
    with pytest.raises(PrivacyError, match="epsilon: inf on hospital would reveal real private patients"):
        study.finetuned(math.inf)


def test_a_private_cohort_never_stands_in_for_the_public_one() -> None:
    with pytest.raises(PrivacyError, match="cohort_public: phantom_private is private"):
        _ = Study(Parameters(cohort_public="phantom_private")).public


def test_all_models_of_one_cohort_are_stated_together_whatever_each_stated(tmp_path: Path) -> None:
    study = Study(Parameters(profile=str(TINY)))
    study.runs = tmp_path
    train = MagicMock(split="train", __len__=lambda _: 24)
    train.name = "mine"
    study.private = MagicMock(split=lambda name: train)
    mine = [(24, 1e-5, "mine")] * 2 + [(25, 1e-5, "mine"), (24, 1e-6, "mine")]
    for number, (patients, delta, data) in enumerate([*mine, (24, 1e-5, "yours")]):
        plan = PrivatePlan(patients, 6, 2, 1.0, 1, 5.0, delta, noise_multiplier=2.0)
        words = {"stage": "denoiser", "tuned": "all", "private_data": f"{data} (train)", "public_data": ""}
        (tmp_path / f"finetune-{number}").mkdir()
        plan.ledger(Randomness(0, simulated=True), **words).save(tmp_path / f"finetune-{number}" / "privacy.json")
    found = study._spending.ledgers()
    assert len(found) == len(mine)
    together = [Ledger.compose(found[:n]).epsilon for n in range(1, 5)]
    assert together == sorted(set(together))  # each one adds to it


@pytest.mark.filterwarnings("ignore:.*have no labels")
@pytest.mark.parametrize(
    ("without_labels", "trains"),
    [("nobody", False), ("private", True), ("everybody", False), ("a public patient", True)],
)
def test_the_segmenter_is_trained_early_only_where_hearts_must_be_found_and_some_public_ones_are_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_labels: str, trains: bool
) -> None:
    def read(manifest: Manifest, root: None, patient_id: str, imaged: bool = True) -> Patient:
        patient = read_patient(manifest, root, patient_id, imaged)
        named = {"private": manifest.role == "private", "everybody": True, "nobody": False}
        if named.get(without_labels, manifest.role == "public" and patient_id == "p000000"):
            return replace(patient, volumes=tuple(replace(v, labels=None) for v in patient.volumes))
        return patient

    room = sys.modules["cardiac_ldm.cohort.prepare"]
    monkeypatch.setattr(room, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(room, "read_patient", read)
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    study = Study(Parameters(profile=str(TINY)))
    public, private = study.public.split("train"), study.private.split("train")
    assert len(list(tmp_path.glob("anatomy-*/segmenter.safetensors"))) == trains
    assert public.labelled.all() == (without_labels in ("nobody", "private"))
    assert private.labelled.all() == (without_labels in ("nobody", "a public patient"))
    again = Study(Parameters(profile=str(TINY)))
    assert (again.public.key, again.private.key) == (study.public.key, study.private.key)
    if trains:
        assert study.anatomy.key == again.anatomy.key
        assert len(list(tmp_path.glob("anatomy-*/segmenter.safetensors"))) == 1


def test_what_synthetic_patients_teach_stands_beside_real_ones(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(runs))
    study = Study(Parameters(profile=str(TINY)))
    useful, baselines = study.useful(0), study.useful_baselines
    drawn = study.training_cohort(0).volumes
    public = study.public.split("train")
    conditions = {tuple(row) for row in np.nan_to_num(drawn.attributes)}
    assert conditions == {
        tuple(row) for row in np.nan_to_num(public.attributes)
    }  # of nobody it's tested on, or private
    assert study.training_cohort(0).ledger == study.pretrained.ledger
    names = ["public", "private", "few private"]
    rows = utility_rows(baselines.metrics, [useful.metrics])
    training_sets = [*names, "synthetic (public data only)", "few private + synthetic (public data only)"]
    assert list(rows.training_set.unique()) == training_sets
    for training_set in training_sets:
        assert set(rows[rows.training_set == training_set].against) == {"", *names} - {training_set}
    assert set(rows[rows.against == ""].n_patients) == {len(study.reference)}
    assert set(rows.metric) >= {"Dice LV", "phase accuracy", "mean absolute error LVEDV (mL)"}  # this decoder labels
    assert set(rows.run) == {baselines.folder.name, useful.folder.name}
    capsys.readouterr()
    assert Study(Parameters(profile=str(TINY))).useful(0).key == useful.key
    assert capsys.readouterr().out == ""


def test_real_private_patients_teach_nothing_but_the_mechanism(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(runs))
    manifest = {"name": "hospital", "role": "private", "simulated": False, "licence": "none", "citation": "none"}
    manifest |= {"budget": {"epsilon": 10, "delta": 1e-5}}
    splits = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    path = tmp_path / "hospital.yaml"
    path.write_text(yaml.safe_dump(manifest | {"reader": {"kind": "acdc"}, "root": "acdc", "splits": splits}))
    study = Study(Parameters(profile=str(TINY), cohort_private=str(path)))
    monkeypatch.setattr(Study, "private", property(lambda _: pytest.fail("nobody may look at them")))
    rows = utility_rows(study.useful_baselines.metrics, [study.useful(0).metrics])
    assert list(rows.training_set.unique()) == ["public", "synthetic (public data only)"]
