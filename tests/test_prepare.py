"""Preparation onto the grid, the store it leaves, the patients read from it, and the guards on private ones."""

import errno
import os
import re
import resource
import secrets
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cardiac_ldm.cohort import (
    ATTRIBUTE_NAMES,
    GRID,
    Manifest,
    Patient,
    PatientRecord,
    Patients,
    Volume,
    load_manifest,
    measure_attributes,
    prepare,
    require_labelled,
    require_public,
    require_releasable,
)
from cardiac_ldm.cohort.grid import place_on_grid
from cardiac_ldm.cohort.guards import salt
from cardiac_ldm.cohort.patients import read_rows, volumes_file
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import CohortError, PrivacyError
from tests import miniatures
from tests.conftest import store_patients

ROOM = sys.modules["cardiac_ldm.cohort.prepare"]
LIMITS = {"train": 20, "validation": 2, "test": 3}
EDV, ESED, DEPTH = (ATTRIBUTE_NAMES.index(name) for name in ("LVEDV", "ESED", "DEPTH"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def cohort(store):
    return prepare(load_manifest("phantom_private"), store=store, limits=LIMITS)


@pytest.fixture(scope="module")
def acdc(store, acdc_root):
    start = time.perf_counter()
    prepared = prepare(load_manifest("acdc"), store=store, data_root=acdc_root)
    print(f"\n80 ACDC patients prepared in {time.perf_counter() - start:.1f} s")
    return prepared


@pytest.fixture
def threads(monkeypatch):
    """A thread in place of processes, so that what it calls can be patched, and parts of two patients.

    One alone: `warnings.catch_warnings` of two threads at once loses what a test waits for.
    """
    monkeypatch.setattr(ROOM, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))
    monkeypatch.setattr(ROOM, "_PART", 2)


def hospital(name="hospital", role="private", train=("patient000",), **changes):
    """A manifest of real patients in ACDC's layout, one each for validation and test."""
    said = {"licence": "none", "citation": "none", "reader": {"kind": "acdc"}, "simulated": False}
    splits = {"train": list(train), "validation": ["patient008"], "test": ["patient009"]}
    if role == "private":
        said |= {"budget": {"epsilon": 10, "delta": 1e-5}}
    return Manifest.model_validate(said | {"name": name, "role": role, "splits": splits} | changes)


@pytest.fixture
def ward(make_acdc_patient, threads, monkeypatch):
    """Prepare patients of tmp_path/acdc, where there are 000 to 003, 008 and 009; notes whom it reads."""
    folders = [make_acdc_patient(f"patient00{i}") for i in (0, 1, 2, 3, 8, 9)]
    for seed, folder in enumerate(folders):
        speckle(folder, seed)
    return folders[0].parent


def speckle(folder, seed):
    """Give a made-up patient files that no other has."""
    for file in folder.glob("*.nii.gz"):
        nifti = nib.load(file)
        voxels = np.asarray(nifti.dataobj).copy()
        voxels[20 + seed, 20] = seed % 4
        nib.save(nib.Nifti1Image(voxels, nifti.affine), file)


@pytest.fixture
def read(monkeypatch):
    """Whom preparation has read since the list was last cleared."""
    seen = []

    def reading(manifest, root, patient_id):
        seen.append(patient_id)
        return read_patient(manifest, root, patient_id)

    monkeypatch.setattr(ROOM, "read_patient", reading)
    return seen


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tissue(n_slices, spacing, size=110):
    """An ellipsoidal LV in a wall with an RV beside it, as one patient with an ED volume."""
    z, y, x = np.indices((n_slices, size, size)).astype(float)
    z, y, x = (z - (n_slices - 1) / 2) * spacing[0], (y - size / 2) * spacing[1], (x - size / 2 - 5) * spacing[2]
    labels = np.zeros(z.shape, np.uint8)
    labels[(x + 40) ** 2 + y**2 + (z / 1.5) ** 2 < 25**2] = 1
    labels[x**2 + y**2 + (z / 1.5) ** 2 < 32**2] = 2
    labels[x**2 + y**2 + (z / 1.5) ** 2 < 24**2] = 3
    image = 100 + 50 * labels.astype(np.float32)
    return Patient("a", None, (Volume("ED", image, labels, spacing),), {"AGE": 50.0})


@pytest.mark.parametrize(
    ("n_slices", "spacing"), [(20, (5.0, 1.4, 1.4)), (11, (10.0, 1.56, 1.56)), (13, (8.0, 1.8, 1.2))]
)
def test_resampling_keeps_volumes_and_centres_the_heart(n_slices, spacing):
    patient = tissue(n_slices, spacing)
    record = place_on_grid(patient)
    original = measure_attributes({"ED": patient.volumes[0].labels}, spacing)
    placed = measure_attributes({"ED": record.labels[0]}, GRID.spacing_mm)
    for name in ("LVEDV", "RVEDV", "MYOEDTHICK"):
        assert placed[name] == pytest.approx(original[name], rel=0.07)
        assert record.attributes[0, ATTRIBUTE_NAMES.index(name)] == pytest.approx(original[name])
    extent = np.argwhere(record.labels[0])[:, 1:]
    assert (extent.min(axis=0) + extent.max(axis=0)) / 2 == pytest.approx([47.5, 47.5], abs=1)
    assert record.attributes[0, DEPTH] == placed["DEPTH"]
    assert record.attributes[0, ATTRIBUTE_NAMES.index("AGE")] == 50
    assert np.isnan(record.attributes[0, ATTRIBUTE_NAMES.index("BMI")])


def test_what_a_table_says_goes_before_what_labels_tell_except_for_the_slices_shown():
    known = place_on_grid(replace(tissue(9, (10.0, 1.5, 1.5)), attributes={"LVEDV": 123.0, "DEPTH": 99.0})).attributes[
        0
    ]
    assert (known[EDV], known[DEPTH]) == (123, 9)


def test_slices_of_ten_millimetres_stay_slices():
    patient = tissue(11, (10.0, 1.5, 1.5))
    marked = patient.volumes[0].image
    marked[5] += 500
    image = place_on_grid(patient).images[0]
    assert (image.mean(axis=(1, 2)) > 0.5).sum() == 1


def test_a_stack_longer_than_the_grid_loses_its_ends_and_a_small_field_is_padded():
    labels = np.full((20, 40, 40), 3, np.uint8)
    image = np.random.default_rng(0).random((20, 40, 40), np.float32)
    record = place_on_grid(Patient("a", None, (Volume("ES", image, labels, (10.0, 2.0, 2.0)),), {}))
    assert record.labels.shape == (1, *GRID.shape)
    assert record.attributes[0, DEPTH] == GRID.n_slices
    assert record.attributes[0, ESED] == 0
    assert record.labels[0, :, 48, 48].all()
    assert not record.labels[0, :, :20].any()


def test_every_split_holds_what_the_contract_says(cohort):
    for split, n in LIMITS.items():
        patients = cohort.split(split)
        assert (patients.name, patients.split, patients.role, patients.simulated) == (
            "phantom_private",
            split,
            "private",
            True,
        )
        assert len(patients) == len(patients.ids) == n
        assert patients.attributes.shape == (2 * n, 14)
        assert patients.attributes.dtype == np.float32
        assert patients.patient_index.tolist() == [patient for patient in range(n) for _ in range(2)]
        for record in patients:
            assert record.images.shape == record.labels.shape == (2, *GRID.shape)
            assert (record.images.dtype, record.labels.dtype) == (np.float32, np.uint8)
            assert record.images.min() == 0
            assert record.images.max() == 1
            shown = record.images.any(axis=(0, 2, 3))
            assert shown.sum() == record.attributes[0, DEPTH]
            assert abs(np.flatnonzero(shown).mean() - (GRID.n_slices - 1) / 2) <= 0.5
            assert not record.labels[:, ~shown].any()
            assert record.attributes[:, ESED].tolist() == [1, 0]
    assert len({i for split in LIMITS for i in cohort.split(split).ids}) == sum(LIMITS.values())


def test_the_store_returns_what_was_prepared(cohort):
    manifest, patients = load_manifest("phantom_private"), cohort.split("train")
    for index in (0, 15, 16, 19):
        expected = place_on_grid(read_patient(manifest, None, patients.ids[index]))
        record = patients[index]
        assert record.id == expected.id
        assert np.array_equal(record.labels, expected.labels)
        assert np.allclose(record.images, expected.images, atol=5e-4)
        assert np.allclose(record.attributes, expected.attributes)


def test_volumes_are_read_in_any_order_and_repeatedly(cohort):
    patients = cohort.split("train")
    everything = patients.images(range(40))
    for wanted in ([7, 3, 3, 39, 0], [4, 5, 6], [11], []):
        assert np.array_equal(patients.images(wanted), everything[wanted])
        assert np.array_equal(patients.labels(wanted), patients.labels(range(40))[wanted])


def test_a_subset_renumbers_its_volumes(cohort):
    patients = cohort.split("train")
    some = patients.subset([9, 2, 5])
    assert some.ids == tuple(patients.ids[i] for i in (9, 2, 5))
    assert some.patient_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(some.attributes, patients.attributes[[18, 19, 4, 5, 10, 11]])
    assert np.array_equal(some.images([2]), patients.images([4]))
    assert some.subset([1])[0].id == patients.ids[2]
    assert some[-1].id == patients.ids[5]
    assert [record.id for record in patients[1:3]] == list(patients.ids[1:3])
    with pytest.raises(IndexError):
        some[3]


def test_patients_may_have_any_number_of_volumes(tmp_path):
    counts = [1, 4, 2, 1]
    records = [
        PatientRecord(
            f"q{i}",
            None,
            np.full((n, *GRID.shape), i / 4, np.float32),
            np.full((n, *GRID.shape), i, np.uint8),
            np.full((n, 14), i, np.float32),
        )
        for i, n in enumerate(counts)
    ]
    store_patients(tmp_path, len(records), records)
    patients = Patients(load_manifest("phantom_public"), "train", tmp_path)
    assert patients.patient_index.tolist() == [0, 1, 1, 1, 1, 2, 2, 3]
    assert [len(record.images) for record in patients] == counts
    assert [record.labels.max() for record in patients.subset([3, 1])] == [3, 1]
    assert patients.subset([3, 1]).images([1, 3])[:, 0, 0, 0].tolist() == [0.25, 0.25]


def test_a_prepared_cohort_is_returned_at_once(cohort, store, monkeypatch):
    monkeypatch.setattr(ROOM, "_write", lambda *_: pytest.fail("prepared again"))
    again = prepare(load_manifest("phantom_private"), store=store, limits=LIMITS)
    assert (again.path, again.key) == (cohort.path, cohort.key)
    assert cohort.path == store / f"phantom_private-{cohort.key}"


def test_patients_on_demand_are_drawn_when_they_are_read_and_are_the_same(cohort, tmp_path, monkeypatch):
    manifest = load_manifest("phantom_private")
    later = prepare(manifest, store=tmp_path, limits=LIMITS, on_demand=True)
    assert later.key != cohort.key
    for split in cohort.splits:
        assert (later.path / f"{split}.jsonl").read_bytes() == (cohort.path / f"{split}.jsonl").read_bytes()
    assert not list(later.path.rglob("*.zst"))
    drawn = []

    def drawing(manifest, root, patient_id):
        drawn.append(patient_id)
        return read_patient(manifest, root, patient_id)

    monkeypatch.setattr(ROOM, "read_patient", drawing)
    patients, expected = later.split("train"), cohort.split("train")
    few = patients.subset([7, 3])
    assert np.array_equal(few.images([3, 0]), expected.subset([7, 3]).images([3, 0]))
    assert np.array_equal(few.labels([0]), expected.labels([14]))
    assert sorted(drawn) == [patients.ids[3], patients.ids[7]]  # once each
    again = prepare(manifest, store=tmp_path, limits=LIMITS, on_demand=True).split("train")
    assert np.array_equal(again[3].images, expected[3].images)
    assert len(drawn) == 2
    every = np.arange(len(expected.patient_index))
    assert np.array_equal(again.images(every), expected.images(every))
    assert sorted(drawn) == sorted(expected.ids)
    for split in ("validation", "test"):
        assert np.array_equal(later.split(split)[0].labels, cohort.split(split)[0].labels)


def test_a_patient_on_demand_whose_drawing_was_killed_is_drawn_again(cohort, tmp_path, monkeypatch):
    later = prepare(load_manifest("phantom_private"), store=tmp_path, limits=LIMITS, on_demand=True)
    monkeypatch.setattr(ROOM, "place_on_grid", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        later.split("train").images([0])
    monkeypatch.undo()
    record = cohort.split("train")[0]
    file = volumes_file(later.path, "train", 0)
    file.parent.mkdir()
    file.with_suffix(".0123.tmp").write_bytes(b"torn")  # killed while writing
    assert np.array_equal(later.split("train")[0].labels, record.labels)
    assert np.array_equal(later.split("train")[0].images, record.images)


def test_real_patients_are_never_left_for_later(ward, tmp_path, read):
    at_once = prepare(hospital(), store=tmp_path / "store", data_root=ward)
    assert prepare(hospital(), store=tmp_path / "store", data_root=ward, on_demand=True).path == at_once.path
    assert at_once.draw is None


def test_the_key_follows_who_is_in_the_cohort_and_what_their_files_hold(ward, tmp_path, read):
    def key(limits=None, **changes):
        return prepare(hospital(**changes), store=tmp_path / "store", data_root=ward, limits=limits).key

    first = key()
    assert [key(root="elsewhere"), key(licence="another"), key(limits={"train": 9})] == [first] * 3
    assert sorted(read) == ["patient000", "patient008", "patient009"]
    (ward / "patient000/Info.cfg").touch()
    assert key() == first  # read again, and found to be the same
    assert len(read) == 6
    assert key() == first
    assert len(read) == 6
    assert key(train=("patient000", "patient001")) != first
    text = (ward / "patient000/Info.cfg").read_text()
    (ward / "patient000/Info.cfg").write_text(text.replace("81", "82"))
    assert key() != first


def test_a_file_that_appears_beside_others_is_noticed(ward, tmp_path, read):
    prepare(hospital(), store=tmp_path / "store", data_root=ward)
    (ward / "patient000/labels_found_in_the_attic.nii.gz").touch()
    prepare(hospital(), store=tmp_path / "store", data_root=ward)
    assert len(read) == 6


def test_a_key_of_real_private_patients_belongs_to_its_store(ward, tmp_path):
    def key(role, store):
        return prepare(hospital(role=role), store=tmp_path / store, data_root=ward).key

    assert key("public", "one") == key("public", "two")
    assert not (tmp_path / "one" / ".salt").exists()
    assert key("private", "three") == key("private", "three")
    assert key("private", "three") != key("private", "four")  # else whoever guesses the members could check the guess


def test_processes_that_need_a_salt_at_once_agree_on_it(tmp_path, monkeypatch):
    def slow(n, made=secrets.token_hex):
        time.sleep(0.2)
        return made(n)

    monkeypatch.setattr(secrets, "token_hex", slow)
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        salts = set(pool.map(salt, [tmp_path / "store"] * 3))
    assert {len(made) for made in salts} == {64}
    assert salts == {(tmp_path / "store" / ".salt").read_text()}


def test_limits_name_splits_and_are_positive(tmp_path):
    for limits in ({"training": 3}, {"train": 0}):
        with pytest.raises(CohortError, match="train, validation, test"):
            prepare(load_manifest("phantom_public"), store=tmp_path, limits=limits)


def test_a_failure_names_every_broken_patient_and_keeps_the_sound_parts(ward, tmp_path, read):
    manifest = hospital(train=("patient000", "patient001", "patient002", "patient003"))
    broken = (ward / "patient001/Info.cfg", ward / "patient009/Info.cfg")
    texts = [file.read_text() for file in broken]
    for file in broken:
        file.unlink()
    with pytest.raises(CohortError, match=r"2 patient\(s\) can't be prepared") as caught:
        prepare(manifest, store=tmp_path / "store", data_root=ward)
    assert "patient0" not in str(caught.value)  # they are real and private: their names are for the holder alone
    log = tmp_path / "store" / ".hospital-problems.txt"
    assert [name in log.read_text() for name in ("patient000", "patient001", "patient009")] == [False, True, True]
    assert not list((tmp_path / "store").glob("hospital-*"))
    read.clear()
    for file, text in zip(broken, texts, strict=True):
        file.write_text(text)
    mended = prepare(manifest, store=tmp_path / "store", data_root=ward)
    assert sorted(read) == ["patient000", "patient001", "patient009"]
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "store/.salt", tmp_path / "other")
    assert contents(prepare(manifest, store=tmp_path / "other", data_root=ward).path) == contents(mended.path)


SCRIPT = f"""
import sys
from pathlib import Path
from cardiac_ldm.cohort import load_manifest, prepare
if __name__ == "__main__":
    prepare(load_manifest("phantom_private"), store=Path(sys.argv[1]), limits={LIMITS})
"""


def test_a_killed_preparation_goes_on_where_it_was_and_leaves_no_orphans(cohort, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    store, deadline = tmp_path / "store", time.monotonic() + 60
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "script.py"), str(store)]
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (tables := list(store.glob(".phantom_private-*/*-*.jsonl"))):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.kill()
    killed.wait()
    assert not list(store.glob("phantom_private-*"))
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    split, _, first = tables[0].stem.partition("-")
    work, patient = tables[0].parent, (split, int(first))
    written = volumes_file(work / "store", *patient).stat().st_mtime_ns
    volumes_file(work / "store", *patient).with_suffix(".0123.tmp").write_bytes(b"torn")
    finished = prepare(load_manifest("phantom_private"), store=store, limits=LIMITS)
    assert finished.key == cohort.key
    assert contents(finished.path) == contents(cohort.path)
    assert volumes_file(finished.path, *patient).stat().st_mtime_ns == written
    assert not work.exists()


