"""The check of a cohort from the command line: what it prints, and with which exit code it ends."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cardiac_ldm.cohort import check as module
from cardiac_ldm.cohort import prepare
from cardiac_ldm.cohort.__main__ import main
from cardiac_ldm.cohort.check import check, summarise
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.errors import CohortError, PrivacyError
from tests import miniatures as mini

PATIENTS = ("anna", "berta", "carl")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Threads will do: processes would take longer to start than these patients to read."""
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))


def test_a_sound_cohort_is_counted(tmp_path, capsys):
    mini.make_table(tmp_path / "data", PATIENTS, group="DCM", AGE="61", SEX="F")
    mini.manifest(tmp_path, "table")
    assert check(tmp_path / "mini.yaml")
    printed = capsys.readouterr().out
    assert "holder's eyes alone" in printed
    assert "problems" not in printed.replace("read without problems", "")
    assert "mini: 3 patients, all sound" in printed
    rows = {line[:30].strip(): line[30:].split() for line in printed.splitlines()}
    words = {" ".join(line.split()) for line in printed.splitlines()}
    assert "train validation test" in words
    for row in ("patients 1 1 1", "volumes 2 2 2", "with labels 2 2 2", "group DCM 1 1 1", "slices 6 6 6"):
        assert row in words, rows
    assert "spacing z (mm) 10 10 10" in words
    assert "AGE years 61 (of 1) 61 (of 1) 61 (of 1)" in words
    assert any(line.startswith("LVEDV mL") for line in words)


def test_public_cohorts_are_nobodys_secret(tmp_path, capsys):
    mini.make_table(tmp_path / "data", PATIENTS)
    mini.manifest(tmp_path, "table", role="public")
    assert check(tmp_path / "mini.yaml")
    assert "holder" not in capsys.readouterr().out


def test_everything_that_is_wrong_or_mended_is_printed_file_by_file(tmp_path, capsys):
    mini.make_table(tmp_path / "data", (*PATIENTS, "dora"))
    (tmp_path / "data/anna/ED.nii.gz").unlink()
    (tmp_path / "data/anna/ES_gt.nii.gz").write_bytes(b"no")
    (tmp_path / "data/berta/ED_gt.nii.gz").unlink()
    for name, array in (("ED", 0), ("ED_gt", 1), ("ES", 0), ("ES_gt", 1)):
        mini.save(np.flip(mini.heart(name[:2], 2)[array], 2), tmp_path / f"data/carl/{name}.nii.gz")
    mini.manifest(tmp_path, "table")
    assert not check(tmp_path / "mini.yaml")
    problems, repairs, left, _ = capsys.readouterr().out.split("\n\n", 1)[1].split("\n\n", 3)
    assert [line.split(": ")[0] for line in problems.splitlines()] == ["problems:", "  anna", "  anna", "  berta"]
    for part in (
        "anna/ED.nii.gz: there's no such file",
        "anna/ES_gt.nii.gz: can't be read",
        "berta/ED_gt.nii.gz: there's",
    ):
        assert part in problems
    assert repairs.splitlines()[1].startswith("  carl: carl/ED.nii.gz: slices ran from apex to base")
    assert left.splitlines()[1:] == ["  dora"]


@pytest.mark.parametrize(
    ("role", "second", "wrong"), [("private", "anna2", True), ("public", "carl", True), ("public", "anna2", False)]
)
def test_a_picture_with_two_names_is_a_problem_across_splits_and_among_private_patients(
    tmp_path, capsys, role, second, wrong
):
    mini.make_table(tmp_path / "data", ("anna", "anna2", *PATIENTS[1:]))
    (tmp_path / f"data/{second}/ES.nii.gz").write_bytes((tmp_path / "data/anna/ES.nii.gz").read_bytes())
    splits = {"train": ["anna", "anna2"], "validation": ["berta"], "test": ["carl"]}
    cohort = mini.manifest(tmp_path, "table", role=role, splits=splits)
    same = f"anna/ES.nii.gz = {second}/ES.nii.gz"
    assert check(tmp_path / "mini.yaml") is not wrong
    said = f"anna, {second}: share the file {same}; remove one" if wrong else f"one split:\n  anna, {second}: {same}"
    assert said in capsys.readouterr().out
    if wrong:
        with pytest.raises(CohortError, match="one person has two names") as caught:
            prepare(cohort, store=tmp_path / "store")
        log = tmp_path / "store/.mini-problems.txt"
        said = log.read_text() if role == "private" else str(caught.value)  # names of real private ones aren't shown
        assert f"anna (train) and {second} (" in said
        assert "anna" not in str(caught.value) or role == "public"
    else:
        prepare(cohort, store=tmp_path / "store")


def test_simulated_cohorts_have_nothing_to_check():
    with pytest.raises(CohortError, match="it's simulated"):
        check("phantom_public")


def test_files_of_a_private_cohort_are_refused_to_a_public_one(tmp_path):
    mini.make_table(tmp_path / "data", PATIENTS)
    content = (tmp_path / "mini.yaml", mini.manifest(tmp_path, "table"))[0].read_text()
    (tmp_path / "open.yaml").write_text(content.replace("name: mini", "name: open").replace("private", "public"))
    with pytest.raises(PrivacyError, match="open is public"):
        check(tmp_path / "open.yaml")


def test_summaries_hold_no_pictures(tmp_path):
    mini.make_table(tmp_path / "data")
    manifest = mini.manifest(tmp_path, "table")
    summary = summarise(manifest, tmp_path / "data", "anna")
    assert summary.shape == read_patient(manifest, tmp_path / "data", "anna").volumes[0].image.shape
    assert not any(isinstance(value, np.ndarray) for value in vars(summary).values())
    assert len(repr(summary)) < 3000


def test_exit_codes_are_0_for_sound_1_for_problems_and_2_for_wrong_usage(tmp_path, capsys):
    mini.make_table(tmp_path / "data", PATIENTS)
    mini.manifest(tmp_path, "table", root=None)
    manifest, root = str(tmp_path / "mini.yaml"), ["--data-root", str(tmp_path / "data")]
    assert main(["check", manifest, *root]) == 0
    (tmp_path / "data/anna/ED.nii.gz").unlink()
    assert main(["check", manifest, *root]) == 1
    assert main(["check", manifest]) == 1
    assert "no data folder is named" in capsys.readouterr().err
    for wrong in ([], ["chekc"], ["check"], ["check", manifest, "--root", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_the_module_runs_in_processes_of_its_own(tmp_path):
    mini.make_table(tmp_path / "data", PATIENTS)
    (tmp_path / "data/anna/ED.nii.gz").unlink()
    mini.manifest(tmp_path, "table")
    command = [sys.executable, "-m", "cardiac_ldm.cohort", "check", str(tmp_path / "mini.yaml")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "mini: 3 patients, 1 with problems" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
