"""Readers: miniature trees in every documented layout, the real ACDC patients, and how stacks are turned."""

import hashlib
import shutil

import nibabel as nib
import numpy as np
import pytest

from cardiac_ldm.cohort import load_manifest, measure_attributes
from cardiac_ldm.cohort.readers import list_patients, read_patient
from cardiac_ldm.errors import CohortError
from tests import miniatures as mini

OBLIQUE = np.array([[-0.7, -0.7, 0.0], [0.35, -0.35, -0.84], [-0.6, 0.6, -0.5]]).T
"""A short axis in RAS: columns run left and back, rows down, slices to the apex, which is left, forwards and down."""


def oblique(flipped: tuple[int, ...]) -> np.ndarray:
    """An affine of a stack as it should be, but for the axes (0 x, 1 y, 2 z) that are flipped."""
    directions = OBLIQUE / np.linalg.norm(OBLIQUE, axis=0)
    directions[:, list(flipped)] *= -1
    return nib.affines.from_matvec(directions * mini.ZOOMS)


def assert_is_the_heart(patient, seed=0, labelled=True):
    assert [volume.phase for volume in patient.volumes] == ["ED", "ES"]
    for volume in patient.volumes:
        image, labels = mini.heart(volume.phase, seed)
        assert volume.spacing_mm == (10.0, 2.0, 2.0)
        assert volume.image.dtype == np.float32
        assert np.array_equal(volume.image, image.T)
        if labelled:
            assert volume.labels.dtype == np.uint8
            assert np.array_equal(volume.labels, labels.T)
        else:
            assert volume.labels is None


@pytest.mark.parametrize("outer", ["", "training", "testing"])
def test_acdc_is_read_as_it_is_downloaded_and_without_its_outer_folder(tmp_path, outer):
    mini.make_acdc(tmp_path / "data" / outer)
    (tmp_path / "data" / outer / "patient007/patient007_4d.nii.gz").touch()
    manifest = mini.manifest(tmp_path, "acdc")
    assert list_patients(manifest, tmp_path / "data") == ("patient007",)
    patient = read_patient(manifest, tmp_path / "data", "patient007")
    assert_is_the_heart(patient)
    assert (patient.group, patient.attributes, patient.repairs) == ("HCM", {"BMI": pytest.approx(25)}, ())
    assert len(patient.files) == 5


def test_files_are_hashed_by_their_path_below_the_data_root(tmp_path):
    mini.make_acdc(tmp_path / "data/training")
    patient = read_patient(mini.manifest(tmp_path, "acdc"), tmp_path / "data", "patient007")
    for path, digest in patient.files.items():
        assert path.startswith("training/patient007/")
        assert digest == hashlib.sha256((tmp_path / "data" / path).read_bytes()).hexdigest()


def test_heights_that_are_no_patients_leave_the_body_mass_index_unknown_which_is_a_repair(tmp_path):
    mini.make_acdc(tmp_path / "data")
    (tmp_path / "data/patient007/Info.cfg").write_text("ED: 1\nES: 12\nHeight: 1.8\nWeight: 81.0\n")
    patient = read_patient(mini.manifest(tmp_path, "acdc"), tmp_path / "data", "patient007")
    assert (patient.group, patient.attributes) == (None, {})
    assert patient.repairs == (
        "patient007/Info.cfg: height 1.8 cm and weight 81.0 kg are no patient's; BMI was left unknown",
    )


def test_mnms_takes_frames_and_attributes_from_its_table_and_brings_labels_to_ours(tmp_path):
    mini.make_mnms(tmp_path / "data")
    manifest = mini.manifest(tmp_path, "mnms")
    assert list_patients(manifest, tmp_path / "data") == ("A0S9V9", "B1", "C1", "D1")
    for seed, code in enumerate(("A0S9V9", "B1", "C1", "D1")):
        patient = read_patient(manifest, tmp_path / "data", code)
        assert_is_the_heart(patient, seed, labelled=code != "B1")
        assert patient.group == "DCM"
        assert patient.attributes == {"AGE": 40 + seed, "SEX": seed % 2, "BMI": pytest.approx(25)}


