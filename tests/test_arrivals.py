"""Exports as they arrive: headers, tables and names that differ from the layout are read right, or named."""

import stat
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest

from benchmarks import hospital_export
from cardiac_ldm.cohort import check as module
from cardiac_ldm.cohort import load_manifest, prepare
from cardiac_ldm.cohort.__main__ import main
from cardiac_ldm.cohort.check import check, refuse_release
from cardiac_ldm.cohort.new import new
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.cohort.tables import ukbb_field
from cardiac_ldm.errors import CohortError, PrivacyError
from tests import miniatures as mini
from tests.test_readers import assert_is_the_heart

PATIENTS = ("anna", "berta", "carl")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Threads will do: processes would take longer to start than these patients to read."""
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))


def as_downloaded(file, spacing, qform_code=1):
    """Give a file the header of ACDC's download: a sform of 1 mm beside a right qform."""
    image = nib.Nifti1Image(np.asarray(nib.load(file).dataobj), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.set_qform(np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]), qform_code)
    image.header.set_zooms(spacing)
    nib.save(image, file)


def test_a_sform_that_contradicts_the_spacing_yields_to_the_qform_which_is_a_repair(tmp_path):
    mini.make_acdc(tmp_path / "data")
    for file in (tmp_path / "data/patient007").glob("*.nii.gz"):
        as_downloaded(file, mini.ZOOMS)
        assert np.allclose(np.abs(np.diag(nib.load(file).affine)), 1)
    patient = read_patient(mini.manifest(tmp_path, "acdc"), tmp_path / "data", "patient007")
    assert_is_the_heart(patient)
    assert patient.repairs[0] == (
        "patient007/patient007_frame01.nii.gz: its sform has voxels of 1 x 1 x 1, which pixdim contradicts: "
        "the qform was taken"
    )


def test_a_qform_without_a_code_mends_nothing(tmp_path):
    mini.make_acdc(tmp_path / "data")
    as_downloaded(tmp_path / "data/patient007/patient007_frame01.nii.gz", mini.ZOOMS, 0)
    with pytest.raises(CohortError, match=r"frame01\.nii\.gz: its affine contradicts its spacing \(pixdim\); correct"):
        read_patient(mini.manifest(tmp_path, "acdc"), tmp_path / "data", "patient007")


def test_real_patients_with_the_header_of_the_download_are_what_they_were(acdc_root, tmp_path):
    manifest = load_manifest("acdc")
    for name in manifest.patient_ids("train")[::12]:
        (tmp_path / name).mkdir()
        for file in (acdc_root / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
            if file.name.endswith(".nii.gz"):
                as_downloaded(tmp_path / name / file.name, nib.load(file).header.get_zooms())
        ours, theirs = (read_patient(manifest, root, name) for root in (tmp_path, acdc_root))
        assert len(ours.repairs) == 4
        for one, other in zip(ours.volumes, theirs.volumes, strict=True):
            assert np.array_equal(one.image, other.image)
            assert one.spacing_mm == pytest.approx(other.spacing_mm)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("participant.p21003_i2", "21003-2.0"),
        ("p21003_i2", "21003-2.0"),
        ("p31", "31-0.0"),
        ("p24100_i2_a1", "24100-2.1"),
        ("f.21003.2.0", "21003-2.0"),
        ("participant.eid", "eid"),
        ("f.eid", "eid"),
        ("eid", "eid"),
        ("21003-2.0", "21003-2.0"),
    ],
)
def test_ukbb_columns_are_known_in_every_spelling(theirs, ours):
    assert ukbb_field(theirs) == ours


def ukbb(tmp_path, text):
    mini.make_ukbb(tmp_path / "data")
    (tmp_path / "data/fields.csv").write_text(text)
    manifest = mini.manifest(tmp_path, "ukbb", reader={"kind": "ukbb", "table": "fields.csv"})
    return read_patient(manifest, tmp_path / "data", "1000011").attributes


def test_ukbb_is_read_with_the_names_of_the_research_analysis_platform(tmp_path):
    columns = "participant.eid,participant.p31,participant.p21003_i2,participant.p21001_i2"
    assert ukbb(tmp_path, f"{columns}\n1000011,Female,61,24.5\n") == {"SEX": 0, "AGE": 61, "BMI": 24.5}