@pytest.mark.parametrize("failure", [BrokenProcessPool(), MemoryError(), OSError(errno.ENOSPC, "No space left")])
def test_a_machine_that_falls_short_is_said_and_nothing_is_lost(ward, tmp_path, read, monkeypatch, failure):
    manifest = hospital(train=("patient000", "patient001", "patient002"))
    sound = ROOM.place_on_grid

    def short(patient, localiser):
        if patient.id == "patient002":
            raise failure
        return sound(patient, localiser)

    monkeypatch.setattr(ROOM, "place_on_grid", short)
    with pytest.raises(CohortError, match="prepare again: what is done is kept"):
        prepare(manifest, store=tmp_path / "store", data_root=ward)
    monkeypatch.setattr(ROOM, "place_on_grid", sound)
    read.clear()
    assert len(prepare(manifest, store=tmp_path / "store", data_root=ward).split("train")) == 3
    assert "patient002" in read
    assert "patient000" not in read


def test_a_file_that_the_disk_refuses_is_said(ward, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CohortError, match="File too large; make room there and prepare again"):
            prepare(hospital(), store=tmp_path / "store", data_root=ward)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("first", ["public", "private"])
def test_a_file_of_private_patients_in_a_public_cohort_is_refused(ward, tmp_path, first):
    shutil.copy(ward / "patient000/patient000_frame12.nii.gz", ward / "patient001/patient001_frame01.nii.gz")
    manifests = {
        "private": hospital(splits={"train": ["patient000"], "validation": ["patient002"], "test": ["patient003"]}),
        "public": hospital("school", "public", train=("patient001",)),
    }
    prepare(manifests.pop(first), store=tmp_path / "store", data_root=ward)
    (second,) = manifests.values()
    found = r"school: patient001/\S+frame01.nii.gz is the same as a file of hospital, of real private patients"
    for _ in range(2):
        with pytest.raises(PrivacyError, match=found):
            prepare(second, store=tmp_path / "store", data_root=ward)
    assert not list((tmp_path / "store").glob(f"{second.name}-*"))


