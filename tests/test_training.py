"""The loops: what they refuse, what they leave, and that a killed one ends where an unkilled one does."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Cohort, Patients, load_manifest, prepare
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.models.autoencoder import Autoencoder, VQAutoencoder
from cardiac_ldm.profile import Profile
from cardiac_ldm.training.anatomy import train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import (
    AutoencoderSettings,
    HeartSettings,
    VQRegularisation,
    _Heart,
    _random_slices,
    blurred_l1,
    reconstruct,
    train_autoencoder,
)
from cardiac_ldm.training.checkpoint import load_state, load_weights, save_state, save_weights, update_average
from cardiac_ldm.training.pretrain import Latents, held_out_loss, pretrain

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cohorts")


@pytest.fixture(scope="module")
def public(store: Path) -> Cohort:
    return prepare(load_manifest("phantom_public"), store=store, limits={"train": 4, "validation": 1, "test": 2})


@pytest.fixture(scope="module")
def private(store: Path) -> Cohort:
    return prepare(load_manifest("phantom_private"), store=store, limits={"train": 12, "validation": 1, "test": 2})


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.load(str(TINY))


@pytest.fixture(scope="module", params=["kl", "vq", "heart"])
def autoencoder(profile: Profile, request: pytest.FixtureRequest) -> AutoencoderSettings:
    return {
        "kl": profile.autoencoder.model_copy(update={"heart": None}),
        "vq": as_vq(profile),
        "heart": with_heart(profile),
    }[request.param]


@pytest.fixture(scope="module")
def trained(
    public: Cohort, autoencoder: AutoencoderSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Autoencoder, list[dict[str, float]]]:
    """An autoencoder that was trained without a break, and its losses."""
    return train_autoencoder(public.split("train"), autoencoder, 0, tmp_path_factory.mktemp("trained") / "state.pt")


def as_vq(profile: Profile) -> AutoencoderSettings:
    quantised = VQRegularisation(kind="vq", codes=50, weight=0.25)
    return profile.autoencoder.model_copy(update={"regularisation": quantised})


def with_heart(profile: Profile) -> AutoencoderSettings:
    heart = HeartSettings(emphasis=4, labels=0.1, guide=0.2, guide_steps=2)
    return profile.autoencoder.model_copy(update={"heart": heart})


def random_latents(patients: Patients) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(patients.patient_index), 2, 13, 12, 12)).astype(np.float32)


def test_nothing_that_is_trained_without_noise_takes_private_patients(
    private: Cohort, profile: Profile, tmp_path: Path
) -> None:
    patients, state = private.split("train"), tmp_path / "state.pt"
    assert patients.simulated  # a simulated cohort is refused too: it stands in for a real one
    for settings in (profile.autoencoder, as_vq(profile)):
        with pytest.raises(PrivacyError, match="scale of its latents"):
            train_autoencoder(patients, settings, 0, state)
    with pytest.raises(PrivacyError):
        pretrain(patients, random_latents(patients), profile.denoiser, profile.pretrain, 0, state)
    for train in (train_segmenter, train_phase_classifier):
        with pytest.raises(PrivacyError):
            train(patients, steps=1, batch=1, learning_rate=1e-3, seed=0)


@pytest.mark.parametrize(("steps", "first"), [(2, 0), (4, 0), (5, 4)], ids=["information", "between", "texture"])
def test_a_killed_autoencoder_training_goes_on_as_if_nothing_had_happened(
    steps: int,
    first: int,
    public: Cohort,
    autoencoder: AutoencoderSettings,
    trained: tuple[Autoencoder, list[dict[str, float]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = tmp_path / ("state-texture.pt" if first else "state.pt")

    def save_then_stop(path: Path, **state: list[object]) -> None:
        save_state(path, **state)
        if path == stage and len(state["losses"]) == steps - first:
            raise KeyboardInterrupt

    monkeypatch.setattr("cardiac_ldm.training.fit.save_state", save_then_stop)
    monkeypatch.setattr("cardiac_ldm.training.fit.SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(public.split("train"), autoencoder, 0, tmp_path / "state.pt")
    left = load_state(stage)
    assert left
    assert [row["step"] for row in left["losses"]] == list(range(first, steps))
    taken: list[Patients] = []

    def counted(patients: Patients, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(patients)
        return _random_slices(patients, *given)

    monkeypatch.setattr("cardiac_ldm.training.autoencoder._random_slices", counted)
    resumed, losses = train_autoencoder(public.split("train"), autoencoder, 0, tmp_path / "state.pt")
    assert len(taken) == 7 - steps  # none anew
    assert [row["step"] for row in losses] == [0, 1, 2, 3, 4, 5, 6]
    assert losses == trained[1]
    for name, tensor in trained[0].state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_losses_are_told_by_the_terms_of_their_stage(
    autoencoder: AutoencoderSettings, trained: tuple[Autoencoder, list[dict[str, float]]]
) -> None:
    information = ["step", "l1", "l2", autoencoder.regularisation.kind, "perceptual", "adversarial"]
    texture = ["step", "blurred l1", "texture perceptual", "texture adversarial"]
    if heart := autoencoder.heart:
        taught = ["labels", "guide"] if heart.guide else ["labels"]
        information, texture = [*information[:-1], *taught, information[-1]], [*texture, *taught]
    assert [list(row) for row in trained[1]] == 4 * [information] + 3 * [texture]


def test_texture_changes_the_decoder_and_no_latent(
    public: Cohort,
    autoencoder: AutoencoderSettings,
    trained: tuple[Autoencoder, list[dict[str, float]]],
    tmp_path: Path,
) -> None:
    patients, (model, _) = public.split("train"), trained
    smooth, losses = train_autoencoder(patients, autoencoder.model_copy(update={"texture": None}), 0, tmp_path / "s.pt")
    assert losses == trained[1][:4]
    changed = {
        name for name, tensor in smooth.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
    }
    anatomy = {name for name in smooth.state_dict() if name.startswith("anatomy.")}
    assert bool(anatomy) == bool(autoencoder.heart)
    assert changed == set(smooth.decoder_parameters()) | anatomy  # not encoder, codebook nor scale
    volumes = torch.from_numpy(patients.images([0, 1]))
    with torch.no_grad():
        assert torch.equal(smooth.encode(volumes), model.encode(volumes))
    torch.manual_seed(0)
    fresh = autoencoder.build()
    for name, tensor in fresh.grain.state_dict().items():
        assert not torch.equal(tensor, model.grain.state_dict()[name]), name


def test_the_scale_of_latents_is_measured_on_the_same_volumes_with_texture_and_without(
    public: Cohort, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []

    def choose(model: Autoencoder, patients: Patients, rng: np.random.Generator) -> None:
        chosen.append(int(rng.integers(2**62)))

    monkeypatch.setattr("cardiac_ldm.training.autoencoder._set_latent_scale", choose)
    for name, changes in (("grain", {}), ("smooth", {"texture": None})):
        settings = profile.autoencoder.model_copy(update=changes)
        train_autoencoder(public.split("train"), settings, 0, tmp_path / name)
    assert chosen[0] == chosen[1]


def test_the_deviation_of_a_vq_posterior_matters_to_no_stage(
    public: Cohort, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, losses = train_autoencoder(public.split("train"), as_vq(profile), 0, tmp_path / "a.pt")
    moments = VQAutoencoder.moments

    def wide(model: VQAutoencoder, slices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = moments(model, slices)
        return mean, 100 * std

    monkeypatch.setattr(VQAutoencoder, "moments", wide)
    assert train_autoencoder(public.split("train"), as_vq(profile), 0, tmp_path / "b.pt")[1] == losses


def test_blurred_images_say_nothing_of_their_texture() -> None:
    image = torch.rand(1, 2, 96, 96)
    chequers = 0.2 * (-1.0) ** torch.arange(96) * (-1.0) ** torch.arange(96)[:, None]
    assert blurred_l1(image + chequers, image).item() == pytest.approx(0, abs=1e-6)
    assert blurred_l1(image + 0.2, image).item() == pytest.approx(0.2)
    assert blurred_l1(image.roll(9, -1), image).item() > 0.05  # what is elsewhere is told


def test_empty_slices_are_one_at_most_of_a_batch(public: Cohort) -> None:
    patients = public.split("train")
    n_filled = int(patients.images(np.arange(len(patients.patient_index))).any(axis=(2, 3)).sum())
    assert n_filled < len(patients.patient_index) * 13 - 1
    everything, _ = _random_slices(patients, 99, 999, np.random.default_rng(0))
    assert everything.shape == (n_filled + 1, 1, 96, 96)
    assert everything.any(dim=-1).any(dim=-1).sum() == n_filled


def test_slices_come_with_their_own_labels(public: Cohort) -> None:
    patients = public.split("train")
    every = np.arange(len(patients.patient_index))
    label_of = dict(
        zip(
            map(bytes, patients.images(every).reshape(-1, 96, 96)),
            patients.labels(every).reshape(-1, 96, 96),
            strict=True,
        )
    )
    slices, labels = _random_slices(patients, 3, 9, np.random.default_rng(0))
    assert slices.shape == labels.shape == (9, 1, 96, 96)
    assert labels.any()
    for one, its in zip(slices.numpy(), labels.numpy(), strict=True):
        assert np.array_equal(label_of[bytes(one)], its[0])


def test_the_heart_weighs_more_where_it_is_and_the_mean_weight_is_one(
    public: Cohort, profile: Profile, tmp_path: Path
) -> None:
    settings = with_heart(profile).heart
    assert settings
    heart = _Heart(settings, public.split("train"), 0, tmp_path / "guide.pt")
    labels = torch.zeros(1, 1, 96, 96, dtype=torch.uint8)
    labels[..., 40:50, 40:50] = 2
    weights = heart.weights(labels)[0, 0]
    assert weights.mean().item() == pytest.approx(1)
    assert weights[45, 45] / weights[0, 0] == pytest.approx(4)
    assert torch.equal((weights > weights.min()).nonzero().aminmax(dim=0).min, torch.tensor([36, 36]))  # 4 pixels: 7 mm
    assert torch.equal((weights > weights.min()).nonzero().aminmax(dim=0).max, torch.tensor([53, 53]))


def test_the_guide_is_another_than_the_judge_trained_once_and_never_taught_by_drawn_slices(
    public: Cohort, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients, settings = public.split("train"), with_heart(profile).heart
    assert settings
    first = _Heart(settings, patients, 0, tmp_path / "guide.pt").guide
    assert first
    guide = first.state_dict()
    judge, _ = train_segmenter(patients, steps=2, batch=4, learning_rate=5e-3, seed=0)
    assert not any(torch.equal(tensor, judge.state_dict()[name]) for name, tensor in guide.items() if tensor.ndim == 4)
    monkeypatch.setattr("cardiac_ldm.training.anatomy.augment", None)  # it isn't trained again
    again = _Heart(settings, patients, 0, tmp_path / "guide.pt")
    labels = torch.from_numpy(patients.labels([0]))[0][:, None]
    drawn = torch.rand(13, 1, 96, 96, requires_grad=True)
    terms = again.terms(drawn, torch.zeros(13, 4, 96, 96), labels)
    (gradient,) = torch.autograd.grad(terms["guide"], drawn)
    assert gradient.any()
    assert again.guide
    assert not any(p.requires_grad for p in again.guide.parameters())
    for name, tensor in again.guide.state_dict().items():
        assert torch.equal(tensor, guide[name]), name


def test_without_a_guide_none_is_trained_and_the_labels_alone_teach(
    public: Cohort, profile: Profile, tmp_path: Path
) -> None:
    settings = HeartSettings(emphasis=4, labels=0.1, guide=0, guide_steps=0)
    heart = _Heart(settings, public.split("train"), 0, tmp_path / "guide.pt")
    labels = torch.from_numpy(public.split("train").labels([0]))[0][:, None]
    terms = heart.terms(torch.rand(13, 1, 96, 96), torch.zeros(13, 4, 96, 96), labels)
    assert terms.keys() == {"labels"}
    assert not (tmp_path / "guide.pt").exists()


def test_labels_that_nobody_has_drawn_cannot_teach(
    public: Cohort, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients, settings = public.split("train"), with_heart(profile).heart
    assert settings
    monkeypatch.setattr(Patients, "labelled", np.arange(len(patients)) > 2)
    with pytest.raises(ParameterError, match=r"autoencoder.heart: 3 patients of phantom_public have no labels"):
        _Heart(settings, patients, 0, tmp_path / "guide.pt")


@pytest.mark.parametrize("grain", [False, True], ids=["smooth", "grain"])
def test_the_seed_of_a_reconstruction_draws_its_texture_and_nothing_else(
    grain: bool, public: Cohort, profile: Profile
) -> None:
    settings = profile.autoencoder.model_copy(update={} if grain else {"texture": None})
    model, images = settings.build().eval(), np.repeat(public.split("train").images([0]), 9, axis=0)  # two batches
    first = reconstruct(model, images, 0)
    assert np.array_equal(reconstruct(model, images, 0), first)
    assert np.allclose(reconstruct(model, images, 1), first, atol=1e-6) != grain
    for other in first[1:]:
        assert np.allclose(other, first[0], atol=1e-6) != grain


@pytest.mark.parametrize("grain", [False, True], ids=["smooth", "grain"])
def test_a_reconstruction_is_empty_where_a_synthetic_volume_of_its_depth_is(
    grain: bool, public: Cohort, profile: Profile
) -> None:
    settings = profile.autoencoder.model_copy(update={} if grain else {"texture": None})
    patients = public.split("train")
    images, model = patients.images(np.arange(len(patients.patient_index))), settings.build().eval()
    drawn = reconstruct(model, images, 0)
    depths = patients.attributes[:, ATTRIBUTE_NAMES.index("DEPTH")].astype(int)
    assert depths.min() < GRID.n_slices
    for volume, depth in zip(drawn, depths, strict=True):
        first = (GRID.n_slices - depth) // 2  # as `synthesise` has it
        assert np.flatnonzero(volume.any(axis=(1, 2))).tolist() == list(range(first, first + depth))


def test_training_teaches_the_codebook_and_using_it_does_not(public: Cohort, profile: Profile, tmp_path: Path) -> None:
    patients, settings = public.split("train"), as_vq(profile)
    torch.manual_seed(0)
    fresh = settings.build()
    model, losses = train_autoencoder(patients, settings, 0, tmp_path / "state.pt")
    assert isinstance(fresh, VQAutoencoder)
    assert isinstance(model, VQAutoencoder)
    assert {"l1", "vq"} < set(losses[0])
    counts = model.quantiser.ema_cluster_size
    assert counts.max() > 1 > counts.min()  # some codes were taken, others weren't
    taught = {name: tensor.clone() for name, tensor in model.quantiser.state_dict().items()}
    for name, tensor in fresh.quantiser.state_dict().items():
        assert not torch.equal(tensor, taught[name]), name
    reconstruct(model.train(), patients.images([0, 1]), 0)
    for name, tensor in model.quantiser.state_dict().items():
        assert torch.equal(tensor, taught[name]), name


@pytest.mark.parametrize(
    ("regularisation", "sentence"),
    [
        ({"kind": "gan", "weight": 1.0}, r"autoencoder\.regularisation: .*'gan'.*'kl', 'vq'"),
        ({"kind": "vq", "weight": 1.0}, r"autoencoder\.regularisation\.vq\.codes: is missing"),
        ({"kind": "vq", "codes": 1, "weight": 1.0}, r"regularisation\.vq\.codes: 1: .*greater than or equal to 2"),
        (
            {"kind": "vq", "codes": 9, "weight": -1.0},
            r"regularisation\.vq\.weight: -1\.0: .*than or equal to 0",
        ),
        ({"kind": "kl", "codes": 9, "weight": 1.0}, r"regularisation\.kl\.codes: is no setting of this study"),
    ],
)
def test_a_wrong_regularisation_is_one_clear_sentence(
    regularisation: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    settings = yaml.safe_load(TINY.read_text())
    settings["autoencoder"]["regularisation"] = regularisation
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ParameterError, match=sentence) as raised:
        Profile.load(str(path))
    assert "\n" not in str(raised.value)


def test_weights_of_another_kind_of_autoencoder_are_refused(profile: Profile, tmp_path: Path) -> None:
    kl, vq = profile.autoencoder, as_vq(profile)
    fewer = vq.model_copy(update={"regularisation": VQRegularisation(kind="vq", codes=49, weight=0.25)})
    for ours, theirs in ((kl, vq), (vq, kl), (vq, fewer)):
        save_weights(theirs.build(), tmp_path / "w.safetensors")
        with pytest.raises(ParameterError, match="these weights are of another network"):
            load_weights(ours.build(), tmp_path / "w.safetensors")


def test_a_killed_pretraining_goes_on_as_if_nothing_had_happened(
    public: Cohort, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = public.split("train")
    latents = random_latents(patients)
    whole, _ = pretrain(patients, latents, profile.denoiser, profile.pretrain, 0, tmp_path / "a.pt")

    def save_then_stop(path: Path, **state: list[object]) -> None:
        save_state(path, **state)
        if len(state["losses"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("cardiac_ldm.training.fit.save_state", save_then_stop)
    monkeypatch.setattr("cardiac_ldm.training.fit.SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        pretrain(patients, latents, profile.denoiser, profile.pretrain, 0, tmp_path / "b.pt")
    resumed, _ = pretrain(patients, latents, profile.denoiser, profile.pretrain, 0, tmp_path / "b.pt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_latent_scale_standardises_public_latents(
    public: Cohort, trained: tuple[Autoencoder, list[dict[str, float]]], tmp_path: Path
) -> None:
    patients, (model, _) = public.split("train"), trained
    stored = Latents(model, patients, tmp_path / "latents.zarr")
    latents = stored[:]
    assert latents.shape == stored.shape == (len(stored), 2, 13, 12, 12) == (len(patients.patient_index), 2, 13, 12, 12)
    assert latents.dtype == np.float32
    assert latents.mean(axis=(0, 2, 3, 4)) == pytest.approx([0, 0], abs=1e-3)
    assert latents.std(axis=(0, 2, 3, 4)) == pytest.approx([1, 1], abs=1e-3)
    with torch.no_grad():
        again = model.encode(torch.from_numpy(patients.images([3])))[0].numpy()
    assert np.abs(latents[3] - again).max() < 1e-4


def counting(model: Autoencoder, calls: list[bytes]) -> Autoencoder:
    """The model, which notes what it encodes."""
    encode = model.encode

    def counted(volumes: torch.Tensor) -> torch.Tensor:
        calls.extend(bytes(volume.numpy()) for volume in volumes)
        return encode(volumes)

    model.encode = counted  # type: ignore[method-assign]
    return model


def test_latents_are_encoded_when_they_are_asked_for_and_once(public: Cohort, profile: Profile, tmp_path: Path) -> None:
    patients, calls = public.split("train"), []  # type: tuple[Patients, list[bytes]]
    model = counting(profile.autoencoder.build().eval(), calls)
    latents = Latents(model, patients, tmp_path / "latents.zarr")
    assert not calls
    some = latents[[5, 2, 5]]
    assert calls == [bytes(patients.images([row])) for row in (2, 5)]
    assert np.array_equal(some[0], some[2])
    again = Latents(model, patients, tmp_path / "latents.zarr")
    assert np.array_equal(again[[2]], some[1:2])
    assert len(calls) == 2
    everything = again[:]
    assert len(calls) == len(patients.patient_index)
    assert np.array_equal(everything[[5, 2, 5]], some)
    assert np.array_equal(latents[np.arange(3)], everything[:3])
    whole = Latents(model, patients, tmp_path / "other.zarr")[:]
    assert np.array_equal(whole, everything)  # in whatever order they were asked for


def test_latents_asked_for_at_once_or_by_one_that_was_killed_are_whole(
    public: Cohort, profile: Profile, tmp_path: Path
) -> None:
    patients, model = public.split("train"), profile.autoencoder.build().eval()
    expected = Latents(model, patients, tmp_path / "alone.zarr")[:]
    with ThreadPoolExecutor(3) as pool:
        arrays = list(pool.map(lambda _: Latents(model, patients, tmp_path / "latents.zarr")[:], range(3)))
    assert all(np.array_equal(expected, array) for array in arrays)
    calls: list[bytes] = []

    def dies(volumes: torch.Tensor) -> torch.Tensor:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(b"")
        return encode(volumes)

    encode, model.encode = model.encode, dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Latents(model, patients, tmp_path / "killed.zarr")[:]
    model.encode = encode  # type: ignore[method-assign]
    (tmp_path / "killed.zarr/c.3.0.0.0.0123.partial").write_bytes(b"torn")
    after: list[bytes] = []
    model = counting(model, after)
    assert np.array_equal(Latents(model, patients, tmp_path / "killed.zarr")[:], expected)
    assert len(after) == len(patients.patient_index) - 3


def test_the_held_out_loss_is_one_number_a_patient_and_the_same_each_time(public: Cohort, profile: Profile) -> None:
    patients = public.split("train")
    latents, model = random_latents(patients), profile.denoiser.build(2).eval()
    first = held_out_loss(model, latents, patients)
    assert first.shape == (len(patients),)
    assert np.array_equal(first, held_out_loss(model, latents, patients))


def test_the_average_follows_the_weights() -> None:
    average, now = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    update_average(average, now, step=0, decay=0.9)
    assert average["w"].item() == pytest.approx(0.9)  # young: keeps (1 + 0) / (10 + 0)
    for step in range(1000, 1003):
        update_average(average, {"w": torch.zeros(1)}, step, decay=0.9)
    assert average["w"].item() == pytest.approx(0.9 * 0.9**3)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_weights(nn.Linear(2, 3), tmp_path / "w.safetensors")
    with pytest.raises(ParameterError, match=r"w\.safetensors"):
        load_weights(nn.Linear(2, 4), tmp_path / "w.safetensors")
