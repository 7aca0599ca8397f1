"""The segmenter and the phase classifier: shapes, learning, determinism, and nothing private."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES
from cardiac_ldm.errors import CohortError, PrivacyError
from cardiac_ldm.evaluation.control import segmentation_dice
from cardiac_ldm.models.anatomy import HeartFinder, PhaseClassifier, Segmenter
from cardiac_ldm.training.anatomy import augment, train_phase_classifier, train_segmenter
from cardiac_ldm.training.checkpoint import save_weights


def discs_of(n_patients, role="public") -> Any:
    """Just enough of a split of patients: a disc in a ring with a disc beside it; the cavity shrinks at end-systole."""
    rng = np.random.default_rng(0)
    phases = np.tile([1, 0], n_patients)
    attributes = np.full((2 * n_patients, len(ATTRIBUTE_NAMES)), np.nan, np.float32)
    attributes[:, ATTRIBUTE_NAMES.index("ESED")] = phases
    y, x = np.mgrid[:96, :96] - 48.0
    labels = np.zeros((2 * n_patients, 13, 96, 96), np.uint8)
    for volume, phase in zip(labels, phases, strict=True):
        outer, (dy, dx) = rng.uniform(15, 19), rng.uniform(-6, 6, 2)
        inner = outer - (4 if phase else 11)
        volume[2:11, np.hypot(y - dy, x - dx + 24) < 11] = 1
        volume[2:11, np.hypot(y - dy, x - dx) < outer] = 2
        volume[2:11, np.hypot(y - dy, x - dx) < inner] = 3
    noise = 0.03 * rng.standard_normal(labels.shape, np.float32)
    images = (np.array([0.15, 0.8, 0.3, 0.9], np.float32)[labels] + noise).clip(0, 1)
    return SimpleNamespace(
        name="discs",
        role=role,
        simulated=True,
        attributes=attributes,
        labelled=np.ones(n_patients, bool),
        patient_index=np.repeat(np.arange(n_patients), 2),
        images=lambda volumes: images[volumes],
        labels=lambda volumes: labels[volumes],
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small convolutions gain nothing from a second thread and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def discs():
    return discs_of(12)


def test_logits_have_the_shapes_of_labels_and_phases_at_depth_13():
    images = torch.rand(2, 13, 96, 96)
    assert Segmenter()(images).shape == (2, 4, 13, 96, 96)
    assert PhaseClassifier()(images).shape == (2, 2)


def test_segmenter_sees_each_slice_alone():
    segmenter = Segmenter().eval()
    images = torch.rand(1, 13, 96, 96)
    changed = images.clone()
    changed[:, 4] = 0
    with torch.no_grad():
        same = torch.isclose(segmenter(images), segmenter(changed), atol=1e-4).all(dim=(0, 1, 3, 4))
    assert same.tolist() == [number != 4 for number in range(13)]


def test_trained_segmenter_finds_the_structures(discs):
    segmenter, losses = train_segmenter(discs, steps=50, batch=2, learning_rate=1e-2, seed=0)
    assert len(losses) == 50
    assert losses[-1]["loss"] < losses[0]["loss"] / 2
    assert not segmenter.training
    assert segmentation_dice(segmenter, discs).mean().min() > 0.8


def test_trained_classifier_tells_the_phases(discs):
    classifier, _ = train_phase_classifier(discs, steps=60, batch=4, learning_rate=3e-3, seed=0)
    with torch.no_grad():
        predicted = classifier(torch.from_numpy(discs.images(np.arange(24)))).argmax(dim=1).numpy()
    assert (predicted == discs.attributes[:, ATTRIBUTE_NAMES.index("ESED")]).mean() > 0.9


@pytest.mark.parametrize("train", [train_segmenter, train_phase_classifier])
def test_training_follows_from_the_seed_alone(discs, train):
    runs = [train(discs, steps=2, batch=2, learning_rate=1e-3, seed=seed) for seed in (5, 5, 6)]
    assert runs[0][1] == runs[1][1]
    assert runs[0][1] != runs[2][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))


@pytest.mark.parametrize("train", [train_segmenter, train_phase_classifier])
def test_private_patients_are_refused_even_simulated_ones(train):
    with pytest.raises(PrivacyError, match="discs is private"):
        train(discs_of(2, role="private"), steps=1, batch=2, learning_rate=1e-3, seed=0)


def test_augmentation_moves_image_and_labels_together(discs):
    labels = torch.from_numpy(discs.labels(np.arange(8)))
    images, moved = augment((labels == 3).float(), labels, torch.Generator().manual_seed(0))
    assert moved is not None
    assert images.min() >= 0
    assert images.max() <= 1
    inside, outside = images[moved == 3].mean(), images[moved != 3].mean()
    assert inside > 0.5 > 5 * outside
    assert set(moved.unique().tolist()) <= {0, 1, 2, 3}
    assert not torch.equal(moved, labels)


def test_what_needs_labels_refuses_a_cohort_without():
    discs = discs_of(2)
    discs.labelled[:], discs.split = False, "train"
    with pytest.raises(CohortError, match=r"discs: no patient .* training a segmenter"):
        train_segmenter(discs, steps=1, batch=1, learning_rate=1e-3, seed=0)
    with pytest.raises(CohortError, match=r"discs: no patient .* the Dice score"):
        segmentation_dice(Segmenter(), discs)


class Bright(nn.Module):
    """A segmenter to whom brightness is an LV, if it lies so near the middle of what it's shown."""

    def forward(self, images):
        assert images.shape[2:] == (96, 96)
        row, column = np.indices((96, 96)) - 47.5
        near = torch.from_numpy(np.hypot(row, column) < 36)
        lv = ((images > 0.5) & near).float()
        return torch.stack([1 - lv, 0 * lv, 0 * lv, lv], dim=1)


