"""Synthetic cohorts from folders: a release comes back as it left, others reach the grid as real patients do."""

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Volumes, load_manifest
from cardiac_ldm.cohort.grid import place_on_grid
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import CohortError, PrivacyError
from cardiac_ldm.evaluation.external import read_folder
from cardiac_ldm.evaluation.synthesis import RELEASED
from cardiac_ldm.report.viewer import nifti
from tests import miniatures as mini
from tests.test_readers import oblique

ESED, LVEDV = (ATTRIBUTE_NAMES.index(name) for name in ("ESED", "LVEDV"))


def write_table(folder: Path, rows: list[dict[str, object]]) -> None:
    with (folder / "attributes.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_foreign(
    folder: Path, affine: np.ndarray = mini.AFFINE, flipped: tuple[int, ...] = (), **columns: Any
) -> Path:
    """Two patients on another grid, in another range, listed ES first; an attribute each."""
    rows = []
    for seed, patient in enumerate(("b", "a")):
        for phase in ("ES", "ED"):
            name = f"{patient}_{phase}.nii.gz"
            image, labels = (np.flip(array, flipped) for array in mini.heart(phase, seed))
            mini.save(image, folder / name, affine)
            mini.save(labels, folder / name.replace(".nii", "_seg.nii"), affine)
            rows.append({"patient": patient, "file": name, "ESED": int(phase == "ED"), "AGE": 60 + seed} | columns)
    write_table(folder, rows)
    return folder


def test_a_table_with_semicolons_is_read_as_one_with_commas(folder: Path) -> None:
    once, table = read_folder(folder), folder / "attributes.csv"
    table.write_text("sep=;\n" + table.read_text().replace(",", ";"))
    again = read_folder(folder)
    assert np.array_equal(once.attributes, again.attributes, equal_nan=True)
    table.write_text(table.read_text().replace("AGE", "AGES"))
    with pytest.raises(CohortError, match="has the unknown column 'AGES'; rename or remove it; did you mean AGE"):
        read_folder(folder)


def without_labels(folder: Path) -> None:
    for file in folder.glob("*_seg.nii.gz"):
        file.unlink()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "baseline")


def write_released(cohort: Volumes, folder: Path) -> Path:
    """Write volumes with the header that releases have, and their labels, if any, beside them."""
    folder.mkdir()
    rows: list[dict[str, object]] = []
    for i, (image, attributes) in enumerate(zip(cohort.images, cohort.attributes, strict=True)):
        name = f"{cohort.patient_index[i]:05d}_{'ED' if attributes[ESED] == 1 else 'ES'}.nii.gz"
        (folder / name).write_bytes(nifti(image, RELEASED))
        if cohort.labels is not None:
            (folder / name.replace(".nii", "_seg.nii")).write_bytes(nifti(cohort.labels[i], RELEASED))
        known: dict[str, object] = {
            n: "" if np.isnan(value) else f"{value:.6g}" for n, value in zip(ATTRIBUTE_NAMES, attributes, strict=True)
        }
        rows.append({"patient": f"synthetic{cohort.patient_index[i]:05d}", "file": name} | known)
    write_table(folder, rows)
    return folder


