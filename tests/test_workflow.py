"""The workflow: what it's asked for, how it's killed and started again, a cluster's scheduler, `make clean`."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import nbformat
import pytest
import yaml
from filelock import FileLock
from packaging.specifiers import SpecifierSet

from benchmarks import RESULTS
from cardiac_ldm.cohort.manifest import MANIFEST_FOLDER
from cardiac_ldm.errors import ParameterError, StudyError
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness
from cardiac_ldm.trained import ROOT
from tests.conftest import TINY
from workflow import clean
from workflow.publish import publish
from workflow.settings import WorkflowSettings, budget_name, only_workflow

pytestmark = pytest.mark.slow(minutes=8)

ODD = 'it\'s "a" $HOME `id` {b}; & profile.yaml'
"""What a shell, a scheduler and Snakemake's formatting would each take for something else."""
SLURM = ("sbatch", "srun", "sacct", "squeue", "scancel", "sinfo", "scontrol", "sacctmgr", "sshare")
SCHEDULER = '''#!{python}
"""A cluster of one machine, under the names of slurm's commands: a job is a script that starts at once.

Whoever asks how jobs stand is answered when one more has ended: the executor waits ten seconds longer after each answer
that has no news.
"""
import os, pathlib, shlex, subprocess, sys, time

jobs = pathlib.Path(__file__).resolve().parent / "jobs"
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
given, rest = dict(), list()
while arguments:
    part = arguments.pop(0)
    if rest or not part.startswith("-"):
        rest.append(part)
    elif part in ("--job-name", "--output", "--comment", "-A", "-p", "-t", "--mem", "-D", "-C"):
        given[part] = arguments.pop(0)
    else:
        key, _, given[key] = part.partition("=")
if name == "sbatch":
    if "--wrap" in given and rest:
        sys.exit("sbatch: error: Script arguments not permitted with --wrap option")
    script = "#!/bin/sh\\n" + given["--wrap"] if "--wrap" in given else pathlib.Path(rest[0]).read_text()
    job = jobs / str(len(list(jobs.iterdir())) + 1)
    job.mkdir()
    (job / "call").write_text(shlex.join(sys.argv))
    (job / "script").write_text(script)
    run = f"sh {{job}}/script && echo COMPLETED > {{job}}/state || echo FAILED > {{job}}/state"
    output = open(given["--output"].replace("%j", job.name), "w")
    where = os.environ | {{"SLURM_JOB_ID": job.name}}
    subprocess.Popen(["sh", "-c", run], cwd=given["-D"], stdin=subprocess.DEVNULL, stdout=output,
                     stderr=subprocess.STDOUT, env=where, start_new_session=True)
    print(job.name)
elif name == "srun":
    os.execvp(rest[0], rest)
elif name in ("sacct", "squeue") and "--name" in sys.argv:
    told = jobs.parent / "told"
    known, until = int(told.read_text()) if told.exists() else 0, time.monotonic() + 45
    while (ended := len(list(jobs.glob("*/state")))) == known and time.monotonic() < until:
        time.sleep(0.1)
    told.write_text(str(ended))
    for job in jobs.iterdir():
        print(job.name, (job / "state").read_text().strip() if (job / "state").exists() else "RUNNING", sep="|")
'''