def test_a_ukbb_participant_whom_the_table_lacks_is_unknown_where_it_names_another(tmp_path):
    for eid in ("1000001_2_0", "1000002_2_0"):
        mini.make_ukbb(tmp_path / "data", eid)
    (tmp_path / "data/fields.csv").write_text("eid,p31\n1000001,Male\n")
    manifest = mini.manifest(tmp_path, "ukbb", reader={"kind": "ukbb", "table": "fields.csv"})
    assert read_patient(manifest, tmp_path / "data", "1000001_2_0").attributes == {"SEX": 1}
    assert read_patient(manifest, tmp_path / "data", "1000002_2_0").attributes == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eid,age\n1000011,61\n", "fields.csv: has none of the fields 31-0.0, 21003-2.0"),
        ("eid,p31\n7777777,Male\n", "lists no participant who has a folder; are the eids another application's?"),
    ],
)
def test_a_named_table_that_yields_nothing_is_refused(tmp_path, text, message):
    with pytest.raises(CohortError) as caught:
        ukbb(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize("word", ["n/a", "nan", "NA", "NaN", ""])
def test_words_for_unknown_in_a_path_cell_mean_that_there_is_no_file(tmp_path, word):
    mini.make_table(tmp_path / "data")
    path = tmp_path / "data/patients.csv"
    path.write_text(path.read_text().replace("anna/ES_gt.nii.gz", word).replace("anna/ED_gt.nii.gz", word))
    assert_is_the_heart(read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna"), labelled=False)


def test_unpacked_files_are_taken_for_packed_ones_and_the_reverse(tmp_path):
    mini.make_acdc(tmp_path / "data")
    mini.make_ukbb(tmp_path / "bank")
    for root in ("data", "bank"):
        for file in (tmp_path / root).rglob("*.nii.gz"):
            nib.save(nib.load(file), file.with_suffix(""))
            file.unlink()
    patient = read_patient(mini.manifest(tmp_path, "acdc"), tmp_path / "data", "patient007")
    assert_is_the_heart(patient)
    assert "patient007/patient007_frame01.nii" in patient.files
    assert_is_the_heart(read_patient(mini.manifest(tmp_path, "ukbb"), tmp_path / "bank", "1000011"))
    mini.make_table(tmp_path / "list")
    table = tmp_path / "list/patients.csv"
    table.write_text(table.read_text().replace(".nii.gz", ".nii"))
    assert_is_the_heart(read_patient(mini.manifest(tmp_path, "table"), tmp_path / "list", "anna"))


def test_a_byte_order_mark_in_info_cfg_is_skipped(tmp_path):
    mini.make_acdc(tmp_path / "data")
    info = tmp_path / "data/patient007/Info.cfg"
    info.write_bytes(b"\xef\xbb\xbf" + info.read_bytes())
    assert_is_the_heart(read_patient(mini.manifest(tmp_path, "acdc"), tmp_path / "data", "patient007"))


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (lambda text: f"sep=,\n{text}", "utf-8"),
        (lambda text: text.replace(",", ";").replace("61.5", "61,5"), "utf-8-sig"),
        (lambda text: "sep=;\r\n" + text.replace(",", ";").replace("61.5", "61,5").replace("\n", "\r\n"), "utf-8-sig"),
        (lambda text: text.replace("anna/", "anna\\"), "utf-8"),
    ],
)
def test_tables_of_spreadsheets_are_read(tmp_path, change, encoding):
    mini.make_table(tmp_path / "data", AGE="61.5")
    path = tmp_path / "data/patients.csv"
    path.write_bytes(change(path.read_text()).encode(encoding))
    patient = read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "anna")
    assert_is_the_heart(patient)
    assert patient.attributes == {"AGE": 61.5}


def test_windows_text_is_refused_with_how_to_save_it(tmp_path):
    mini.make_table(tmp_path / "data", ("änna",))
    path = tmp_path / "data/patients.csv"
    path.write_bytes(path.read_text(encoding="utf-8").encode("cp1252"))
    with pytest.raises(CohortError, match=r"save it as UTF-8 with commas between cells \(in Excel: CSV UTF-8\)"):
        read_patient(mini.manifest(tmp_path, "table"), tmp_path / "data", "änna")