def test_mnms2_is_read_at_both_phases_with_its_disease(tmp_path):
    mini.make_mnms2(tmp_path / "data")
    manifest = mini.manifest(tmp_path, "mnms2")
    assert list_patients(manifest, tmp_path / "data") == ("001", "161")
    for seed, (code, disease) in enumerate((("001", "NOR"), ("161", "FALL"))):
        patient = read_patient(manifest, tmp_path / "data", code)
        assert_is_the_heart(patient, seed)
        assert (patient.group, patient.attributes) == (disease, {})


def test_mnms2_manifest_has_the_challenges_splits():
    manifest = load_manifest("mnms2")
    ends = [(len(ids), ids[0], ids[-1]) for ids in map(manifest.patient_ids, ("train", "validation", "test"))]
    assert ends == [(160, "001", "160"), (40, "161", "200"), (160, "201", "360")]


@pytest.mark.parametrize("labels", ["seg_sa", "label_sa_"])
def test_ukbb_is_read_with_labels_of_all_frames_or_of_two(tmp_path, labels):
    mini.make_ukbb(tmp_path / "data", labels=labels)
    patient = read_patient(mini.manifest(tmp_path, "ukbb"), tmp_path / "data", "1000011")
    assert_is_the_heart(patient)
    assert patient.repairs == ()


def test_ukbb_prefers_labels_by_hand(tmp_path):
    mini.make_ukbb(tmp_path / "data", labels="seg_sa")
    mini.make_ukbb(tmp_path / "data", labels="label_sa_")
    patient = read_patient(mini.manifest(tmp_path, "ukbb"), tmp_path / "data", "1000011")
    assert "1000011/label_sa_ED.nii.gz" in patient.files
    assert "1000011/seg_sa.nii.gz" not in patient.files


def test_ukbb_without_labels_takes_the_frame_that_differs_most_as_es_and_says_so(tmp_path):
    mini.make_ukbb(tmp_path / "data", labels="")
    patient = read_patient(mini.manifest(tmp_path, "ukbb"), tmp_path / "data", "1000011")
    assert_is_the_heart(patient, labelled=False)
    assert patient.repairs == (
        "1000011/sa.nii.gz: has no labels: frame 2, which differs most from frame 0, was taken as ES",
    )


def test_ukbb_fields_become_attributes_and_later_analyses_go_before_the_scanners(tmp_path):
    for eid in ("1000011", "1000022"):
        mini.make_ukbb(tmp_path / "data", eid)
    columns = "eid,31-0.0,21003-2.0,21001-2.0,22421-2.0,22420-2.0,24100-2.0,24106-2.0,53-2.0"
    (tmp_path / "data/fields.csv").write_text(f"{columns}\n1000011,0,61,24.5,35,45,34.5,,2016-01-01\n")
    manifest = mini.manifest(tmp_path, "ukbb", reader={"kind": "ukbb", "table": "fields.csv"})
    patient = read_patient(manifest, tmp_path / "data", "1000011")
    assert patient.attributes == {"SEX": 0, "AGE": 61, "BMI": 24.5, "LVEDV": 34.5, "LVEF": 45}
    assert "fields.csv" in patient.files
    assert read_patient(manifest, tmp_path / "data", "1000022").attributes == {}
    assert list_patients(manifest, tmp_path / "data") == ("1000011", "1000022")


def test_a_table_of_files_is_read_with_attributes_and_group(tmp_path):
    mini.make_table(tmp_path / "data", ("anna", "berta"), group="DCM", LVEF="31.5", SEX="Female", AGE="")
    manifest = mini.manifest(tmp_path, "table")
    assert list_patients(manifest, tmp_path / "data") == ("anna", "berta")
    for seed, name in enumerate(("anna", "berta")):
        patient = read_patient(manifest, tmp_path / "data", name)
        assert_is_the_heart(patient, seed)
        assert (patient.group, patient.attributes) == ("DCM", {"LVEF": 31.5, "SEX": 0})


def test_a_table_may_name_frames_of_a_cine_map_labels_and_leave_them_out(tmp_path):
    images, labels = mini.cine(es=3)
    mini.save(images, tmp_path / "data/sa.nii")
    mini.save(10 * labels[..., 0], tmp_path / "data/ed.nii")
    (tmp_path / "data/patients.csv").write_text(
        "\ufeffphase, patient ,path,frame,labels\nES,anna,sa.nii,3,\nED,anna,sa.nii,0,ed.nii\n", encoding="utf-8"
    )
    reader = {"kind": "table", "table": "patients.csv", "labels": {10: 1, 20: 2, 30: 3}}
    ed, es = read_patient(mini.manifest(tmp_path, "table", reader=reader), tmp_path / "data", "anna").volumes
    assert ed.labels is not None
    assert np.array_equal(ed.labels, mini.heart("ED")[1].T)
    assert np.array_equal(es.image, mini.heart("ES")[0].T)
    assert es.labels is None


