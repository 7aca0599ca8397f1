"""Parameters, profiles, and the stages' folders."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy import epsilon_pld
from cardiac_ldm.study import (
    PROFILES,
    CompareParameters,
    FinetuneParameters,
    ModelParameters,
    Parameters,
    Profile,
    Study,
)


@pytest.mark.parametrize("epsilon", [0, -2, math.nan, "ten", None, True])
def test_finetuning_refuses_a_budget_that_is_none(epsilon: object) -> None:
    with pytest.raises(ParameterError, match=r"epsilon: .*must be a number above 0"):
        FinetuneParameters.start({"epsilon": epsilon})


def test_other_notebooks_take_zero_for_the_public_model() -> None:
    parameters, _ = ModelParameters.start({"epsilon": 0})
    assert parameters.epsilon == 0
    with pytest.raises(ParameterError, match="at least 0"):
        ModelParameters.start({"epsilon": -0.1})


def test_budgets_are_read_in_rising_order() -> None:
    parameters, _ = CompareParameters.start({"epsilons": "10, inf,0, 1"})
    assert parameters.budgets == (0, 1, 10, math.inf)
    with pytest.raises(ParameterError, match="'one' must be a number"):
        CompareParameters.start({"epsilons": "0, one"})


def test_a_mistyped_parameter_is_named_and_corrected() -> None:
    with pytest.raises(ParameterError, match=r"epsilom: no such parameter; did you mean epsilon\?"):
        FinetuneParameters.start({"epsilon": 1, "epsilom": 2})
    with pytest.raises(ParameterError, match=r"seed: 1\.5"):
        Parameters.start({"seed": 1.5})


def test_what_a_notebook_holds_besides_parameters_is_ignored() -> None:
    namespace = {"In": [""], "Out": {}, "_i1": "", "exit": print, "Parameters": Parameters, "seed": 3, "json": json}
    assert Parameters.start(namespace)[0].seed == 3


def test_errors_show_as_one_sentence_in_a_notebook() -> None:
    assert ParameterError("seed: no")._render_traceback_() == ["ParameterError: seed: no"]


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ParameterError, match=r"profile: there is no .quik.; choose .*quick"):
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
    plan = profile.finetune.plan(10, profile.patients["private"].train)
    spent = epsilon_pld(plan.noise_multiplier, plan.sampling_rate, plan.steps, plan.delta)
    assert 9.85 <= spent <= 10.05


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    return Study(Parameters(profile=str(Path(__file__).parent / "tiny.yaml")))


def test_a_stage_is_done_once_and_anew_when_its_settings_change(study: Study, capsys) -> None:
    calls: list[Path] = []

    def work(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return {"n": len(calls)}

    first = study._run("stage", {"a": 1}, ["up"], work)
    assert "stage: not done yet" in capsys.readouterr().out
    assert study._run("stage", {"a": 1}, ["up"], work).metrics == first.metrics == {"n": 1}
    changed = [({"a": 2}, ["up"]), ({"a": 1}, ["other"])]
    assert len({study._run("stage", settings, up, work).key for settings, up in changed} | {first.key}) == 3


def test_a_stage_that_fails_is_not_taken_for_done(study: Study) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "weights.safetensors").write_text("half")
        raise RuntimeError

    def succeed(folder: Path) -> dict[str, Any]:
        return {}

    works: list[Callable[[Path], dict[str, Any]]] = [fail, succeed]
    with pytest.raises(RuntimeError):
        study._run("stage", 1, [], works[0])
    assert study._run("stage", 1, [], works[1]).metrics == {}


def test_a_private_cohort_never_stands_in_for_the_public_one() -> None:
    with pytest.raises(PrivacyError, match="cohort_public: phantom_private is private"):
        _ = Study(Parameters(cohort_public="phantom_private")).public