def test_excluded_patients_are_in_no_split_and_not_read(tmp_path, capsys):
    mini.make_table(tmp_path / "data", (*PATIENTS, "dora"))
    (tmp_path / "data/dora/ED.nii.gz").write_bytes(b"broken")
    splits = {"train": ["anna", "dora"], "validation": ["berta"], "test": ["carl"]}
    manifest = mini.manifest(tmp_path, "table", splits=splits, exclude=["dora"])
    assert manifest.patient_ids("train") == ("anna",)
    assert prepare(manifest, store=tmp_path / "store").split("train").ids == ("anna",)
    assert check(tmp_path / "mini.yaml")
    assert "excluded:\n  dora" in capsys.readouterr().out


def test_shares_put_nobody_elsewhere_because_somebody_is_excluded(tmp_path):
    names = [f"n{i:03d}" for i in range(60)]
    shares = {"train": 0.5, "validation": 0.25, "test": 0.25}
    all_in = mini.manifest(tmp_path, "table", splits=shares)
    without = mini.manifest(tmp_path, "table", splits=shares, exclude=["n007", "n008"])
    for split in shares:
        kept = tuple(name for name in all_in.patient_ids(split, names) if name not in ("n007", "n008"))
        assert without.patient_ids(split, names) == kept


@pytest.mark.parametrize("shares", [True, False])
def test_excluding_somebody_who_is_not_there_is_refused_without_anybody_elses_name(tmp_path, shares):
    splits = {"splits": {"train": 0.5, "validation": 0.25, "test": 0.25}} if shares else {}
    manifest = mini.manifest(tmp_path, "table", exclude=["dora"], **splits)
    with pytest.raises(CohortError) as caught:
        manifest.patient_ids("train", PATIENTS)
    assert "mini: exclude: number 1 is no patient of this cohort; correct the name" in str(caught.value)
    assert not any(name in str(caught.value) for name in PATIENTS)
    if shares:  # of a folder that holds nobody, the folder is wrong: to take out who left would bring them back
        with pytest.raises(CohortError, match="no patients of the layout table are there; is the root right"):
            manifest.patient_ids("train", ())


def test_exclude_is_a_list_of_names_once_each_that_leaves_somebody(tmp_path):
    with pytest.raises(CohortError, match="exclude: dora is listed twice; list each patient once"):
        mini.manifest(tmp_path, "table", exclude=["dora", "dora"])
    with pytest.raises(CohortError, match=r"exclude\.0: 7 won't do"):
        mini.manifest(tmp_path, "table", exclude=[7])
    with pytest.raises(CohortError, match="exclude leaves nobody in the split train"):
        mini.manifest(tmp_path, "table", exclude=["anna"]).patient_ids("train")