def test_cohorts_of_one_role_may_share_patients(ward, tmp_path):
    for name in ("one", "two"):
        prepare(hospital(name), store=tmp_path / "store", data_root=ward)


def test_shares_say_who_is_in_which_split_and_limit_real_private_patients_by_themselves(tmp_path, threads):
    names = tuple(f"n{i:02d}" for i in range(12))
    miniatures.make_table(tmp_path / "data", names)
    shares = {"train": 0.5, "validation": 0.25, "test": 0.25}
    private = miniatures.manifest(tmp_path, "table", splits=shares)
    assert private.places == 12
    cohort = prepare(private, store=tmp_path / "store")
    members = {split: cohort.split(split).ids for split in cohort.splits}
    assert sorted(sum(members.values(), ())) == list(names)
    assert members == {split: private.patient_ids(split, names) for split in members}
    n = len(members["train"])
    with pytest.raises(CohortError, match=r"splits.train: 12 places are more than the 11 wanted; give fewer in the"):
        prepare(private, store=tmp_path / "store", limits={"train": 11})
    few = miniatures.manifest(
        tmp_path, "table", splits=shares, budget={"epsilon": 10, "delta": 1e-5, "patients": n - 1}
    )
    with pytest.raises(CohortError, match=rf"budget.patients: {n - 1} places are too few for splits.train"):
        prepare(few, store=tmp_path / "store")
    prepare(private, store=tmp_path / "store", limits={"train": 12, "validation": 1, "test": 1})
    public = miniatures.manifest(tmp_path, "table", splits=shares, role="public", name="elsewhere")
    assert len(prepare(public, store=tmp_path / "other", limits={"train": 1}).split("train")) == 1


