"""Fixtures that tests of several modules share."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cardiac_ldm.cohort import PatientRecord
from cardiac_ldm.cohort.patients import open_split, write_patient

ACDC_VARIABLE = "CARDIAC_LDM_ROOT_ACDC"


def store_patients(path: Path, n_patients: int, records: Iterable[PatientRecord]) -> None:
    """Write made-up patients as the train split of a prepared cohort at path."""
    arrays = open_split(path / "train", n_patients)
    rows = [write_patient(arrays, number, record) for number, record in enumerate(records)]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def acdc_root() -> Path:
    """Folder of the ACDC patients; without it a test skips, except in CI (CI=true), where it fails."""
    named = os.environ.get(ACDC_VARIABLE)
    if named and Path(named).is_dir():
        return Path(named)
    reason = f"{ACDC_VARIABLE} is {named!r}: set it to the folder that holds ACDC's patient001, patient002, ..."
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def make_acdc_patient(tmp_path) -> Callable[..., Path]:
    """Write a made-up patient in ACDC's layout under tmp_path/acdc: a ring of myocardium with an RV beside it."""

    def make(name: str = "patient007", shape=(60, 50, 8), zooms=(1.5, 1.5, 10.0)) -> Path:
        folder = tmp_path / "acdc" / name
        folder.mkdir(parents=True)
        (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: HCM\nHeight: 180.0\nNbFrame: 30\nWeight: 81.0\n")
        x, y = np.indices(shape[:2])
        number = int(name[-3:])  # no two patients have the same file
        y = y - 18 - number % 5
        for frame, radius in ((1, 9 + number // 5 % 5), (12, 6 + number // 5 % 5)):
            labels = np.zeros(shape, np.uint8)
            labels[np.hypot(x - 14, y) < 9] = 1
            labels[np.hypot(x - 30, y) < radius + 5] = 2
            labels[np.hypot(x - 30, y) < radius] = 3
            noise = np.random.default_rng([frame, number]).integers(0, 99, shape)
            image = (noise + 300 * labels.astype(int)).astype(np.int16)
            affine = np.diag([*zooms, 1])
            stem = folder / f"{name}_frame{frame:02d}"
            nib.save(nib.Nifti1Image(image, affine), f"{stem}.nii.gz")
            nib.save(nib.Nifti1Image(labels, affine), f"{stem}_gt.nii.gz")
        return folder

    return make
