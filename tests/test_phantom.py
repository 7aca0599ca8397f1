"""The phantom: the same everywhere, true to its attributes, populations as published, images as physics has them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage, stats

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, measure_attributes
from cardiac_ldm.cohort.phantom import simulate
from cardiac_ldm.cohort.phantom.contours import build
from cardiac_ldm.cohort.phantom.population import GROUPS, HEALTHY, draw_scanner, draw_traits
from cardiac_ldm.cohort.phantom.scanner import TISSUES, Scanner, acquire, off_resonance, signals, steady_state

N = 16
SCANNER = Scanner(1.5, 3.0, 60, 8, sampled=(0.7, 0.9), noise=0.0, shading=0.0, off_resonance=0.0)


@pytest.fixture(scope="module", params=["clinics", "biobank"])
def patients(request):
    return [simulate(request.param, 5, index) for index in range(N)]


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return {population: [draw_traits(population, rng) for _ in range(5000)] for population in ("clinics", "biobank")}


def test_a_patient_depends_on_its_seed_and_index_alone():
    first, again = simulate("clinics", 1, 4), simulate("clinics", 1, 4)
    assert first.attributes == again.attributes
    for volume, same in zip(first.volumes, again.volumes, strict=True):
        assert np.array_equal(volume.image, same.image)
        assert np.asarray(volume.labels).tobytes() == np.asarray(same.labels).tobytes()
    assert simulate("clinics", 1, 5).attributes != first.attributes
    assert simulate("clinics", 2, 4).attributes != first.attributes


@pytest.mark.parametrize(
    ("population", "seed", "index", "attributes", "voxels", "brightness"),
    [
        (
            "clinics",
            20170,
            0,
            {"LVEDV": 138.21, "RVESV": 51.11, "MYOEDTHICK": 6.13, "AGE": 57.74, "BMI": 25.95, "ANGLE": 202.58},
            ([3591, 2413, 4136], [1529, 2781, 1661]),
            (0.6511, 0.6583),
        ),
        (
            "biobank",
            20171,
            2099,
            {"LVEDV": 102.54, "RVESV": 62.5, "MYOEDTHICK": 5.3, "AGE": 62.13, "BMI": 25.89, "ANGLE": 159.84},
            ([3661, 1788, 3070], [1877, 1725, 1294]),
            (0.4501, 0.4276),
        ),
    ],
)
def test_patients_are_the_same_on_every_machine(population, seed, index, attributes, voxels, brightness):
    patient = simulate(population, seed, index)
    assert {name: round(patient.attributes[name], 2) for name in attributes} == attributes
    for volume, counts, mean in zip(patient.volumes, voxels, brightness, strict=True):
        assert np.bincount(np.asarray(volume.labels).ravel(), minlength=4)[1:] == pytest.approx(counts, abs=4)
        assert volume.image.mean() == pytest.approx(mean, rel=1e-3)


def test_voxels_measure_what_the_attributes_state(patients):
    for patient in patients:
        measured = measure_attributes({v.phase: v.labels for v in patient.volumes}, GRID.spacing_mm)
        for name, value in measured.items():
            slack = (
                0.5 if name.endswith("EF") else 0.0
            )  # points: 3 % of an ejection fraction of 6 % is less than a voxel
            assert value == pytest.approx(patient.attributes[name], rel=0.03, abs=slack)


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
            assert (volume.image.dtype, volume.labels.dtype) == (np.float32, np.uint8)
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


def test_the_right_ventricle_touches_the_septum_and_ends_before_the_apex(patients):
    ends = []
    for patient in patients:
        labels = patient.volumes[0].labels
        for slice_ in labels:
            rv, wall = slice_ == 1, slice_ == 2
            assert not rv.any() or (ndimage.binary_dilation(rv) & wall).any()
        with_rv, with_lv = (np.flatnonzero(m.any(axis=(1, 2)))[-1] for m in (labels == 1, labels >= 2))
        assert with_rv <= with_lv
        ends.append(with_lv - with_rv)
    assert np.mean(ends) > 0.2


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


def test_blood_is_brighter_than_muscle_and_lungs_are_dark(patients):
    for patient in patients:
        for volume in patient.volumes:
            muscle, lv = (np.median(volume.image[volume.labels == k]) for k in (2, 3))
            assert lv > 1.15 * muscle
            assert np.percentile(volume.image, 10) < 0.6 * muscle


@pytest.mark.parametrize("quantity", ["lvedv", "lvef", "rvedv", "rvef", "mass"])
@pytest.mark.parametrize("group", [*HEALTHY, *GROUPS])
def test_populations_have_the_published_means_and_spreads(drawn, group, quantity):
    if group in HEALTHY:
        people, published = [t for t in drawn["biobank"] if t.sex == (group == "male")], HEALTHY[group]
    else:
        people, published = [t for t in drawn["clinics"] if t.group == group], GROUPS[group]
    ejected = {"lvef": ("lvedv", "lvesv"), "rvef": ("rvedv", "rvesv")}
    if quantity in ejected:
        full, empty = (np.array([getattr(t, name) for t in people]) for name in ejected[quantity])
        values = 100 * (full - empty) / full
    else:
        values = np.array([getattr(t, quantity) for t in people])
    mean, spread = getattr(published, quantity)
    assert values.mean() == pytest.approx(mean, rel=0.05)
    assert values.std() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    ("sex", "lvesv", "rvesv", "stroke"), [(1, (69, 16), (85, 22), (96, 20)), (0, (49, 11), (55, 15), (75, 14))]
)
def test_what_follows_in_the_biobank_is_as_published_too(drawn, sex, lvesv, rvesv, stroke):
    people = [t for t in drawn["biobank"] if t.sex == sex]
    for values, (mean, spread) in (
        ([t.lvesv for t in people], lvesv),
        ([t.rvesv for t in people], rvesv),
        ([t.lvedv - t.lvesv for t in people], stroke),
    ):
        assert np.mean(values) == pytest.approx(mean, rel=0.05)
        assert np.std(values) == pytest.approx(spread, rel=0.1)
    assert [t.rvedv - t.rvesv for t in people] == pytest.approx([t.lvedv - t.lvesv for t in people])


def test_volumes_fall_with_age_and_rise_with_body_size(drawn):
    for people in drawn.values():
        lvedv, age, bmi = (np.array([getattr(t, name) for t in people]) for name in ("lvedv", "age", "bmi"))
        group = np.array([t.group + str(t.sex) for t in people])
        for name in set(group):
            assert stats.spearmanr(lvedv[group == name], age[group == name]).statistic < -0.05
            assert stats.spearmanr(lvedv[group == name], bmi[group == name]).statistic > 0.05


def test_infarcts_are_thin_and_stand_still_and_an_overloaded_septum_is_flat(drawn):
    def shapes(group, phase):
        healed = [replace(t, group=group) for t in drawn["clinics"][:40]]
        radii = [
            build(t, np.arange(5.0, t.length - 5, 10), np.random.default_rng(i))[phase] for i, t in enumerate(healed)
        ]
        return [
            (c.endo[2, 1] / c.endo[2, 1].mean(), (c.epi - c.endo)[2, 1], t) for c, t in zip(radii, healed, strict=True)
        ]

    thinnest = {g: np.mean([w.min() / w.mean() for _, w, _ in shapes(g, "ED")]) for g in ("NOR", "MINF", "HCM")}
    assert thinnest["MINF"] < thinnest["NOR"] - 0.15
    thickest = {g: np.mean([w.max() / w.mean() for _, w, _ in shapes(g, "ED")]) for g in ("NOR", "HCM")}
    assert thickest["HCM"] > thickest["NOR"] + 0.15
    left_behind = {g: np.mean([r.max() for r, _, _ in shapes(g, "ES")]) for g in ("NOR", "MINF")}
    assert left_behind["MINF"] > left_behind["NOR"] + 0.1
    septum = {g: np.mean([r[round(2 * t.orientation) % 720] for r, _, t in shapes(g, "ED")]) for g in ("NOR", "RV")}
    assert septum["RV"] < septum["NOR"] - 0.07


def test_the_populations_differ_in_disease_scanner_and_orientation(drawn):
    clinics, biobank = drawn["clinics"], drawn["biobank"]
    assert {t.group for t in biobank} == {"NOR"}
    assert {t.group for t in clinics} == set(GROUPS)
    assert len({t.scanner for t in biobank}) == 1
    assert len({t.scanner for t in clinics}) == len(clinics)
    assert {t.scanner.field for t in clinics} == {1.5, 3.0}
    for name in ("age", "orientation"):
        assert np.std([getattr(t, name) for t in clinics]) > 1.5 * np.std([getattr(t, name) for t in biobank])


@pytest.mark.parametrize("hertz", [0.0, 40.0, 120.0, 166.0])
@pytest.mark.parametrize("name", ["blood", "myocardium", "fat"])
def test_the_steady_state_is_that_of_the_bloch_equations(name, hertz):
    tissue, tr = TISSUES[name], SCANNER.repetition_time

    def after(magnetisation, time):
        e1, e2 = np.exp(-time / tissue.t1[0]), np.exp(-time / tissue.t2[0])
        phase = 2 * np.pi * hertz * time / 1000
        turn = np.array([[np.cos(phase), np.sin(phase), 0], [-np.sin(phase), np.cos(phase), 0], [0, 0, 1]])
        return np.diag([e2, e2, e1]) @ turn @ magnetisation + np.array([0, 0, 1 - e1])

    magnetisation = np.array([0.0, 0.0, 1.0])
    for pulse in range(6000):
        flip = np.radians(SCANNER.flip) * (-1) ** pulse
        tip = np.array([[1, 0, 0], [0, np.cos(flip), np.sin(flip)], [0, -np.sin(flip), np.cos(flip)]])
        tipped = tip @ magnetisation
        magnetisation = after(tipped, tr)
    echo = tissue.density * np.hypot(*after(tipped, tr / 2)[:2])
    assert steady_state(tissue, SCANNER, hertz) == pytest.approx(echo, rel=1e-3)


def test_field_that_is_off_darkens_in_bands():
    band = 500 / SCANNER.repetition_time
    factor = off_resonance(np.array([0.0, 10.0, -10.0, band, 2 * band]), SCANNER)
    assert factor[0] == 1
    assert factor[1] == factor[2] > 0.95
    assert factor[3] < 0.1
    assert factor[4] == pytest.approx(1, abs=0.02)


def test_water_and_fat_cancel_where_fat_lags_by_an_odd_number_of_turns():
    assert signals(SCANNER)["fat"] < 0 < signals(SCANNER)["blood"]
    assert signals(replace(SCANNER, field=3.0, repetition_time=4.4))["fat"] > 0


def test_k_space_beyond_what_is_sampled_is_empty_and_noise_is_rician():
    rng = np.random.default_rng(0)
    picture = 5 + rng.random((2, 96, 96), np.float32)
    spectrum = np.abs(np.fft.fft2(acquire(picture, SCANNER, rng)))
    frequency = 2 * np.abs(np.fft.fftfreq(96))
    beyond = (frequency[:, None] > 0.7) | (frequency[None, :] > 0.9)
    assert spectrum[:, beyond].max() < 1e-4 * spectrum[:, ~beyond].max()
    silence = acquire(np.zeros((8, 96, 96), np.float32), replace(SCANNER, noise=0.1), rng)
    assert silence.mean() / silence.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.05)  # Rayleigh's


def test_every_drawn_scanner_shows_blood_brighter_than_myocardium():
    rng = np.random.default_rng(1)
    for _ in range(200):
        relative = signals(draw_scanner("clinics", rng))
        assert relative["lung"] < relative["myocardium"] < 0.6 * relative["blood"]
