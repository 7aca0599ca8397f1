"""The phantom: the same everywhere, true to its attributes, hearts in health and disease as the literature has them."""

import numpy as np
import pytest
from scipy import ndimage

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, measure_attributes
from cardiac_ldm.cohort.phantom import DISEASES, draw_traits, simulate

N = 16


@pytest.fixture(scope="module", params=["clinics", "biobank"])
def patients(request):
    return [simulate(request.param, 5, index) for index in range(N)]


def draws(population, n=2000):
    rng = np.random.default_rng(0)
    return [draw_traits(population, rng) for _ in range(n)]


def test_a_patient_depends_on_its_seed_and_index_alone():
    first, again = simulate("clinics", 1, 4), simulate("clinics", 1, 4)
    assert first.attributes == again.attributes
    for volume, same in zip(first.volumes, again.volumes, strict=True):
        assert np.array_equal(volume.image, same.image)
        assert np.array_equal(volume.labels, same.labels)
    assert simulate("clinics", 1, 5).attributes != first.attributes
    assert simulate("clinics", 2, 4).attributes != first.attributes


@pytest.mark.parametrize(
    ("population", "seed", "index", "group", "attributes", "voxels"),
    [
        (
            "clinics",
            20170,
            0,
            "HCM",
            {
                "LVEDV": 138.63,
                "RVESV": 70.59,
                "MYOEDTHICK": 11.01,
                "AGE": 59.98,
                "BMI": 27.15,
                "ANGLE": 183.79,
                "DEPTH": 9,
            },
            ([4545, 4965, 4163], [2107, 5292, 1731]),
        ),
        (
            "biobank",
            20171,
            2099,
            "NOR",
            {
                "LVEDV": 81.54,
                "RVESV": 42.99,
                "MYOEDTHICK": 5.30,
                "AGE": 62.84,
                "BMI": 21.89,
                "ANGLE": 149.15,
                "DEPTH": 7,
            },
            ([2850, 1481, 2441], [1282, 1511, 884]),
        ),
    ],
)
def test_patients_are_the_same_on_every_machine(population, seed, index, group, attributes, voxels):
    patient = simulate(population, seed, index)
    assert patient.group == group
    assert {name: round(patient.attributes[name], 2) for name in attributes} == attributes
    for volume, counts in zip(patient.volumes, voxels, strict=True):
        assert np.bincount(volume.labels.ravel(), minlength=4)[1:] == pytest.approx(counts, abs=4)


def test_voxels_measure_what_the_attributes_state(patients):
    ratios = []
    for patient in patients:
        measured = measure_attributes({v.phase: v.labels for v in patient.volumes}, GRID.spacing_mm)
        ratios.append([measured[name] / patient.attributes[name] for name in measured])
    assert np.mean(ratios, axis=0) == pytest.approx(1, abs=0.01)
    assert np.array(ratios) == pytest.approx(1, abs=0.04)


def test_every_attribute_is_known(patients):
    for patient in patients:
        assert set(patient.attributes) == set(ATTRIBUTE_NAMES) - {"ESED"}
        assert np.isfinite(list(patient.attributes.values())).all()


def test_the_stack_fits_the_grid_and_shows_the_heart_in_every_slice(patients):
    for patient in patients:
        end_diastole, _ = patient.volumes
        assert len(end_diastole.labels) == patient.attributes["DEPTH"] <= GRID.n_slices
        assert end_diastole.labels.any(axis=(1, 2)).all()
        for volume in patient.volumes:
            assert volume.image.shape == volume.labels.shape == (len(end_diastole.labels), GRID.size, GRID.size)
            assert volume.spacing_mm == GRID.spacing_mm
            assert volume.image.dtype == np.float32
            assert not volume.labels[:, [0, -1]].any()
            assert not volume.labels[:, :, [0, -1]].any()


def test_the_left_ventricle_is_one_cavity_enclosed_by_myocardium(patients):
    for patient in patients:
        for volume in patient.volumes:
            for labels in volume.labels:
                cavity = labels == 3
                assert ndimage.label(cavity)[1] <= 1
                ring = ndimage.binary_dilation(cavity) & ~cavity
                assert (labels[ring] == 2).mean() > 0.97 if ring.any() else True


def test_hearts_contract_shorten_and_keep_their_muscle(patients):
    muscle = []
    for patient in patients:
        a, (ed, es) = patient.attributes, (volume.labels for volume in patient.volumes)
        assert a["LVEDV"] > a["LVESV"] > 0
        assert a["RVEDV"] > a["RVESV"] > 0
        assert a["MYOESTHICK"] > a["MYOEDTHICK"]
        assert (es == 3).any(axis=(1, 2)).sum() <= (ed == 3).any(axis=(1, 2)).sum()
        muscle.append((es == 2).sum() / (ed == 2).sum())
    assert np.mean(muscle) == pytest.approx(1, abs=0.05)


def test_blood_is_brighter_than_muscle(patients):
    for patient in patients:
        for volume in patient.volumes:
            rv, muscle, lv = (volume.image[volume.labels == k].mean() for k in (1, 2, 3))
            assert min(rv, lv) > 1.3 * muscle


@pytest.mark.parametrize(("male", "lvedv", "lvef", "rvedv", "rvef"), [(1, 166, 58, 182, 54), (0, 124, 61, 130, 58)])
def test_the_biobank_has_the_published_means(male, lvedv, lvef, rvedv, rvef):
    people = [t for t in draws("biobank") if t.sex == male]
    assert np.mean([t.lvedv for t in people]) == pytest.approx(lvedv, rel=0.05)
    assert np.mean([t.rvedv for t in people]) == pytest.approx(rvedv, rel=0.06)
    assert np.mean([100 * (1 - t.lvesv / t.lvedv) for t in people]) == pytest.approx(lvef, abs=1)
    assert np.mean([100 * (1 - t.rvesv / t.rvedv) for t in people]) == pytest.approx(rvef, abs=1.5)


def test_diseases_show_what_defines_them():
    by_group = {group: [t for t in draws("clinics") if t.group == group] for group in DISEASES}
    ejection = {g: np.array([100 * (1 - t.lvesv / t.lvedv) for t in people]) for g, people in by_group.items()}
    volume = {g: np.array([t.lvedv for t in people]) for g, people in by_group.items()}
    mass = {g: np.array([t.mass for t in people]) for g, people in by_group.items()}
    rv_ejection = np.array([100 * (1 - t.rvesv / t.rvedv) for t in by_group["RV"]])
    assert (ejection["DCM"] < 40).mean() > 0.9
    assert (ejection["MINF"] < 45).mean() > 0.9
    assert (ejection["NOR"] > 50).mean() > 0.9
    assert (rv_ejection < 45).mean() > 0.8
    assert volume["DCM"].mean() > 1.5 * volume["NOR"].mean()
    assert mass["HCM"].mean() > 1.5 * mass["NOR"].mean()


def test_the_populations_differ_in_disease_contrast_and_orientation():
    clinics, biobank = draws("clinics"), draws("biobank")
    assert {t.group for t in biobank} == {"NOR"}
    assert len({t.scanner for t in clinics}) == 4
    assert {t.scanner for t in biobank}.isdisjoint(t.scanner for t in clinics)
    ages, angles = (
        [np.std([getattr(t, name) for t in p]) for p in (clinics, biobank)] for name in ("age", "orientation")
    )
    assert ages[0] > 1.5 * ages[1]
    assert angles[0] > 1.5 * angles[1]