LAYOUTS = {
    "acdc": (mini.make_acdc, "reader: acdc, for 1 folders patientNNN"),
    "mnms": (mini.make_mnms, "reader: mnms, for 211230_M&Ms"),
    "mnms2": (mini.make_mnms2, "reader: mnms2, for dataset_information.csv"),
    "ukbb": (mini.make_ukbb, "reader: ukbb, for 1 cines <eid>/sa.nii.gz"),
    "table": (mini.make_table, "1 patients in 2 rows, 2 of them with labels"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_new_guesses_the_layout_says_so_and_overwrites_nothing(tmp_path, capsys, kind):
    make, said = LAYOUTS[kind]
    make(tmp_path / "My Data")
    out = new(tmp_path / "My Data", tmp_path / "guess.yaml")
    assert said in capsys.readouterr().out
    manifest = load_manifest(out)
    assert (manifest.name, manifest.role, manifest.reader.kind) == ("my_data", "private", kind)
    assert manifest.data_root() == (tmp_path / "My Data").resolve()
    before = out.read_bytes()
    with pytest.raises(CohortError, match=r"guess\.yaml: is there already and isn't overwritten"):
        new(tmp_path / "My Data", out)
    assert out.read_bytes() == before


def test_new_lists_files_that_no_table_lists(tmp_path, capsys):
    mini.make_table(tmp_path / "data", ("anna", "berta"))
    (tmp_path / "data/patients.csv").unlink()
    mini.save(mini.heart("ED")[0], tmp_path / "data/anna/scout.nii")
    manifest = load_manifest(new(tmp_path / "data", tmp_path / "guess.yaml"))
    printed = capsys.readouterr().out
    assert "2 patients in 4 rows, 4 labelled" in printed
    assert "anna/scout.nii: doesn't say ED or ES, or not whose it is; left out" in printed
    assert_is_the_heart(read_patient(manifest, manifest.data_root(), "anna"))


def test_new_takes_names_from_files_where_folders_tell_nobody_apart(tmp_path, capsys):
    for seed, name in enumerate(("anna", "berta")):
        for phase in mini.PHASES:
            for array, folder, end in zip(mini.heart(phase, seed), ("images", "labels"), ("", "_gt"), strict=True):
                mini.save(array, tmp_path / f"data/{folder}/{name}_{phase}{end}.nii.gz")
    manifest = load_manifest(new(tmp_path / "data", tmp_path / "guess.yaml"))
    printed = capsys.readouterr().out
    assert "2 patients in 4 rows, 4 labelled" in printed
    assert "left out" not in printed
    assert_is_the_heart(read_patient(manifest, manifest.data_root(), "anna"))


def test_new_says_which_files_nobody_can_be_told_from(tmp_path, capsys):
    for phase in mini.PHASES:
        for again in ("", " copy"):
            mini.save(mini.heart(phase)[0], tmp_path / f"data/anna/{phase}{again}.nii.gz")
    new(tmp_path / "data", tmp_path / "guess.yaml")
    printed = capsys.readouterr().out
    assert "1 patients in 2 rows" in printed
    assert printed.count(".nii.gz: doesn't say ED or ES, or not whose it is; left out") == 2


def test_new_says_what_it_lacks(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert main(["new", str(tmp_path / "data"), "--out", str(tmp_path / "x.yaml")]) == 1
    assert "holds no NIfTI file; list the files in a CSV" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.parametrize("role", ["public", "private"])
def test_the_page_shows_every_patient_with_what_is_wrong_and_is_its_owners(tmp_path, capsys, role):
    mini.make_table(tmp_path / "data", PATIENTS)
    for phase in mini.PHASES:
        for array, end in zip(mini.heart(phase, 1), ("", "_gt"), strict=True):
            mini.save(array[::-1], tmp_path / f"data/berta/{phase}{end}.nii.gz")
    mini.manifest(tmp_path, "table", role=role)
    assert main(["check", str(tmp_path / "mini.yaml"), "--page", str(tmp_path / "page.html")]) == 1
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert page.index("<h2>berta") < page.index("the RV lies at 0 degrees") < page.index("<h2>anna")
    assert ("for their holder's eyes alone. Don't release" in page) == (role == "private")
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o600


def test_a_page_of_private_patients_is_never_put_where_releases_are(tmp_path):
    (tmp_path / "runs/release").mkdir(parents=True)
    private = mini.manifest(tmp_path, "table")
    with pytest.raises(PrivacyError, match="what lies under `release` is given away"):
        refuse_release(tmp_path / "runs/release/page.html", private)
    (tmp_path / "link").symlink_to(tmp_path / "runs/release")
    with pytest.raises(PrivacyError):
        refuse_release(tmp_path / "link/page.html", private)
    refuse_release(tmp_path / "page.html", private)
    refuse_release(tmp_path / "runs/release/page.html", mini.manifest(tmp_path, "table", role="public"))


def test_a_hospitals_export_becomes_a_sound_cohort_by_what_the_commands_say(tmp_path):
    said = "\n".join(hospital_export.journey(tmp_path, None))  # the segmenter is for the benchmark; too slow here
    assert said.count("(exit code 0)") == 2
    assert "my_hospital: 29 patients, 3 with problems\n(exit code 1)" in said
    assert said.rstrip().endswith("my_hospital: 29 patients, all sound\n(exit code 0)")
