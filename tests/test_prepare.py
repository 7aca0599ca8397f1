"""Preparation onto the grid, the store it leaves, the patients read from it, and the guards on private ones."""

import secrets
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import yaml
import zarr

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
    require_public,
    require_releasable,
)
from cardiac_ldm.cohort.prepare import _salt, _write_split, place_on_grid
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import CohortError, PrivacyError

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
        assert patients.owners.tolist() == [patient for patient in range(n) for _ in range(2)]
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
    assert some.owners.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(some.attributes, patients.attributes[[18, 19, 4, 5, 10, 11]])
    assert np.array_equal(some.images([2]), patients.images([4]))
    assert some.subset([1])[0].id == patients.ids[2]
    assert some[-1].id == patients.ids[5]
    assert [record.id for record in patients[1:3]] == list(patients.ids[1:3])
    with pytest.raises(IndexError):
        some[3]


def test_patients_may_have_one_to_three_volumes(tmp_path):
    counts = [1, 3, 2, 1]
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
    _write_split(zarr.open_group(tmp_path, mode="w").create_group("train"), iter(records), len(records))
    patients = Patients(load_manifest("phantom_public"), "train", tmp_path)
    assert patients.owners.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert [len(record.images) for record in patients] == counts
    assert [record.labels.max() for record in patients.subset([3, 1])] == [3, 1]
    assert patients.subset([3, 1]).images([1, 3])[:, 0, 0, 0].tolist() == [0.25, 0.25]


def test_a_prepared_cohort_is_returned_at_once(cohort, store, monkeypatch):
    monkeypatch.setitem(prepare.__globals__, "_write", lambda *_: pytest.fail("prepared again"))
    again = prepare(load_manifest("phantom_private"), store=store, limits=LIMITS)
    assert (again.path, again.key) == (cohort.path, cohort.key)
    assert cohort.path == store / f"phantom_private-{cohort.key}"


def test_the_key_follows_manifest_limits_and_files(make_acdc_patient, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.__globals__, "_write", lambda path, *_: None)
    folders = [make_acdc_patient(f"patient00{i}") for i in range(3)]
    content = {
        "name": "tiny",
        "role": "private",
        "simulated": False,
        "licence": "none",
        "citation": "none",
        "reader": {"kind": "acdc"},
        "splits": {"train": ["patient000"], "validation": ["patient001"], "test": ["patient002"]},
    }

    def key(limits=None, **changes):
        manifest = Manifest.model_validate(content | changes)
        return prepare(manifest, store=tmp_path / "store", data_root=tmp_path / "acdc", limits=limits).key

    first = key()
    assert key(root="elsewhere") == first
    assert key(limits={"train": 9}) == first
    assert key(role="public") != first
    (folders[0] / "Info.cfg").write_text("ED: 1\nES: 12\n")
    assert key() != first


def test_a_key_of_real_private_patients_belongs_to_its_store(make_acdc_patient, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.__globals__, "_write", lambda path, *_: None)
    make_acdc_patient("patient000")
    split = {"train": ["patient000"], "validation": ["patient001"], "test": ["patient002"]}
    said = {"licence": "none", "citation": "none", "reader": {"kind": "acdc"}, "splits": split, "simulated": False}

    def key(role, store):
        manifest = Manifest.model_validate(said | {"name": "tiny", "role": role})
        return prepare(manifest, store=tmp_path / store, data_root=tmp_path / "acdc").key

    assert key("public", "one") == key("public", "two")
    assert not (tmp_path / "one" / ".salt").exists()
    assert key("private", "one") == key("private", "one")
    assert key("private", "one") != key("private", "two")  # else whoever guesses the members could check the guess
    assert key("public", "one") == key("public", "two")


def test_processes_that_need_a_salt_at_once_agree_on_it(tmp_path, monkeypatch):
    def slow(n, made=secrets.token_hex):
        time.sleep(0.2)
        return made(n)

    monkeypatch.setattr(secrets, "token_hex", slow)
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        salts = set(pool.map(_salt, [tmp_path / "store"] * 3))
    assert {len(salt) for salt in salts} == {64}
    assert salts == {(tmp_path / "store" / ".salt").read_text()}


def test_limits_name_splits_and_are_positive(tmp_path):
    for limits in ({"training": 3}, {"train": 0}):
        with pytest.raises(CohortError, match="train, validation, test"):
            prepare(load_manifest("phantom_public"), store=tmp_path, limits=limits)


def test_a_failure_names_every_broken_patient_and_leaves_nothing(make_acdc_patient, tmp_path):
    for i in range(4):
        make_acdc_patient(f"patient00{i}")
    (tmp_path / "acdc/patient001/Info.cfg").unlink()
    shutil.rmtree(tmp_path / "acdc/patient003")
    path = tmp_path / "tiny.yaml"
    splits = {"train": ["patient000", "patient001"], "validation": ["patient002"], "test": ["patient003"]}
    path.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "role": "private",
                "simulated": False,
                "licence": "none",
                "citation": "none",
                "root": "acdc",
                "reader": {"kind": "acdc"},
                "splits": splits,
            }
        )
    )
    with pytest.raises(CohortError, match=r"2 patient\(s\)") as caught:
        prepare(load_manifest(path), store=tmp_path / "store")
    assert "patient001" in str(caught.value)
    assert "patient003" in str(caught.value)
    left = {path.name for path in (tmp_path / "store").iterdir()}
    assert not [name for name in left if not name.endswith((".salt", ".lock"))]


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
