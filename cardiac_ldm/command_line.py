"""What `papermill notebooks/NAME.ipynb` leaves open: at a terminal, or with a pipe on its standard input.

At a terminal papermill refuses to run without an output path; with a pipe on standard input it takes the one path for
the output, waits for a notebook to come through the pipe, and writes over the one that was named. It imports what
packages register as its engines before it looks at its command line, so this module, which is registered, can complete
that line. It does so for a notebook of this study alone, named alone: standard input becomes empty, and at a terminal
the executed notebook goes to `runs/notebooks`, never over another. A command that says where to goes as it was.

Kernels of this study's notebooks don't talk over TCP, which others on the machine could listen to.
"""

import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from stat import S_ISFIFO
from typing import Any

from papermill import engines
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
TWO_VALUES = {"-p", "-r", "--parameters", "--parameters_raw"}
ONE_VALUE = {"-f", "-y", "-b", "-k", "-l", "--parameters_file", "--parameters_yaml", "--parameters_base64", "--engine"}
ONE_VALUE |= {"--autosave-cell-every", "--kernel", "--language", "--cwd", "--stdout-file", "--stderr-file"}
ONE_VALUE |= {"--log-level", "--start-timeout", "--start_timeout", "--execution-timeout"}


class NBClientEngine(engines.NBClientEngine):
    """papermill's own engine, but for its kernels' messages: they go through sockets in a folder of the user's alone.

    Windows has none: there they go over TCP, as papermill's do.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **settings: Any) -> Any:  # noqa: ANN401
        """Execute a notebook with a kernel of its own."""
        if sys.platform == "win32":
            return super().execute_managed_notebook(nb_man, kernel_name, **settings)
        short = None if len(tempfile.gettempdir()) < 60 else "/tmp"  # a socket's path has 100 characters or so
        with tempfile.TemporaryDirectory(prefix="kernel-", dir=short) as folder:
            apart = Config(KernelManager={"transport": "ipc", "connection_file": f"{folder}/kernel.json"})
            return super().execute_managed_notebook(nb_man, kernel_name, config=apart, **settings)


def of_this_study(arguments: list[str]) -> bool:
    """Whether papermill's arguments name a notebook of this study."""
    return bool(given := paths(arguments)) and Path(given[0]).resolve().parent == ROOT / "notebooks"


def paths(arguments: list[str]) -> list[str]:
    """The paths among papermill's arguments: what is neither an option nor an option's value."""
    found: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "--":
            return found + left
        if argument == "-" or not argument.startswith("-"):
            found.append(argument)
        elif argument in TWO_VALUES:
            del left[:2]
        elif argument in ONE_VALUE or argument[:2] in TWO_VALUES:
            del left[:1]
    return found


def complete(arguments: list[str]) -> list[str]:
    """Papermill's arguments with the output path that they lack; empties a standard input that isn't meant."""
    given = paths(arguments)
    if len(given) != 1 or not of_this_study(arguments) or "--help-notebook" in arguments:
        return arguments
    if _has_input():
        _empty_input()
    if not sys.stdout.isatty():
        return arguments  # papermill writes the notebook there
    folder = Path(os.environ.get("CARDIAC_LDM_RUNS", ROOT / "runs")) / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{Path(given[0]).stem}-{datetime.now():%Y-%m-%d-%H%M%S}.ipynb"
    output = str(folder / name).replace("{", "{{").replace("}", "}}")  # papermill fills in what is in braces
    return [*arguments, output]


def _has_input() -> bool:
    """Whether papermill would read standard input, or stumble over one that is closed."""
    try:
        return S_ISFIFO(os.fstat(0).st_mode)
    except OSError:
        return True


def _empty_input() -> None:
    empty = os.open(os.devnull, os.O_RDONLY)
    if empty:
        os.dup2(empty, 0)
        os.close(empty)


if Path(sys.argv[0]).name in ("papermill", "papermill.exe") or sys.orig_argv[1:3] == ["-m", "papermill"]:
    if of_this_study(sys.argv[1:]):
        engines.papermill_engines.register(None, NBClientEngine)
    sys.argv[1:] = complete(sys.argv[1:])
