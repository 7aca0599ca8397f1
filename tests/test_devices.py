"""Every stage computes on the device that was chosen, shown without a GPU.

PyTorch's fake tensors have shapes and a device, but no numbers, and refuse an operation on two devices as real ones do.
The device that stands for a GPU is "meta": without CUDA, PyTorch can't index even fake tensors that claim to lie on it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, PatientRecord, Patients, load_manifest
from cardiac_ldm.evaluation.control import read_anatomy, volume_dice
from cardiac_ldm.evaluation.features import AnatomyEncoder, slice_features
from cardiac_ldm.evaluation.memorisation import embed
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.evaluation.utility import _phases, labelled_volumes
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter
from cardiac_ldm.models.device import compute_device, device_of
from cardiac_ldm.privacy import PrivatePlan, Randomness
from cardiac_ldm.profile import Profile
from cardiac_ldm.settings import TrainingSettings
from cardiac_ldm.training.anatomy import fit_phase_classifier, fit_segmenter, train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import HeartSettings, VQRegularisation, reconstruct, train_autoencoder
from cardiac_ldm.training.finetune import learning
from cardiac_ldm.training.pretrain import Latents, held_out_loss, pretrain
from tests.conftest import TINY, store_patients

PROFILE = Profile.load(str(TINY))
GPU = torch.device("meta")
BUDGET = TrainingSettings(steps=1, batch=2, learning_rate=1e-3)
ONE_STEP = {"steps": 1, "batch": 2, "learning_rate": 1e-3, "seed": 0}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("cohorts") / "made-up", np.random.default_rng(0)
    labels = np.broadcast_to((np.arange(GRID.size) // 24).astype(np.uint8), (2, *GRID.shape))
    attributes = rng.random((2, 14), np.float32)
    attributes[:, ATTRIBUTE_NAMES.index("ESED")] = [1, 0]
    records = (
        PatientRecord(f"p{n}", None, rng.random((2, *GRID.shape), np.float32), labels, attributes) for n in range(4)
    )
    store_patients(folder, 4, records)
    return folder


@pytest.fixture
def public(cohort: Path) -> Patients:
    return Patients(load_manifest("phantom_public"), "train", cohort)


@pytest.fixture
def private(cohort: Path) -> Patients:
    return Patients(load_manifest("phantom_private"), "train", cohort)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU, as far as the library can tell; where a number is asked for there's a zero or a one."""

    def numpy(tensor: Tensor, **_: object) -> np.ndarray:
        if tensor.device.type != "cpu":
            raise TypeError(f"can't convert {tensor.device} tensor to numpy")
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def moved(module: nn.Module, device: torch.device) -> nn.Module:
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fake_device = device  # type: ignore[attr-defined]  # in place, as for real ones
        return module

    real = torch.from_numpy
    monkeypatch.setattr(nn.Module, "to", moved)
    with FakeTensorMode() as mode:
        for name, module in list(sys.modules.items()):
            if name.startswith("cardiac_ldm.") and hasattr(module, "compute_device"):
                monkeypatch.setattr(module, "compute_device", lambda: GPU)
        monkeypatch.setattr(torch, "from_numpy", lambda array: mode.from_tensor(real(array)))
        for read, one in (("item", 1), ("__int__", 1), ("__index__", 1), ("__bool__", True)):
            monkeypatch.setattr(FakeTensor, read, lambda tensor, one=one: one, raising=False)
        monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: list(range(2, 2 + len(tensor))), raising=False)
        monkeypatch.setattr(FakeTensor, "numpy", numpy, raising=False)
        kind = "torch.FloatTensor"
        monkeypatch.setattr(FakeTensor, "type", lambda tensor, *new: tensor.float() if new else kind, raising=False)
        monkeypatch.setattr("cardiac_ldm.training.fit.save_state", lambda *_, **__: None)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        yield


def test_a_gpu_computes_where_there_is_one_and_else_the_cpu() -> None:
    assert compute_device() == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def autoencoder_step(patients: Patients, folder: Path, **changes: object) -> nn.Module:
    texture = PROFILE.autoencoder.texture
    assert texture
    short = {"steps": 1, "texture": texture.model_copy(update={"steps": 1})}
    return train_autoencoder(patients, PROFILE.autoencoder.model_copy(update=short | changes), 0, folder / "s.pt")[0]


def pretraining_step(patients: Patients, folder: Path) -> nn.Module:
    latents = np.zeros((len(patients.patient_index), 2, 13, 12, 12), np.float32)
    settings = PROFILE.pretrain.model_copy(update={"steps": 1, "min_snr": 5.0})
    return pretrain(patients, latents, PROFILE.denoiser, settings, 0, folder / "s.pt")[0]


