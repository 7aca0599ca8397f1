"""The check of anatomy: each fault of real exports is named with what to do, and sound hearts are left alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Patient, load_manifest
from cardiac_ldm.cohort.anatomy import Sources, examine, segmented, wrapped
from cardiac_ldm.cohort.attributes import measure_attributes
from cardiac_ldm.cohort.grid import place_on_grid
from cardiac_ldm.cohort.orientation import features, handedness
from cardiac_ldm.cohort.phantom import simulate
from cardiac_ldm.cohort.readers import open_patient, read_patient
from cardiac_ldm.errors import CohortError
from tests import miniatures as mini

FILES = {"ED": "ed.nii.gz", "ES": "es.nii.gz"}
LABELS = {"ED": "ed_gt.nii.gz", "ES": "es_gt.nii.gz"}


@pytest.fixture(scope="module")
def heart() -> Patient:
    return replace(simulate("clinics", 777, 3), attributes={})


def said(patient: Patient, **sources) -> list[str]:
    """What is found, errors first, doubts marked."""
    findings = examine(patient.volumes, patient.attributes, Sources(FILES, LABELS, **sources))
    return [f"{'? ' * finding.doubt}{finding.file}: {finding.says}" for finding in findings]


def changed(
    patient: Patient, image: Callable | None = None, labels: Callable | None = None, both: Callable | None = None
) -> Patient:
    image, labels = both or image, both or labels
    volumes = []
    for v in patient.volumes:
        new = labels(v.labels) if labels else v.labels
        volumes.append(replace(v, image=image(v.image) if image else v.image, labels=new))
    return replace(patient, volumes=tuple(volumes))


def test_sound_phantoms_of_both_populations_with_their_true_attributes_raise_nothing():
    for population in ("clinics", "biobank"):
        for number in range(6):
            patient = simulate(population, 5, number)
            assert said(patient) == [], (population, number)


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ((0, 3, 2, 1), "{1: 3, 2: 2, 3: 1}"),
        ((0, 2, 1, 3), "{1: 2, 2: 1, 3: 3}"),
        ((0, 1, 3, 2), "{1: 1, 2: 3, 3: 2}"),
        ((0, 2, 3, 1), "{1: 3, 2: 1, 3: 2}"),
        ((0, 3, 1, 2), "{1: 2, 2: 3, 3: 1}"),
    ],
)
def test_mixed_up_labels_are_refused_with_the_map_that_fits(heart, values, fits):
    mixed = changed(heart, labels=lambda labels: np.array(values, np.uint8)[labels])
    messages = said(mixed)
    assert messages[0].startswith("ed_gt.nii.gz: ")
    assert all(f"map the label values: {fits} would fit" in message for message in messages)
    assert len(messages) == 2
    undone = {int(k): int(v) for k, v in (pair.split(": ") for pair in fits.strip("{}").split(", "))}
    new = np.array([0, *(undone[k] for k in (1, 2, 3))], np.uint8)
    assert said(changed(mixed, labels=lambda labels: new[labels])) == []


def test_the_map_is_in_the_values_of_the_files(heart):
    mixed = changed(heart, labels=lambda labels: np.array((0, 3, 2, 1), np.uint8)[labels])
    assert "{10: 3, 20: 2, 30: 1} would fit" in said(mixed, values={10: 1, 20: 2, 30: 3})[0]


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        (lambda a: a[:, :, ::-1], "mirrored left to right"),
        (lambda a: a.transpose(0, 2, 1), "x and y exchanged"),
        (lambda a: a[:, ::-1, ::-1], "turned by 180 degrees"),
        (lambda a: np.rot90(a, 1, (1, 2)), "turned left by 90 degrees"),
    ],
)
def test_mirrored_and_turned_pictures_are_refused_with_what_undoes_it(turn, what):
    for number in (1, 4, 6):
        patient = replace(simulate("clinics", 777, number), attributes={})
        angle = measure_attributes({"ED": np.asarray(patient.volumes[0].labels)}, GRID.spacing_mm)["ANGLE"]
        if not 165 < angle < 235:
            continue
        (message,) = said(changed(patient, both=turn))
        assert message.startswith("ed.nii.gz: the RV lies at ")
        assert "expected 100 to 255" in message
        assert what in message
        assert "undo that in images and labels alike" in message


def test_a_picture_upside_down_is_doubted(heart):
    (message,) = said(changed(heart, both=lambda a: a[:, ::-1]))
    assert message.startswith("? ed.nii.gz: it looks like the mirror image of a heart")


def test_handedness_changes_its_sign_with_a_reflection_and_keeps_it_with_a_rotation():
    for number in range(4):
        (v, _) = simulate("clinics", 778, number).volumes
        assert v.labels is not None
        straight, mirrored, turned = (
            features(a.copy(), b.copy(), v.spacing_mm)
            for a, b in (
                (v.image, v.labels),
                (v.image[:, :, ::-1], v.labels[:, :, ::-1]),
                (np.rot90(v.image, 1, (1, 2)), np.rot90(v.labels, 1, (1, 2))),
            )
        )
        assert straight is not None and mirrored is not None and turned is not None  # noqa: PT018
        assert np.allclose(mirrored, -straight, atol=0.02)
        assert np.allclose(turned, straight, atol=0.02)
    assert np.isnan(handedness([replace(v, labels=None)]))


@pytest.mark.parametrize("labelled", [True, False])
def test_shuffled_and_interleaved_slices_are_named_in_their_order(heart, labelled):
    n = len(heart.volumes[0].image)
    order = [*range(0, n, 2), *range(1, n, 2)]
    spoilt = changed(heart, both=lambda a: a[order])
    if not labelled:
        spoilt = replace(spoilt, volumes=tuple(replace(v, labels=None) for v in spoilt.volumes))
    assert (np.diff(order) != 1).any()
    message = next(m for m in said(spoilt) if "order" in m)
    assert message.startswith("ed.nii.gz: its slices aren't in the order in which they lie in the body: from one end")
    way = [int(k) for k in message.split("they'd be ")[1].split(" (from 0); bring them into that order")[0].split(", ")]
    undone = {"both" if labelled else "image": lambda a: a[way]}
    assert said(changed(spoilt, **undone)) == []


def test_labels_alone_out_of_order_are_named(heart):
    n = len(heart.volumes[0].image)
    messages = said(changed(heart, labels=lambda a: a[[*range(0, n, 2), *range(1, n, 2)]]))
    assert any(m.startswith("ed_gt.nii.gz: its slices aren't in the order") for m in messages)


def test_slices_are_counted_as_they_are_stored(heart):
    def black(image):
        image = image.copy()
        image[2] = 0
        return image

    n = len(heart.volumes[0].image)
    assert said(changed(heart, image=black))[0] == (
        "ed.nii.gz: slice 2 (from 0) is black inside the stack; export it again"
    )
    assert f"slice {n - 3} (from 0)" in said(changed(heart, image=black), reverse=True)[0]


def test_black_slices_without_labels_at_the_ends_are_doubted(heart):
    padded = changed(heart, both=lambda a: np.concatenate([a, 0 * a[:1]]))
    assert {m.split(": ", 1)[1] for m in said(padded)} == {
        f"slice {len(heart.volumes[0].image)} (from 0) is black at the stack's end; is it padding?"
    }
    assert all(m.startswith("? ") for m in said(padded))


def test_a_repeated_slice_is_named(heart):
    def repeated(image):
        image = image.copy()
        image[3] = image[2]
        return image

    assert "ed.nii.gz: slices 2 and 3 (from 0) are the same picture; export it again" in said(
        changed(heart, image=repeated)
    )


def test_a_cine_of_one_slice_taken_for_a_stack_is_refused(heart):
    ed, es = (v.image[3] for v in heart.volumes)
    beat = np.sin(np.linspace(0, np.pi, 25))[:, None, None]
    frames = ((1 - beat) * ed + beat * es).astype(np.float32)
    volumes = tuple(replace(v, image=frames, labels=None) for v in heart.volumes)
    assert said(replace(heart, volumes=volumes))[0] == (
        "ed.nii.gz: its 25 slices are nearly the same picture: they seem to be the frames of one slice's cine (x, y, t)"
        "; give the stack (x, y, z) of one phase"
    )


@pytest.mark.parametrize(("unsigned", "signed"), [(np.uint16, np.int16), (np.uint8, np.int8)])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_wrapped_integers_are_refused_with_the_cast_that_undoes_it(heart, unsigned, signed, share):
    top = share * np.iinfo(unsigned).max

    def wrap(image):
        return np.round(image / image.max() * top).astype(unsigned).view(signed).astype(np.float32)

    bits = np.iinfo(unsigned).bits
    assert said(changed(heart, image=wrap))[0] == (
        f"ed.nii.gz: its negative values run on above the largest: they're wrapped; cast it to numpy.uint{bits}"
    )


def test_images_that_are_negative_for_another_reason_are_left_alone(heart):
    image = heart.volumes[0].image
    for sound in (image - image.mean(), np.round(1000 * image - 20), np.round(2000 * (image - 0.5))):
        assert wrapped(sound.astype(np.float32)) == 0


@pytest.mark.parametrize("first", [(0, 1, 2, 3), (0, 3, 2, 1)])
def test_labels_that_were_interpolated_and_rounded_are_refused(heart, first):
    to, back = np.array(first), np.argsort(first).astype(np.uint8)

    def interpolate(labels):
        return back[np.round(ndimage.shift(to[labels].astype(np.float32), (0, 0.5, 0.4), order=1)).astype(int)]

    messages = said(changed(heart, labels=interpolate))
    assert messages[0].startswith("ed_gt.nii.gz: ")
    assert not all(m.startswith("? ") for m in messages)
    if first[1] == 1:
        assert any("RV lies round" in m and "resample them by nearest neighbour" in m for m in messages)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"LVEDV": 3.0}, "LVEDV is {LVEDV:g} mL, but the labels measure"),
        ({"LVEDV": 100.0, "LVESV": 120.0}, "LVESV, 120 mL, is more than LVEDV, 100 mL; correct them"),
        (
            {"LVEDV": 100.0, "LVESV": 50.0, "LVEF": 80.0},
            "LVEF is 80 %, but volumes of 100 and 50 mL make 50 %; correct them",
        ),
        ({"RVEDV": 100.0, "RVESV": 50.0, "RVEF": 20.0}, "RVEF is 20 %, but"),
    ],
)
def test_a_table_that_contradicts_itself_or_the_labels_is_refused(heart, attributes, message):
    if len(attributes) == 1:
        labels = {v.phase: v.labels for v in heart.volumes}
        attributes = {"LVEDV": 3 * measure_attributes(labels, GRID.spacing_mm)["LVEDV"]}
    messages = said(replace(heart, attributes=attributes), table="patients.csv: anna")
    assert any(m.startswith("patients.csv: anna: " + message.format(**attributes)[:30]) for m in messages), messages


def test_a_table_that_differs_somewhat_is_doubted(heart):
    labels = {v.phase: v.labels for v in heart.volumes}
    ed = measure_attributes(labels, GRID.spacing_mm)["LVEDV"]
    assert [m[:2] for m in said(replace(heart, attributes={"LVEDV": 1.7 * ed}))] == ["? "]
    assert said(replace(heart, attributes={"LVEDV": 1.3 * ed})) == []


def test_exchanged_phases_and_an_rv_at_one_phase_alone_are_named(heart):
    ed, es = heart.volumes
    other = replace(heart, volumes=(replace(es, phase="ED"), replace(ed, phase="ES")))
    assert "the LV is larger at ES than at ED" in said(other)[0]
    no_rv = replace(es, labels=np.where(es.labels == 1, 0, es.labels).astype(np.uint8))
    assert said(replace(heart, volumes=(ed, no_rv))) == [
        "? es_gt.nii.gz: has no RV, which is labelled at ED; label it, or not"
    ]


def test_labels_of_another_picture_are_noticed(heart):
    messages = said(changed(heart, labels=lambda a: np.roll(a, 24, axis=1)))
    assert any("the LV cavity isn't brighter than the wall; are they this image's labels?" in m for m in messages)


def test_a_fragment_of_a_structure_is_doubted(heart):
    def scatter(labels):
        labels = labels.copy()
        labels[2:5, 2:14, 2:14] = 2
        return labels

    assert any(
        m.startswith("? ed_gt.nii.gz: ") and "of the wall lies apart" in m for m in said(changed(heart, labels=scatter))
    )


def test_what_a_segmenter_labels_is_held_to_the_same_and_doubted(heart):
    bare = replace(heart, volumes=tuple(replace(v, labels=None) for v in heart.volumes))
    seen = {v.phase: np.asarray(v.labels) for v in heart.volumes}
    assert segmented(bare, seen) == segmented(heart, seen) == []
    mirrored = changed(bare, image=lambda a: a[:, :, ::-1])
    (doubt,) = segmented(mirrored, {phase: one[:, :, ::-1] for phase, one in seen.items()})
    assert doubt.startswith(f"{heart.id}: as the segmenter sees it, the RV lies at ")

    class Knows:
        key = "knows"

        def __call__(self, image):
            return seen["ED"][:, :, ::-1]

    assert "as the segmenter sees it, the RV lies at" in place_on_grid(mirrored, Knows()).doubts[0]


def test_hand_labels_without_rv_leave_its_attributes_missing(heart, tmp_path):
    without = changed(heart, labels=lambda a: np.where(a == 1, 0, a).astype(np.uint8))

    known = dict(zip(ATTRIBUTE_NAMES, place_on_grid(without).attributes[0], strict=True))
    assert all(np.isnan(known[name]) for name in ("RVEDV", "RVESV", "RVEF", "ANGLE"))
    assert known["LVEDV"] > known["LVESV"] > 0


def test_reading_refuses_errors_and_keeps_doubts_with_the_patient(tmp_path):
    mini.make_table(tmp_path / "data")
    manifest = mini.manifest(tmp_path, "table")
    for name in ("ED", "ES"):
        image, labels = mini.heart(name)
        black = image.copy()
        black[..., -1] = 0
        mini.save(black, tmp_path / f"data/anna/{name}.nii.gz")
        mini.save(
            np.where(np.indices(labels.shape)[2] == 5, 0, labels).astype(np.uint8),
            tmp_path / f"data/anna/{name}_gt.nii.gz",
        )
    patient = read_patient(manifest, tmp_path / "data", "anna")
    assert patient.doubts[0] == "anna/ED.nii.gz: slice 5 (from 0) is black at the stack's end; is it padding?"
    assert place_on_grid(patient).doubts == patient.doubts
    for name in ("ED", "ES"):
        for array, end in zip(mini.heart(name), ("", "_gt"), strict=True):
            mini.save(array[::-1], tmp_path / f"data/anna/{name}{end}.nii.gz")
    with pytest.raises(CohortError, match=r"anna/ED\.nii\.gz: the RV lies at 0 degrees from the LV, expected 100"):
        read_patient(manifest, tmp_path / "data", "anna")
    _, findings, _ = open_patient(manifest, tmp_path / "data", "anna")
    assert [finding.code for finding in findings] == ["side"]


def test_all_real_patients_are_sound(acdc_root: Path):

    manifest = load_manifest("acdc")
    for split in ("train", "validation", "test"):
        for patient in manifest.patient_ids(split):
            assert read_patient(manifest, acdc_root, patient).doubts == ()
