"""A public subspace: its directions are principal ones of public patients, and patients move no more than k numbers."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from cardiac_ldm.cohort import Patients, load_manifest
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation.audit import audit_training
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import PrivatePlan, Randomness
from cardiac_ldm.training import subspace as room
from cardiac_ldm.training.finetune import FinetuneSettings, PatientLoss, finetune, learning
from cardiac_ldm.training.subspace import Directions, SubspaceLoss, SubspaceSettings, public_directions, restraint
from tests.test_finetune import NARROW, PROFILE, SEEDED, made_up

SUBSPACE = SubspaceSettings(dimensions=4, patients=12, draws=2, power=0.25)


def latents_of(patients: Patients) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((len(patients.patient_index), 1, 3, 4, 4)).astype(np.float32)


def network() -> Denoiser:
    torch.manual_seed(1)
    model = NARROW.build(1)
    for parameter in model.parameters():  # what starts at zero would hide the paths behind it
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Patients:
    return made_up(tmp_path_factory.mktemp("public") / "twelve", (2, 1, 3) * 4, load_manifest("phantom_public"))


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Patients:
    return made_up(tmp_path_factory.mktemp("private") / "twelve", (2, 1, 3) * 4)


def of_all(directions: Tensor) -> Directions:
    """Directions (k, d) of all weights together."""
    found = Directions([directions.shape])
    found.block0 = directions
    return found


def recipe(**changes: object) -> FinetuneSettings:
    settings = PROFILE.finetune.model_dump() | {"tuned": "subspace", "subspace": SUBSPACE.model_dump(), "clip": 0.05}
    return FinetuneSettings.model_validate(settings | {"expected_batch": 12, "learning_rate": 0.1} | changes)


def plan_of(settings: FinetuneSettings, **changes: float) -> PrivatePlan:
    terms = {"epsilon": 20.0, "delta": 1e-3, "noise_multiplier": 1.0} | changes
    return PrivatePlan(12, **settings.model_dump(include={"expected_batch", "steps", "clip", "draws"}), **terms)  # type: ignore[arg-type]


@pytest.mark.parametrize(("power", "apart"), [(0.0, False), (0.25, False), (1.0, False), (0.25, True)])
def test_directions_are_the_principal_ones_of_scaled_public_gradients(
    power: float, apart: bool, public: Patients, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, latents, gradients = network(), latents_of(public), []
    settings = SUBSPACE.model_copy(update={"power": power, "apart": apart, "dimensions": 30 if apart else 4})
    common = room._common_loss

    def seen(*given: object) -> Tensor:
        loss = common(*given)  # type: ignore[arg-type]
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]).double().numpy())
        return loss

    monkeypatch.setattr(room, "_common_loss", seen)
    found, variance = public_directions(model, public, latents, settings)
    centred = np.stack(gradients) - np.mean(gradients, axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    spread = (centred**2).mean(axis=0)
    scale = (spread + 1e-3 * spread.mean()) ** -power
    scale /= np.sqrt((scale**2).mean())
    ends = np.cumsum([weight.numel() for weight in model.parameters()]) if apart else [len(scale)]
    blocks = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    each = [np.linalg.svd((centred * scale)[:, block], full_matrices=False)[1:] for block in blocks]
    least = np.sort(np.concatenate([singular for singular, _ in each]))[-settings.dimensions]
    expected = np.concatenate([singular[singular >= least] for singular, _ in each])
    assert len(found) == len(expected) == settings.dimensions
    np.testing.assert_allclose(variance, expected**2 / 12, rtol=1e-3)
    numbers = iter(np.eye(len(found), dtype=np.float16))
    for block, (singular, vectors) in zip(blocks, each, strict=True):
        for right in vectors[singular >= least] * scale[block]:
            moved = found.moves(torch.from_numpy(next(numbers))).double().numpy()
            own = moved[block]
            assert np.linalg.norm(own) == np.linalg.norm(moved) > 0
            assert abs(own @ right) >= 0.999 * np.linalg.norm(own) * np.linalg.norm(right)


def test_all_patients_meet_the_same_timesteps_and_noise(public: Patients, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[Tensor, Tensor]] = []
    loss = Denoiser.loss

    def seen(model: Denoiser, latents: Tensor, attributes: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        met.append((steps.unique(), noise.unique(dim=0)))
        return loss(model, latents, attributes, steps, noise)

    monkeypatch.setattr(Denoiser, "loss", seen)
    public_directions(network(), public, latents_of(public), SUBSPACE)
    assert len(met) == 12
    assert all(torch.equal(steps, met[0][0]) and torch.equal(noise, met[0][1]) for steps, noise in met)
    assert met[0][0].tolist() == [37, 112]


def test_private_patients_give_no_directions_and_few_public_ones_few(public: Patients, private: Patients) -> None:
    with pytest.raises(PrivacyError, match="directions of private patients' gradients"):
        public_directions(network(), private, latents_of(private), SUBSPACE)
    many = SUBSPACE.model_copy(update={"dimensions": 12})
    with pytest.raises(ParameterError, match="12 directions need more than 12 public patients"):
        public_directions(network(), public, latents_of(public), many)
    found, _ = public_directions(network(), public, latents_of(public), many.model_copy(update={"apart": True}))
    assert len(found) == 12
    assert max(k for k, _ in found.sizes) < 12


@pytest.mark.parametrize("changes", [{"subspace": None}, {"tuned": "edges"}])
def test_a_subspace_and_its_settings_go_together(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="goes with tuned: subspace"):
        recipe(**changes)


def along(private: Patients, directions: Directions, settings: FinetuneSettings) -> tuple[Denoiser, SubspaceLoss]:
    model = network()
    _, loss = learning(model, private, latents_of(private), plan_of(settings), settings, directions)
    assert isinstance(loss, SubspaceLoss)
    return model, loss


@pytest.mark.parametrize("apart", [False, True])
def test_a_patients_gradient_is_that_of_their_loss_by_z(apart: bool, private: Patients) -> None:
    settings = recipe()
    torch.manual_seed(3)
    model = network()
    names, sizes = zip(*((name, weight.shape) for name, weight in model.named_parameters()), strict=True)
    directions = torch.randn(4, sum(size.numel() for size in sizes)) * 1e-2
    if apart:  # two of them are of the first weight tensor alone, two of the others
        first = sizes[0].numel()
        directions[:2, first:], directions[2:, :first] = 0, 0
        blocks = Directions([(2, first), (2, directions.shape[1] - first)])
        blocks.block0, blocks.block1 = directions[:2, :first], directions[2:, first:]
    model, loss = along(private, blocks if apart else of_all(directions), settings)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        loss.z.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
    found = torch.cat(list(loss.gradients(range(12), partial(SEEDED.draws, 0))))
    of_units = learning(network(), private, latents_of(private), plan_of(settings), settings)[1]
    for unit in (0, 4, 11):
        assert isinstance(of_units, PatientLoss)
        rows = of_units.rows(unit, SEEDED.draws(0, unit))
        assert rows is not None
        z = loss.z.detach().clone().requires_grad_(True)
        moves = (z @ directions).split([size.numel() for size in sizes])
        weights = {n: start[n] + move.view_as(start[n]) for n, move in zip(names, moves, strict=True)}

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, *rows: Tensor) -> Tensor:
                return self.model.loss(*rows)

        value = functional_call(Loss(), {f"model.{n}": w for n, w in weights.items()}, rows).mean()
        (right,) = torch.autograd.grad(value, z)
        assert (found[unit] - right).norm() <= 1e-4 * right.norm()
        alone = loss.alone(unit, SEEDED.draws(0, unit))
        assert alone is not None
        (of_one,) = torch.autograd.grad(alone, loss.z)
        assert (of_one - right).norm() <= 1e-4 * right.norm()


@pytest.mark.parametrize("size", [1.0, 1e6, np.inf])
def test_one_patient_more_moves_the_sum_by_no_more_than_the_clip(size: float, private: Patients) -> None:
    """However long the directions and whatever the volume: what is clipped is what noise is added to."""
    settings = recipe()
    directions = of_all(torch.randn(4, sum(weight.numel() for weight in network().parameters())) * 100)
    plan = plan_of(settings, noise_multiplier=0.0)

    class Sized:
        def __init__(self, leaves: bool) -> None:
            self.leaves = leaves
            _, self.loss = along(private, directions, settings)

        def gradients(self, units: Sequence[int], draws: Callable[[int], torch.Generator]) -> Iterator[Tensor]:
            for unit in units:
                if unit != 5 or not self.leaves:
                    (own,) = self.loss.gradients([unit], draws)
                    yield own * (size if unit == 5 else 1.0)

    without, whole = (
        plan.gradient(0, [Sized(leaves).loss.z], Sized(leaves), SEEDED).double() for leaves in (True, False)
    )
    moved = (whole - without).norm() * plan.expected_batch
    assert moved <= plan.clip * (1 + 1e-6)
    assert moved == 0 if np.isinf(size) else moved > 0.99 * plan.clip


def test_noise_is_added_to_k_numbers(private: Patients) -> None:
    settings = recipe(clip=1e-9)
    directions = of_all(torch.randn(4, sum(weight.numel() for weight in network().parameters())))
    _, loss = along(private, directions, settings)
    plan = plan_of(settings, noise_multiplier=3e9)
    drawn = [plan.gradient(0, [loss.z], loss, Randomness(n, simulated=True)) for n in range(60)]
    noise = torch.stack(drawn)
    assert noise.shape == (60, 4)
    assert noise.std().item() == pytest.approx(3.0 / 12, rel=0.2)


def test_training_moves_the_weights_along_the_directions_alone_and_goes_on_after_a_kill(
    public: Patients, private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe()
    found, _ = public_directions(network(), public, latents_of(public), SUBSPACE)
    plan = plan_of(settings)

    def train(folder: Path) -> dict[str, Tensor]:
        given = private, latents_of(private), plan, settings, SEEDED, folder, "public", found
        ledger = finetune(network(), *given, save_every=0.0)
        assert ledger.mechanisms[-1].tuned == "subspace"
        return load_file(folder / "weights.safetensors")

    weights = train(tmp_path / "whole")
    start = dict(network().named_parameters())
    moved = torch.cat([(weights[name] - start[name]).flatten() for name in start]).double()
    basis = torch.stack([found.moves(z) for z in torch.eye(4, dtype=torch.float16)]).double()
    left = moved - torch.linalg.lstsq(basis.T, moved[:, None]).solution[:, 0] @ basis
    assert left.norm() < 1e-3 * moved.norm()
    gradient = PrivatePlan.gradient

    def killed(plan: PrivatePlan, step: int, *given: object) -> Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return gradient(plan, step, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(PrivatePlan, "gradient", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed")
    with monkeypatch.context() as patched:  # z means nothing along other directions
        patched.setattr(SubspaceLoss, "digest", "others")
        with pytest.raises(ParameterError, match=r"state.pt: was left by a run with other public directions"):
            train(tmp_path / "killed")
    again = train(tmp_path / "killed")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_other_directions_have_another_digest(private: Patients) -> None:
    directions = torch.randn(4, sum(weight.numel() for weight in network().parameters()))
    (_, first), (_, same), (_, other) = (
        along(private, of_all(d), recipe()) for d in (directions, directions, 2 * directions)
    )
    assert first.digest == same.digest != other.digest


def test_weights_move_only_when_z_has_since_other_threads_may_be_reading_them(private: Patients) -> None:
    directions = of_all(torch.randn(4, sum(weight.numel() for weight in network().parameters())))
    _, loss = along(private, directions, recipe())
    weights: list[list[int]] = []
    for z in (0.0, 0.0, 0.5, 0.5):
        with torch.no_grad():
            loss.z.fill_(z)
        loss.alone(0, torch.Generator().manual_seed(0))
        weights.append([parameter.data_ptr() for parameter in loss.model.parameters()])
    assert weights[0] == weights[1] != weights[2] == weights[3]
    moved = nn.utils.parameters_to_vector(loss.model.parameters()) - loss.start
    torch.testing.assert_close(moved.detach(), loss.directions.moves(torch.full((4,), 0.5)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_that_span_too_little_are_refused(
    apart: bool, public: Patients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many patients are there, but they pull in three ways only: a direction more would be rounding over nothing."""
    common, told = room._common_loss, iter(range(1000))
    latents = latents_of(public)

    def alike(model: Denoiser, *_: object) -> Tensor:
        own = slice(*public.offsets[(one := next(told) % 4) : one + 2].tolist())
        return common(model, torch.from_numpy(latents[own]), torch.from_numpy(public.attributes)[own], 2)

    monkeypatch.setattr(room, "_common_loss", alike)
    blocks = len(list(network().parameters()))
    settings = SUBSPACE.model_copy(update={"apart": apart, "dimensions": 3 * blocks + 1 if apart else 4})
    with pytest.raises(ParameterError, match=r"span \d+ directions, fewer than"):
        public_directions(network(), public, latents, settings)
    found, _ = public_directions(network(), public, latents, settings.model_copy(update={"dimensions": 3}))
    assert len(found) == 3
    assert all(torch.isfinite(block).all() for block in found.buffers())


