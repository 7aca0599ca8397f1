"""Delete what runs left, and say what: `python -m workflow.clean`. What was spent on real patients stays.

A model that learnt from real private patients has been paid for with their privacy, and training it again would be paid
for again: its folder stays whole, and so does every other that holds such a model's ledger (synthetic cohorts and what
was released). Of models of simulated patients their ledgers stay, and the salt that names real cohorts stays.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cardiac_ldm.errors import ParameterError, StudyError
from cardiac_ldm.privacy import Ledger
from workflow.settings import only_workflow, runs_folder

ROOT = Path(__file__).resolve().parents[1]
BUILT = (ROOT / "book" / "_build", ROOT / ".snakemake")


def kept(runs: Path) -> Iterator[Path]:
    """The files and folders below `runs` that stay."""
    for ledger in sorted(runs.rglob("privacy.json")):
        if about_real_patients(ledger):
            yield ledger.parent
        elif ledger.relative_to(runs).parts[0].startswith("finetune-"):
            yield ledger
    yield from runs.glob("cohorts/.salt")


def about_real_patients(ledger: Path) -> bool:
    """Whether a model learnt from real private patients; one whose ledger can't be read may have."""
    try:
        told = Ledger.load(ledger)
    except (StudyError, ValueError, OSError):
        return True
    return told.guarantee != "public data only" and not told.simulated


def leave_only(folder: Path, stay: set[Path]) -> None:
    """Delete all of a folder but what `stay` names, and what that lies in."""
    for path in folder.iterdir():
        if path in stay:
            continue
        if path.is_dir() and not path.is_symlink():
            if any(path in other.parents for other in stay):
                leave_only(path, stay)
            else:
                shutil.rmtree(path)
        else:
            path.unlink()


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.lstat().st_size if not path.is_dir() else sum(p.lstat().st_size for p in path.rglob("*") if p.is_file())


def main() -> None:
    """List what lies in `runs` and what was built, with sizes, and delete it but for the records."""
    runs = runs_folder().absolute()
    if runs == ROOT or runs in ROOT.parents:
        raise ParameterError(f"CARDIAC_LDM_RUNS: {runs} holds this clone, and is not a folder of runs; name another")
    only_workflow(runs)
    stay = set(kept(runs))
    for path in (*sorted(runs.iterdir()), *filter(Path.exists, BUILT)):
        print(f"{size(path) / 1e6:10.1f} MB  {path}")
    for folder in (runs, *filter(Path.exists, BUILT)):
        leave_only(folder, stay)
        if not any(folder.iterdir()):
            folder.rmdir()
    print("deleted, but for the records of what was spent on private patients:" if stay else "deleted")
    for path in sorted(stay):
        print(f"      kept  {path}")


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        sys.exit(f"{type(error).__name__}: {error}")
