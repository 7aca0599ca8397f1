"""Manifests say what a cohort is; a wrong one is refused with every problem named."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cardiac_ldm.cohort import load_manifest
from cardiac_ldm.cohort.manifest import MANIFEST_FOLDER, SPLITS
from cardiac_ldm.errors import CohortError

SOUND = {
    "name": "hospital",
    "role": "private",
    "simulated": False,
    "licence": "none",
    "citation": "none",
    "reader": {"kind": "acdc"},
    "splits": {"train": ["a", "b"], "validation": ["c"], "test": ["d"]},
}


@pytest.fixture
def write(tmp_path):
    def _write(**changes):
        path = tmp_path / "hospital.yaml"
        path.write_text(yaml.safe_dump(SOUND | changes))
        return path

    return _write


@pytest.mark.parametrize("path", sorted(MANIFEST_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_manifests_are_sound_and_named_after_their_files(path):
    manifest = load_manifest(path.stem)
    assert manifest.name == path.stem
    ids = [patient for split in SPLITS for patient in manifest.patient_ids(split)]
    assert len(set(ids)) == len(ids)


def test_the_shipped_cohorts_are_what_the_study_expects():
    public, private, acdc = map(load_manifest, ("phantom_public", "phantom_private", "acdc"))
    assert [len(public.patient_ids(split)) for split in SPLITS] == [2000, 100, 200]
    assert [len(private.patient_ids(split)) for split in SPLITS] == [4000, 100, 400]
    assert sum(len(acdc.patient_ids(split)) for split in SPLITS) == 80
    assert (public.role, private.role, acdc.role) == ("public", "private", "public")
    assert (public.simulated, private.simulated, acdc.simulated) == (True, True, False)
    assert public.reader != private.reader
    assert "CC BY-NC-SA" in acdc.licence
    assert "10.1109/TMI.2018.2837502" in acdc.citation


def test_every_problem_is_in_one_message(write):
    path = write(
        rolle="public",
        role="semi-private",
        reader={"kind": "acdc", "seed": 3},
        splits={"train": ["a", "b"], "validation": ["c"]},
    )
    with pytest.raises(CohortError) as caught:
        load_manifest(path)
    message = str(caught.value)
    assert message.startswith("hospital.yaml: 4 problem(s)")
    for part in (
        "rolle: no such field",
        "role: 'semi-private'",
        "'public' or 'private'",
        "seed",
        "splits.test: is missing",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("splits", "named"),
    [
        ({"train": ["a", "b"], "validation": ["c"], "test": ["a"]}, "a is listed 2 times (train, test)"),
        ({"train": ["a", "a"], "validation": ["c"], "test": ["d"]}, "a is listed 2 times (train)"),
        ({"train": [], "validation": ["c"], "test": ["d"]}, "splits.train"),
        ({"train": 10, "validation": 5, "test": 5}, "lists of their names"),
    ],
)
def test_a_patient_belongs_to_one_split_once(write, splits, named):
    with pytest.raises(CohortError, match=r"hospital\.yaml") as caught:
        load_manifest(write(splits=splits))
    assert named in str(caught.value)


def test_real_files_cannot_be_declared_simulated(write):
    with pytest.raises(CohortError, match="phantoms alone are simulated"):
        load_manifest(write(simulated=True))


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [unclosed", ""])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(CohortError, match=r"broken\.yaml"):
        load_manifest(path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CohortError, match="phantom_private, phantom_public"):
        load_manifest("phantom_publik")


def test_a_manifest_does_not_change():
    with pytest.raises(ValidationError):
        load_manifest("acdc").role = "private"


def test_data_root_is_the_parameter_then_the_environment_then_the_manifest(write, tmp_path, monkeypatch):
    for name in ("given", "environment", "manifest"):
        (tmp_path / name).mkdir()
    manifest = load_manifest(write(root="manifest"))
    monkeypatch.delenv("CARDIAC_LDM_ROOT_HOSPITAL", raising=False)
    assert manifest.data_root() == tmp_path / "manifest"
    monkeypatch.setenv("CARDIAC_LDM_ROOT_HOSPITAL", os.fspath(tmp_path / "environment"))
    assert manifest.data_root() == tmp_path / "environment"
    assert manifest.data_root(tmp_path / "given") == tmp_path / "given"


@pytest.mark.parametrize("changes", [{}, {"root": "nowhere"}])
def test_a_missing_data_root_names_all_three_ways(write, monkeypatch, changes):
    monkeypatch.delenv("CARDIAC_LDM_ROOT_HOSPITAL", raising=False)
    with pytest.raises(CohortError) as caught:
        load_manifest(write(**changes)).data_root()
    for way in ("parameter data_root", "CARDIAC_LDM_ROOT_HOSPITAL", "field root"):
        assert way in str(caught.value)


def test_phantoms_have_no_data_root_and_disjoint_ids():
    manifest = load_manifest("phantom_public")
    assert manifest.data_root(Path("/nowhere")) is None
    assert manifest.patient_ids("train")[0] == "p000000"
    assert manifest.patient_ids("validation")[0] == "p002000"
    with pytest.raises(CohortError, match="train, validation, test"):
        manifest.patient_ids("valid")