def test_a_mended_table_is_read_again(tmp_path):
    mini.make_table(tmp_path / "data", AGE="650")
    manifest = mini.manifest(tmp_path, "table")
    with pytest.raises(CohortError, match="looks like months"):
        read_patient(manifest, tmp_path / "data", "anna")
    mini.make_table(tmp_path / "data", AGE="54")
    assert read_patient(manifest, tmp_path / "data", "anna").attributes == {"AGE": 54}


def test_metres_and_micrometres_are_brought_to_mm_which_is_a_repair(tmp_path):
    mini.make_table(tmp_path / "data")
    for unit, factor in (("meter", 0.001), ("micron", 1000.0)):
        for file in (tmp_path / "data/anna").iterdir():
            scaled = nib.Nifti1Image(np.asarray(nib.load(file).dataobj), mini.AFFINE * factor)
            scaled.header.set_xyzt_units(unit)
            nib.save(scaled, file)
        patient = read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna")
        assert [v.spacing_mm for v in patient.volumes] == 2 * [pytest.approx((10, 2, 2))]
        assert len(patient.repairs) == 4
        assert "brought to mm" in patient.repairs[0]


def test_labels_in_metres_lie_on_their_image_in_mm(tmp_path):
    mini.make_table(tmp_path / "data")
    scaled = nib.Nifti1Image(mini.heart("ED")[1], np.diag([0.002, 0.002, 0.01, 1]))
    scaled.header.set_xyzt_units("meter")
    nib.save(scaled, tmp_path / "data/anna/ED_gt.nii.gz")
    assert_is_the_heart(read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna"))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("axes", [(), (2,), (1,), (0, 1), (0, 1, 2)])
def test_an_oblique_affine_tells_how_a_stack_is_turned(tmp_path, axes, labelled):
    mini.make_table(tmp_path / "data")
    for file in (tmp_path / "data/anna").iterdir():
        mini.save(np.flip(np.asarray(nib.load(file).dataobj), axes), file, oblique(axes))
    if not labelled:
        table = tmp_path / "data/patients.csv"
        table.write_text(table.read_text().replace("anna/ED_gt.nii.gz", "").replace("anna/ES_gt.nii.gz", ""))
    patient = read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna")
    assert_is_the_heart(patient, labelled=labelled)
    said = {0: "columns left", 1: "rows up", 2: "slices ran from apex to base"}
    assert [axis for axis in said if said[axis] in "".join(patient.repairs)] == sorted(axes)


def test_labels_alone_tell_that_slices_run_from_apex_to_base(tmp_path):
    mini.make_table(tmp_path / "data")
    for file in (tmp_path / "data/anna").iterdir():
        mini.save(np.flip(np.asarray(nib.load(file).dataobj), 2), file)
    patient = read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna")
    assert_is_the_heart(patient)
    assert patient.repairs == ("anna/ED.nii.gz: slices ran from apex to base: turned round",)


def test_a_placeholder_affine_and_an_rv_that_does_not_tell_leave_the_slices_alone(tmp_path):
    mini.make_table(tmp_path / "data")
    for phase in mini.PHASES:
        labels = mini.heart(phase)[1]
        labels[labels == 1] = 0
        mini.save(np.flip(labels, 2), tmp_path / f"data/anna/{phase}_gt.nii.gz")
    patient = read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna")
    assert patient.repairs == ()
    assert np.array_equal(patient.volumes[0].image, mini.heart("ED")[0].T)


def test_every_problem_of_every_file_of_a_patient_is_named(tmp_path):
    mini.make_table(tmp_path / "data", AGE="650", LVEDV="0.15")
    (tmp_path / "data/anna/ED.nii.gz").unlink()
    (tmp_path / "data/anna/ED_gt.nii.gz").write_bytes(b"")
    mini.save(0 * mini.heart("ES")[0], tmp_path / "data/anna/ES.nii.gz")
    mini.save(7 * mini.heart("ES")[1], tmp_path / "data/anna/ES_gt.nii.gz")
    with pytest.raises(CohortError) as caught:
        read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for line, part in zip(
        lines,
        (
            "it looks like months",
            "it looks like litres",
            "ED.nii.gz: ",
            "ED_gt.nii.gz: ",
            "ES.nii.gz: ",
            "ES_gt.nii.gz: ",
        ),
        strict=True,
    ):
        assert part in line


def test_a_public_table_cannot_take_files_through_a_link_out_of_its_root(tmp_path):
    mini.make_table(tmp_path / "data")
    shutil.move(tmp_path / "data/anna", tmp_path / "elsewhere")
    (tmp_path / "data/anna").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CohortError, match=r"ED\.nii\.gz: leads out of the data folder, to .*elsewhere"):
        read_patient(mini.manifest(tmp_path, "table", role="public"), tmp_path / "data", "anna")


