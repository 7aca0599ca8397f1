"""papermill as people call it: the ways that were tried, what the first cell checks, and where progress shows."""

import base64
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import nbformat
import papermill.cli
import pytest
import yaml
from click.testing import CliRunner
from jupyter_client.manager import start_new_kernel
from papermill import execute_notebook

from cardiac_ldm.command_line import ONE_VALUE, TWO_VALUES, complete, paths
from cardiac_ldm.errors import StudyError
from cardiac_ldm.parameters import (
    CohortParameters,
    CompareParameters,
    EvaluateParameters,
    FinetuneParameters,
    Parameters,
    ReleaseParameters,
)
from cardiac_ldm.trained import ROOT
from tests.conftest import TINY

pytestmark = pytest.mark.slow

NOTEBOOK = "notebooks/03_dp_finetune.ipynb"
PAPERMILL = str(Path(sys.executable).with_name("papermill"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user's: runs go to tmp_path/runs, and nobody tells the kernel that it's tested."""
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {
        "CARDIAC_LDM_RUNS": str(tmp_path / "runs")
    }


@pytest.fixture(autouse=True)
def sources() -> Iterator[None]:
    """No way of calling papermill may write over a notebook."""
    before = {path: path.read_bytes() for path in (ROOT / "notebooks").iterdir() if path.is_file()}
    yield
    assert {path: path.read_bytes() for path in before} == before


def at_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command at a terminal of 110 columns; its exit status and all that the terminal got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    return process.wait(), shown.decode()


def injected(path: Path) -> str:
    """The cell that papermill has put into a notebook."""
    (cell,) = (c for c in nbformat.read(path, 4).cells if "injected-parameters" in c.metadata.get("tags", []))
    return cell.source


def test_an_installation_registers_what_completes_papermills_command_line() -> None:
    registered = {point.value for point in entry_points(group="papermill.engine")}
    assert "cardiac_ldm.command_line:NBClientEngine" in registered, "install the package again: pip install -e ."


def test_papermill_has_the_options_that_its_command_line_is_read_by() -> None:
    options = [p for p in papermill.cli.papermill.params if p.param_type_name == "option"]
    assert {name for p in options if p.nargs == 2 for name in p.opts} == TWO_VALUES
    assert {name for p in options if p.nargs == 1 and not p.is_flag for name in p.opts} == ONE_VALUE


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a.ipynb", ["a.ipynb"]),
        ("-p epsilon 1 a.ipynb -k python3 --log-output", ["a.ipynb"]),
        ("a.ipynb -pepsilon 1 --kernel=other", ["a.ipynb"]),
        ("a.ipynb -r epsilon b.ipynb out.ipynb", ["a.ipynb", "out.ipynb"]),
        ("- out.ipynb", ["-", "out.ipynb"]),
        ("-f some.yaml -- -odd.ipynb", ["-odd.ipynb"]),
    ],
)
def test_paths_are_told_from_options(line: str, found: list[str]) -> None:
    assert paths(line.split()) == found


LISTENS = """
import json, stat
from pathlib import Path
from ipykernel.connect import get_connection_file
file = Path(get_connection_file())
told = json.loads(file.read_text())
mode = stat.S_IMODE(file.parent.stat().st_mode) & 0o777
sockets = [path for path in file.parent.glob(Path(told["ip"]).name + "-*") if path.is_socket()]
print(told["transport"], f"{mode:o}", len(sockets), file.parent)
"""


def test_a_kernel_talks_through_sockets_of_the_users_alone_and_leaves_none(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    cell = nbformat.v4.new_code_cell(LISTENS)
    spec = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=spec), tmp_path / "in.ipynb")
    command = [PAPERMILL, "--engine", "cardiac_ldm", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    finished = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (output,) = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    *said, folder = output.text.split()
    assert said == ["ipc", "700", "5"]  # all of a kernel's channels
    assert not Path(folder).exists()
    assert "plain text" not in finished.stderr  # so ipykernel warns of TCP


@pytest.mark.parametrize(
    ("line", "module"),
    [
        (NOTEBOOK, "cardiac_ldm.command_line"),
        (f"-p epsilon 1 {NOTEBOOK} out.ipynb", "cardiac_ldm.command_line"),
        ("other/a.ipynb out.ipynb", "papermill.engines"),
    ],
)
def test_notebooks_of_this_study_alone_get_such_a_kernel_unasked(line: str, module: str) -> None:
    told = f"import sys; sys.argv = ['papermill', *{line.split()}]; from papermill.engines import papermill_engines; "
    told += "print(papermill_engines.get_engine().__module__)"
    shown = subprocess.run([sys.executable, "-c", told], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True)
    assert shown.stdout.decode().strip() == module


@pytest.mark.parametrize("line", ["notebooks/03_dp_finetune.ipynb out.ipynb", "other/a.ipynb", "- out.ipynb", "", "-h"])
def test_a_command_that_is_complete_or_about_other_notebooks_stays_as_it_is(line: str) -> None:
    assert complete(line.split()) == line.split()


@pytest.mark.parametrize(
    "line",
    [
        "{papermill} {notebook} -p epsilon 1 > {out}",
        "{papermill} {notebook} -p epsilon 1 < /dev/null > {out}",
        "{papermill} {notebook} -p epsilon 1 <&- > {out}",
        "{papermill} {notebook} -p epsilon 1 < {notebook} > {out}",
        "true | {papermill} {notebook} -p epsilon 1 > {out}",
        "echo words | {papermill} {notebook} -p epsilon 1 > {out}",
        "cat notebooks/00_cohorts.ipynb | {papermill} {notebook} -p epsilon 1 > {out}",
        "true | {papermill} {notebook} -p epsilon 1 | cat > {out}",
        "true | {papermill} {notebook} {out} -p epsilon 1",
        "cat {notebook} | {papermill} - {out} -p epsilon 1",
        "cat {notebook} | {papermill} {out} -p epsilon 1",
        "{python} -m papermill {notebook} -p epsilon 1 < /dev/null > {out}",
        "true | {python} -m papermill {notebook} -p epsilon 1 > {out}",
        "cd {elsewhere}; true | {papermill} {root}/{notebook} -p epsilon 1 > {out}",
        "{papermill} {notebook} -p epsilon 1 --cwd {elsewhere} > {out}",
    ],
)
def test_the_command_runs_the_notebook_that_it_names(line: str, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    out, words = tmp_path / "out.ipynb", {"papermill": f"{PAPERMILL} --prepare-only", "notebook": NOTEBOOK}
    words["python"] = sys.executable
    line = line.replace("-m papermill", "-m papermill --prepare-only")
    line = line.format(**words, out=out, root=ROOT, elsewhere=tmp_path / "elsewhere")
    finished = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert "epsilon = 1" in injected(out)
    assert "DP" in str(nbformat.read(out, 4).cells) or "differential privacy" in str(nbformat.read(out, 4).cells)


def test_an_idle_pipe_on_standard_input_is_not_waited_for(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [PAPERMILL, "--prepare-only", NOTEBOOK, "-p", "epsilon", "1"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        (tmp_path / "out.ipynb").write_bytes(process.stdout.read())  # ends while our end of the pipe is open
        assert process.wait(timeout=120) == 0
    assert "epsilon = 1" in injected(tmp_path / "out.ipynb")


@pytest.mark.parametrize("before", ["", "sleep 5 | "])
def test_at_a_terminal_the_executed_notebook_goes_under_runs(
    before: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    environment["CARDIAC_LDM_RUNS"] = str(tmp_path / "my {runs}")
    command = f"{before}{PAPERMILL} {NOTEBOOK} -p epsilon 1 --prepare-only"
    status, shown = at_a_terminal(["bash", "-c", command], environment)
    assert status == 0, shown
    (out,) = (tmp_path / "my {runs}" / "notebooks").iterdir()
    assert str(out) in shown
    assert out.name.startswith("03_dp_finetune-")
    assert "epsilon = 1" in injected(out)


def given(options: list[str], tmp_path: Path, notebook: str = NOTEBOOK) -> dict[str, Any]:
    """What a notebook's first cells define when papermill is called with these options."""
    out = tmp_path / "out.ipynb"
    called = [str(ROOT / notebook), str(out), "--prepare-only", "-p", "profile", str(TINY), *options]
    result = CliRunner().invoke(papermill.cli.papermill, called, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    namespace: dict[str, Any] = {}
    for cell in nbformat.read(out, 4).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    return namespace


@pytest.mark.parametrize(
    ("options", "epsilon"),
    [
        (["-p", "epsilon", "1"], 1),
        (["-p", "epsilon", "1.0"], 1),
        (["-p", "epsilon", "1e-1"], 0.1),
        (["-p", "epsilon", "inf"], math.inf),
        (["-r", "epsilon", "1"], 1),
        (["-r", "epsilon", " 1e-1 "], 0.1),
        (["-r", "epsilon", "inf"], math.inf),
        (["-y", "{epsilon: 1}"], 1),
        (["-y", "epsilon: '1'"], 1),
        (["-y", "{epsilon: 1e-1}"], 0.1),  # text to YAML 1.1
        (["-y", "{epsilon: .inf}"], math.inf),
        (["-y", "{epsilon: inf}"], math.inf),
        (["-b", base64.b64encode(b"epsilon: 1").decode()], 1),
        (["-f", "given.yaml"], 1),
        (["-f", "given.yaml", "-p", "epsilon", "2"], 2),
    ],
    ids=str,
)
def test_a_budget_is_a_number_however_it_is_given(options: list[str], epsilon: float, tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text("epsilon: 1\n")
    options = [str(tmp_path / option) if option == "given.yaml" else option for option in options]
    assert FinetuneParameters.read(given(options, tmp_path)).epsilon == epsilon


@pytest.mark.parametrize("value", ["nan", "-1", "0", "True", "None", "ten", "1,2", "", "[1]"])
def test_a_budget_that_is_no_positive_number_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^epsilon: .*: must be a number above 0"):
        FinetuneParameters.read(given(["-p", "epsilon", value], tmp_path))


@pytest.mark.parametrize(
    ("options", "budgets"),
    [
        (["-p", "epsilons", "1"], (1,)),
        (["-p", "epsilons", "10,1, 1.0 ,0"], (0, 1, 10)),
        (["-p", "epsilons", "inf"], (math.inf,)),
        (["-r", "epsilons", "1e-1, inf"], (0.1, math.inf)),
        (["-y", '{epsilons: [0, 1, "inf", 1.0, "1"]}'], (0, 1, math.inf)),
        (["-y", "{epsilons: 1}"], (1,)),
    ],
    ids=str,
)
def test_budgets_are_a_list_or_text_each_once(options: list[str], budgets: tuple[float, ...], tmp_path: Path) -> None:
    assert CompareParameters.read(given(options, tmp_path, "notebooks/06_tradeoff.ipynb")).budgets == budgets


@pytest.mark.parametrize("value", ["one", "0 1", "1,,10", "nan", "-1", "True", "None", ""])
def test_budgets_of_which_one_is_none_are_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^epsilons: .*must be a number of at least 0; separate them by commas"):
        CompareParameters.read(given(["-p", "epsilons", value], tmp_path, "notebooks/06_tradeoff.ipynb"))
    with pytest.raises(StudyError, match="must hold at least one budget"):
        CompareParameters.read({"epsilons": []})
    with pytest.raises(StudyError, match=r"'\[1\]' must be a number"):
        CompareParameters.read({"epsilons": [[1]]})


@pytest.mark.parametrize("value", ["inf", "7", "8.5", "100000", "many"])
def test_patients_of_a_release_are_a_whole_number_that_measures_and_names_allow(value: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^patients: .*must be a whole number from 8, which measures need, to 99999"):
        ReleaseParameters.read(given(["-p", "patients", value], tmp_path, "notebooks/08_release.ipynb"))


@pytest.mark.parametrize(("option", "value", "seed"), [("-p", "3", 3), ("-r", "0", 0), ("-p", "0.0", 0)])
def test_a_seed_is_a_whole_number_however_it_is_given(option: str, value: str, seed: int, tmp_path: Path) -> None:
    read = FinetuneParameters.read(given([option, "seed", value], tmp_path)).seed
    assert (read, type(read)) == (seed, int)


@pytest.mark.parametrize("value", ["1.5", "-1", "True", "nan", "inf", "4294967296", "one"])
def test_what_is_no_seed_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^seed: .*: must be a whole number from 0 to 4294967295"):
        FinetuneParameters.read(given(["-p", "seed", value], tmp_path))


def test_a_name_that_looks_like_a_number_is_asked_for_as_text(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cohort_private: 7: must be text; papermill's option -r"):
        FinetuneParameters.read(given(["-p", "cohort_private", "7"], tmp_path))


@pytest.mark.parametrize("options", [["-p", "epsilom", "1"], ["-y", "{epsilom: [1]}"], ["-p", "study", "1"]])
def test_a_parameter_that_the_notebook_lacks_is_refused(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such parameter"):
        FinetuneParameters.read(given(options, tmp_path))


def test_a_first_cell_that_is_run_again_ignores_what_later_cells_defined(tmp_path: Path) -> None:
    later = given([], tmp_path) | {"study": object(), "losses": {0: 1}, "captions": ["a"]}
    assert FinetuneParameters.read(later).epsilon == 10


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("sampling.steps", 0, "sampling.steps: 0: .*greater than or equal to 1"),
        ("sampling.steps", 151, "sampling.steps: 151: .*less than or equal to 150"),
        ("sampling.guidance", -1, "sampling.guidance"),
        ("sampling.guidance", math.nan, "sampling.guidance"),
        ("evaluation.resamples", 0, "evaluation.resamples"),
        ("evaluation.half_sample_pairs", 1, "evaluation.half_sample_pairs"),
        ("evaluation.inception", "nowhere.pt", "evaluation.inception"),
        ("utility.few", 11, "few: 11 of a training set's 10 patients"),
        ("utility.few", 7, "utility.few: 7"),
        ("patients.public.train", 0, "patients.public.train: 0"),
        ("anatomy.segmenter.batch", 0, "anatomy.segmenter.batch: 0"),
        ("overfit.learning_rate", 0, "overfit.learning_rate: 0"),
        ("autoencoder.steps", 0, "autoencoder.steps: 0"),
        ("autoencoder.texture.steps", 0, "autoencoder.texture.steps: 0"),
        ("pretrain.batch", 0, "pretrain.batch: 0"),
        ("pretrain.average_decay", 1, "pretrain.average_decay: 1"),
        ("finetune.steps", 0, "finetune.steps: 0"),
        ("finetune.clip", 0, "finetune.clip: 0"),
        ("finetune.draws", 0, "finetune.draws: 0"),
        ("finetune.delta", 1, "finetune.delta: 1"),
        ("finetune.delta", 0.1, r"delta: 0.1 must lie between 0 and 1/N = 1/24"),
        ("finetune.expected_batch", 0, "finetune.expected_batch: 0"),
        ("denoiser.channels", [8, 12], "autoencoder or denoiser can't be built"),
        ("denoiser.attention", [True], "autoencoder or denoiser can't be built"),
        ("autoencoder.channels", [], "autoencoder or denoiser can't be built|autoencoder.channels"),
        ("patients", {"private": {"train": 24, "validation": 8, "test": 8}}, "patients: must say how many are public"),
    ],
)
def test_a_setting_that_cant_work_is_found_in_the_first_cell(
    setting: str, value: object, message: str, tmp_path: Path
) -> None:
    profile = yaml.safe_load(TINY.read_text())
    *parents, name = setting.split(".")
    place = profile
    for parent in parents:
        place = place[parent]
    place[name] = value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(StudyError, match=message):
        FinetuneParameters.read({"profile": str(tmp_path / "mine.yaml"), "epsilon": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TINY.read_text().encode("utf-16"), r"mine.yaml: can't be read \(.*save it as UTF-8"),
        ("# für uns\n".encode("latin-1") + TINY.read_bytes(), r"mine.yaml: can't be read \(.*save it as UTF-8"),
        (TINY.read_bytes() + b"sampling: {steps: 3, guidance: 2}\n", "sampling is given twice"),
    ],
)
def test_a_profile_of_another_encoding_or_with_a_setting_twice_is_one_sentence(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(StudyError, match=message):
        FinetuneParameters.read({"profile": str(tmp_path / "mine.yaml"), "epsilon": 1})


def test_cohorts_and_budgets_that_cant_work_are_found_in_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CARDIAC_LDM_ROOT_ACDC", raising=False)
    terms = {"simulated": False, "licence": "none", "citation": "none", "reader": {"kind": "acdc"}}
    splits = {"train": ["patient001"], "validation": ["patient002"], "test": ["patient003"]}
    hospital, root = tmp_path / "hospital.yaml", tmp_path / "files"
    spending = {"budget": {"epsilon": 10, "delta": 1e-5}}
    hospital.write_text(yaml.safe_dump({"name": "hospital", "role": "private", "splits": splits} | terms | spending))
    clinic = tmp_path / "clinic.yaml"
    clinic.write_text(yaml.safe_dump({"name": "clinic", "role": "public", "splits": splits} | terms))
    for patient in ("patient001", "patient003"):
        (root / "training" / patient).mkdir(parents=True)
    tiny, there = {"profile": str(TINY)}, {"data_root_private": str(root), "cohort_private": str(hospital)}
    many: dict[str, Any] = {"data_root_public": str(root), "cohort_public": str(clinic)}

    def refused(given: dict[str, Any], message: str, of: type[Parameters] = FinetuneParameters) -> None:
        with pytest.raises(StudyError, match=message):
            of.read(tiny | given)

    refused({"cohort_private": "nowhere"}, "there's no such manifest")
    refused({"cohort_public": "phantom_private"}, "cohort_public: phantom_private is private")
    refused({"cohort_private": str(hospital)}, "hospital: no data folder is named")
    refused(there | {"data_root_private": str(root / "lost")}, "is no folder")
    refused(there, "hospital: 1 of 3 patients aren't in ")  # nobody's name: they are real
    refused(many, r"clinic: 1 of 3 patients \(patient002\) aren't in ")
    refused({"cohort_beside": "acdc"}, "acdc: no data folder is named", CohortParameters)
    refused({"folder": str(root)}, "folder: .* has no attributes.csv", EvaluateParameters)
    refused({"epsilon": 1e-12}, "epsilon: 1e-12 protects nobody or teaches nothing; ask for 0.01 to 100")
    refused({"epsilons": "1, 200"}, "epsilon: 200.0 protects nobody or teaches nothing", CompareParameters)
    (root / "training" / "patient002").mkdir()
    (root / "training" / "attributes.csv").touch()
    beside = there | {"folder": str(root / "training"), "epsilons": "0"}
    refused(beside, "folder: .* shares files with hospital", EvaluateParameters)
    refused(there | {"epsilon": math.inf}, "epsilon: inf on hospital would reveal real private patients")
    small = yaml.safe_load(TINY.read_text())
    small["patients"]["private"]["test"] = 7
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    refused({"profile": str(tmp_path / "small.yaml")}, r"patients.private.test: 7; at least 8", CompareParameters)
    FinetuneParameters.read({"profile": str(tmp_path / "small.yaml")})


def test_another_kernel_does_and_one_that_is_missing_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    """It must have the library installed; `python -m ipykernel install --user --name other` makes one."""
    kernel = tmp_path / "kernels" / "other"
    kernel.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "Other", "language": "python"}))
    environment |= {"JUPYTER_PATH": str(tmp_path)}
    for name, message in (("other", "ParameterError: epsilon: 0: must be"), ("lost", "No such kernel named lost")):
        finished = subprocess.run(
            [
                PAPERMILL,
                NOTEBOOK,
                str(tmp_path / "out.ipynb"),
                "-p",
                "epsilon",
                "0",
                "-k",
                name,
                "--cwd",
                str(tmp_path),
            ],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert finished.returncode != 0
        assert message in finished.stderr


@pytest.mark.parametrize("absolute", [True, False])
def test_python_runs_a_notebook_from_any_folder(
    absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / NOTEBOOK
    execute_notebook(
        str(path) if absolute else os.path.relpath(path, tmp_path.resolve()),
        "out.ipynb",
        parameters={"epsilon": 1},
        prepare_only=True,
        progress_bar=False,
    )
    assert "epsilon = 1" in injected(tmp_path / "out.ipynb")


def streams(path: Path) -> list[str]:
    """Names of the streams that a notebook's cells have caught."""
    return [o.name for c in nbformat.read(path, 4).cells for o in c.get("outputs", []) if o.output_type == "stream"]


STAGES = """
import time
from cardiac_ldm.progress import awaited, tqdm

@awaited("pretraining")
def pretrained():
    for _ in tqdm(range(3), desc="pretrain", unit="step"):
        time.sleep(0.2)
    for _ in tqdm(range(3), desc="sample", unit="batch", leave=False):
        pass

@awaited("fine-tuning")
def finetuned():
    pretrained()
    for _ in tqdm(range(3), desc="private denoiser", unit="step"):
        time.sleep(0.2)

finetuned()
"""


def test_progress_goes_where_a_person_looks(tmp_path: Path, environment: dict[str, str]) -> None:
    """The same with the stages themselves: test_pipeline."""
    notebook, out, log = tmp_path / "stages.ipynb", tmp_path / "out.ipynb", tmp_path / "log"
    cells = [nbformat.v4.new_code_cell(STAGES)]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebook)
    environment["PYTHONPATH"] = str(ROOT)
    with log.open("w") as stderr:
        subprocess.run([PAPERMILL, notebook, out], cwd=ROOT, env=environment, stderr=stderr, check=True)
    assert streams(out) == []
    lines = log.read_text()
    assert re.search(r"^pretrain: 0/3 steps, .*left, then fine-tuning$", lines, re.M)
    assert re.search(r"^pretrain: 3/3 steps, [\d.]+ steps/s, 00:00 left, then fine-tuning$", lines, re.M)
    assert re.search(r"^private denoiser: 3/3 steps, [\d.]+ steps/s, 00:00 left$", lines, re.M)
    assert "sample" not in lines  # parts of a stage show when they take long
    assert "IProgress" not in lines

    status, shown = at_a_terminal([PAPERMILL, str(notebook), str(out)], environment)
    assert status == 0, shown
    assert streams(out) == []
    assert re.search(r"\rpretrain: 100%\|█+\| 3/3 \[\d\d:\d\d<00:00, +[\d.]+step/s\], then fine-tuning", shown)
    assert re.search(r"\rprivate denoiser: 100%\|█+\| 3/3 \[\d\d:\d\d<00:00, +[\d.]+step/s\]", shown)


@pytest.mark.parametrize("attended", [True, False])
def test_a_notebook_that_is_open_shows_the_bar_in_its_cell(
    attended: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manager, client = start_new_kernel()
    caught: list[dict[str, Any]] = []
    loop = "from cardiac_ldm.progress import tqdm\nfor _ in tqdm(range(3), desc='counting'): pass"
    try:
        reply = client.execute_interactive(loop, allow_stdin=attended, output_hook=caught.append, timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok"
    cell = [m["content"] for m in caught if m["msg_type"] != "status" and m["msg_type"] != "execute_input"]
    if attended:
        assert {content["name"] for content in cell} == {"stdout"}
        assert "\rcounting: 100%|" in "".join(content["text"] for content in cell)
        assert "counting" not in capfd.readouterr().err
    else:
        assert cell == []
        assert "counting: 3/3 steps, " in capfd.readouterr().err


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from cardiac_ldm.parameters import Parameters\nfrom cardiac_ldm.study import Study\n"
        f"print(len(Study(Parameters(profile={str(TINY)!r})).private.split('train')))\n"
    )
    finished = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert finished.returncode != 0
    assert 'put its calls under `if __name__ == "__main__":`' in finished.stderr
    assert "a script lacks `if __name__" in finished.stderr.splitlines()[-1]