@pytest.mark.parametrize("labelled", [True, False])
def test_a_release_comes_back_as_it_left(tmp_path: Path, labelled: bool) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((4, *GRID.shape), np.float32) / 2
    labels = rng.integers(4, size=images.shape, dtype=np.uint8)
    labels[1] = 0  # a poor model draws no heart
    attributes = rng.uniform(15, 45, (4, 14)).astype(np.float32)[[0, 0, 2, 2]]
    attributes[:, ESED] = attributes[:, ATTRIBUTE_NAMES.index("SEX")] = 1, 0, 1, 0
    attributes[:, ATTRIBUTE_NAMES.index("SEX")] = 0, 0, 1, 1
    attributes[:2, ATTRIBUTE_NAMES.index("BMI")] = np.nan
    left = Volumes("synthetic", images, attributes, np.array([0, 0, 1, 1]), labels if labelled else None)
    came = read_folder(write_released(left, tmp_path / "release"))
    assert (came.images.dtype, came.attributes.dtype, came.patient_index.dtype) == (np.float32, np.float32, np.int64)
    np.testing.assert_allclose(came.images, images, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(came.attributes, attributes, rtol=1e-5)
    assert came.patient_index.tolist() == [0, 0, 1, 1]
    if labelled:
        assert came.labels is not None
        assert came.labels.dtype == np.uint8
        assert np.array_equal(came.labels, labels)
    else:
        assert came.labels is None


def test_volumes_of_another_grid_and_range_go_the_way_of_real_patients(tmp_path: Path, folder: Path) -> None:
    cohort = read_folder(folder)
    mini.make_table(tmp_path / "data", ("b", "a"))
    manifest = mini.manifest(tmp_path, "table")
    real = [place_on_grid(read_patient(manifest, tmp_path / "data", name)) for name in ("a", "b")]
    assert np.array_equal(cohort.images, np.concatenate([record.images for record in real]))
    assert cohort.labels is not None
    assert np.array_equal(cohort.labels, np.concatenate([record.labels for record in real]))
    assert cohort.patient_index.tolist() == [0, 0, 1, 1]
    assert cohort.attributes[:, ESED].tolist() == [1, 0, 1, 0]
    assert cohort.attributes[:, ATTRIBUTE_NAMES.index("AGE")].tolist() == [61, 61, 60, 60]
    assert np.isnan(cohort.attributes[:, LVEDV]).all()


@pytest.mark.filterwarnings("ignore:.*repair")
def test_volumes_on_the_grid_in_another_range_are_scaled_and_not_moved(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(-500, 1500, 96), GRID.shape)
    for name in ("ED", "ES"):
        mini.save(ramp.transpose(2, 1, 0) + (name == "ES"), tmp_path / f"{name}.nii", np.diag([1.8269, 1.8269, 10, 1]))
    write_table(tmp_path, [{"patient": "a", "file": f"{p}.nii", "ESED": int(p == "ED")} for p in ("ED", "ES")])
    images = read_folder(tmp_path).images
    np.testing.assert_allclose(images, np.stack([ramp + 500, ramp + 500]) / 2000, atol=0.015)


def test_a_stack_turned_over_is_turned_back_by_its_affine(tmp_path: Path) -> None:
    upright = write_foreign(tmp_path / "upright", oblique(()))
    turned = write_foreign(tmp_path / "turned", oblique((0, 1, 2)), (0, 1, 2))
    for each in (upright, turned):
        without_labels(each)
    with pytest.warns(UserWarning, match="slices ran from apex to base, rows up, columns left: turned round"):
        came = read_folder(turned).images
    with pytest.warns(
        UserWarning, match=r"upright: 1 repair\(s\): attributes.csv: its volumes have no labels; the middle"
    ):
        assert np.array_equal(came, read_folder(upright).images)


def phantoms(n: int = 3) -> Volumes:
    """Simulated hearts on the grid, with their labels."""
    manifest = load_manifest("phantom_private")
    placed = [place_on_grid(read_patient(manifest, None, f"p{i:06d}", imaged=False)) for i in range(n)]
    images = np.concatenate([record.labels for record in placed]).astype(np.float32) / 3
    attributes = np.full((2 * n, 14), np.nan, np.float32)
    attributes[:, ESED] = [1, 0] * n
    labels = np.concatenate([record.labels for record in placed])
    return Volumes("synthetic", images, attributes, np.repeat(np.arange(n), 2), labels)


def turn(folder: Path, axes: str, dtype: type, descrip: bytes | None = None) -> None:
    """Store the volumes along other axes, as a library's reorientation does; descrip: what the header then says."""
    for file in folder.glob("*.nii.gz"):
        image = nib.load(file)
        there = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
        image = image.as_reoriented(there)
        image.set_data_dtype(dtype)
        if descrip is not None:
            image.header["descrip"] = descrip
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(dtype), image.affine, image.header), file)


