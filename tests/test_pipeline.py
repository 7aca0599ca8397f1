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

pytestmark = pytest.mark.slow(minutes=3)

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


def test_finetuning_runs_what_it_lacks_and_leaves_weights_metrics_and_ledger(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
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
    requested = papermill("07_gallery", *cohorts, "epsilons", "10", runs=runs)
    assert "to agree, set the parameter spend to True" in requested.stderr
    finished = papermill("07_gallery", *cohorts, "epsilons", "10", "spend", "True", runs=runs)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (folder,) = runs.glob("finetune-*")
    assert Ledger.load(folder / "privacy.json").randomness == "ChaCha20, keyed by the operating system's entropy"
    (drawn,) = runs.glob("synthesise-*")
    assert json.loads((drawn / "metrics.json").read_text())["n_volumes"] == 2 * 8  # public test patients stand in
    shared = papermill("08_release", *cohorts, "epsilon", "10", "patients", "8", "spend", "True", runs=runs)
    assert shared.returncode == 0, shared.stderr[-3000:]
    (release,) = (runs / "release").iterdir()
    statement = (release / "STATEMENT.md").read_text()
    assert "(10, 1e-05)-differential privacy per patient" in statement
    assert "simulated" not in statement
    refused = papermill("03_dp_finetune", *cohorts, "epsilon", "inf", runs=runs)
    assert "epsilon: inf on hospital would reveal real private patients" in refused.stderr
