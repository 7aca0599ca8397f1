"""The release: a folder that appears whole or not at all, that others can load, and that proves what it says."""

import csv
import dataclasses
import gzip
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import nibabel as nib
import numpy as np
import pytest
import yaml

from cardiac_ldm import release as room
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, load_manifest
from cardiac_ldm.cohort.readers import open_patient
from cardiac_ldm.cohort.requests import completed, of_public, of_table, refuse_private
from cardiac_ldm.errors import CohortError, ParameterError, PrivacyError
from cardiac_ldm.evaluation.external import read_folder
from cardiac_ldm.parameters import ReleaseParameters
from cardiac_ldm.privacy import Ledger
from cardiac_ldm.release import release
from cardiac_ldm.report import verify
from cardiac_ldm.study import Study
from tests.conftest import TINY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]

PATIENTS = 8


def asked(study: Study, **parameters: Any) -> Study:
    """The same study, of which this release is asked."""
    other = Study(ReleaseParameters(profile=str(TINY), patients=PATIENTS, **parameters))
    other.runs, other.public, other.private = study.runs, study.public, study.private
    return other


@pytest.fixture(scope="module")
def released(study: Study, threads) -> Path:
    return release(asked(study, epsilon=1, licence="CC-BY-4.0", share_model=True))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_release_is_named_for_people_and_leaves_nothing_else(released: Path, study: Study) -> None:
    assert released.name.startswith(f"phantom_private-epsilon1-{PATIENTS}patients-tiny-20")
    assert not list(study.runs.glob("release-*"))
    assert {p.name for p in released.glob("sub-*")} == {f"sub-{i + 1:05d}" for i in range(PATIENTS)}
    about = json.loads((released / "release.json").read_text())
    assert about["warnings"]  # nobody trained this model for long, and the folder says so
    for file in ("STATEMENT.md", "README", "DATASHEET.md", "MODEL_CARD.md"):
        assert "> **Warning**: " in (released / file).read_text()
    statement = (released / "STATEMENT.md").read_text()
    assert "private model(s) of phantom_private" in statement
    ledger = (released / "privacy.json").read_text()
    jsonschema.validate(json.loads(ledger), Ledger.model_json_schema(mode="serialization"))
    assert "CC-BY-4.0" in (released / "README").read_text()