def test_a_link_within_the_root_is_followed(tmp_path):
    mini.make_table(tmp_path / "data")
    (tmp_path / "data/anna/ED.nii.gz").rename(tmp_path / "data/moved.nii.gz")
    (tmp_path / "data/anna/ED.nii.gz").symlink_to("../moved.nii.gz")
    assert "moved.nii.gz" in read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna").files


def test_all_real_patients_have_the_volumes_of_their_files_and_need_no_repair(acdc_root):
    manifest = load_manifest("acdc")
    ids = [patient for split in ("train", "validation", "test") for patient in manifest.patient_ids(split)]
    assert tuple(sorted(ids)) == list_patients(manifest, acdc_root)
    groups = []
    for patient_id in ids:
        patient = read_patient(manifest, acdc_root, patient_id)
        groups.append(patient.group)
        assert patient.repairs == ()
        labels: dict[str, np.ndarray] = {v.phase: np.asarray(v.labels) for v in patient.volumes}
        assert {v.image.shape for v in patient.volumes} == {v.shape for v in labels.values()}
        spacing = patient.volumes[0].spacing_mm
        assert 5 <= spacing[0] <= 10
        assert 1 < spacing[1] == spacing[2] < 2
        measured = measure_attributes(labels, spacing)
        assert measured["LVEDV"] > measured["LVESV"] > 0
        assert measured["RVEDV"] > measured["RVESV"] > 0
        frames = dict(line.split(": ") for line in (acdc_root / patient_id / "Info.cfg").read_text().splitlines())
        for phase in ("ED", "ES"):
            file = nib.load(acdc_root / patient_id / f"{patient_id}_frame{int(frames[phase]):02d}_gt.nii.gz")
            voxel_volume = abs(np.linalg.det(file.affine[:3, :3]))
            expected = (file.get_fdata() == 3).sum() * voxel_volume / 1000
            assert measured[f"LV{phase}V"] == pytest.approx(expected, rel=0.001)
    assert {group: groups.count(group) for group in groups} == dict.fromkeys(("DCM", "HCM", "MINF", "NOR", "RV"), 16)


def test_real_patients_with_their_slices_reversed_or_ventricles_exchanged_are_noticed(acdc_root, tmp_path):
    manifest, readers = load_manifest("acdc"), mini.manifest(tmp_path, "table")
    for patient_id in manifest.patient_ids("test")[::3]:
        patient = read_patient(manifest, acdc_root, patient_id)
        rows = ["patient,phase,path,labels"]
        for volume in patient.volumes:
            affine = np.diag([*volume.spacing_mm[::-1], 1])
            mini.save(volume.image[::-1].T, tmp_path / f"data/{volume.phase}.nii", affine)
            mini.save(np.asarray(volume.labels)[::-1].T, tmp_path / f"data/{volume.phase}_gt.nii", affine)
            rows.append(f"anna,{volume.phase},{volume.phase}.nii,{volume.phase}_gt.nii")
        (tmp_path / "data/patients.csv").write_text("\n".join(rows))
        turned = read_patient(readers, tmp_path / "data", "anna")
        assert len(turned.repairs) == 1
        assert np.array_equal(np.asarray(turned.volumes[1].labels), np.asarray(patient.volumes[1].labels))
        swapped = readers.model_copy(
            update={"reader": readers.reader.model_copy(update={"labels": {1: 3, 2: 2, 3: 1}})}
        )
        with pytest.raises(CohortError, match="surrounds what is labelled RV"):
            read_patient(swapped, tmp_path / "data", "anna")