@pytest.mark.filterwarnings("ignore:.*repair")
@pytest.mark.parametrize("axes", ["RAS", "LAS", "RPI", "LPI"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_release_that_was_turned_comes_back_as_it_left(tmp_path: Path, axes: str, labelled: bool) -> None:
    left = phantoms()
    folder = write_released(left, tmp_path / "release")
    if not labelled:
        without_labels(folder)
    turn(folder, axes, np.uint8)
    came = read_folder(folder)
    np.testing.assert_allclose(came.images, left.images, atol=0.5 / 255 + 1e-6)
    if labelled:
        assert came.labels is not None
        assert left.labels is not None
        assert np.array_equal(came.labels, left.labels)


@pytest.mark.filterwarnings("ignore:.*repair")
@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPI", "ARS", "PRI", "PLI"])
def test_hearts_that_others_store_along_other_axes_come_upright_by_affine_and_labels(tmp_path: Path, axes: str) -> None:
    left = phantoms()
    folder = write_released(left, tmp_path / "release")
    turn(folder, axes, np.int16, b"")
    came = read_folder(folder).labels
    assert came is not None
    assert left.labels is not None
    for volume, meant in zip(came, left.labels, strict=True):
        both = 2 * ((volume > 0) & (volume == meant)).sum() / ((volume > 0).sum() + (meant > 0).sum())
        assert both > 0.8  # placed anew round the labels, by half a voxel at most


@pytest.mark.filterwarnings("ignore:.*repair")
def test_only_a_releases_own_header_has_its_volumes_taken_as_they_are(tmp_path: Path) -> None:
    left = replace(phantoms(1), images=phantoms(1).images / 2)
    folder = write_released(left, tmp_path / "release")
    without_labels(folder)
    as_they_are = read_folder(folder).images
    np.testing.assert_allclose(as_they_are, left.images, atol=0.5 / 255 + 1e-6)
    turn(folder, "LPI", np.uint8, b"")
    assert np.abs(read_folder(folder).images - left.images).max() > 0.1  # scaled between percentiles


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1, 2)])
def test_a_short_axis_with_rows_for_columns_is_upright_by_its_affine(tmp_path: Path, axes: tuple[int, ...]) -> None:
    upright, exchanged = (
        write_foreign(tmp_path / "upright", oblique(())),
        write_foreign(tmp_path / "b", oblique(axes), axes),
    )
    for each in (upright, exchanged):
        without_labels(each)
    for file in exchanged.glob("*.nii.gz"):
        image = nib.load(file)
        affine = image.affine[:, [1, 0, 2, 3]]
        mini.save(np.asarray(image.dataobj).swapaxes(0, 1), file, affine)
    with pytest.warns(UserWarning, match="turned"):
        came = read_folder(exchanged).images
    with pytest.warns(UserWarning, match="no labels"):
        assert np.array_equal(came, read_folder(upright).images)


Spoil = Callable[[Path], Any]


def array(file: str, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray = mini.AFFINE) -> Spoil:
    """Replace a file's voxels."""
    return lambda folder: mini.save(change(np.asarray(nib.load(folder / file).dataobj)), folder / file, affine)


def table(old: str, new: str) -> Spoil:
    """Replace text in the table."""

    def spoil(folder: Path) -> None:
        text = (folder / "attributes.csv").read_text()
        assert old in text
        (folder / "attributes.csv").write_text(text.replace(old, new))

    return spoil


def nan(image: np.ndarray) -> np.ndarray:
    return np.where(image == image.max(), np.nan, image).astype(np.float32)


def one_seg_less(folder: Path) -> None:
    (folder / "b_ES_seg.nii.gz").unlink()


