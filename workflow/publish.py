"""Make a run's executed notebooks the published ones: `python -m workflow.publish PROFILE`, for maintainers."""

import re
import sys
from pathlib import Path

from cardiac_ldm.errors import ParameterError, StudyError
from workflow.settings import runs_folder

PUBLISHED = Path(__file__).resolve().parents[1] / "book" / "executed"
_PATH = re.compile(r'("(?:in|out)put_path": ")/[^"]*/((?:notebooks|chapters)/)')


def publish(executed: Path, published: Path) -> None:
    """Put the notebooks of `executed` in the place of those in `published`; the run keeps its own.

    Where on the machine they lay, which papermill writes down, is left out.

    Raises:
        ParameterError: the study hasn't been run to its end.
    """
    notebooks = sorted(executed.glob("*.ipynb"))
    if not any(path.stem.startswith("07_") for path in notebooks):
        raise ParameterError(f"{executed}: holds no finished study; run it first: make study PROFILE={executed.name}")
    for path in published.glob("*.ipynb"):
        path.unlink()
    for path in notebooks:
        (published / path.name).write_text(_PATH.sub(r"\1\2", path.read_text()))


if __name__ == "__main__":
    try:
        publish(runs_folder() / "executed" / sys.argv[1], PUBLISHED)
    except StudyError as error:
        sys.exit(f"{type(error).__name__}: {error}")
