"""The segmenter and the phase classifier: shapes, learning, determinism, and nothing private."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cardiac_ldm.cohort import ATTRIBUTE_NAMES
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.evaluation.control import segmentation_dice
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter
from cardiac_ldm.training.anatomy import augment, train_phase_classifier, train_segmenter


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
        owners=np.repeat(np.arange(n_patients), 2),
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
    segmenter, losses = train_segmenter(discs, steps=50, batch=2, learning_rate=1e-2, seed=0, progress=False)
    assert len(losses) == 50
    assert losses[-1]["loss"] < losses[0]["loss"] / 2
    assert not segmenter.training
    assert segmentation_dice(segmenter, discs).mean().min() > 0.8


def test_trained_classifier_tells_the_phases(discs):
    classifier, _ = train_phase_classifier(discs, steps=60, batch=4, learning_rate=3e-3, seed=0, progress=False)
    with torch.no_grad():
        predicted = classifier(torch.from_numpy(discs.images(np.arange(24)))).argmax(dim=1).numpy()
    assert (predicted == discs.attributes[:, ATTRIBUTE_NAMES.index("ESED")]).mean() > 0.9


@pytest.mark.parametrize("train", [train_segmenter, train_phase_classifier])
def test_training_follows_from_the_seed_alone(discs, train):
    runs = [train(discs, steps=2, batch=2, learning_rate=1e-3, seed=seed, progress=False) for seed in (5, 5, 6)]
    assert runs[0][1] == runs[1][1]
    assert runs[0][1] != runs[2][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))


@pytest.mark.parametrize("train", [train_segmenter, train_phase_classifier])
def test_private_patients_are_refused_even_simulated_ones(train):
    with pytest.raises(PrivacyError, match="discs is private"):
        train(discs_of(2, role="private"), steps=1, batch=2, learning_rate=1e-3, seed=0, progress=False)


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