def test_files_are_kept_with_their_checksums(ward, tmp_path):
    path = prepare(hospital(), store=tmp_path / "store", data_root=ward).path
    (row,) = read_rows(path, "train")
    assert row["files"] == dict(read_patient(hospital(), ward, "patient000").files)
    assert len(row["files"]) == 5


@pytest.mark.parametrize("role", ["public", "private"])
def test_repairs_are_said_once_and_nothing_of_those_of_private_patients(ward, tmp_path, monkeypatch, capfd, role):
    def mended(manifest, root, patient_id):
        return replace(read_patient(manifest, root, patient_id), repairs=(f"{patient_id}: was upside down",))

    def said(store):
        with pytest.warns(UserWarning, match="hospital: ") as caught:
            prepare(manifest, store=tmp_path / store, data_root=ward)
        assert len(caught) == 1
        return re.sub(r"hospital-\w+", "hospital-key", str(caught[0].message)).replace(store, "store")

    manifest = hospital(role=role)
    unmended = said("first") if role == "private" else None
    monkeypatch.setattr(ROOM, "read_patient", mended)
    message = said("second")
    assert ("preparing" in capfd.readouterr().err) == (
        role == "public"
    )  # no progress of private patients in a notebook
    if role == "private":
        assert message == unmended  # nor whether there was anything to mend
        assert "in store/hospital-key/*.jsonl" in message
    else:
        assert "hospital: 3 repair(s), all in store/hospital-key/*.jsonl: patient000: was upside down" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = prepare(manifest, store=tmp_path / "second", data_root=ward)
    assert again.split("train")[0].repairs == ("patient000: was upside down",)


