"""The ten mistakes that void a guarantee, each made impossible: a table of contents of what is promised.

The mistakes are those that reviews of differentially private training name most (Ponomareva et al., arXiv 2303.00654;
NIST SP 800-226; Chua et al., arXiv 2411.04205). Every test goes through the code that a study runs.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cardiac_ldm.cohort import ATTRIBUTES, GRID, Patients
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation.measured import measure_real
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.perception import Critic
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness, epsilon_pld
from cardiac_ldm.privacy.accounting import terms_of
from cardiac_ldm.profile import PROFILES, Profile
from cardiac_ldm.report.statement import privacy_statement
from cardiac_ldm.study import Run, Study
from cardiac_ldm.training.anatomy import train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import train_autoencoder
from cardiac_ldm.training.finetune import finetune
from cardiac_ldm.training.pretrain import DenoiserSettings, held_out_loss, pretrain
from cardiac_ldm.training.private import PrivateSettings, train_privately
from tests.conftest import TINY

ALL_PROFILES = [*sorted(path.stem for path in PROFILES.glob("*.yaml")), str(TINY)]
WORDS = {"stage": "denoiser", "tuned": "all", "private_data": "hospital (train)", "public_data": "phantom_public"}


def finetuned_afresh(study: Study) -> Run:
    """Fine-tune with a budget of 0.5, whatever other tests have left."""
    for folder in study.runs.glob("finetune-*"):
        shutil.rmtree(folder)
    return study.finetuned(0.5)


def free_plan(n_patients: int, expected_batch: int, steps: int, **changes: Any) -> PrivatePlan:
    """A plan without noise, so that every contribution shows."""
    terms = {"clip": math.inf, "draws": 1, "epsilon": math.inf, "delta": 1e-5, "noise_multiplier": 0.0}
    return PrivatePlan(n_patients, expected_batch, steps, **(terms | changes))


def private_steps(
    plan: PrivatePlan, patients: Patients, folder: Path, slope: Callable[[int], float]
) -> list[tuple[list[int], Tensor]]:
    """Run the private loop on one weight, where each patient's loss has this slope: every step's lot and gradient."""
    weight, batch, taken = nn.Parameter(torch.zeros(1)), [], []

    def unit_loss(unit: int, generator: torch.Generator) -> Tensor:
        batch.append(unit)
        return slope(unit) * weight.sum()

    def remember(optimiser: torch.optim.Optimizer, *_: object) -> None:
        assert weight.grad is not None
        taken.append((batch.copy(), weight.grad.clone()))
        batch.clear()

    recipe: dict[str, Any] = {"steps": plan.steps, "expected_batch": plan.expected_batch, "clip": 1.0, "draws": 1}
    recipe |= {"learning_rate": 1e-3, "average_decay": 0.9, "precision": "fp32"}
    randomness, settings = Randomness(0, simulated=True), PrivateSettings.model_validate(recipe)
    ledger = plan.ledger(randomness, **WORDS)
    handle = register_optimizer_step_pre_hook(remember)
    try:
        train_privately({"w": weight}, unit_loss, plan, settings, randomness, ledger, patients, folder)
    finally:
        handle.remove()
    return taken


def test_mistake_01_statistics_of_private_patients_are_never_taken(
    study: Study, hospital: Study, tmp_path: Path
) -> None:
    simulated, real, profile = study.private.split("train"), hospital.private.split("train"), study.profile
    latents = study.latents(simulated, study.private)[:]
    with pytest.raises(PrivacyError, match="scale of its latents"):
        train_autoencoder(simulated, profile.autoencoder, 0, tmp_path / "state.pt")
    with pytest.raises(PrivacyError, match="trained with no noise"):
        pretrain(simulated, latents, profile.denoiser, profile.pretrain, 0, tmp_path / "state.pt")
    for train in (train_segmenter, train_phase_classifier):
        with pytest.raises(PrivacyError, match="private patients"):
            train(simulated, steps=1, batch=1, learning_rate=1e-3, seed=0)
    with pytest.raises(PrivacyError, match="exact losses"):  # so there is no best checkpoint and no early stopping
        held_out_loss(study.denoiser(study.pretrained), latents, real)
    with pytest.raises(PrivacyError, match="hospital holds real private patients"):
        measure_real(real, Segmenter(), PhaseClassifier(), seed=0)
    assert hospital.reference.role == "public"
    ranges = profile.denoiser.build(2).attributes
    assert ranges.low.tolist() == [attribute.low for attribute in ATTRIBUTES]
    assert ranges.high.tolist() == [attribute.high for attribute in ATTRIBUTES]
    with pytest.raises(ParameterError, match="has 23 patients, the plan is for 24"):  # N is the manifest's
        private_steps(free_plan(24, 6, 1), simulated[:23], tmp_path, slope=float)


@pytest.mark.parametrize("name", ALL_PROFILES, ids=lambda name: Path(name).stem)
def test_mistake_02_no_layer_mixes_patients(name: str) -> None:
    profile = Profile.load(name)
    with torch.device("meta"):
        models = [profile.denoiser.build(profile.autoencoder.latent_channels), profile.autoencoder.build()]
    assert not [layer for model in models for layer in model.modules() if isinstance(layer, _BatchNorm)]


@pytest.mark.parametrize("name", [name for name in ALL_PROFILES if name != "paper"], ids=lambda name: Path(name).stem)
def test_mistake_02_one_patients_output_does_not_know_the_others(name: str) -> None:
    profile = Profile.load(name)
    autoencoder, channels = profile.autoencoder.build().train(), profile.autoencoder.latent_channels
    denoiser = profile.denoiser.build(channels).train()
    with torch.no_grad():
        for parameter in denoiser.parameters():  # some layers start at zero, which would hide what they mix
            parameter.add_(0.05 * torch.randn(parameter.shape))
    size = GRID.size // autoencoder.reduction
    latents, others = torch.randn(2, 3, channels, GRID.n_slices, size, size)
    attributes, other_attributes = torch.rand(2, 3, len(ATTRIBUTES)) * 100
    noise, other_noise = torch.randn(2, 3, *GRID.shape)
    others[0], other_attributes[0], other_noise[0] = latents[0], attributes[0], noise[0]
    with torch.no_grad():
        for model in (
            lambda x, given, noise: denoiser(x, torch.tensor([3, 70, 140]), given),
            lambda x, given, noise: autoencoder.decode(x, noise),
        ):
            one = model(latents, attributes, noise)
            other = model(100 * (others - latents) + latents, other_attributes, other_noise)
            assert torch.allclose(one[0], other[0], atol=1e-5)
            assert not torch.allclose(one[1], other[1], atol=1e-2)


def test_mistake_02_no_discriminator_and_no_autoencoder_learns_from_private_patients(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(*_: object, **__: object) -> None:
        raise AssertionError("a discriminator would learn from private patients outside of the clipped gradient")

    weights = study.autoencoder.folder / "weights.safetensors"
    before = weights.read_bytes()
    for critic in (PatchDiscriminator, Critic):
        monkeypatch.setattr(critic, "__init__", judge)
    moving = set[int]()
    handle = register_optimizer_step_pre_hook(
        lambda optimiser, *_: moving.update(id(p) for group in optimiser.param_groups for p in group["params"])
    )
    built, build = list[Denoiser](), DenoiserSettings.build

    def remembered(settings: DenoiserSettings, latent_channels: int) -> Denoiser:
        built.append(build(settings, latent_channels))
        return built[-1]

    monkeypatch.setattr(DenoiserSettings, "build", remembered)
    run = finetuned_afresh(study)
    handle.remove()
    assert moving
    assert moving <= {id(parameter) for model in built for parameter in model.parameters()}
    assert weights.read_bytes() == before
    assert not [path for path in run.folder.rglob("*.safetensors") if path.parent != run.folder]


def test_mistake_03_the_sampler_is_the_one_that_is_accounted_for(study: Study, tmp_path: Path) -> None:
    plan = free_plan(24, 6, 1500)
    batches = [
        batch for batch, _ in private_steps(plan, study.private.split("train"), tmp_path, slope=lambda unit: 1.0)
    ]
    sizes, rate = np.array([len(batch) for batch in batches]), Ledger.load(tmp_path / "privacy.json").mechanisms[0]
    expected, spread = 24 * rate.sampling_rate, 24 * rate.sampling_rate * (1 - rate.sampling_rate)
    assert (rate.steps, len(batches)) == (1500, 1500)
    assert sizes.mean() == pytest.approx(expected, abs=4 * math.sqrt(spread / 1500))
    assert sizes.var() == pytest.approx(spread, rel=4 * math.sqrt(2 / 1500))  # of shuffled batches: 0
    joined = np.bincount(np.concatenate(batches).astype(int), minlength=24) / 1500
    assert abs(joined - rate.sampling_rate).max() < 4 * math.sqrt(spread / 24 / 1500)


def test_mistake_04_the_divisor_is_the_expected_batch(study: Study, tmp_path: Path) -> None:
    taken = private_steps(free_plan(24, 6, 30), study.private.split("train"), tmp_path, slope=lambda unit: 1.0)
    assert len({len(batch) for batch, _ in taken}) > 3
    for batch, gradient in taken:
        assert gradient.item() == pytest.approx(len(batch) / 6, rel=1e-6)


def test_mistake_05_empty_lots_are_steps_with_noise(study: Study, tmp_path: Path) -> None:
    plan = free_plan(24, 1, 40, clip=1.0, noise_multiplier=4.0)
    taken = private_steps(plan, study.private.split("train"), tmp_path, slope=lambda unit: 1.0)
    empty = [gradient.item() for batch, gradient in taken if not batch]
    assert len(taken) == 40
    assert len(empty) >= 5
    assert len(set(empty)) == len(empty)
    assert 0 not in empty


def test_mistake_06_every_patient_is_clipped_alone_and_whole(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = study.private.split("train")
    plan = free_plan(24, 12, 20, clip=0.5)
    for batch, gradient in private_steps(plan, patients, tmp_path, slope=lambda unit: 1e6 * (-1) ** unit):
        balance = sum((-1) ** unit for unit in batch)
        assert gradient.item() == pytest.approx(0.5 * balance / 12, abs=1e-5)  # clipped after the sum: 0.5 / 12

    seen: list[float] = []
    clipped = PrivatePlan.clipped

    def counted(plan: PrivatePlan, loss: Tensor, parameters: list[Tensor]) -> Tensor:
        contribution = clipped(plan, loss, parameters)
        seen.append(contribution.double().norm().item())
        return contribution

    monkeypatch.setattr(PrivatePlan, "clipped", counted)
    joined: list[int] = []
    sample = PrivatePlan.sample_batch

    def sampled(plan: PrivatePlan, generator: np.random.Generator) -> np.ndarray:
        batch = sample(plan, generator)
        joined.append(batch.sum())
        return batch

    monkeypatch.setattr(PrivatePlan, "sample_batch", sampled)
    ledger = finetuned_afresh(study).ledger
    assert len(patients.patient_index) == 48  # two volumes each: one gradient a patient, not a volume
    assert len(seen) == sum(joined)
    assert max(seen) <= ledger.mechanisms[0].clip


def test_mistake_07_the_noise_on_real_patients_has_no_seed(hospital: Study) -> None:
    with pytest.raises(PrivacyError, match="seed: 0 would make the noise on real private patients reproducible"):
        Randomness(0, simulated=False)
    assert hospital.seed == 0
    first = finetuned_afresh(hospital)
    assert first.ledger.randomness == "ChaCha20, keyed by the operating system's entropy"
    weights = (first.folder / "weights.safetensors").read_bytes()
    again = finetuned_afresh(hospital)
    assert again.folder == first.folder
    assert (again.folder / "weights.safetensors").read_bytes() != weights


def test_mistake_08_what_has_been_encoded_tells_nothing_of_who_was_in_the_lots(
    study: Study, hospital: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: dict[str, list[int]] = {}

    def before_the_first_step(model: object, patients: Patients, *given: object) -> None:
        folders = (study.runs / "latents").glob(f"{patients.name}-train-*.zarr")
        encoded[patients.name] = [len(list(folder.glob("c.*"))) for folder in folders]
        raise KeyboardInterrupt

    for latents in (study.runs / "latents").glob("*-train-*"):
        shutil.rmtree(latents) if latents.is_dir() else latents.unlink()
    monkeypatch.setattr("cardiac_ldm.trained.finetune", before_the_first_step)
    for of in (study, hospital):
        with pytest.raises(KeyboardInterrupt):
            finetuned_afresh(of)
    real, simulated = (of.private.split("train") for of in (hospital, study))
    assert encoded[real.name] == [len(real.patient_index)]
    assert encoded[simulated.name] == [0]  # drawn and encoded as they're met: nobody is exposed


def test_mistake_08_a_run_on_real_patients_shows_and_leaves_nothing_of_them(
    study: Study, hospital: Study, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(of: Study) -> tuple[str, Path, set[str]]:
        during: set[str] = set()
        handle = register_optimizer_step_pre_hook(
            lambda *_: during.update(path.name for folder in of.runs.glob("finetune-*") for path in folder.iterdir())
        )
        capfd.readouterr()
        folder = finetuned_afresh(of).folder
        handle.remove()
        return "".join(capfd.readouterr()), folder, during

    for latents in (study.runs / "latents").glob("hospital-*"):
        shutil.rmtree(latents) if latents.is_dir() else latents.unlink()  # encoding them is part of the run
    shown, _, _ = run(study)
    assert "private denoiser" in shown  # simulated patients: the bar, so that its absence below means something
    shown, folder, during = run(hospital)
    assert "progress.txt" in during
    assert {path.name for path in folder.iterdir()} == {
        "lock",
        "metrics.json",
        "privacy.json",
        "settings.yaml",
        "weights.safetensors",
    }
    said = [line for line in shown.splitlines() if line and "held-out loss" not in line]  # of public patients
    said = [line for line in said if "phantom_public" not in line]
    assert said[1:] == [f"finetune: not done yet with these settings; running it in {folder.name}"]
    assert said[0].startswith("hospital: this spends 0.")  # of the cohort's budget
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"epsilon"}
    ledger = json.loads((folder / "privacy.json").read_text())
    assert not [
        field for field in {**ledger, **ledger["mechanisms"][0]} if field in ("loss", "norm", "batch", "batches")
    ]


def test_mistake_09_a_guarantee_for_volumes_is_never_stated_as_if_for_patients(study: Study, tmp_path: Path) -> None:
    by_volume = yaml.safe_load(TINY.read_text())
    by_volume["finetune"]["unit"] = "volume"
    (tmp_path / "volume.yaml").write_text(yaml.safe_dump(by_volume))
    with pytest.raises(ParameterError, match=r"finetune\.unit: is no setting"):
        Profile.load(str(tmp_path / "volume.yaml"))
    run = finetuned_afresh(study)
    assert run.ledger.n_units == len(study.private.split("train"))  # each with two volumes
    assert "differential privacy per patient" in privacy_statement(run.ledger)
    assert "one patient with all volumes" in run.ledger.adjacency
    stated = json.loads((run.folder / "privacy.json").read_text())
    (tmp_path / "privacy.json").write_text(json.dumps(stated | {"guarantee": "volume-level DP"}))
    with pytest.raises(PrivacyError, match="guarantee is missing or wrong"):
        Ledger.load(tmp_path / "privacy.json")


def test_mistake_10_two_private_stages_spend_one_budget(study: Study, tmp_path: Path) -> None:
    patients, settings = study.private.split("train"), study.profile.finetune
    first = settings.plan(0.2, settings.delta, 24).mechanisms("attributes", "table")
    plan = settings.plan(0.6, settings.delta, 24, first)
    latents, randomness = study.latents(patients, study.private), Randomness(0, simulated=True)
    model = study.denoiser(study.pretrained)
    finetune(model, patients, latents, plan, settings, randomness, tmp_path, "phantom_public")
    whole = Ledger.load(tmp_path / "privacy.json")
    assert [stage.stage for stage in whole.mechanisms] == ["attributes", "denoiser"]
    assert whole.mechanisms[:1] == first
    assert 0.98 * 0.2 <= epsilon_pld(terms_of(first), whole.delta, 2e-4) <= 0.2
    assert whole.epsilon == pytest.approx(0.6, rel=0.01)
    assert 0.98 * 0.6 <= epsilon_pld(terms_of(whole.mechanisms), whole.delta, 2e-4) <= 0.6
