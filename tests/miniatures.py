"""Miniature cohorts, made up, in the layouts of the real ones: a few small files each."""

from pathlib import Path

import nibabel as nib
import numpy as np
import yaml

from cardiac_ldm.cohort import Manifest
from cardiac_ldm.cohort.manifest import load_manifest

SHAPE, ZOOMS = (48, 44, 6), (2.0, 2.0, 10.0)
AFFINE = np.diag([*ZOOMS, 1.0])
LV_FIRST = np.array([0, 3, 2, 1], np.uint8)
"""Our labels 0, 1, 2, 3 in the values of M&Ms and UK Biobank."""
PHASES = ("ED", "ES")


def heart(phase: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image int16 and its labels uint8, (x, y, z) with the base first; the RV, on the left, ends before the apex."""
    x, y, z = np.indices(SHAPE)
    beat = 1.0 if phase == "ED" else 0.75
    labels = np.zeros(SHAPE, np.uint8)
    row, column = 18 + seed % 5, 28 + seed // 5 % 5
    labels[np.hypot(x - 12, y - row) < beat * (9 - 2 * z)] = 1
    from_lv = np.hypot(x - column, y - row)
    labels[from_lv < beat * (9 - z) + 4] = 2
    labels[from_lv < beat * (9 - z)] = 3
    noise = np.random.default_rng([seed, PHASES.index(phase)]).integers(0, 99, SHAPE)
    return (noise + 300 * np.isin(labels, (1, 3)) + 100 * (labels > 0)).astype(np.int16), labels


def cine(seed: int = 0, es: int = 2, frames: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels (x, y, z, t): ED is frame 0, ES frame `es`; the others aren't labelled, and halfway between."""
    ed, end = heart("ED", seed), heart("ES", seed)
    images = np.stack([ed[0]] + (frames - 1) * [(ed[0] + end[0]) // 2], axis=-1)
    labels = np.zeros_like(images, np.uint8)
    images[..., es], labels[..., 0], labels[..., es] = end[0], ed[1], end[1]
    return images, labels


def save(array: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> None:
    """Write a NIfTI file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def manifest(folder: Path, kind: str, **changes: object) -> Manifest:
    """A real private cohort called `mini` whose manifest is folder/mini.yaml and whose files are in folder/data."""
    said = {"name": "mini", "role": "private", "simulated": False, "licence": "none", "citation": "none"}
    said |= {"root": "data", "splits": {"train": ["anna"], "validation": ["berta"], "test": ["carl"]}}
    reader = {"kind": kind} | ({"table": "patients.csv"} if kind == "table" else {})
    if (said | changes)["role"] == "private":
        said |= {"budget": {"epsilon": 10, "delta": 1e-5, "patients": 12}}
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(said | {"reader": reader} | changes))
    return load_manifest(path)


def make_table(root: Path, patients: tuple[str, ...] = ("anna",), **columns: str) -> None:
    """A table of 3D files; columns: attributes, alike for all."""
    rows = [",".join(["patient", "phase", "path", "labels", *columns])]
    for seed, patient in enumerate(patients):
        for phase in PHASES:
            image, labels = heart(phase, seed)
            save(image, root / patient / f"{phase}.nii.gz")
            save(labels, root / patient / f"{phase}_gt.nii.gz")
            files = [f"{patient}/{phase}.nii.gz", f"{patient}/{phase}_gt.nii.gz"]
            rows.append(",".join([patient, phase, *files, *columns.values()]))
    (root / "patients.csv").write_text("\n".join(rows) + "\n")


def make_acdc(root: Path, patient: str = "patient007") -> None:
    """ACDC's layout: frames 1 and 12 are ED and ES."""
    for phase, frame in zip(PHASES, ("01", "12"), strict=True):
        for array, end in zip(heart(phase), ("", "_gt"), strict=True):
            save(array, root / patient / f"{patient}_frame{frame}{end}.nii.gz")
    (root / patient / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: HCM\nHeight: 180.0\nNbFrame: 30\nWeight: 81.0\n")


MNMS_TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"


def make_mnms(root: Path) -> None:
    """M&Ms' layout: a labelled, an unlabelled, a validation and a test patient, and one whom the files lack."""
    rows = [",External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex,Height,Weight"]
    for seed, (folder, code) in enumerate(
        (("Training/Labeled", "A0S9V9"), ("Training/Unlabeled", "B1"), ("Validation", "C1"), ("Testing", "D1"))
    ):
        images, labels = cine(seed)
        save(images, root / folder / code / f"{code}_sa.nii.gz")
        empty = folder.endswith("Unlabeled")
        save(0 * labels if empty else LV_FIRST[labels], root / folder / code / f"{code}_sa_gt.nii.gz")
        rows.append(f"{seed},{code},Siemens,A,1,0,2,{40 + seed},DCM,{'FM'[seed % 2]},180.0,81.0")
    rows.append("9,E9,Canon,D,5,0,9,50,NOR,F,170.0,60.0")
    (root / MNMS_TABLE).write_text("\n".join(rows) + "\n")


def make_mnms2(root: Path) -> None:
    """M&Ms-2's layout: two patients, long axes beside them, and a table that ends in blank rows."""
    for seed, code in enumerate(("001", "161")):
        for phase in PHASES:
            image, labels = heart(phase, seed)
            save(image, root / f"dataset/{code}/{code}_SA_{phase}.nii.gz")
            save(LV_FIRST[labels], root / f"dataset/{code}/{code}_SA_{phase}_gt.nii.gz")
            save(image[..., :1], root / f"dataset/{code}/{code}_LA_{phase}.nii.gz")
    rows = (
        "SUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD",
        "1,NOR,Philips,Achieva,1.5",
        "161,FALL,GE,HDxt,1.5",
        ",,,,",
        "",
    )
    (root / "dataset_information.csv").write_text("\n".join(rows))


def make_ukbb(root: Path, eid: str = "1000011", labels: str = "seg_sa") -> None:
    """UK Biobank's layout after conversion. labels: "seg_sa" (a network's, all frames), "label_sa_" (by hand) or ""."""
    images, marked = cine()
    save(images.astype(np.float32), root / eid / "sa.nii.gz")
    if labels == "seg_sa":
        marked[..., [1, 3]] = marked[..., :1]  # the network labels every frame
        save(LV_FIRST[marked].astype(np.float64), root / eid / "seg_sa.nii.gz")
    for frame, phase in ((0, "ED"), (2, "ES")):
        if labels:
            save(images[..., frame], root / eid / f"sa_{phase}.nii.gz")
        if labels == "label_sa_":
            save(LV_FIRST[marked[..., frame]], root / eid / f"label_sa_{phase}.nii.gz")