@dataclass(frozen=True)
class Bright:
    """A localiser: what is brighter than `level` is a left ventricle."""

    key: str = "bright"
    level: float = 0.9

    def __call__(self, image):
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
        return 3 * (image > self.level).astype(np.uint8)


def unlabelled(n_slices=9, spacing=(10.0, 1.3, 1.5), at=(60, 90), name="a"):
    """A bright ball in a large dark field, with no labels, in pixels round `at`."""
    z, y, x = np.indices((n_slices, 180, 200)).astype(float)
    distance = np.hypot((y - at[0]) * spacing[1], (x - at[1]) * spacing[2])
    image = np.where((distance < 30) & (abs(z - 4) < 3), 900, 100).astype(np.float32)
    return Patient(name, None, (Volume("ED", image, None, spacing),), {"AGE": 50.0})


def test_a_localiser_finds_and_labels_the_heart_that_nobody_labelled():
    record = place_on_grid(unlabelled(), Bright())
    assert not record.labelled
    assert (record.labels[0] == 3).sum() == pytest.approx((record.images[0] > 0.5).sum(), rel=0.1)
    assert record.images[0][record.labels[0] == 3].min() > 0.3
    rows, columns = np.nonzero(record.labels[0].any(axis=0))
    assert (rows.mean(), columns.mean()) == pytest.approx((47.5, 47.5), abs=1)
    known = dict(zip(ATTRIBUTE_NAMES, record.attributes[0], strict=True))
    assert known["LVEDV"] == pytest.approx(np.pi * 30**2 * 50 / 1000, rel=0.1)
    assert (known["DEPTH"], known["AGE"]) == (5, 50)
    assert np.isnan(known["LVESV"])