def test_the_audit_trains_what_the_recipe_trains(private: Patients, tmp_path: Path) -> None:
    """An attacker who reads the coordinates finds as many canaries as there are, where noise is left out."""
    directions = of_all(torch.randn(40, sum(weight.numel() for weight in network().parameters())) * 1e-3)
    found = audit_training(network(), private, latents_of(private), 10.0, recipe(), SEEDED, tmp_path, directions)
    assert (found["n_canaries"], found["n_patients"]) == (40, 12)
    without_noise = [row for row in found["rows"] if row["noise"] == 0]
    assert without_noise
    assert all(row["shown"] == row["at_most"] > 0 for row in without_noise)


def test_the_more_noise_the_smaller_the_step(
    private: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [restraint(noise) for noise in (0.0, 0.05, 0.1367, 0.5487, 4.095, math.inf)]
    assert parts[:3] == [1.0, 1.0, 1.0]  # no step is larger than what was rehearsed
    assert parts[3:] == pytest.approx([0.354, 0.00918, 0.0], rel=0.01)
    own = [restraint(noise, apart=True) for noise in (0.0, 0.2618, 0.6975, math.inf)]
    assert own == pytest.approx([1.0, 1.0, 0.636, 0.0], rel=0.01)
    taken = []

    def seen(
        tuned: object, loss: object, plan: object, settings: FinetuneSettings, *rest: object, **more: object
    ) -> None:
        taken.append(settings.learning_rate)

    monkeypatch.setattr("cardiac_ldm.training.finetune.train_privately", seen)
    directions = of_all(torch.zeros(4, sum(weight.numel() for weight in network().parameters())))
    apart = recipe(subspace=SUBSPACE.model_copy(update={"apart": True}))
    for noise, given in ((0.5, recipe()), (3.292, recipe()), (3.292, apart)):  # σ √4 / 12
        plan, folder = plan_of(given, noise_multiplier=noise), tmp_path / str(len(taken))
        folder.mkdir()
        finetune(network(), private, latents_of(private), plan, given, SEEDED, folder, "public", directions)
    expected = [0.1, 0.1 * restraint(0.5487), 0.1 * restraint(0.5487, apart=True)]
    assert taken == pytest.approx(expected, rel=1e-3)