def profile_file(path: Path) -> Path:
    """Write a profile that is read as quickly as any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(TINY, path)
    return path


ACCEPTED: list[tuple[dict[str, Any], str]] = [
    ({}, "1 10 inf"),
    ({"epsilons": "1,10"}, "1 10 inf"),
    ({"epsilons": "1, 10"}, "1 10 inf"),
    ({"epsilons": " 10 ,1 "}, "1 10 inf"),
    ({"epsilons": "1.0,1"}, "1 inf"),
    ({"epsilons": "1,1.00,1e0,01"}, "1 inf"),
    ({"epsilons": 1}, "1 inf"),
    ({"epsilons": 1.0}, "1 inf"),
    ({"epsilons": "0.1"}, "0.1 inf"),
    ({"epsilons": 0.1}, "0.1 inf"),
    ({"epsilons": "1e-1,.1"}, "0.1 inf"),
    ({"epsilons": "1.23456789,1.2345678"}, "1.2345678 1.23456789 inf"),
    ({"epsilons": "0, 1, 10, inf"}, "1 10 inf"),
    ({"epsilons": "inf"}, "inf"),
    ({"epsilons": float("inf")}, "inf"),
    ({"epsilons": "Infinity,2"}, "2 inf"),
    ({"epsilons": [1, "10"]}, "1 10 inf"),
    ({"epsilons": ["1"]}, "1 inf"),
    ({"seed": 3}, "1 10 inf"),
    ({"seed": "3"}, "1 10 inf"),
    ({"cohort_private": "phantom_private"}, "1 10 inf"),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"epsilons": "0"}, "epsilons: '0' has no budget above 0"),
    ({"epsilons": 0}, "epsilons: '0' has no budget above 0"),
    ({"epsilons": "abc"}, "'abc' must be a number of at least 0"),
    ({"epsilons": "1;10"}, "'1;10' must be a number"),
    ({"epsilons": "1 10"}, "'1 10' must be a number"),
    ({"epsilons": "-1"}, "'-1' must be a number of at least 0"),
    ({"epsilons": -1}, "'-1' must be a number of at least 0"),
    ({"epsilons": "1,,10"}, "'' must be a number"),
    ({"epsilons": "1,"}, "'' must be a number"),
    ({"epsilons": ","}, "'' must be a number"),
    ({"epsilons": "nan"}, "'nan' must be a number"),
    ({"epsilons": "$(id)"}, "must be a number"),
    ({"epsilons": "'1'"}, "must be a number"),
    ({"epsilons": True}, "'True' must be a number"),
    ({"epsilons": None}, "epsilons: is empty"),
    ({"epsilons": ""}, "epsilons: is empty"),
    ({"epsilons": []}, "epsilons: is empty"),
    ({"epsilons": {"a": 1}}, "epsilons: is empty or no plain value"),
    ({"epsilons": "1\n2"}, "has a character that can't be printed"),
    ({"epsilon": 1}, "epsilon: the workflow has no such setting; it takes profile"),
    ({"_profile": "demo"}, "_profile: the workflow has no such setting"),
    ({"print": "demo"}, "print: the workflow has no such setting"),
    ({"profile": "quik"}, "profile: there is no 'quik'"),
    ({"profile": 7}, "profile: there is no '7'"),
    ({"profile": None}, "profile: is empty"),
    ({"profile": "no such file.yaml"}, "profile: there is no 'no such file.yaml'"),
    ({"cohort_private": "nobody's"}, "there's no such manifest"),
    ({"cohort_public": "no such.yaml"}, "there's no such manifest"),
    ({"seed": "x"}, "seed: 'x'"),
    ({"seed": 1.5}, "seed: '1.5'"),
]


@pytest.mark.parametrize(("config", "budgets"), ACCEPTED, ids=lambda value: str(value)[:40])
def test_budgets_are_each_run_once_and_named_alike(config: dict[str, Any], budgets: str) -> None:
    assert " ".join(WorkflowSettings.read(config).budgets) == budgets


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_no_notebook_takes_is_refused_in_a_sentence(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError) as refused:
        WorkflowSettings.read(config)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "pydantic" not in str(refused.value)


def test_a_real_private_cohort_is_never_trained_on_without_privacy(tmp_path: Path) -> None:
    path = tmp_path / "our hospital's.yaml"
    names = [f"patient{number:03d}" for number in range(10)]
    for name in names:
        (tmp_path / "files" / name).mkdir(parents=True)
    manifest = yaml.safe_load((MANIFEST_FOLDER / "acdc.yaml").read_text()) | {"name": "hospital", "role": "private"}
    manifest |= {"splits": {"train": names[:8], "validation": names[8:9], "test": names[9:]}}
    manifest |= {"root": str(tmp_path / "files"), "budget": {"epsilon": 20, "delta": 1e-5}}
    path.write_text(yaml.safe_dump(manifest))
    requested = {"cohort_private": str(path), "profile": str(TINY)}
    settings = WorkflowSettings.read(requested)
    assert settings.budgets == ["1", "10"]
    assert "would-spend" in settings.would_spend  # looks at both before one is spent
    with pytest.raises(StudyError, match="inf on hospital would reveal real private patients"):
        WorkflowSettings.read(requested | {"epsilons": "1,inf"})


@pytest.mark.parametrize("name", [ODD, "plain.yaml", "'.yaml", '".yaml', "-r.yaml", "ä ß.yaml", "a=b,c.yaml"])
def test_a_path_reaches_papermill_as_it_was_typed_through_every_shell(name: str, tmp_path: Path) -> None:
    path = str(profile_file(tmp_path / name))
    settings = WorkflowSettings.read({"profile": path, "epsilons": "2"})
    (encoded,) = settings.encoded
    assert re.fullmatch(r"encoded=[A-Za-z0-9+/]+=*", encoded)
    name, _, value = encoded.partition("=")
    assert WorkflowSettings.read({name: value, "profile": "ignored"}) == settings
    assert settings.papermill(epsilon="2") == ["-r", "profile", path, "-p", "epsilon", "2"]
    assert re.fullmatch(r"[\w.-]+", settings.name)


def test_another_profile_or_manifest_of_the_same_name_is_another_study(tmp_path: Path) -> None:
    path = profile_file(tmp_path / "mine.yaml")
    before = WorkflowSettings.read({"profile": str(path)})
    path.write_text(path.read_text().replace("steps: 4", "steps: 5"))
    after = WorkflowSettings.read({"profile": str(path)})
    assert before.name == after.name == "mine"
    assert before.digest != after.digest


@pytest.mark.parametrize("epsilon", [1, 10, 0.1, 1e-5, 1e16, 1 / 3, float("inf")])
def test_a_budget_is_what_its_name_says(epsilon: float) -> None:
    assert float(budget_name(epsilon)) == epsilon


def test_only_one_workflow_runs_at_a_time(tmp_path: Path) -> None:
    held = only_workflow(tmp_path)
    with pytest.raises(ParameterError, match="a study is running here already"):
        only_workflow(tmp_path)
    held.release()
    only_workflow(tmp_path).release()


def test_make_hands_the_shell_quoted_values() -> None:
    command = ["make", "--dry-run", "--assume-old", ".venv/installed", "study", f"PROFILE={ODD.replace('$', '$$')}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert '--config "profile=$PROFILE" "epsilons=$EPSILONS"' in shown


def test_pythons_that_are_named_are_those_for_which_the_pinned_versions_resolve() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = json.loads((RESULTS / "python_versions.json").read_text())["rows"]
    resolved = [row["python"] for row in rows if row["system"] == "Linux x86-64" and row["resolves"]]
    requested = SpecifierSet(project["requires-python"])
    assert all(version in requested for version in resolved)
    assert not {"3.11.4", "3.15"} & set(requested.filter(["3.11.4", "3.15"]))
    named = [classifier.rpartition(" ")[2] for classifier in project["classifiers"] if "Python" in classifier]
    assert named == [".".join(version.split(".")[:2]) for version in resolved]


# ---- runs of the workflow, in a clone of its own ----


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone in a folder with a blank in its name, and a small profile; building the book leaves but a page."""
    folder = tmp_path_factory.mktemp("a clone") / "cardiac ldm"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "book" / "build.py").write_text(
        "import pathlib, sys\nassert len(list(pathlib.Path(sys.argv[1]).glob('*.ipynb'))) == 10\n"
        "page = pathlib.Path(sys.argv[2], '_build/html/index.html')\n"
        "assert not pathlib.Path(sys.argv[2]).exists()\n"
        "page.parent.mkdir(parents=True)\npage.write_text('the book')\n"
    )
    profile_file(folder / "runs" / ODD)
    for command in ("init --quiet", "add --all", "-c user.name=x -c user.email=x commit --quiet -m all"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder


def environment(clone: Path, **others: str) -> dict[str, str]:
    """The environment of a workflow in a clone."""
    left = ("CARDIAC_LDM_RUNS", "PYTEST_CURRENT_TEST")  # by the latter ipykernel knows that it's tested
    kept = {name: value for name, value in os.environ.items() if name not in left}
    return kept | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"} | others


def snakemake(clone: Path, *arguments: str, log: IO[str] | None = None, **env: str) -> subprocess.Popen[str]:
    """Start the workflow of the clone's small profile; its output goes to `log` or to pipes."""
    output = log or subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=clone,
        env=environment(clone, **env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output_of(workflow: subprocess.Popen[str]) -> str:
    """What a workflow has printed when it ends; one that hangs is killed, and what it said fails the test."""
    try:
        return workflow.communicate(timeout=1200)[0]
    except subprocess.TimeoutExpired:
        os.killpg(workflow.pid, signal.SIGKILL)
        pytest.fail(f"the workflow hangs: {workflow.communicate()[0]}")


def is_clean(clone: Path) -> bool:
    """Whether git sees nothing new and nothing changed."""
    told = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    return not told.stdout


def processes_with(marker: str) -> list[int]:
    """The processes whose environment holds a marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if marker.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_a_wrong_setting_ends_the_workflow_with_one_sentence(clone: Path) -> None:
    workflow = snakemake(clone, "--dry-run", "--cores", "2", "--config", "epsilons=ten")
    said = output_of(workflow)
    assert workflow.returncode != 0
    assert "ParameterError: epsilons: 'ten'" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2


def test_the_slurm_profile_plans_every_chapter_with_what_it_needs(clone: Path) -> None:
    arguments = ("--config", f"profile=runs/{ODD}", "epsilons=1, 10")
    workflow = snakemake(clone, "--dry-run", "--workflow-profile", "slurm", "--quiet", "host", *arguments)
    said = output_of(workflow)
    assert workflow.returncode == 0, said
    (finetune, *_) = re.findall(r"rule finetune:.*?\n\n", said, re.DOTALL)
    for needed in ("mem_mb=64000", "runtime=2880", "gpu=1"):
        assert needed in finetune
    assert said.count("rule finetune:") == 3


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc")
def test_a_killed_workflow_is_started_again_by_the_same_command(clone: Path, tmp_path: Path) -> None:
    command = ("--cores", "2", "--config", f"profile=runs/{ODD}", "epsilons=1")
    wanted = clone / "runs" / "executed" / re.sub(r"[^\w.-]+", "-", Path(ODD).stem) / "03_dp_finetune-eps1.ipynb"
    goal = ("--", str(wanted.relative_to(clone)))
    moments = [
        ("00_cohorts: begins", os.kill),
        ("02_pretrain: begins", os.killpg),
        ("03_dp_finetune-eps1: begins", os.kill),
    ]
    for number, (moment, kill) in enumerate(moments):
        marker = f"KILLED={tmp_path.name}-{number}"
        with (tmp_path / "log").open("w+") as log:
            workflow = snakemake(clone, *command, *goal, log=log, KILLED=f"{tmp_path.name}-{number}")
            while moment not in (tmp_path / "log").read_text():
                assert workflow.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        if number == 0:
            second = snakemake(clone, *command, *goal)
            said = output_of(second)
            assert second.returncode != 0
            assert "a study is running here already" in said
        time.sleep(2 * number)  # into the notebook
        kill(workflow.pid, signal.SIGKILL)
        workflow.wait()
        deadline = time.monotonic() + 60
        while left := processes_with(marker):
            assert time.monotonic() < deadline, f"{left} outlive the workflow"
            time.sleep(0.5)
    workflow = snakemake(clone, *command, *goal)
    said = output_of(workflow)
    assert workflow.returncode == 0, said
    assert nbformat.read(wanted, 4).cells
    assert is_clean(clone)


@dataclass
class Studied:
    """A study that slurm ran: the clone, and each job's call of `sbatch`."""

    clone: Path
    calls: list[list[str]]

    @property
    def runs(self) -> Path:
        """What its stages left."""
        return self.clone / "runs"

    def chapter(self, name: str) -> nbformat.NotebookNode:
        """An executed notebook."""
        return nbformat.read(next(self.runs.glob(f"executed/*/{name}.ipynb")), 4)


@pytest.fixture(scope="module")
def studied(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Studied:
    """The whole study, by the real executor and the real notebooks, on a scheduler that starts jobs on this machine."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "jobs").mkdir()
    scheduler = folder / "scheduler.py"
    scheduler.write_text(SCHEDULER.format(python=sys.executable))
    scheduler.chmod(0o755)
    for name in SLURM:
        (folder / name).symlink_to(scheduler)
    shutil.rmtree(clone / "runs" / "executed", ignore_errors=True)
    patient = ("--jobs", "2", "--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1")
    requested = ("--config", f"profile=runs/{ODD}", "epsilons=1.0, 10,1")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    workflow = snakemake(clone, "--workflow-profile", "slurm", *patient, *requested, PATH=path)
    said = output_of(workflow)
    assert workflow.returncode == 0, said + "".join(
        p.read_text() for p in clone.glob(".snakemake/slurm_logs/*/*/*.log")
    )
    return Studied(clone, [shlex.split((job / "call").read_text()) for job in (folder / "jobs").iterdir()])


def test_slurm_runs_the_whole_study(studied: Studied) -> None:
    calls = studied.calls
    assert len(calls) == 10  # chapters; the book is built where the workflow runs
    assert sum("--gpus=1" in call for call in calls) == 9
    assert {call[call.index("-t") + 1] for call in calls} == {"240", "1440", "2880"}
    executed = sorted(path.name for path in studied.runs.glob("executed/*/*.ipynb"))
    assert [name for name in executed if "eps" in name] == [f"03_dp_finetune-eps{e}.ipynb" for e in ("1", "10", "inf")]
    cells = studied.chapter("06_tradeoff").cells
    (cell,) = [cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    values: dict[str, Any] = {}
    exec(cell.source, values)
    assert values["profile"] == f"runs/{ODD}"
    assert values["epsilons"] == "0,1,10,inf"
    assert (studied.runs / "book" / "_build" / "html" / "index.html").read_text() == "the book"
    assert is_clean(studied.clone)


def test_every_chapter_runs_without_an_error(studied: Studied) -> None:
    for path in studied.runs.glob("executed/*/*.ipynb"):
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        assert outputs
        assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], path.name


def test_the_audit_attacks_a_model_that_overfits(studied: Studied) -> None:
    (control,) = studied.runs.glob("overfit-*")
    assert Ledger.load(control / "privacy.json").guarantee == "public data only"
    attack, copies = (json.loads((control / "metrics.json").read_text())[k] for k in ("membership", "memorisation"))
    assert len({row["attack"] for row in attack}) == 2
    assert len({row["space"] for row in copies}) == 3


def papermill(studied: Studied, notebook: str, *parameters: str) -> None:
    """Run a notebook by hand, after the study."""
    given = ["-p", "profile", f"runs/{ODD}", *parameters]
    finished = subprocess.run(
        [str(Path(sys.executable).with_name("papermill")), f"notebooks/{notebook}.ipynb", *given],
        cwd=studied.clone,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(studied.clone),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


@pytest.fixture(scope="module")
def released(studied: Studied) -> Path:
    """The folder of a release of one of the study's models."""
    papermill(studied, "08_release", "-p", "epsilon", "1", "-p", "patients", "8")
    (folder,) = (studied.runs / "release").iterdir()
    return folder


def test_what_is_shared_has_a_guarantee_and_proves_itself(released: Path) -> None:
    assert "differential privacy per patient" in (released / "STATEMENT.md").read_text()
    assert len(list(released.glob("sub-*/anat/*.nii.gz"))) == 16
    assert Ledger.load(released / "privacy.json").guarantee == "patient-level DP"
    assert "differential privacy per patient" in (released / "quality.html").read_text()
    verified = subprocess.run([sys.executable, released / "verify.py"], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout


def test_every_metric_has_an_interval_and_a_cohort_of_files_gives_the_same(studied: Studied, released: Path) -> None:
    papermill(studied, "04_evaluate", "-p", "epsilons", "0, 1, 10, inf", "-p", "folder", str(released))
    metrics = [json.loads(path.read_text()) for path in studied.runs.glob("evaluate-*/metrics.json")]
    (external,) = [m["rows"] for m in metrics if m["model"].startswith("folder-")]
    own = json.loads((released / "metrics.json").read_text())["rows"]
    assert external[0]["metric"] == own[0]["metric"] == "FD-EffNet"
    assert external[0]["value"] == pytest.approx(own[0]["value"], rel=1e-3)
    models = [m for m in metrics if not m["model"].startswith(("folder-", "release-"))]
    (rows,) = [m["rows"] for m in models if m["epsilon"] == 1]
    assert {"FD-EffNet", "KID", "MS-SSIM", "phase accuracy", "correlation"} <= {row["metric"] for row in rows}
    for row in rows:
        assert row["n_patients"] > 0 or row["value"] is None
        if row["value"] is not None and row["low"] is not None:
            assert row["low"] <= row["high"]


# ---- a chapter ----


@pytest.fixture
def chapter(tmp_path: Path) -> SimpleNamespace:
    """Run a notebook of one cell as a chapter; what it printed and where it went."""

    def run(source: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        (tmp_path / "executed").mkdir()
        nbformat.write(notebook, tmp_path / "07_x.ipynb")
        raw, executed = tmp_path / "raw" / "07_x.ipynb", tmp_path / "executed" / "07_x.ipynb"
        paths = (ROOT / "workflow" / "chapter.py", tmp_path / "07_x.ipynb", raw, executed)
        return subprocess.run(
            [sys.executable, *map(str, paths)], capture_output=True, text=True, env=environment(ROOT)
        ), executed

    return SimpleNamespace(run=run)


def test_a_failed_chapter_says_why_in_a_sentence_and_where_its_log_is(chapter: SimpleNamespace) -> None:
    finished, executed = chapter.run(
        "from cardiac_ldm.errors import CohortError\nraise CohortError('p7: no such file')"
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[1:2] == ["07_x: CohortError: p7: no such file"]
    assert "07_x.log" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not executed.exists()


def test_progress_of_a_chapter_reaches_the_terminal_with_its_name(chapter: SimpleNamespace) -> None:
    line = "fine-tuning: 3/8 steps, 00:12 left, then sampling"
    told = f"import os, sys\nos.write(os.dup(sys.stderr.fileno()), b'{line}\\n')"
    finished, executed = chapter.run(told + "\nprint('out')")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.splitlines() == ["07_x: begins", f"07_x: {line}", "07_x: done"]
    assert "out" in executed.read_text()


# ---- what stays ----


def test_clean_says_what_it_deletes_and_leaves_what_was_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = PrivatePlan(24, 6, 2, 1.0, 1, 5.0, 1e-5, noise_multiplier=2.0)
    words = {"stage": "denoiser", "tuned": "all", "private_data": "mine (train)", "public_data": ""}
    simulated = plan.ledger(Randomness(0, simulated=True), **words)
    real = simulated.model_copy(update={"simulated": False})
    for folder, ledger in (("finetune-1", simulated), ("finetune-2", real), ("release/finetune-2", real)):
        (tmp_path / folder).mkdir(parents=True)
        weights = tmp_path / folder / "weights.safetensors"
        weights.write_bytes(b"0" * 1_000_000)
        ledger.bound(weights).save(weights.with_name("privacy.json"))
    for name in ("cohorts/.salt", "cohorts/x/images", "latents/y", "executed/demo/00.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    monkeypatch.setattr(clean, "BUILT", ())
    clean.main()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    spent = ["finetune-2/privacy.json", "finetune-2/weights.safetensors"]
    assert left == ["cohorts/.salt", "finetune-1/privacy.json", *spent, *(f"release/{name}" for name in spent)]
    said = capsys.readouterr().out
    assert re.search(r"1\.0 MB  \S+/finetune-1\n", said)
    assert "kept" in said


def test_clean_waits_for_no_study_that_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    (tmp_path / "kept").touch()
    with FileLock(tmp_path / "workflow.lock"), pytest.raises(ParameterError, match="running"):
        clean.main()
    assert (tmp_path / "kept").exists()


def test_only_a_finished_study_is_published(tmp_path: Path) -> None:
    executed, published = tmp_path / "executed", tmp_path / "published"
    for folder, names in ((executed, ["00_cohorts"]), (published, ["00_cohorts", "03_dp_finetune-eps3"])):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.ipynb").write_text(folder.name)
    with pytest.raises(ParameterError, match="holds no finished study"):
        publish(executed, published)
    assert len(list(published.iterdir())) == 2
    paths = '{}"input_path": "{}notebooks/a.ipynb", "output_path": "{}chapters/laptop/a.ipynb"'
    (executed / "07_gallery.ipynb").write_text(paths.format("executed", "/home/me/clone/", "/home/me/runs/"))
    publish(executed, published)
    assert sorted(path.name for path in published.iterdir()) == ["00_cohorts.ipynb", "07_gallery.ipynb"]
    assert {path.read_text() for path in published.iterdir()} == {"executed", paths.format("executed", "", "")}
