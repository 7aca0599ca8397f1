"""The notebooks, run as a user runs them: papermill in a fresh process, every missing stage first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml

from cardiac_ldm.parameters import FinetuneParameters
from cardiac_ldm.privacy import Ledger, epsilon_pld
from cardiac_ldm.privacy.accounting import terms_of
from cardiac_ldm.study import Study
from cardiac_ldm.trained import ROOT
from tests.conftest import TINY

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def papermill(notebook: str, *arguments: str, runs: Path, profile: str = str(TINY)) -> subprocess.CompletedProcess[str]:
    """`papermill notebooks/NOTEBOOK.ipynb -p ... < /dev/null`; the executed notebook is on stdout."""
    given = [part for name, value in zip(arguments[::2], arguments[1::2], strict=True) for part in ("-p", name, value)]
    return subprocess.run(
        [Path(sys.executable).with_name("papermill"), f"notebooks/{notebook}.ipynb", "-p", "profile", profile, *given],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"CARDIAC_LDM_RUNS": str(runs)},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_finetuning_runs_what_it_lacks_and_leaves_weights_metrics_and_ledger(runs: Path) -> None:
    finished = papermill("03_dp_finetune", "epsilon", "1", runs=runs)
    assert finished.returncode == 0, finished.stderr[-3000:]
    notebook = nbformat.reads(finished.stdout, 4)
    text = str(notebook.cells)
    for stage in ("autoencoder", "pretrain", "finetune"):
        assert f"{stage}: not done yet" in text
    (folder,) = runs.glob("finetune-*")
    assert {"weights.safetensors", "metrics.json", "privacy.json"} <= {path.name for path in folder.iterdir()}
    ledger = Ledger.load(folder / "privacy.json")
    spent = epsilon_pld(terms_of(ledger.mechanisms), ledger.delta)
    assert ledger.epsilon * 0.985 <= spent <= ledger.epsilon * 1.015
    assert ledger.epsilon == pytest.approx(1, rel=0.005)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"]  # bars go to whoever called papermill
    assert "pretrain: 4/4 steps, " in finished.stderr
    assert "left, then pretraining, fine-tuning\n" in finished.stderr


def test_two_processes_run_what_they_lack_and_the_study_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, profile = tmp_path / "runs", tmp_path / "tinier.yaml"
    settings = yaml.safe_load(TINY.read_text())
    settings["patients"]["public"] = {"train": 4, "validation": 1, "test": 2}
    settings["patients"]["private"] = {"train": 12, "validation": 1, "test": 2}
    profile.write_text(yaml.safe_dump(settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*torchrun, "-m", "cardiac_ldm", "--profile", str(profile), "--epsilon", "0.5"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"CARDIAC_LDM_RUNS": str(runs), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for stage in ("autoencoder", "pretrain", "finetune"):
        assert finished.stdout.count(f"{stage}: not done yet") == 1
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(runs))
    run = Study(FinetuneParameters(profile=str(profile), epsilon=0.5)).finetuned(0.5)
    assert capsys.readouterr().out == ""
    assert run.metrics["epsilon"] == 0.5
    assert run.ledger.epsilon == pytest.approx(0.5, rel=0.005)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "lock",
        "metrics.json",
        "privacy.json",
        "settings.yaml",
        "weights.safetensors",
    ]


@pytest.mark.parametrize(
    "notebook",
    ["00_cohorts", "01_autoencoder", "02_pretrain", "05_privacy_audit", "06_tradeoff", "07_gallery", "08_release"],
)
def test_every_chapter_runs(notebook: str, runs: Path) -> None:
    budgets = ("epsilons", "1" if notebook == "05_privacy_audit" else "0, 1, inf") if notebook >= "05" else ()
    budgets = ("epsilon", "1", "patients", "8") if notebook == "08_release" else budgets
    finished = papermill(notebook, *budgets, runs=runs)
    assert finished.returncode == 0, finished.stderr[-3000:]
    if notebook == "05_privacy_audit":
        (control,) = runs.glob("overfit-*")
        assert Ledger.load(control / "privacy.json").guarantee == "public data only"
        attack, copies = (json.loads((control / "metrics.json").read_text())[k] for k in ("membership", "memorisation"))
        assert len({row["attack"] for row in attack}) == 2
        assert len({row["space"] for row in copies}) == 3
    if notebook == "08_release":
        (folder,) = (runs / "release").iterdir()
        statement = (folder / "STATEMENT.md").read_text()
        assert "differential privacy per patient" in statement
        assert len(list(folder.glob("sub-*/anat/*.nii.gz"))) == 16
        assert Ledger.load(folder / "privacy.json").guarantee == "patient-level DP"
        assert "differential privacy per patient" in (folder / "quality.html").read_text()
        verified = subprocess.run([sys.executable, folder / "verify.py"], capture_output=True, text=True)
        assert verified.returncode == 0, verified.stdout


def test_evaluating_a_model_leaves_a_row_with_interval_and_patients_for_every_metric(runs: Path) -> None:
    (release,) = (runs / "release").iterdir()  # as if somebody else had made it
    finished = papermill("04_evaluate", "epsilons", "0, 1, inf", "folder", str(release), runs=runs)
    assert finished.returncode == 0, finished.stderr[-3000:]
    metrics = [json.loads(path.read_text()) for path in runs.glob("evaluate-*/metrics.json")]
    (rows,) = [m["rows"] for m in metrics if m["epsilon"] == 1]
    (external,) = [m["rows"] for m in metrics if m["model"].startswith("folder-")]
    assert external[0]["metric"] == rows[0]["metric"] == "FD-EffNet"
    assert external[0]["value"] > 0
    assert {"FD-EffNet", "KID", "MS-SSIM", "phase accuracy", "correlation"} <= {row["metric"] for row in rows}
    for row in rows:
        assert row["n_patients"] > 0 or row["value"] is None
        if row["value"] is not None and row["low"] is not None:
            assert row["low"] <= row["high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("epsilon", "0"), "epsilon: 0: must be a number above 0"),
        (("epsilon", "ten"), "epsilon: 'ten': must be a number above 0"),
        (("epsilom", "1"), "epsilom: no such parameter; did you mean epsilon?"),
    ],
)
def test_a_wrong_parameter_stops_with_one_sentence(arguments: tuple[str, str], message: str, tmp_path: Path) -> None:
    finished = papermill("03_dp_finetune", *arguments, runs=tmp_path)
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "pydantic" not in finished.stderr


def test_an_unknown_profile_stops_with_one_sentence(tmp_path: Path) -> None:
    finished = papermill("03_dp_finetune", runs=tmp_path, profile="quik")
    assert finished.returncode != 0
    assert "profile: there is no 'quik'; choose" in finished.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_paired_text_without_outputs(path: Path) -> None:
    notebook, text = nbformat.read(path, 4), jupytext.read(path.with_suffix(".md"))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in text.cells]
    assert [cell.metadata.get("tags", []) for cell in notebook.cells] == [
        cell.metadata.get("tags", []) for cell in text.cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert code[0].metadata.tags == ["parameters"]
    assert max(len(cell.source.splitlines()) for cell in code) <= 30  # what is longer belongs in the library


def test_a_real_private_cohort_is_used_by_the_mechanism_alone(tmp_path: Path, acdc_root: Path) -> None:
    """The whole flow on real hearts, public and private: nothing is measured on private ones and no seed is used."""
    manifest = yaml.safe_load((ROOT / "data_manifests" / "acdc.yaml").read_text())
    train = manifest["splits"]["train"]  # of which this profile takes the first few for the public cohort
    others = {"train": train[-24:], "validation": train[20:25], "test": train[25:30]}
    path, runs = tmp_path / "hospital.yaml", tmp_path / "runs"
    terms = {"name": "hospital", "role": "private", "splits": others, "budget": {"epsilon": 10, "delta": 1e-5}}
    path.write_text(yaml.safe_dump(manifest | terms))
    cohorts = ("cohort_public", "acdc", "cohort_private", str(path), "data_root_private", str(acdc_root))
    wanted = (*cohorts, "epsilon", "10", "patients", "8")
    requested = papermill("08_release", *wanted, runs=runs)
    assert "to agree, set the parameter spend to True" in requested.stderr
    finished = papermill("08_release", *wanted, "spend", "True", runs=runs)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (folder,) = runs.glob("finetune-*")
    assert Ledger.load(folder / "privacy.json").randomness == "ChaCha20, keyed by the operating system's entropy"
    assert not list(runs.glob("synthesise-*"))
    (release,) = (runs / "release").iterdir()
    statement = (release / "STATEMENT.md").read_text()
    assert "(10, 1e-05)-differential privacy per patient" in statement
    assert "simulated" not in statement
    refused = papermill("03_dp_finetune", *cohorts, "epsilon", "inf", runs=runs)
    assert "epsilon: inf on hospital would reveal real private patients" in refused.stderr
