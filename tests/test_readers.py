"""The ACDC reader: on made-up files of the challenge's layout, on broken ones, and on the real patients."""

import nibabel as nib
import numpy as np
import pytest

from cardiac_ldm.cohort import load_manifest, measure_attributes
from cardiac_ldm.cohort.readers import read_acdc, read_patient
from cardiac_ldm.errors import CohortError


def test_axes_become_slices_rows_columns(make_acdc_patient):
    folder = make_acdc_patient(shape=(60, 50, 8), zooms=(1.5, 1.25, 10.0))
    patient = read_acdc(folder)
    assert (patient.id, patient.group) == ("patient007", "HCM")
    assert [volume.phase for volume in patient.volumes] == ["ED", "ES"]
    for volume, frame in zip(patient.volumes, ("01", "12"), strict=True):
        assert volume.spacing_mm == (10.0, 1.25, 1.5)
        stored = nib.load(folder / f"patient007_frame{frame}.nii.gz").get_fdata()
        assert volume.image.shape == volume.labels.shape == (8, 50, 60)
        assert volume.image[3, 20, 41] == stored[41, 20, 3]
    assert measure_attributes({"ED": patient.volumes[0].labels}, (10.0, 1.25, 1.5))["ANGLE"] == 180


def test_body_mass_index_comes_from_height_and_weight(make_acdc_patient):
    folder = make_acdc_patient()
    assert read_acdc(folder).attributes["BMI"] == pytest.approx(25)
    (folder / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: NOR\n")
    assert not read_acdc(folder).attributes


def _truncate(folder):
    file = folder / "patient007_frame01.nii.gz"
    file.write_bytes(file.read_bytes()[:900])


def _replace(frame, change):
    def spoil(folder):
        file = folder / f"patient007_frame{frame}.nii.gz"
        nifti = nib.load(file)
        nib.save(nib.Nifti1Image(change(nifti.get_fdata().astype(np.float32)), nifti.affine), file)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "Info.cfg").unlink(), "Info.cfg: there's no such file"),
        (
            lambda folder: (folder / "Info.cfg").write_text("ED: 1\nGroup: NOR\n"),
            "expected a line 'ES: <frame number>'",
        ),
        (
            lambda folder: (folder / "Info.cfg").write_text("ED: 1\nES: 9\n"),
            "patient007_frame09.nii.gz: there's no such",
        ),
        (lambda folder: (folder / "patient007_frame12_gt.nii.gz").unlink(), "frame12_gt.nii.gz: there's no such file"),
        (_truncate, "patient007_frame01.nii.gz: can't be read as NIfTI"),
        (_replace("12", lambda image: np.where(image == image.max(), np.nan, image)), "frame12.nii.gz: expected a 3D"),
        (_replace("12", lambda image: image[:-1]), r"its shape \(60, 50, 8\) isn't its image's, \(59, 50, 8\)"),
        (_replace("12_gt", lambda labels: labels + 1), "expected labels 0, 1, 2, 3"),
        (_replace("12_gt", lambda labels: 0 * labels), "not all 0"),
    ],
)
def test_a_broken_patient_is_refused_with_the_file_and_the_remedy(make_acdc_patient, spoil, named):
    folder = make_acdc_patient()
    spoil(folder)
    with pytest.raises(CohortError, match=named):
        read_acdc(folder)


def test_phases_of_one_patient_share_one_geometry(make_acdc_patient):
    folder = make_acdc_patient()
    for suffix in ("", "_gt"):
        _replace("12" + suffix, lambda array: array[:, :, :-1])(folder)
    with pytest.raises(CohortError, match="ED and ES frames differ"):
        read_acdc(folder)


def test_all_real_patients_have_the_volumes_of_their_files(acdc_root):
    manifest = load_manifest("acdc")
    ids = [patient for split in ("train", "validation", "test") for patient in manifest.patient_ids(split)]
    groups = []
    for patient_id in ids:
        patient = read_patient(manifest, acdc_root, patient_id)
        groups.append(patient.group)
        assert {v.image.shape for v in patient.volumes} == {v.labels.shape for v in patient.volumes}
        spacing = patient.volumes[0].spacing_mm
        assert 5 <= spacing[0] <= 10
        assert 1 < spacing[1] == spacing[2] < 2
        measured = measure_attributes({v.phase: v.labels for v in patient.volumes}, spacing)
        assert measured["LVEDV"] > measured["LVESV"] > 0
        assert measured["RVEDV"] > measured["RVESV"] > 0
        frames = dict(line.split(": ") for line in (acdc_root / patient_id / "Info.cfg").read_text().splitlines())
        for phase in ("ED", "ES"):
            file = nib.load(acdc_root / patient_id / f"{patient_id}_frame{int(frames[phase]):02d}_gt.nii.gz")
            voxel_volume = abs(np.linalg.det(file.affine[:3, :3]))
            expected = (file.get_fdata() == 3).sum() * voxel_volume / 1000
            assert measured[f"LV{phase}V"] == pytest.approx(expected, rel=0.001)
    assert {group: groups.count(group) for group in groups} == dict.fromkeys(("DCM", "HCM", "MINF", "NOR", "RV"), 16)