GUIDED = HeartSettings(emphasis=4, labels=0.1, guide=0.2, guide_steps=1)
VQ = VQRegularisation(kind="vq", codes=20, weight=0.25)
STEPS: dict[str, Callable[[Patients, Path], nn.Module]] = {
    "segmenter": lambda patients, _: train_segmenter(patients, **ONE_STEP)[0],  # type: ignore[arg-type]
    "phase classifier": lambda patients, _: train_phase_classifier(patients, **ONE_STEP)[0],  # type: ignore[arg-type]
    "autoencoder": lambda patients, folder: autoencoder_step(patients, folder, heart=GUIDED),
    "autoencoder, VQ": lambda patients, folder: autoencoder_step(patients, folder, regularisation=VQ),
    "denoiser": pretraining_step,
}


@pytest.mark.parametrize("stage", STEPS)
def test_public_training_computes_on_the_gpu(gpu: None, stage: str, public: Patients, tmp_path: Path) -> None:
    network = STEPS[stage](public, tmp_path)
    assert {tensor.device for tensor in [*network.parameters(), *network.buffers()]} == {GPU}


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("segmenter", "anatomy"),
        ("phase classifier", "anatomy"),
        ("autoencoder", "autoencoder"),
        ("denoiser", "pretrain"),
    ],
)
def test_a_batch_that_stayed_on_the_cpu_is_found(
    gpu: None, stage: str, module: str, public: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"cardiac_ldm.training.{module}.compute_device", lambda: torch.device("cpu"))
    with pytest.raises(RuntimeError, match="device"):
        STEPS[stage](public, tmp_path)


@pytest.mark.parametrize("tuned", ["attention", "edges", "lora-2"])
def test_a_private_step_computes_on_the_gpu(
    gpu: None, tuned: str, private: Patients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTensor, "nonzero", lambda joins: torch.zeros(2, 1, device=joins.device), raising=False)
    settings = PROFILE.finetune.model_copy(update={"tuned": tuned, "draws": 2})
    plan = PrivatePlan(4, 2, 1, 0.3, 2, 20.0, 1e-3, noise_multiplier=1.0)
    latents = np.zeros((len(private.patient_index), 2, 13, 12, 12), np.float32)
    parameters, unit_loss = learning(PROFILE.denoiser.build(2), private, latents, plan, settings)
    gradient = plan.gradient(0, list(parameters.values()), unit_loss, Randomness(0, simulated=True))
    assert gradient.device == GPU
    assert {parameter.device for parameter in parameters.values()} == {GPU}


def test_encoding_and_decoding_compute_on_the_gpu(gpu: None, public: Patients, tmp_path: Path) -> None:
    model = PROFILE.autoencoder.build().to(GPU).eval()
    assert Latents(model, public, tmp_path / "latents.zarr")[:].shape == (8, 2, 13, 12, 12)
    assert reconstruct(model, public.images([0, 1]), 0).shape == (2, 13, 96, 96)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_sampling_computes_on_the_gpu(gpu: None, guidance: float, public: Patients) -> None:
    autoencoder, denoiser = PROFILE.autoencoder.build().to(GPU).eval(), PROFILE.denoiser.build(2).to(GPU).eval()
    drawn = synthesise(
        autoencoder, denoiser, public.attributes, public.patient_index, steps=2, guidance=guidance, seed=0
    )
    assert drawn.images.shape == (8, 13, 96, 96)
    assert drawn.labels is not None


class DiceOfNumbers:
    """MONAI's selects voxels by their values, which fake tensors don't have."""

    def __init__(self, **_: object) -> None:
        self.volumes = 0

    def __call__(self, predicted: Tensor, truth: Tensor) -> None:
        self.volumes += len(predicted + truth)

    def aggregate(self) -> Tensor:
        return torch.zeros(self.volumes, 3)


def test_evaluation_computes_on_the_gpu(gpu: None, public: Patients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cardiac_ldm.evaluation.control.DiceMetric", DiceOfNumbers)
    segmenter, classifier = Segmenter().to(GPU).eval(), PhaseClassifier().to(GPU).eval()
    denoiser, autoencoder = PROFILE.denoiser.build(2).to(GPU), PROFILE.autoencoder.build().to(GPU).eval()
    images, volumes = public.images(np.arange(8)), labelled_volumes(public)
    latents = np.zeros((8, 2, 13, 12, 12), np.float32)
    assert held_out_loss(denoiser, latents, public).shape == (4,)
    assert len(read_anatomy(volumes, segmenter, classifier))
    assert len(volume_dice(segmenter, images, public.labels(np.arange(8)))) == 8
    for encoder in (None, AnatomyEncoder(segmenter)):
        assert len(slice_features(images, encoder)) == 8 * 7
    assert len(embed(volumes, autoencoder).vectors["latent"]) == 8
    assert volumes.labels is not None
    trained, _ = fit_segmenter(
        torch.from_numpy(images), torch.from_numpy(volumes.labels), seed=0, **BUDGET.model_dump()
    )
    assert device_of(trained) == GPU
    phases = torch.from_numpy(volumes.attributes[:, ATTRIBUTE_NAMES.index("ESED")])
    classifier, _ = fit_phase_classifier(torch.from_numpy(images), phases, seed=0, **BUDGET.model_dump())
    assert len(_phases(classifier, images)) == 8
