"""Volumes in memory: what doesn't fit is named, cohorts add up, files keep them, and real private patients stay out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cardiac_ldm.cohort import Volumes
from cardiac_ldm.errors import ParameterError, PrivacyError


def some(n_patients: int, name: str = "hearts", seed: int = 0) -> Volumes:
    rng, shape = np.random.default_rng(seed), (2 * n_patients, 13, 96, 96)
    attributes = rng.normal(size=(2 * n_patients, 14)).astype(np.float32)
    patient_index, labels = np.repeat(np.arange(n_patients), 2), rng.integers(4, size=shape, dtype=np.uint8)
    return Volumes(name, rng.random(shape, np.float32), attributes, patient_index, labels)


def test_cohorts_add_up_and_nobody_becomes_another() -> None:
    first, second = some(2, "a"), some(3, "b", seed=1)
    both = first + second
    assert both.name == "a + b"
    assert both.labels is not None
    assert both.patient_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    np.testing.assert_array_equal(both.images[4:], second.images)
    np.testing.assert_array_equal(both.labels[:4], first.labels)
    np.testing.assert_array_equal(both.attributes[4:], second.attributes)
    assert (first + replace(second, labels=None)).labels is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": np.zeros((16, 13, 64, 64), np.float32)},
            r"hearts: images are \(16, 13, 64, 64\), expected \(16, 13",
        ),
        ({"images": np.full((16, 13, 96, 96), np.nan, np.float32)}, "hearts: images hold values that aren't finite"),
        ({"labels": np.zeros((15, 13, 96, 96), np.uint8)}, r"hearts: labels are \(15, .* expected \(16"),
        ({"labels": np.full((16, 13, 96, 96), 4, np.uint8)}, "hearts: labels go up to 4; give 0 to 3"),
        ({"attributes": np.zeros((16, 13), np.float32)}, r"hearts: attributes are \(16, 13\), expected \(16, 14\)"),
        ({"patient_index": np.zeros(8, np.int64)}, r"hearts: patient_index are \(8,\), expected \(16,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        replace(some(8), **changes)


def test_volumes_survive_their_file(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((2, 13, 96, 96), np.float32)
    cohort = Volumes("synthetic", images, np.full((2, 14), np.nan, np.float32), np.array([0, 0]))
    cohort.save(tmp_path / "synthetic.npz")
    again = Volumes.load(tmp_path / "synthetic.npz")
    assert again.labels is None
    assert again.name == tmp_path.name
    labels = np.random.default_rng(0).integers(4, size=images.shape, dtype=np.uint8)
    replace(cohort, labels=labels).save(tmp_path / "labelled.npz")
    assert np.array_equal(Volumes.load(tmp_path / "labelled.npz").labels, labels)  # type: ignore[arg-type]
    assert np.abs(again.images - images).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(again.patient_index, cohort.patient_index)
    assert np.isnan(again.attributes).all()


def test_real_private_patients_are_refused_with_what_they_would_reveal() -> None:
    patients: Any = SimpleNamespace(name="ward", secret=True)
    with pytest.raises(PrivacyError, match="ward holds real private patients, and this would reveal their hearts"):
        Volumes.of(patients, "their hearts")