def test_a_release_verifies_with_numpy_and_dp_accounting_alone(released: Path) -> None:
    imports = "import sys; sys.argv = ['verify.py', '.']; import runpy, builtins\n"
    imports += "had = set(sys.modules)\ntry:\n  runpy.run_path('verify.py', run_name='__main__')\n"
    imports += "except SystemExit as end:\n  assert not end.code, end.code\n"
    imports += (
        "bad = {m for m in sys.modules if m.partition('.')[0] in ('torch', 'cardiac_ldm', 'nibabel', 'pandas')}\n"
    )
    imports += "assert not bad, bad"
    ran = subprocess.run([sys.executable, "-c", imports], cwd=released, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("HOLDS") == 6
    assert "FAILS" not in ran.stdout
    assert "To be trusted" in ran.stdout


def resum(folder: Path) -> None:
    """Write the sums anew, as somebody would who hides what they changed."""
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n"
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    said = json.loads((folder / name).read_text())
    change(said)
    (folder / name).write_text(json.dumps(said))


def replaced(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


def header(folder: Path, pattern: str, change: Callable[[bytearray], object]) -> None:
    for path in folder.glob(pattern):
        voxels = bytearray(gzip.decompress(path.read_bytes()))
        change(voxels)
        path.write_bytes(gzip.compress(bytes(voxels), mtime=0))


def lower_epsilon(folder: Path) -> None:
    edit(folder, "privacy.json", lambda x: x.update(epsilon=0.1))
    edit(folder, "release.json", lambda x: x.update(epsilon=0.1))
    replaced(folder, "STATEMENT.md", "(1, 1e-05)-diff", "(0.1, 1e-05)-diff")


SIDECAR = "sub-00001/anat/sub-00001_acq-ED_T2w.json"
TAMPERINGS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "a volume is exchanged": (
        lambda f: shutil.copy(verify.image(f, "sub-00001", "ED"), verify.image(f, "sub-00002", "ED")),
        "sub-00002_acq-ED_T2w.nii.gz was changed",
        False,
    ),
    "a file is added": (lambda f: (f / "patients.txt").write_text("anna"), "patients.txt was added", False),
    "a file is taken out": (lambda f: (f / "DATASHEET.md").unlink(), "DATASHEET.md is missing", False),
    "the sums are taken out": (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS is missing", False),
    "epsilon is lowered": (lower_epsilon, "more than the 0.1 that is stated", True),
    "there is less noise": (
        lambda f: edit(f, "privacy.json", lambda x: x["mechanisms"][0].update(noise_multiplier=0.6)),
        "more than the 1.0 that is stated",
        True,
    ),
    "the mechanism is left out": (
        lambda f: edit(f, "privacy.json", lambda x: x.update(mechanisms=[])),
        "no mechanism is listed",
        True,
    ),
    "the patients are more": (
        lambda f: edit(f, "privacy.json", lambda x: x.update(n_units=4000)),
        "isn't its expected batch over 4000 places",
        True,
    ),
    "delta is above one in N": (
        lambda f: edit(f, "privacy.json", lambda x: x.update(delta=0.1)),
        "isn't below one in",
        True,
    ),
    "the statement promises more": (
        lambda f: replaced(f, "STATEMENT.md", "(1, 1e-05)-diff", "(0.5, 1e-05)-diff"),
        "STATEMENT.md says",
        True,
    ),
    "a patient is dropped from the table": (
        lambda f: (f / "participants.tsv").write_text(
            "\n".join((f / "participants.tsv").read_text().splitlines()[:-1]) + "\n"
        ),
        f"participants.tsv has {PATIENTS - 1} rows",
        True,
    ),
    "a patient's folder is dropped": (lambda f: shutil.rmtree(f / "sub-00003"), "don't agree: ['sub-00003']", True),
    "the attributes are taken out": (lambda f: (f / "attributes.csv").unlink(), "FileNotFoundError", True),
    "a volume is cut short": (
        lambda f: verify.image(f, "sub-00001", "ES").write_bytes(verify.image(f, "sub-00001", "ES").read_bytes()[:500]),
        "sub-00001_acq-ES_T2w.nii.gz: can't be read",
        True,
    ),
    "the ledger lacks its mechanisms": (
        lambda f: edit(f, "privacy.json", lambda x: x.pop("mechanisms")),
        "it can't be checked to the end: KeyError: 'mechanisms'",
        True,
    ),
    "a sidecar says real": (
        lambda f: edit(f, SIDECAR, lambda x: x.update(Synthetic=False)),
        "its sidecar doesn't say that it's synthetic",
        True,
    ),
    "a header says nothing": (
        lambda f: header(f, "sub-00001/anat/*_acq-ED_T2w.nii.gz", lambda b: b.__setitem__(slice(148, 228), bytes(80))),
        "its header doesn't say that it's synthetic",
        True,
    ),
    "units are gone": (
        lambda f: header(f, "sub-00001/anat/*_acq-ED_T2w.nii.gz", lambda b: b.__setitem__(123, 0)),
        "its units aren't mm and seconds",
        True,
    ),
    "the model is another": (
        lambda f: (f / "model/denoiser/weights.safetensors").write_bytes(b"other"),
        "isn't what the ledger was written for",
        True,
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_verification_fails_on_tampering(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tamper, says, hidden = TAMPERINGS[name]
    tamper(copy)
    if hidden:
        resum(copy)
    assert verify.main(copy) == 1
    assert says in capsys.readouterr().out


def test_mirrored_hearts_fail_verification(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place_hearts(copy)
    resum(copy)
    assert verify.main(copy) == 0, capsys.readouterr().out
    for pattern in ("sub-*/anat/*.nii.gz", "derivatives/*/sub-*/anat/*.nii.gz"):
        header(copy, pattern, lambda b: b.__setitem__(slice(280, 284), np.float32(1.8269).tobytes()))
    resum(copy)
    assert verify.main(copy) == 1
    assert "the hearts are mirrored" in capsys.readouterr().out


def place_hearts(folder: Path) -> None:
    """Put a heart's labels where the tiny model drew none: the RV on the left of the picture."""
    for path in folder.glob("derivatives/*/sub-*/anat/*.nii.gz"):
        image = nib.load(path)
        labels = np.zeros(image.shape, np.uint8)
        labels[20:40, 40:60, 2:8], labels[44:60, 40:60, 2:9] = 1, 3
        content = nib.Nifti1Image(labels, None, image.header).to_bytes()
        path.write_bytes(gzip.compress(content, mtime=0))


def test_the_right_ventricle_lies_to_the_patients_right_in_nibabel_and_simpleitk(copy: Path) -> None:
    itk = pytest.importorskip("SimpleITK", reason="SimpleITK isn't installed: pip install SimpleITK")
    place_hearts(copy)
    path, picture = verify.labels(copy, "sub-00001", "ED"), verify.image(copy, "sub-00001", "ED")
    image, other = nib.load(path), nib.load(picture)
    rv, lv = (image.affine @ [*np.argwhere(np.asarray(image.dataobj) == k).mean(axis=0), 1] for k in (1, 3))
    assert rv[0] > lv[0] + 20  # RAS: to the patient's right is larger x
    assert nib.aff2axcodes(image.affine) == ("L", "P", "I")
    read, read_picture = itk.ReadImage(str(path)), itk.ReadImage(str(picture))
    voxels = itk.GetArrayFromImage(read)
    rv_lps, lv_lps = (
        np.array(
            read.TransformContinuousIndexToPhysicalPoint([*map(float, np.argwhere(voxels == k).mean(axis=0)[::-1])])
        )
        for k in (1, 3)
    )
    np.testing.assert_allclose(rv_lps * [-1, -1, 1], rv[:3], atol=1e-3)
    np.testing.assert_allclose(lv_lps * [-1, -1, 1], lv[:3], atol=1e-3)
    assert np.array_equal(voxels.transpose(2, 1, 0), np.asarray(image.dataobj))
    assert read.GetSpacing() == pytest.approx((1.8269, 1.8269, 10), rel=1e-5)
    assert (read.GetSpacing(), read.GetOrigin(), read.GetDirection()) == (
        read_picture.GetSpacing(),
        read_picture.GetOrigin(),
        read_picture.GetDirection(),
    )
    for one in (image, other):
        assert one.header.get_xyzt_units() == ("mm", "sec")
        assert one.header["descrip"].item().startswith(b"synthetic")
        assert min(int(one.header["sform_code"]), int(one.header["qform_code"])) > 0
        np.testing.assert_allclose(one.header.get_sform(), one.header.get_qform(), atol=1e-4)
    assert np.array_equal(image.affine, other.affine)


def test_the_bids_validator_accepts_a_release(released: Path) -> None:
    validator = Path(sys.executable).with_name("bids-validator-deno")
    if not validator.exists():
        pytest.skip("no BIDS validator: pip install bids-validator-deno")
    ran = subprocess.run([validator, "--json", released], capture_output=True, text=True)
    issues = json.loads(ran.stdout)["issues"]["issues"]
    errors = [issue for issue in issues if issue["severity"] == "error"]
    assert not errors, errors
    assert ran.returncode == 0


def test_croissant_is_valid_and_gives_the_table(released: Path) -> None:
    mlc = pytest.importorskip("mlcroissant", reason="mlcroissant isn't installed: pip install mlcroissant")
    dataset = mlc.Dataset(jsonld=str(released / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    assert dataset.metadata.data_limitations
    rows = list(dataset.records("volumes"))
    assert len(rows) == 2 * PATIENTS
    assert {row["volumes/patient"] for row in rows} == {f"sub-{i + 1:05d}".encode() for i in range(PATIENTS)}


def test_the_readmes_five_lines_load_it_in_monai(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (released / "README").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 6  # one a line: three of them imports
    monkeypatch.chdir(released)
    found: dict = {}
    exec(code, found)
    assert len(found["data"]) == 2 * PATIENTS
    assert found["data"][0]["image"].shape == found["data"][0]["label"].shape == (1, 96, 96, 13)


def test_nnunet_finds_every_volume_and_its_labels(released: Path) -> None:
    said = json.loads((released / "dataset.json").read_text())
    assert said["numTraining"] == len(said["dataset"]) == 2 * PATIENTS
    assert len({case["label"] for case in said["dataset"].values()}) == 2 * PATIENTS
    assert len({case["images"][0] for case in said["dataset"].values()}) == 2 * PATIENTS
    for case in said["dataset"].values():
        image, labels = (nib.load(released / path) for path in (*case["images"], case["label"]))
        assert image.shape == labels.shape
        assert set(np.unique(labels.dataobj)) <= set(said["labels"].values())
    for name, phase in (case.split("_") for case in said["dataset"]):
        assert said["dataset"][f"{name}_{phase}"]["images"] == [f"{name}/anat/{name}_acq-{phase}_T2w.nii.gz"]


def test_the_projects_own_readers_take_a_release(copy: Path, tmp_path: Path) -> None:
    came = read_folder(copy)
    rows = list(csv.DictReader((copy / "attributes.csv").open()))
    assert came.n_patients == PATIENTS
    assert came.labels is not None
    assert came.attributes[:, ATTRIBUTE_NAMES.index("ESED")].tolist() == [1, 0] * PATIENTS
    first = nib.load(copy / rows[0]["path"])
    np.testing.assert_allclose(came.images[0], np.asarray(first.dataobj).transpose(2, 1, 0) / 255, atol=1e-6)
    place_hearts(copy)
    about = {"name": "synthetic", "role": "public", "simulated": False, "licence": "any", "citation": "none"}
    about |= {"reader": {"kind": "table", "table": "attributes.csv"}, "root": str(copy)}
    about |= {"splits": {"train": 0.5, "validation": 0.25, "test": 0.25}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(about))
    patient, _, _ = open_patient(load_manifest(tmp_path / "m.yaml"), copy, "sub-00001")
    labels = patient.volumes[0].labels
    assert labels is not None
    assert (labels == 1).nonzero()[2].mean() < (labels == 3).nonzero()[2].mean()  # not mirrored


def test_the_same_release_asked_for_twice_at_once_is_made_once(study: Study) -> None:
    given = {"epsilon": 0, "licence": "asked for twice"}
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(release, asked(study, **given)) for _ in range(2))
        ended = [future.exception() for future in (first, second)]
    (refused,) = filter(None, ended)
    assert isinstance(refused, ParameterError)
    assert "exists; move it away, or ask for another release" in str(refused)
    (made,) = (future.result() for future in (first, second) if not future.exception())
    assert verify.main(made) == 0
    shutil.rmtree(made)


def test_killed_and_resumed_it_is_the_same_to_the_last_byte(
    released: Path, study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = content(released)
    shutil.move(released, tmp_path / "aside")
    drawn: list[int] = []
    whole = room._Sampler.patient

    def killed(self, number: int, wanted: np.ndarray) -> None:
        if len(drawn) == 3:
            drawn.clear()
            raise KeyboardInterrupt
        drawn.append(number)
        whole(self, number, wanted)

    parameters = {"epsilon": 1, "licence": "CC-BY-4.0", "share_model": True}
    monkeypatch.setattr(room._Sampler, "patient", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            release(asked(study, **parameters))
        assert not list((study.runs / "release").iterdir())
    again = release(asked(study, **parameters))
    assert again == released
    assert content(again) == before


def test_what_cannot_be_released_is_refused_before_anything_is_drawn(released: Path, study: Study) -> None:
    with pytest.raises(ParameterError, match="exists; move it away"):
        release(asked(study, epsilon=1, licence="CC-BY-4.0", share_model=True))
    parameters = ReleaseParameters(profile=str(TINY), epsilon=math.inf)
    with pytest.raises(PrivacyError, match="inf has no guarantee"):
        parameters.check()
    wrongs: list[Any] = [0, 7, 1.5, "many"]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"patients\n.*must be a whole number from 8"):
            ReleaseParameters(profile=str(TINY), patients=wrong)
    with pytest.raises(ParameterError, match=r"'nowhere\.csv' is neither public nor private nor the path of a CSV"):
        ReleaseParameters(profile=str(TINY), attributes="nowhere.csv").check()
    model = study.finetuned(1).folder / "privacy.json"
    kept = model.read_text()
    try:
        edit(model.parent, model.name, lambda x: x.update(epsilon=0.5))
        with pytest.raises(PrivacyError, match="epsilon isn't what it was written for"):
            release(asked(study, epsilon=1))
        model.unlink()
        with pytest.raises(PrivacyError, match="no ledger beside the weights"):
            release(asked(study, epsilon=1))
    finally:
        model.write_text(kept)


def test_the_public_model_alone_is_released_without_a_budget(study: Study) -> None:
    folder = release(asked(study, epsilon=0))
    assert folder.name.startswith("phantom_public-epsilon0-")
    assert "No private patient was used" in (folder / "STATEMENT.md").read_text()
    assert verify.main(folder) == 0


def test_attributes_of_real_private_patients_leave_with_noise_alone(hospital: Study, tmp_path: Path) -> None:
    patients = hospital.private.split("train")
    row = patients.attributes[0].copy()
    row[ATTRIBUTE_NAMES.index("ESED")] = np.nan
    with pytest.raises(PrivacyError, match="leave with noise alone: request `private`"):
        refuse_private(tmp_path / "a.csv", row[None].round(1), patients, None)
    with pytest.raises(PrivacyError, match="lies in the folder of hospital; attributes of private patients"):
        refuse_private(tmp_path / "a.csv", row[None] * np.nan, patients, tmp_path)
    refuse_private(tmp_path / "a.csv", row[None] * 1.3, patients, None)
    with pytest.raises(PrivacyError, match="is private, and this would reveal their attributes"):
        of_public(patients)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("LVEDV,LVESV\n100,120\n", "LVESV 120 mL isn't below LVEDV 100 mL"),
        ("LVEDV,LVESV,LVEF\n100,50,70\n", "LVEF is 70 %, but 100 and 50 mL make 50 %"),
        ("LVEDV\n1000\n", "LVEDV is 1000; expected 60 to 350 mL"),
        ("LVESV,LVEF\n200,75\n", "the other two make LVEDV 800 mL; expected 60 to 350"),
        ("RVEDV,RVESV\n100,95\n", "the other two make RVEF 5 %; expected 10 to 80"),
        ("patient,LVEDV\nanna,100\n", "has the column 'patient'; columns are attributes"),
        ("SEX\nwoman\n", "SEX is woman; expected 0 to 1"),
        ("LVEF,RVEF\n55,60,\n", "a row has more cells than the header"),
    ],
)
def test_a_table_of_requests_against_physics_is_refused(tmp_path: Path, table: str, says: str) -> None:
    (tmp_path / "r.csv").write_text(table)
    with pytest.raises(CohortError, match=says.replace("(", r"\(")):
        of_table(tmp_path / "r.csv")


def test_an_ejection_fraction_requested_alone_brings_its_volumes(study: Study, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("LVEF,SEX,AGE\n30,F,60\n60,M,\n")
    public = of_public(study.public.split("train"))
    rows = completed(of_table(tmp_path / "r.csv"), public, np.random.default_rng(0))
    column = {name: rows[:, i] for i, name in enumerate(ATTRIBUTE_NAMES)}
    np.testing.assert_allclose(column["LVEF"], [30, 60], rtol=1e-6)
    for side in ("LV", "RV"):
        np.testing.assert_allclose(
            column[f"{side}ESV"], column[f"{side}EDV"] * (1 - column[f"{side}EF"] / 100), rtol=1e-5
        )
    assert column["SEX"].tolist() == [0, 1]
    assert np.isnan(column["AGE"][1])
    assert np.isnan(column["ESED"]).all()
    rest = [i for i, name in enumerate(ATTRIBUTE_NAMES) if name not in ("AGE", "SEX", "BMI", "ESED")]
    assert np.isfinite(rows[:, rest]).all()


def test_nothing_of_private_patients_is_in_a_release(released: Path, study: Study) -> None:
    patients = study.private.split("train")
    words = {*patients.ids, str(study.runs), str(study.private.path), str(Path.home()), "/tmp/"}
    hashes = {word for person in patients.people for word in person[1:]}
    for name, data in content(released).items():
        plain = gzip.decompress(data) if name.endswith(".gz") else data
        for word in words | hashes:
            assert word.encode() not in plain, (name, word)
    known = patients.attributes[:, 0]
    rows = list(csv.DictReader((released / "attributes.csv").open()))
    public = study.public.split("train").attributes[:, 0]
    for one in rows:
        assert np.isclose(float(one["LVEDV"]), public, rtol=1e-4).any()
        assert not np.isclose(float(one["LVEDV"]), known, rtol=1e-6).any()
    assert dataclasses.is_dataclass(room._Sampler)
