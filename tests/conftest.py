"""Fixtures that tests of several modules share."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from cardiac_ldm import release
from cardiac_ldm.cohort import Cohort, PatientRecord, load_manifest
from cardiac_ldm.cohort.patients import table_row, write_patient
from cardiac_ldm.evaluation import candidates
from cardiac_ldm.parameters import FinetuneParameters, Parameters
from cardiac_ldm.study import Study

ACDC_VARIABLE = "CARDIAC_LDM_ROOT_ACDC"
TINY = Path(__file__).parent / "tiny.yaml"


def store_patients(path: Path, n_patients: int, records: Iterable[PatientRecord]) -> None:
    """Write made-up patients as the train split of a prepared cohort at path."""
    rows = []
    for number, record in enumerate(records):
        write_patient(path, "train", number, record)
        rows.append(json.dumps(table_row(record)) + "\n")
    (path / "train.jsonl").write_text("".join(rows))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, or one process works on it long after the others have ended."""
    markers = {item: item.get_closest_marker("slow") for item in items}
    items.sort(key=lambda item: -(marker.kwargs.get("minutes", 1) if (marker := markers[item]) else 0))


@pytest.fixture(scope="session", autouse=True)
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the record of what real patients have spent: never the user's own."""
    folder = tmp_path_factory.mktemp("record")
    os.environ["CARDIAC_LDM_RECORD"] = str(folder)
    return folder


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
    """Write a made-up patient in ACDC's layout under tmp_path/acdc: a tapering wall with an RV beside it."""

    def make(name: str = "patient007", shape=(60, 50, 8), zooms=(1.5, 1.5, 10.0)) -> Path:
        folder = tmp_path / "acdc" / name
        folder.mkdir(parents=True)
        (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: HCM\nHeight: 180.0\nNbFrame: 30\nWeight: 81.0\n")
        x, y, z = np.indices(shape)
        number = int(name[-3:])  # no two patients have the same file
        y = y - 18 - number % 5
        for frame, radius in ((1, 9 + number // 5 % 5), (12, 6 + number // 5 % 5)):
            labels = np.zeros(shape, np.uint8)
            labels[np.hypot(x - 14, y) < radius + 2 - 1.8 * z] = 1
            labels[np.hypot(x - 30, y) < radius + 5 - 1.3 * z] = 2
            labels[np.hypot(x - 30, y) < radius - 1.3 * z] = 3
            noise = np.random.default_rng([frame, number]).integers(0, 99, shape)
            image = (noise + 300 * labels.astype(int)).astype(np.int16)
            affine = np.diag([*zooms, 1])
            stem = folder / f"{name}_frame{frame:02d}"
            nib.save(nib.Nifti1Image(image, affine), f"{stem}.nii.gz")
            nib.save(nib.Nifti1Image(labels, affine), f"{stem}_gt.nii.gz")
        return folder

    return make


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of simulated patients whose public stages are done."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CARDIAC_LDM_RUNS", str(tmp_path_factory.mktemp("runs")))
        # threads will do: processes would take longer to start than to simulate a few patients
        threads = lambda workers, context: ThreadPoolExecutor(workers)  # noqa: E731
        environment.setattr(sys.modules["cardiac_ldm.cohort.prepare"], "ProcessPoolExecutor", threads)
        study = Study(Parameters(profile=str(TINY)))
        _ = study.pretrained, study.private
    return study


@pytest.fixture(scope="module")
def hospital(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same study of real private patients, as far as the library can tell: their files are the simulated ones."""
    manifest = tmp_path_factory.mktemp("hospital") / "hospital.yaml"
    splits = {split: list(study.private.split(split).ids) for split in ("train", "validation", "test")}
    terms = {"role": "private", "simulated": False, "licence": "none", "citation": "none"}
    terms |= {"budget": {"epsilon": 100, "delta": 1e-5}}
    manifest.write_text(yaml.safe_dump({"name": "hospital", "reader": {"kind": "acdc"}, "splits": splits} | terms))
    real = Study(FinetuneParameters(profile=str(TINY), cohort_private=str(manifest), spend=True, epsilon=0.5))
    real.runs, real.public = study.runs, study.public
    real.private = Cohort(load_manifest(manifest), study.private.path, "hospital", study.private.draw)
    return real


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """Releases are drawn by a thread, without second rounds: processes would take longer to start than to draw a few.

    The networks of these tests never draw a plausible heart, so that every request would go through all rounds.
    """
    with pytest.MonkeyPatch.context() as environment:
        threads = lambda workers, context, begin, given: ThreadPoolExecutor(1, "", begin, given)  # noqa: E731
        environment.setattr(release, "ProcessPoolExecutor", threads)
        environment.setattr(candidates, "ROUNDS", 1)
        yield


@pytest.fixture
def copy(released: Path, tmp_path: Path) -> Path:
    """A copy of a module's release."""
    return Path(shutil.copytree(released, tmp_path / "copy"))