def test_without_a_localiser_the_middle_of_the_field_stands_for_the_heart():
    record = place_on_grid(unlabelled(at=(90, 100)))
    assert not record.labelled
    assert not record.labels.any()
    rows, columns = np.nonzero(record.images[0].max(axis=0) > 0.9)
    assert (rows.mean(), columns.mean()) == pytest.approx((47.5, 47.5), abs=1)
    assert np.flatnonzero((record.images[0] > 0.9).any(axis=(1, 2))).tolist() == list(range(4, 9))
    known = dict(zip(ATTRIBUTE_NAMES, record.attributes[0], strict=True))
    assert {name for name, value in known.items() if np.isfinite(value)} == {"AGE", "ESED"}
    assert known["ESED"] == 1


def test_a_localiser_that_sees_nothing_leaves_the_middle_and_says_so():
    record = place_on_grid(unlabelled(), Bright(level=1.0))
    assert record.repairs == ("a: no heart was found; the middle of the field of view was taken for it",)
    assert np.isnan(record.attributes[0, EDV])


def test_labels_of_one_phase_place_both_and_a_patient_counts_as_unlabelled():
    patient = tissue(11, (10.0, 1.5, 1.5))
    ed = patient.volumes[0]
    record = place_on_grid(replace(patient, volumes=(ed, replace(ed, phase="ES", labels=None))))
    assert not record.labelled
    assert np.array_equal(record.images[0], record.images[1])
    assert record.labels[0].any()
    assert not record.labels[1].any()
    assert np.isfinite(record.attributes[0, EDV])
    assert np.isnan(record.attributes[0, ATTRIBUTE_NAMES.index("LVESV")])


