"""Manifests say what a cohort is; a wrong one is refused with every problem named."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cardiac_ldm.cohort import load_manifest
from cardiac_ldm.cohort.manifest import MANIFEST_FOLDER, SPLITS
from cardiac_ldm.errors import CohortError, PrivacyError

SOUND = {
    "name": "hospital",
    "role": "private",
    "simulated": False,
    "licence": "none",
    "citation": "none",
    "reader": {"kind": "acdc"},
    "splits": {"train": ["a", "b"], "validation": ["c"], "test": ["d"]},
    "budget": {"epsilon": 10, "delta": 1e-5, "patients": 4000},
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
    found = [f"{i:07d}" for i in range(200)]
    ids = [patient for split in SPLITS for patient in manifest.patient_ids(split, found)]
    assert len(set(ids)) == len(ids)
    assert "doi:" in manifest.citation or manifest.secret
    assert manifest.simulated or manifest.obtain


def test_of_the_shipped_real_cohorts_only_the_open_challenges_are_public():
    roles = {path.stem: load_manifest(path) for path in MANIFEST_FOLDER.glob("*.yaml")}
    assert {name for name, manifest in roles.items() if manifest.secret} == {"hospital", "ukbb"}
    assert {name for name, m in roles.items() if m.role == "public" and not m.simulated} == {"acdc", "mnms", "mnms2"}


def test_the_shipped_cohorts_are_what_the_study_expects():
    public, private, acdc = map(load_manifest, ("phantom_public", "phantom_private", "acdc"))
    assert [len(public.patient_ids(split)) for split in SPLITS] == [10000, 100, 200]
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
        (
            {"train": ["a", "b"], "validation": ["c"], "test": ["a"]},
            "number 1 of train and number 1 of test are",
        ),
        (
            {"train": ["a", "a"], "validation": ["c"], "test": ["d"]},
            "number 1 of train and number 2 of train are",
        ),
        ({"train": [], "validation": ["c"], "test": ["d"]}, "splits.train"),
        ({"train": 10, "validation": 5, "test": 5}, "lists of their names"),
        ({"train": 0.8, "validation": 0.1, "test": 0.2}, "the shares sum to 1.1; expected 1"),
        ({"train": 0.9, "validation": 0.1, "test": ["a"]}, "give all three splits in one way"),
        ({"train": 0.5, "validation": 0.5, "test": 0.0}, "splits.test: 0.0 won't do"),
        ({"train": [1, 2], "validation": ["c"], "test": ["d"]}, "quote those that look like numbers"),
        ({"train": True, "validation": ["c"], "test": ["d"]}, "splits.train: True won't do"),
    ],
)
def test_a_patient_belongs_to_one_split_once(write, splits, named):
    with pytest.raises(CohortError, match=r"hospital\.yaml") as caught:
        load_manifest(write(splits=splits))
    assert named in str(caught.value)


SHARES = {"train": 0.8, "validation": 0.05, "test": 0.15}


def test_shares_draw_about_their_share_of_patients_each_into_one_split(write):
    manifest, found = load_manifest(write(splits=SHARES)), [f"patient{i}" for i in range(4000)]
    drawn = {split: manifest.patient_ids(split, found) for split in SPLITS}
    assert sorted(patient for ids in drawn.values() for patient in ids) == sorted(found)
    for split, share in SHARES.items():
        assert len(drawn[split]) == pytest.approx(4000 * share, abs=4 * (4000 * share * (1 - share)) ** 0.5)


def test_shares_move_nobody_when_a_patient_comes_or_goes_and_differ_between_cohorts(write):
    manifest, found = load_manifest(write(splits=SHARES)), [f"patient{i}" for i in range(300)]
    for gone in range(0, 300, 37):
        fewer = found[:gone] + found[gone + 1 :]
        for split in SPLITS:
            assert set(manifest.patient_ids(split, found)) - set(manifest.patient_ids(split, fewer)) <= {found[gone]}
            assert set(manifest.patient_ids(split, fewer)) <= set(manifest.patient_ids(split, found))
    other = load_manifest(write(splits=SHARES, name="clinic"))
    assert other.patient_ids("test", found) != manifest.patient_ids("test", found)


def test_a_split_that_no_patient_falls_in_is_refused(write):
    with pytest.raises(CohortError, match=r"hospital: no patient falls in the split \w+, a share of 0"):
        [load_manifest(write(splits=SHARES)).patient_ids(split, ["anna"]) for split in SPLITS]


def test_a_budget_whose_delta_would_give_somebody_away_is_refused(write):
    for places, delta, fine in ((4000, 1 / 4000, False), (None, 0.5, False), (4000, 1e-4, True)):
        budget = {"epsilon": 10, "delta": delta} | ({"patients": places} if places else {})
        if fine:
            assert load_manifest(write(budget=budget)).places == places
            continue
        with pytest.raises(CohortError, match=r"budget.delta: .* isn't below one in \d+ places"):
            load_manifest(write(budget=budget))


def test_a_field_that_is_given_twice_is_refused(write):
    path = write()
    path.write_text(path.read_text() + "role: public\n")
    with pytest.raises(CohortError, match="role is given twice"):
        load_manifest(path)


def test_where_checksums_lie_is_no_part_of_what_shapes_a_cohort(write, tmp_path):
    manifest = load_manifest(write(checksums="hospital.sha256"))
    assert manifest.checksums == tmp_path / "hospital.sha256"
    assert "checksums" not in manifest.model_dump()


@pytest.fixture
def open_cohort(tmp_path, monkeypatch):
    """A public manifest whose data folder is given, beside whatever `write` writes."""
    monkeypatch.delenv("CARDIAC_LDM_ROOT_OPEN", raising=False)
    for folder in ("private/inner", "free"):
        (tmp_path / folder).mkdir(parents=True)

    def _open(root):
        path = tmp_path / "open.yaml"
        path.write_text(yaml.safe_dump(SOUND | {"name": "open", "role": "public", "root": str(root)}))
        return load_manifest(path).data_root

    return _open


@pytest.mark.parametrize("root", ["private", "private/inner", ".", "link", "link/inner", "private/../private"])
@pytest.mark.parametrize("by", ["field", "environment"])
def test_a_public_cohort_cannot_point_at_a_private_ones_files(write, open_cohort, tmp_path, monkeypatch, root, by):
    (tmp_path / "link").symlink_to("private")
    if by == "field":
        write(root="private")
    else:
        write()
        monkeypatch.setenv("CARDIAC_LDM_ROOT_HOSPITAL", str(tmp_path / "private"))
    with pytest.raises(PrivacyError, match=r"open is public.*private patients of .*hospital\.yaml"):
        open_cohort(root)()


def test_a_private_cohorts_folder_may_be_named_through_a_link(write, open_cohort, tmp_path):
    (tmp_path / "link").symlink_to("private")
    write(root="link")
    with pytest.raises(PrivacyError, match="open is public"):
        open_cohort("private")()


def test_a_public_cohort_cannot_be_given_a_private_ones_files_as_parameter(write, open_cohort, tmp_path):
    write(root="private")
    with pytest.raises(PrivacyError, match="open is public"):
        open_cohort("free")(tmp_path / "private")


def test_a_private_manifest_with_mistakes_still_guards_its_files(write, open_cohort):
    write(root="private", role="Private", rolle="x", splits={})
    with pytest.raises(PrivacyError, match="open is public"):
        open_cohort("private")()


@pytest.mark.parametrize("changes", [{"role": "public"}, {"simulated": True}, {"root": "nowhere"}])
def test_files_that_no_real_private_cohort_claims_are_free(write, open_cohort, tmp_path, changes):
    write(**({"root": "private"} | changes))
    (tmp_path / "notes.yaml").write_text("root: [unclosed")
    assert open_cohort("private")() == tmp_path / "private"


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
    assert manifest.patient_ids("validation")[0] == "p010000"
    with pytest.raises(CohortError, match="train, validation, test"):
        manifest.patient_ids("valid")
