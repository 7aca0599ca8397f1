"""Everything that can be wrong with a cohort's files ends in one sentence: file, what is wrong, what to do.

First a table of malformed inputs, each with its message; then random damage, which must never end in anything else.
"""

import gzip
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cardiac_ldm.cohort.manifest import load_manifest
from cardiac_ldm.cohort.nifti import MAX_VOXELS
from cardiac_ldm.cohort.readers import list_patients, read_patient
from cardiac_ldm.errors import CohortError, PrivacyError
from tests import miniatures as mini

Spoil = Callable[[Path], Any]
ED, ED_GT, ES = "anna/ED.nii.gz", "anna/ED_gt.nii.gz", "anna/ES.nii.gz"


def array(file: str, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray = mini.AFFINE) -> Spoil:
    """Replace a file's voxels."""

    def spoil(root: Path) -> None:
        changed = change(np.asarray(nib.load(root / file).dataobj))
        mini.save(changed.astype(np.int16) if changed.dtype == np.int64 else changed, root / file, affine)

    return spoil


def header(file: str, offset: int, form: str, *values: float) -> Spoil:
    """Overwrite a field of a file's header, at its byte offset in the NIfTI-1 standard."""

    def spoil(root: Path) -> None:
        data = bytearray(gzip.decompress((root / file).read_bytes()))
        struct.pack_into(f"<{form}", data, offset, *values)
        (root / file).write_bytes(gzip.compress(bytes(data)))

    return spoil