def scaled(patient, factor):
    """The patient, seen by a brighter coil."""
    volumes = tuple(replace(volume, image=factor * volume.image) for volume in patient.volumes)
    return replace(patient, volumes=volumes)


def test_the_store_knows_whose_labels_were_given_and_by_what_the_others_were_found(tmp_path, threads, monkeypatch):
    people = {f"patient00{i}": scaled(unlabelled(name=f"patient00{i}"), 1 + i) for i in range(10)}
    people["patient001"] = replace(tissue(11, (10.0, 1.5, 1.5)), id="patient001")
    reads = []

    def reading(manifest, root, name):
        reads.append(name)
        return people[name]

    monkeypatch.setattr(ROOM, "read_patient", reading)
    (tmp_path / "data").mkdir()

    def prepared(localiser, train=("patient000", "patient001", "patient002")):
        manifest = hospital("school", "public", train=train)
        return prepare(manifest, store=tmp_path / "store", data_root=tmp_path / "data", localiser=localiser)

    with pytest.warns(UserWarning, match=r"4 patient\(s\) have no labels; the middle of the field of view was taken"):
        middle = prepared(None)
    with pytest.warns(UserWarning, match=r"4 patient\(s\) have no labels; labels of a public segmenter were taken"):
        found = prepared(Bright())
    assert len({middle.key, found.key}) == 2
    assert found.split("train").labelled.tolist() == middle.split("train").labelled.tolist() == [False, True, False]
    reads.clear()
    assert [prepared(localiser).key for localiser in (None, Bright())] == [middle.key, found.key]
    assert not reads
    with pytest.warns(UserWarning, match="labels"):
        assert prepared(Bright(key="another")).key not in (middle.key, found.key)
    assert require_labelled(found.split("train"), "Dice").ids == ("patient001",)
    assert found.split("train").subset([1, 0]).labelled.tolist() == [True, False]
    with pytest.raises(CohortError, match="school: no patient \\(test\\) has labels; Dice needs"):
        require_labelled(found.split("test"), "Dice")


def test_a_localiser_that_is_not_needed_leaves_the_key_alone(ward, tmp_path):
    keys = [
        prepare(hospital(role="public"), store=tmp_path / store, data_root=ward, localiser=localiser).key
        for store, localiser in (("one", None), ("one", Bright()), ("two", Bright()))
    ]
    assert len(set(keys)) == 1


def test_an_image_that_is_constant_in_the_field_round_the_heart_is_refused():
    patient = tissue(11, (10.0, 1.5, 1.5), size=260)
    image = np.full((11, 260, 260), 9, np.float32)
    image[:, :20] = 50
    with pytest.raises(CohortError, match="a: ED has the same value all round the heart"):
        place_on_grid(replace(patient, volumes=(replace(patient.volumes[0], image=image),)))