@pytest.fixture
def bright(monkeypatch, tmp_path):
    monkeypatch.setattr("cardiac_ldm.models.anatomy._saved_segmenter", lambda weights: Bright())
    return HeartFinder(tmp_path / "segmenter.safetensors", "key")


@pytest.mark.parametrize("at", [(90, 100), (60, 130), (40, 60)])
def test_a_heart_is_found_wherever_it_lies_and_nothing_else_is_labelled(bright, at):
    row, column = np.indices((140, 170))
    image = np.zeros((9, 140, 170), np.float32)
    heart = np.broadcast_to(np.hypot(row - at[0], column - at[1]) < 18, image.shape).copy()
    heart[[0, 8]] = False
    image[heart] = 1
    image[4, 70:72, 85:87] = image[4, 0:3, 0:3] = 1  # specks, one in the middle of the field
    labels = bright(image)
    assert labels.dtype == np.uint8
    within = heart & (np.hypot(row - at[0], column - at[1]) < 17)
    assert (labels[within] == 3).mean() > 0.97
    assert not labels[~heart & (image == 0)].any()
    assert not labels[4, 0:3, 0:3].any()


def test_a_field_smaller_than_the_grid_or_without_a_heart_gets_labels_of_its_size(bright):
    for shape in ((1, 30, 40), (5, 200, 33)):
        assert bright(np.zeros(shape, np.float32)).shape == shape
        assert not bright(np.zeros(shape, np.float32)).any()


def test_a_heart_finder_is_sent_to_processes_without_its_network(tmp_path):
    segmenter = Segmenter().eval()
    finder = pickle.loads(pickle.dumps(HeartFinder(tmp_path / "segmenter.safetensors", "key")))
    image = np.random.default_rng(0).random((4, 96, 96), np.float32)
    with pytest.raises(FileNotFoundError):
        finder(image)
    save_weights(segmenter, finder.weights)
    assert finder(image).shape == image.shape
    assert len(pickle.dumps(finder)) < 1000