def content(file: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Replace a file's bytes."""
    return lambda root: (root / file).write_bytes(change((root / file).read_bytes()))


def table(old: str, new: str, encoding: str = "utf-8") -> Spoil:
    """Replace text in the table."""

    def spoil(root: Path) -> None:
        text = (root / "patients.csv").read_text()
        assert old in text
        (root / "patients.csv").write_bytes(text.replace(old, new).encode(encoding))

    return spoil


def nan(image: np.ndarray) -> np.ndarray:
    """One voxel isn't a number."""
    image = image.astype(np.float32)
    image[20, 20, 3] = np.nan
    return image


def as_folder(root: Path) -> None:
    """A folder of the file's name."""
    (root / ED).unlink()
    (root / ED).mkdir()


def as_pipe(root: Path) -> None:
    """A pipe of the file's name, from which reading would wait for ever."""
    (root / ED).unlink()
    os.mkfifo(root / ED)


def as_mgh(root: Path) -> None:
    """Another format under NIfTI's name."""
    nib.save(nib.MGHImage(np.zeros(mini.SHAPE, np.float32), mini.AFFINE), root / "anna/ED.mgz")
    (root / "anna/ED.mgz").replace(root / ED)


def flipped_bit(data: bytes) -> bytes:
    """A bit of the compressed voxels is flipped."""
    return data[:-2000] + bytes([data[-2000] ^ 16]) + data[-1999:]


def longer(root: Path) -> None:
    """The whole patient has 40 slices of 10 mm."""
    for file in (root / "anna").iterdir():
        array(f"anna/{file.name}", lambda a: np.repeat(a, 7, axis=2)[..., :40])(root)


def link(file: str, to: str) -> Spoil:
    """A link of this name, in place of the file if there's one."""

    def spoil(root: Path) -> None:
        (root / file).unlink(missing_ok=True)
        (root / file).symlink_to(to)

    return spoil


def outside(root: Path) -> None:
    """An image lies beside the data root."""
    (root / ED).replace(root.parent / "ED.nii.gz")
    table(ED, "../ED.nii.gz")(root)


NIFTI: dict[str, tuple[Spoil, str]] = {
    "a missing image": (lambda root: (root / ED).unlink(), "ED.nii.gz: there's no such file; fetch it"),
    "missing labels": (lambda root: (root / ED_GT).unlink(), "ED_gt.nii.gz: there's no such file"),
    "a file of no bytes": (content(ED, lambda b: b""), "ED.nii.gz: can't be read as NIfTI"),
    "a truncated file": (content(ED, lambda b: b[:-5000]), "ED.nii.gz: can't be read as NIfTI (Compressed file ended"),
    "a header alone": (content(ED, lambda b: gzip.compress(gzip.decompress(b)[:352])), "can't be read to its end"),
    "half a header": (content(ED, lambda b: gzip.compress(gzip.decompress(b)[:200])), "can't be read as NIfTI"),
    "a file that isn't gzipped": (content(ED, gzip.decompress), "can't be read as NIfTI (Not a gzipped file"),
    "a flipped bit": (content(ED, flipped_bit), "ED.nii.gz: can't be read as NIfTI"),
    "text in place of NIfTI": (
        content(ED, lambda b: gzip.compress(b"<html>" * 99)),
        "ED.nii.gz: can't be read as NIfTI",
    ),
    "another format": (as_mgh, "ED.nii.gz: can't be read as NIfTI"),
    "a folder in place of a file": (as_folder, "ED.nii.gz: is no file but a folder"),
    "a pipe in place of a file": (as_pipe, "ED.nii.gz: is no file but a folder or the like"),
    "a broken link": (link(ED, "gone"), "there's no such file"),
    "a link to itself": (link(ED, "ED.nii.gz"), "ED.nii.gz: "),
    "NaN in the image": (array(ED, nan), "ED.nii.gz: expected finite numbers, found NaN"),
    "infinity in the image": (array(ED, lambda a: np.where(a > 300, np.inf, a)), "ED.nii.gz: expected finite numbers"),
    "NaN in labels": (array(ED_GT, nan), "ED_gt.nii.gz: expected finite numbers"),
    "numbers beyond single precision": (array(ED, lambda a: a * 1e300), "ED.nii.gz: expected finite numbers"),
    "a constant image": (array(ED, lambda a: 0 * a + 7), "ED.nii.gz: every voxel is 7"),
    "a 2D image": (array(ED, lambda a: a[..., 0]), "ED.nii.gz: its shape is (48, 44); expected a volume (x, y, z)"),
    "a cine without a frame": (array(ED, lambda a: np.stack([a, a], -1)), "ED.nii.gz: holds 2 frames where one volume"),
    "a volume of colours": (array(ED, lambda a: np.stack([a] * 3, -1)[..., None, :]), "ED.nii.gz: holds 3 frames"),
    "labels of a cine without a frame": (array(ED_GT, lambda a: np.stack([a, a], -1)), "ED_gt.nii.gz: holds 2 frames"),
    "one slice": (array(ED, lambda a: a[..., :1]), "covers 96 x 88 x 10 mm, no short-axis stack"),
    "forty slices of 10 mm": (longer, "its shape (48, 44, 40) covers 96 x 88 x 400 mm, no short-axis stack"),
    "a field of 20 mm": (array(ED, lambda a: a[:10, :10]), "covers 20 x 20 x 60 mm"),
    "complex values": (array(ED, lambda a: a.astype(np.complex64)), "holds complex64 values; expected one number"),
    "RGB values": (
        array(ED, lambda a: np.zeros(a.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "expected one number a voxel: save the magnitude image",
    ),
    "an unknown data type": (header(ED, 70, "h", 4242), "ED.nii.gz: can't be read as NIfTI"),
    "an infinite intercept": (header(ED, 112, "2f", 1, np.inf), "ED.nii.gz: "),
    "gigantic dimensions": (header(ED, 40, "4h", 3, 30000, 30000, 30000), "its shape is (30000, 30000, 30000)"),
    "ten thousand frames": (header(ED, 40, "5h", 4, 480, 440, 160, 32000), "its shape is (480, 440, 160, 32000)"),
    "dimensions beyond the file's end": (header(ED, 46, "h", 20), "ED.nii.gz: can't be read to its end"),
    "no slices": (header(ED, 46, "h", 0), "ED.nii.gz: its shape is (48, 44, 0)"),
    "a negative dimension": (header(ED, 46, "h", -6), "ED.nii.gz: "),
    "data that starts beyond the end": (header(ED, 108, "f", 1e9), "ED.nii.gz: can't be read"),
    "no spacing": (header(ED, 80, "3f", 2, 2, 0), "its spacing is 2 x 2 x 0 (no unit), no short-axis stack's"),
    "negative spacing": (header(ED, 80, "3f", -2, 2, 10), "its spacing is -2 x 2 x 10"),
    "spacing that isn't a number": (header(ED, 80, "3f", np.nan, 2, 10), "its spacing is nan x 2 x 10"),
    "metres without the unit": (
        array(ED, lambda a: a, np.diag([0.002, 0.002, 0.01, 1])),
        "its spacing is 0.002 x 0.002 x 0.01 (no unit), no short-axis stack's; it looks like metres",
    ),
    "micrometres without the unit": (array(ED, lambda a: a, np.diag([2e3, 2e3, 1e4, 1])), "it looks like micrometres"),
    "mm said to be metres": (
        header(ED, 123, "B", 1),
        "its spacing is 2 x 2 x 10 metres, no short-axis stack's; it looks like mm",
    ),
    "an absurd spacing": (array(ED, lambda a: a, np.diag([2, 2, 90, 1])), "its spacing is 2 x 2 x 90 "),
    "an affine that contradicts the spacing": (header(ED, 280, "4f", 1, 0, 0, 0), "its affine contradicts its spacing"),
    "an affine that isn't a number": (header(ED, 280, "4f", np.nan, 0, 0, 0), "its affine contradicts its spacing"),
    "labels of another shape": (
        array(ED_GT, lambda a: a[:-1]),
        "ED_gt.nii.gz: its shape (47, 44, 6) isn't its image's, (48, 44, 6); pair the right files",
    ),
    "labels of another spacing": (
        array(ED_GT, lambda a: a, np.diag([2.2, 2.2, 10, 1])),
        "ED_gt.nii.gz: its affine puts it",
    ),
    "labels turned over": (array(ED_GT, lambda a: a, np.diag([-2, 2, 10, 1])), "188 mm from its image"),
    "labels elsewhere": (
        array(ED_GT, lambda a: a, nib.affines.from_matvec(np.diag(mini.ZOOMS), (30, 0, 0))),
        "30 mm from its image; pair the right files",
    ),
    "unknown label values": (array(ED_GT, lambda a: a + 2 * (a == 3)), "has the label values 5; expected 0, 1, 2, 3"),
    "labels between the values": (array(ED_GT, lambda a: a * 0.5), "has the label values 0.5, 1.5; expected"),
    "labels all 0": (array(ED_GT, lambda a: 0 * a), "ED_gt.nii.gz: is all 0 at ED; label this phase, or leave its"),
    "LV and RV exchanged": (array(ED_GT, lambda a: mini.LV_FIRST[a]), "the wall surrounds what is labelled RV, not LV"),
    "labels of a mouse": (array(ED_GT, lambda a: a * (np.indices(a.shape)[2] == 5)), "mL; correct it"),
    "ED and ES of two shapes": (
        lambda root: [array(f"anna/ES{end}.nii.gz", lambda a: a[..., :-1])(root) for end in ("", "_gt")],
        "ES.nii.gz: ED and ES differ in shape or spacing",
    ),
    "one picture at both phases": (
        lambda root: shutil.copy(root / ED, root / ES),
        "ES.nii.gz: ES is the same picture as ED",
    ),
    "ED and ES exchanged": (table("anna,ED", "anna,XX"), "anna: the phases of its rows are ES, XX"),
}

TABLES: dict[str, tuple[Spoil, str]] = {
    "no table": (lambda root: (root / "patients.csv").unlink(), "patients.csv: there's no such file"),
    "an empty table": (
        content("patients.csv", lambda b: b""),
        "has no column patient, phase, path, but none; is the first",
    ),
    "a table without rows": (
        content("patients.csv", lambda b: b.splitlines()[0]),
        "patients.csv: has no rows; add the",
    ),
    "a table without its header": (
        content("patients.csv", lambda b: b.split(b"\n", 1)[1]),
        "has no column patient, phase, path, but anna",
    ),
    "a missing column": (table("phase", "fase"), "has no column phase, but patient, fase, path"),
    "semicolons and commas": (table("patient,phase,path", "patient;phase;path"), "line 2 has 5 cells, the header 3"),
    "tabs": (table(",", "\t"), "has no column patient, phase, path"),
    "another alphabet's encoding": (table("anna,ED", "änna,ED", "latin-1"), "can't be read as CSV ('utf-8' codec"),
    "an Excel file": (content("patients.csv", lambda b: b"PK\x03\x04" + bytes(99)), "patients.csv: "),
    "a row longer than the header": (table("ED_gt.nii.gz", "ED_gt.nii.gz,1"), "line 2 has 6 cells, the header 5"),
    "a row shorter than the header": (table("ED_gt.nii.gz,", ""), "line 2 has 4 cells, the header 5"),
    "an open quotation mark": (table("anna,ED", '"anna,ED'), "patients.csv: can't be read as CSV"),
    "a column twice": (table("labels", "path"), "has twice the column 'path'; remove it"),
    "an unknown attribute": (
        table("AGE", "AGES"),
        "patients.csv: has an unknown column 'AGES'; remove it, or name it one",
    ),
    "a phase as attribute": (table("AGE", "ESED"), "has an unknown column 'ESED'"),
    "a row without a patient": (table("anna,ED", ",ED"), "patients.csv: has 1 rows without patient; fill them in"),
    "no row of ES": (
        table("anna,ES", "berta,ES"),
        "anna: the phases of its rows are ED; expected one row of ED and one",
    ),
    "a row twice": (table("anna,ES", "anna,ED"), "anna: the phases of its rows are ED, ED"),
    "a patient who isn't listed": (table("anna,", "berta,"), "anna: the phases of its rows are none"),
    "an unknown phase": (table("anna,ES", "anna,systole"), "anna: the phases of its rows are ED, systole"),
    "a path out of the root": (outside, "ED.nii.gz: leads out of the data folder"),
    "an absolute path": (
        table(ED, "/etc/passwd"),
        "/etc/passwd: leads out of the data folder, to /etc/passwd; copy it",
    ),
    "a path through a link": (
        lambda root: [spoil(root) for spoil in (link("out", "/etc"), table(ED, "out/passwd"))],
        "out/passwd: leads out of the data folder, to /etc/passwd",
    ),
    "a path that is the root": (table(ED, "."), "is no file but a folder"),
    "no path": (table(ED, ""), "is no file but a folder"),
    "a path that no file system takes": (table(ED, "x" * 300), "can't be opened ("),
    "an age in months": (table(",61", ",650"), "AGE is 650, expected 1 to 120 years; it looks like months: give 54.17"),
    "an age in days": (table(",61", ",22000"), "it looks like days: give 60.23"),
    "an age in words": (table(",61", ",old"), "AGE is 'old'; expected a number"),
    "a decimal comma": (table(",61", ',"61,5"'), "AGE is '61,5'; expected a number, decimals after a point"),
    "an age without end": (table(",61", ",inf"), "AGE is inf, expected 1 to 120 years"),
    "litres": (table("AGE", "LVEDV", "utf-8"), "LVEDV is 0.15, expected 10 to 900 mL; it looks like litres: give 150"),
    "a fraction": (table("AGE", "LVEF"), "LVEF is 0.58, expected 2 to 95 %; it looks like a fraction: give 58"),
    "centimetres": (table("AGE", "MYOEDTHICK"), "expected 2 to 50 mm; it looks like centimetres: give 8"),
    "an unknown sex": (table("AGE", "SEX"), "SEX is 2; expected 0 or F for female, 1 or M for male"),
    "two ages of one patient": (
        content("patients.csv", lambda b: b.replace(b",61", b",60", 1)),
        "anna: AGE is 60 and 61; expected one value a patient",
    ),
}
VALUES = {"litres": "0.15", "a fraction": "0.58", "centimetres": "0.8", "an unknown sex": "2"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Data folder of the cohort `mini`: anna, listed in a table, with an age."""
    mini.make_table(tmp_path / "data", AGE="61")
    return tmp_path / "data"


def read(root: Path, **changes: object) -> str:
    """Read anna, and return the message of the CohortError that this ends in."""
    manifest = mini.manifest(root.parent, "table", **changes)
    with pytest.raises(CohortError) as caught:
        read_patient(manifest, manifest.data_root(), "anna")
    return str(caught.value)


@pytest.mark.parametrize("name", [*NIFTI, *TABLES])
def test_a_malformed_input_is_named_with_what_to_do(root, name):
    spoil, expected = (NIFTI | TABLES)[name]
    if name in VALUES:
        table(",61", f",{VALUES[name]}")(root)
    spoil(root)
    message = read(root)
    assert expected in message
    assert all(line.startswith((str(root), "/etc/passwd: ")) and len(line) < 700 for line in message.splitlines())
    assert len(message.splitlines()) <= 4


def test_files_that_may_not_be_read_say_so(root, monkeypatch):
    def refuse(path, mode="r", *rest, allowed=Path.open, **named):
        if path.name == "ED.nii.gz" and mode == "rb":
            raise PermissionError(13, "Permission denied")
        return allowed(path, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", refuse)
    assert "ED.nii.gz: can't be opened ([Errno 13] Permission denied); mend its name or permissions" in read(root)


def test_a_slope_that_is_no_number_means_that_nothing_is_scaled(root):
    for slope in (np.nan, 0, np.inf):
        header(ED, 112, "2f", slope, 0)(root)
        image = read_patient(mini.manifest(root.parent, "table"), root, "anna").volumes[0].image
        assert np.array_equal(image, mini.heart("ED")[0].T)


def test_exchanged_phases_are_noticed_by_the_size_of_the_lv(root):
    text = (root / "patients.csv").read_text()
    text = text.replace("anna,ED", "anna,XX").replace("anna,ES", "anna,ED").replace("anna,XX", "anna,ES")
    (root / "patients.csv").write_text(text)
    assert "the LV is larger at ES than at ED" in read(root)


def test_frames_are_whole_numbers_within_the_cine(root):
    images, _ = mini.cine()
    mini.save(images, root / "sa.nii.gz")
    for frame, expected in (
        ("4", "sa.nii.gz: frame 4 is beyond its end: it has 4, counted from 0"),
        ("-1", "frame is '-1'; expected the number of a frame"),
        ("1.5", "frame is '1.5'"),
        ("ES", "frame is 'ES'"),
        ("1e999", "frame is '1e999'"),
        ("", "sa.nii.gz: holds 4 frames where one volume is expected; say which"),
    ):
        rows = f"patient,phase,path,frame\nanna,ED,sa.nii.gz,0\nanna,ES,sa.nii.gz,{frame}\n"
        (root / "patients.csv").write_text(rows)
        assert expected in read(root)


def test_labels_of_one_phase_alone_are_allowed(root):
    table("anna/ES_gt.nii.gz", "")(root)
    patient = read_patient(mini.manifest(root.parent, "table"), root, "anna")
    assert [volume.labels is None for volume in patient.volumes] == [False, True]


def test_no_memory_is_asked_for_what_a_header_only_claims():
    assert MAX_VOXELS * 8 < 4e9


def _checksums(root: Path, text: str) -> None:
    (root.parent / "mini.sha256").write_text(text)


def test_a_checksum_that_differs_is_told_with_both_values(root):
    manifest = mini.manifest(root.parent, "table", checksums="mini.sha256")
    _checksums(root, "")
    files = read_patient(mini.manifest(root.parent, "table"), root, "anna").files
    _checksums(root, "".join(f"{digest} *./{name}\n" for name, digest in files.items()))
    assert read_patient(manifest, root, "anna").files == files
    array(ED, lambda image: image + 1)(root)
    os.utime(root / ED, ns=(1, 1))  # a change within one tick of the clock is still a change
    message = read(root, checksums="mini.sha256")
    assert files[ED] in message
    assert "ED.nii.gz: its SHA-256 is " in message
    assert "fetch it again" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n", "in mini.sha256 not listed; fetch it again, or correct the checksums"),
        ("0123  anna/ED.nii.gz\n", "'0123  anna/ED.nii.gz' is no line of sha256sum's"),
        ("SHA256 (x) = y\n", "is no line of sha256sum's"),
        (None, "the checksums can't be read"),
    ],
)
def test_checksums_that_do_not_fit_are_refused(root, text, expected):
    if text is not None:
        _checksums(root, text)
    assert expected in read(root, checksums="mini.sha256")


def acdc(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """ACDC's layout, spoilt; the folder is patient007's."""

    def make(root: Path) -> None:
        mini.make_acdc(root)
        change(root / "patient007")

    return make


def mnms(old: str, new: str) -> Callable[[Path], None]:
    """M&Ms' layout with another text in its table."""

    def make(root: Path) -> None:
        mini.make_mnms(root)
        path = root / mini.MNMS_TABLE
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return make


def mnms2(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """M&Ms-2's layout, spoilt; the folder is dataset."""

    def make(root: Path) -> None:
        mini.make_mnms2(root)
        change(root / "dataset")

    return make


def ukbb(change: Callable[[Path], Any], labels: str = "seg_sa") -> Callable[[Path], None]:
    """UK Biobank's layout, spoilt; the folder is the participant's."""

    def make(root: Path) -> None:
        mini.make_ukbb(root, labels=labels)
        change(root / "1000011")

    return make


LAYOUTS: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "ACDC without Info.cfg": (
        "acdc",
        "patient007",
        acdc(lambda f: (f / "Info.cfg").unlink()),
        "Info.cfg: there's no such",
    ),
    "ACDC without ES": (
        "acdc",
        "patient007",
        acdc(lambda f: (f / "Info.cfg").write_text("ED: 1\n")),
        "Info.cfg: ES is ''; expected the number of a frame",
    ),
    "ACDC with a frame of 5000 digits": (
        "acdc",
        "patient007",
        acdc(lambda f: (f / "Info.cfg").write_text("ED: 1\nES: " + "9" * 5000)),
        "expected the number of a frame",
    ),
    "ACDC with a binary Info.cfg": (
        "acdc",
        "patient007",
        acdc(lambda f: (f / "Info.cfg").write_bytes(b"\xff\xfe\x00")),
        "Info.cfg: isn't UTF-8 text",
    ),
    "ACDC with another frame": (
        "acdc",
        "patient007",
        acdc(lambda f: (f / "Info.cfg").write_text("ED: 1\nES: 9\n")),
        "patient007_frame09.nii.gz: there's no such file",
    ),
    "an ACDC patient twice": (
        "acdc",
        "patient007",
        acdc(lambda f: shutil.copytree(f, f.parent / "training" / f.name)),
        "patient007: lies in patient007 and in training/patient007; keep one",
    ),
    "no ACDC patient": ("acdc", "patient008", mini.make_acdc, "patient008: there's no such folder"),
    "a patient above the root": ("acdc", "..", mini.make_acdc, "Info.cfg: leads out of the data folder"),
    "M&Ms without its row": ("mnms", "A0S9V9", mnms("A0S9V9", "Z"), "has 0 rows whose External code is A0S9V9"),
    "M&Ms with two rows": ("mnms", "A0S9V9", mnms("B1,", "A0S9V9,"), "has 2 rows whose External code is A0S9V9"),
    "M&Ms without its ES": (
        "mnms",
        "C1",
        mnms("A,1,0,2,42", "A,1,0,,42"),
        "C1: ES is ''; expected the number of a frame",
    ),
    "M&Ms with labels at other frames": (
        "mnms",
        "C1",
        mnms("A,1,0,2,42", "A,1,0,1,42"),
        "C1_sa_gt.nii.gz: is all 0 at ES",
    ),
    "M&Ms with another column": ("mnms", "C1", mnms("Pathology", "Diagnosis"), "has no column Pathology, but"),
    "no M&Ms patient": ("mnms", "E9", mini.make_mnms, "E9: there's no such folder"),
    "M&Ms-2 without labels": (
        "mnms2",
        "001",
        mnms2(lambda dataset: (dataset / "001/001_SA_ES_gt.nii.gz").unlink()),
        "001_SA_ES_gt.nii.gz: there's no such file",
    ),
    "M&Ms-2 without its row": (
        "mnms2",
        "002",
        mnms2(lambda dataset: (dataset / "001").rename(dataset / "002")),
        "has 0 rows whose SUBJECT_CODE is 002",
    ),
    "UK Biobank without a cine": (
        "ukbb",
        "1000011",
        ukbb(lambda f: (f / "sa.nii.gz").unlink()),
        "1000011/sa.nii.gz: there's no such file",
    ),
    "UK Biobank with one frame": (
        "ukbb",
        "1000011",
        ukbb(lambda f: mini.save(mini.heart("ED")[0], f / "sa.nii.gz"), ""),
        "ES is the same picture as ED",
    ),
    "UK Biobank labelled at ED alone": (
        "ukbb",
        "1000011",
        ukbb(lambda f: mini.save(mini.cine()[1] * (np.arange(4) == 0), f / "seg_sa.nii.gz")),
        "seg_sa.nii.gz: the LV cavity (1) isn't labelled in frame 0 and a later one",
    ),
    "UK Biobank labelled after ED": (
        "ukbb",
        "1000011",
        ukbb(lambda f: mini.save(mini.cine()[1][..., [1, 0, 2, 3]], f / "seg_sa.nii.gz")),
        "seg_sa.nii.gz: the LV cavity (1) isn't labelled in frame 0 and a later one",
    ),
    "UK Biobank with half its labels": (
        "ukbb",
        "1000011",
        ukbb(lambda f: (f / "label_sa_ES.nii.gz").unlink(), "label_sa_"),
        "label_sa_ES.nii.gz: there's no such file",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_incomplete_is_named_with_what_to_do(tmp_path, name):
    kind, patient, make, expected = LAYOUTS[name]
    make(tmp_path / "data")
    with pytest.raises(CohortError) as caught:
        read_patient(mini.manifest(tmp_path, kind), tmp_path / "data", patient)
    assert expected in str(caught.value)


@pytest.mark.parametrize("kind", ["acdc", "mnms", "mnms2", "ukbb"])
def test_a_root_without_the_layout_is_refused(tmp_path, kind):
    (tmp_path / "data/other").mkdir(parents=True)
    manifest = mini.manifest(tmp_path, kind, splits={"train": 0.8, "validation": 0.1, "test": 0.1})
    with pytest.raises(CohortError, match=f"mini: no patients of the layout {kind} are there; is the root right"):
        manifest.patient_ids("train", list_patients(manifest, tmp_path / "data"))


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "a kind that isn't known": ({"reader": {"kind": "dicom"}}, "reader: "),
    "a reader without its kind": ({"reader": {"table": "patients.csv"}}, "reader: "),
    "a table reader without its table": ({"reader": {"kind": "table"}}, "reader.table.table: is missing; add it"),
    "a label beyond ours": ({"reader": {"kind": "table", "table": "t", "labels": {1: 4}}}, "4 won't do"),
    "labels in words": ({"reader": {"kind": "table", "table": "t", "labels": {"lv": 3}}}, "'lv' won't do"),
    "a name with capitals": ({"name": "Mini"}, "name: 'Mini' won't do"),
    "a role in capitals": ({"role": "Private"}, "role: 'Private' won't do; input should be 'public' or 'private'"),
    "a patient in two splits": (
        {"splits": {"train": ["anna"], "validation": ["anna"], "test": ["carl"]}},
        "splits: number 1 of train and number 1 of validation are the same name: a patient belongs to",
    ),
    "a home that doesn't exist": ({"root": "~nobody_at_all/data"}, "root: "),
    "a text in place of a number": ({"splits": {"train": "0.8", "validation": "0.1", "test": "0.1"}}, "'0.8' won't do"),
    "a list in place of a text": ({"citation": ["one", "two"]}, "citation: [...] won't do"),
    "an exploding alias": ({"citation": [["x"] * 9] * 9999}, "won't do"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_wrong_is_named_with_its_field(tmp_path, name):
    changes, expected = MANIFESTS[name]
    with pytest.raises(CohortError) as caught:
        mini.manifest(tmp_path, "table", **changes)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("mini.yaml: ")
    assert len(str(caught.value)) < 2000


FUZZ = settings(
    max_examples=int(os.environ.get("CARDIAC_LDM_FUZZ", "120")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""CARDIAC_LDM_FUZZ=20000 looks for minutes."""

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.text(max_size=12),
    st.sampled_from(["private", "public", "acdc", "table", "", "~x", "\0", "../..", "/", 0.8, 0.1, -1, 10**400]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=6), t, max_size=3), max_leaves=6
)
FIELDS = ["name", "role", "simulated", "licence", "obtain", "root", "checksums", "reader", "splits", "surplus"]
FIELDS += ["reader.kind", "reader.table", "reader.labels", "splits.train", "splits.test"]


def survives(read: Callable[[], object]) -> None:
    """Whatever is read, nothing is raised but the two errors that a user can act on."""
    with suppress(CohortError, PrivacyError):
        read()


@FUZZ
@given(changes=st.lists(st.tuples(st.sampled_from(FIELDS), TREES, st.booleans()), min_size=1, max_size=4))
def test_no_manifest_ends_in_another_error(root, changes):
    path = root.parent / "mini.yaml"
    mini.manifest(root.parent, "table")
    said: Any = yaml.safe_load(path.read_text())
    for path_to, value, gone in changes:
        *above, field = path_to.split(".")
        place = said
        for key in above:
            place = place[key] if isinstance(place.get(key), dict) else {}
        place[field] = value
        if gone:
            del place[field]
    path.write_text(yaml.safe_dump(said))

    def read_all():
        manifest = load_manifest(path)
        data_root = manifest.data_root()
        found = list_patients(manifest, data_root)
        read_patient(manifest, data_root, manifest.patient_ids("train", found)[0])

    survives(read_all)


@FUZZ
@given(text=st.binary(max_size=60) | st.text(alphabet="a:-[]{}&*!|>'\"%@`\n ,#?0", max_size=40).map(str.encode))
def test_no_text_in_place_of_a_manifest_ends_in_another_error(tmp_path, text):
    (tmp_path / "mini.yaml").write_bytes(text)
    with pytest.raises(CohortError, match=r"mini\.yaml"):
        load_manifest(tmp_path / "mini.yaml")


BYTES = st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4))


@FUZZ
@given(
    file=st.sampled_from([ED, ED_GT]),
    changes=st.lists(BYTES, max_size=6),
    compressed=st.lists(BYTES, max_size=1),
    end=st.none() | st.integers(0, 30000),
)
def test_no_damage_to_a_nifti_file_ends_in_another_error(root, file, changes, compressed, end):
    sound = (root / file).read_bytes()

    def overwritten(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
        for offset, new in changes:
            data = data[:offset] + new + data[offset + len(new) :]
        return data

    damaged = gzip.compress(overwritten(gzip.decompress(sound), changes)[:end], 1)
    (root / file).write_bytes(overwritten(damaged, compressed))
    try:
        survives(lambda: read_patient(mini.manifest(root.parent, "table"), root, "anna"))
    finally:
        (root / file).write_bytes(sound)


PIECES = st.one_of(
    st.binary(max_size=3),
    st.sampled_from(
        [b'"', b"\n", b",", b";", b"\0", b"\xef\xbb\xbf", b"anna", b"ED", b"ES", b"nan", b"-1", b"1e400", b"\r"]
    ),
)


@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, 160), st.integers(0, 20), PIECES), min_size=1, max_size=4))
def test_no_damage_to_a_table_ends_in_another_error(root, changes):
    path = root / "patients.csv"
    sound = data = path.read_bytes()
    for offset, n, new in changes:
        data = data[:offset] + new + data[offset + n :]
    path.write_bytes(data)
    manifest = mini.manifest(root.parent, "table", splits={"train": 0.5, "validation": 0.3, "test": 0.2})
    try:
        survives(lambda: [read_patient(manifest, root, patient) for patient in list_patients(manifest, root)])
        survives(lambda: read_patient(manifest, root, "anna"))
    finally:
        path.write_bytes(sound)