def test_dim_and_bright_images_are_scaled_alike():
    patient = tissue(11, (10.0, 1.5, 1.5))
    dim = replace(patient, volumes=(replace(patient.volumes[0], image=patient.volumes[0].image * np.float32(1e-9)),))
    assert place_on_grid(dim).images == pytest.approx(place_on_grid(patient).images, abs=1e-3)


def test_what_a_large_heart_loses_is_said():
    assert place_on_grid(tissue(11, (10.0, 1.5, 1.5))).repairs == ()
    long = np.full((20, 40, 40), 3, np.uint8)
    image = np.random.default_rng(0).random(long.shape, np.float32)
    (said,) = place_on_grid(Patient("a", None, (Volume("ES", image, long, (10.0, 2.0, 2.0)),), {})).repairs
    assert said == "a: 20 slices are more than 13; those at the ends were left out"
    (said,) = place_on_grid(Patient("a", None, (Volume("ES", image, long, (5.0, 5.0, 2.0)),), {})).repairs
    assert said == "a: the heart is wider than the grid; what lies beyond was cut off"


def test_spacings_of_another_world_still_give_a_patient():
    for spacing in ((30.0, 0.2, 6.0), (1.0, 9.0, 0.5)):
        assert place_on_grid(tissue(9, spacing)).images.max() == 1


@pytest.mark.parametrize(
    ("role", "simulated", "public", "releasable"),
    [
        ("public", True, True, True),
        ("public", False, True, True),
        ("private", True, False, True),
        ("private", False, False, False),
    ],
)
def test_guards_let_through_only_what_exposes_nobody(tmp_path, role, simulated, public, releasable):
    phantom = {"kind": "phantom", "population": "biobank", "seed": 1}
    manifest = Manifest.model_validate(
        {
            "name": "some",
            "role": role,
            "simulated": simulated,
            "licence": "none",
            "citation": "none",
            "reader": phantom if simulated else {"kind": "acdc"},
            "splits": dict.fromkeys(("train", "validation", "test"), 1)
            if simulated
            else {"train": ["a"], "validation": ["b"], "test": ["c"]},
            "budget": {"epsilon": 10, "delta": 1e-5} if role == "private" and not simulated else None,
        }
    )
    patients = Patients(manifest, "train", tmp_path, np.arange(1))
    for guard, lets_through in ((require_public, public), (require_releasable, releasable)):
        if lets_through:
            guard(patients, "the latents' scale")
        else:
            with pytest.raises(PrivacyError, match=r"some .* would reveal the latents' scale"):
                guard(patients, "the latents' scale")


def test_an_unknown_split_is_refused(cohort):
    with pytest.raises(CohortError, match="train, validation, test"):
        cohort.split("valid")


def test_all_real_patients_are_prepared_with_their_volumes(acdc):
    ratios, angles = [], []
    for split, n in (("train", 60), ("validation", 8), ("test", 12)):
        patients = acdc.split(split)
        assert len(patients) == n
        for record in patients:
            assert record.images.shape == record.labels.shape == (2, *GRID.shape)
            assert 0 <= record.images.min() < record.images.max() <= 1
            ed, es = ({"ED": record.labels[0]}, {"ES": record.labels[1]})
            placed = measure_attributes(ed | es, GRID.spacing_mm)
            ratios.append(
                [placed[f"LV{p}V"] / record.attributes[0, ATTRIBUTE_NAMES.index(f"LV{p}V")] for p in ("ED", "ES")]
            )
            angles.append(record.attributes[0, ATTRIBUTE_NAMES.index("ANGLE")])
            assert placed["LVEDV"] > placed["LVESV"]
            assert placed["DEPTH"] == record.attributes[0, DEPTH]
            assert np.isnan(record.attributes[:, [ATTRIBUTE_NAMES.index(name) for name in ("AGE", "SEX", "BMI")]]).all()
    assert np.mean(ratios, axis=0) == pytest.approx(1, abs=0.02)
    assert np.array(ratios) == pytest.approx(1, abs=0.16)
    assert 90 < min(angles) < max(angles) < 270