ED, SEG, LAST = "a_ED.nii.gz", "a_ED_seg.nii.gz", "b,b_ED.nii.gz,1,60"
WRONG: dict[str, tuple[Spoil, str]] = {
    "no folder": (shutil.rmtree, "baseline: there's no such folder; give the one that holds attributes.csv"),
    "no table": (lambda f: (f / "attributes.csv").unlink(), "attributes.csv: there's no such file; fetch it"),
    "an empty table": (lambda f: (f / "attributes.csv").write_text("patient,file,ESED\n"), "has no rows; add the"),
    "no column file": (table("file", "path"), "attributes.csv: has no column file, but patient, path, ESED, AGE"),
    "no column patient": (table("patient", "id"), "attributes.csv: has no column patient, but id, file"),
    "a mistyped column": (table("AGE", "AGES"), "unknown column 'AGES'; rename or remove it; did you mean AGE?"),
    "a column in small letters": (table("AGE", "age"), "unknown column 'age'; rename or remove it; did you mean AGE?"),
    "a column of something else": (table("AGE", "vendor"), "unknown column 'vendor'; rename or remove it; the others"),
    "a file that isn't there": (table(ED, "c.nii.gz"), "c.nii.gz: there's no such file; fetch it, or correct its name"),
    "a file twice": (table("a_ES.nii.gz", ED), "attributes.csv: lists the file a_ED.nii.gz more than once"),
    "a file elsewhere": (table(ED, "/etc/passwd"), "/etc/passwd: leads out of the data folder"),
    "text for NIfTI": (lambda f: (f / ED).write_text("no"), "a_ED.nii.gz: can't be read as NIfTI"),
    "a 2D image": (array(ED, lambda a: a[..., 0]), "a_ED.nii.gz: its shape is (48, 44); expected a volume"),
    "a 4D image": (array(ED, lambda a: np.stack([a, a], -1)), "a_ED.nii.gz: holds 2 frames where one volume is"),
    "slices first": (
        array(ED, lambda a: a.T, np.diag([10, 2, 2, 1])),
        "a_ED.nii.gz: its spacing is 10 x 2 x 2 (no unit), no short-axis stack's",
    ),
    "voxels that aren't finite": (array(ED, nan), "a_ED.nii.gz: expected finite numbers, found NaN"),
    "a constant image": (array(ED, lambda a: 0 * a + 7), "a_ED.nii.gz: every voxel is 7; fetch this file again"),
    "one phase of another size": (
        lambda f: [array(file, lambda a: a[..., :-1])(f) for file in (ED, SEG)],
        "a_ES.nii.gz: differs in shape or spacing from a_ED.nii.gz; expected one geometry per patient",
    ),
    "one phase turned over": (
        lambda f: [array(file, lambda a: a, np.diag([-2, 2, 10, 1]))(f) for file in (ED, SEG)],
        "a_ES.nii.gz: lies otherwise than a_ED.nii.gz, as their affines say; expected one geometry per patient",
    ),
    "an attribute in words": (table(LAST, "b,b_ED.nii.gz,1,old"), "csv: b_ED.nii.gz: AGE is 'old'; expected"),
    "an attribute in another unit": (table(LAST, "b,b_ED.nii.gz,1,650"), "it looks like months: give 54.17"),
    "two values of one patient": (table(LAST, "b,b_ED.nii.gz,1,"), "csv: b: AGE is 60 and unknown; expected one value"),
    "a phase between": (table(LAST, "b,b_ED.nii.gz,0.5,60"), "b_ED.nii.gz: ESED is 0.5, but it's needed: give 1 at"),
    "no phase": (table(LAST, "b,b_ED.nii.gz,,60"), "b_ED.nii.gz: ESED is missing, but it's needed: give 1 at end-dia"),
    "no column of phases": (
        lambda f: [table(old, ",")(f) for old in (",ESED,", ",1,", ",0,")],
        ".nii.gz: ESED is missing, but it's needed",
    ),
    "a phase twice": (table(LAST, "b,b_ED.nii.gz,0,60"), "csv: b: has 2 volumes, two of one phase; give each pair a"),
    "labels of some": (one_seg_less, "b_ES_seg.nii.gz: isn't there, but 3 of 4 volumes have labels; give all"),
    "labels beyond ours": (array(SEG, lambda a: a + np.uint8(2) * (a == 3)), "a_ED_seg.nii.gz: has the label values 5"),
    "labels between ours": (array(SEG, lambda a: a * 0.5), "a_ED_seg.nii.gz: has the label values 0.5, 1.5; write"),
    "labels of another shape": (array(SEG, lambda a: a[:-1]), "its shape (47, 44, 6) isn't its image's, (48, 44, 6)"),
    "labels turned over": (array(SEG, lambda a: a, np.diag([-2, 2, 10, 1])), "188 mm from its image; pair the right"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_folder_is_said_in_one_sentence(folder: Path, name: str) -> None:
    spoil, expected = WRONG[name]
    spoil(folder)
    with pytest.raises(CohortError) as caught:
        read_folder(folder)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_files_of_real_private_patients_are_not_taken_for_synthetic_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARDIAC_LDM_ROOT_UKBB", str(folder.parent))
    with pytest.raises(PrivacyError, match=r"baseline is public, but its data folder .* holds the private patients of"):
        read_folder(folder)
