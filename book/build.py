"""Build the book, and accept no warning: `python book/build.py`, or `python book/build.py EXECUTED INTO`.

`jupyter-book build book` builds the published book as well; this writes its contents anew before that. EXECUTED is a
folder of executed notebooks of your own run, INTO the folder that gets a book of them, with the published one's prose.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

from cardiac_ldm.errors import StudyError

BOOK = Path(__file__).resolve().parent
PARTS = {
    "Results": ["results", "06_", "04_", "05_", "07_", "paper", "limits"],
    "Methods": ["method", "mechanism", "models", "recipe"],
    "Data and training": ["phantom", "00_", "01_", "02_", "03_"],
    "Do it yourself": ["run", "data"],
    "Reference": ["glossary", "api", "cite", "references"],
}


def contents(executed: Path) -> str:
    """Return the `_toc.yml` for the notebooks in a folder: which there are depends on a study's budgets.

    Raises:
        StudyError: a chapter of the study isn't there.
    """
    notebooks = sorted(executed.glob("*.ipynb"), key=lambda path: (path.stem.split("-eps")[0], budget(path)))
    names = [path.stem for path in notebooks]
    prefixes = tuple(name for part in PARTS.values() for name in part)
    for chapter in sorted(path.stem for path in (BOOK.parent / "notebooks").glob("*.ipynb")):
        if not chapter.startswith(prefixes):  # a release is no chapter: who wants one asks for it
            continue
        if not any(name.split("-eps")[0] == chapter for name in names):
            raise StudyError(f"{executed} holds no {chapter}.ipynb: run the study to its end first (make study)")
    pages = sorted(path.stem for path in BOOK.glob("*.md"))
    files = {name: f"executed/{name}" for name in names} | {name: name for name in pages}
    parts = [
        {
            "caption": caption,
            "chapters": [{"file": files[name]} for part in chapters for name in files if _is(part, name)],
        }
        for caption, chapters in PARTS.items()
    ]
    return yaml.safe_dump({"format": "jb-book", "root": "intro", "parts": parts}, sort_keys=False)


def _is(part: str, name: str) -> bool:
    """Whether a page or notebook is the one named, or one that begins so (`03_`)."""
    return name.startswith(part) if part.endswith("_") else name == part


def budget(notebook: Path) -> float:
    """The epsilon in a notebook's name (`03_dp_finetune-eps1`), to sort by."""
    return float(notebook.stem.rpartition("-eps")[2]) if "-eps" in notebook.stem else 0.0


def assemble(executed: Path, book: Path) -> None:
    """Write a book of these executed notebooks: the published one's prose and settings, with its own contents.

    Raises:
        StudyError: a chapter is missing, or `book` is a folder that holds anything but such a book.
    """
    table = contents(executed)
    if book.exists() and any(book.iterdir()) and not (book / "executed").exists():
        raise StudyError(f"{book} holds something else than a book: name a new folder for it")
    if any(book == other or book in other.parents or other in book.parents for other in (BOOK, executed)):
        raise StudyError(f"{book} is where the book or the executed notebooks are: name another folder")
    shutil.rmtree(book, ignore_errors=True)
    shutil.copytree(executed, book / "executed", ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")])
    for path in (*BOOK.glob("*.md"), *BOOK.glob("*.bib")):
        shutil.copy(path, book)
    settings = yaml.safe_load((BOOK / "_config.yml").read_text())
    profiles = ", ".join(sorted({f"`{name}`" for name in map(profile, executed.glob("*.ipynb")) if name}))
    settings["title"] += ": your own run"
    settings["sphinx"]["local_extensions"] = {name: str(BOOK / "_ext") for name in ("local_figures", "measured")}
    settings["sphinx"]["config"]["own_run"] = f", with the profile {profiles}" if profiles else ""
    (book / "_config.yml").write_text(yaml.safe_dump(settings))
    (book / "_toc.yml").write_text(table)


def profile(notebook: Path) -> str:
    """The profile that a notebook ran with: papermill's cell of parameters comes after the notebook's own."""
    code = "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells)
    given = re.findall(r'^profile = "([^"]+)"', code, re.MULTILINE)
    return Path(given[-1]).stem if given else ""


def main(executed: str = "", into: str = "") -> None:
    """Write the contents, build without a warning."""
    book = Path(into).resolve() if into else BOOK
    if into:
        assemble(Path(executed).resolve(), book)
    else:
        (BOOK / "_toc.yml").write_text(contents(BOOK / "executed"))
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [str(jupyter_book), "build", str(book), "--all", "-W", "-n", "--keep-going"]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise StudyError("the book did not build; what is said above tells why")
    print(f"The book is at {book / '_build' / 'html' / 'index.html'}")


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit("usage: python book/build.py [EXECUTED INTO]")
    try:
        main(*sys.argv[1:])
    except StudyError as error:
        sys.exit(f"{type(error).__name__}: {error}")
