"""Build the book from its prose and `executed/`: `python book/build.py`. Only the first build needs the network."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import nbformat
import plotly
import yaml

from cardiac_ldm.errors import StudyError

BOOK = Path(__file__).resolve().parent
EXECUTED = BOOK / "executed"
HTML = BOOK / "_build" / "html"
VENDOR = BOOK / "assets" / "vendor"

# npm package and version, sha256 of its archive, and where what's used of it goes
PACKAGES = {
    "@niivue/niivue@0.69.0": (
        "6e9a6a471b428eb3b258a0086beca9187d95e43a781a39e8a519c6da246af485",
        {"package/dist/niivue.umd.js": "niivue.umd.js"},
    ),
    "mathjax@3.2.2": (
        "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
        {
            "package/es5/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
            "package/es5/output/chtml/fonts/": "mathjax/output/chtml/fonts/",
        },
    ),
}

PARTS = {
    "Background": ["method", "mechanism", "models", "recipe", "data", "phantom"],
    "The study": ["00_", "01_", "02_"],
    "Private models": ["03_"],
    "Evaluation": ["04_", "05_"],
    "Results": ["06_", "07_"],
    "Appendix": ["references"],
}


def fetch_vendored() -> None:
    """Put MathJax, NiiVue and plotly under `assets/vendor/`, checksums verified; returns at once when they're there."""
    stamp = VENDOR / "SOURCES.json"
    sources = {"plotly": plotly.__version__, **{package: checksum for package, (checksum, _) in PACKAGES.items()}}
    if stamp.exists() and json.loads(stamp.read_text()) == sources:
        return
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise StudyError('npm is needed to fetch the book\'s viewers: pip install "cardiac-ldm[book]" brings it')
    VENDOR.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=VENDOR.parent) as scratch:
        fresh = Path(scratch) / "vendor"
        for package, (checksum, members) in PACKAGES.items():
            command = [npm, "pack", "--silent", "--pack-destination", scratch, package]
            packed = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            if packed.returncode:
                raise StudyError(f"{package}: npm could not fetch it; the book's first build needs the network")
            archive = Path(scratch) / packed.stdout.split()[-1]
            if hashlib.sha256(archive.read_bytes()).hexdigest() != checksum:
                raise StudyError(f"{package}: the archive fetched is not the one pinned in {Path(__file__).name}")
            extract(archive, members, fresh)
        shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", fresh)
        (fresh / stamp.name).write_text(json.dumps(sources, indent=2))
        shutil.rmtree(VENDOR, ignore_errors=True)
        fresh.replace(VENDOR)


def extract(archive: Path, members: dict[str, str], target: Path) -> None:
    """Unpack the files named by `members` (path or folder inside the archive -> path or folder under `target`)."""
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            for source, destination in members.items():
                if member.name.startswith(source):
                    path = target / (destination + member.name.removeprefix(source))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as content:  # type: ignore[union-attr]
                        path.write_bytes(content.read())


def write_contents() -> None:
    """Write `_toc.yml` from the chapters that are there: which runs a study has depends on its budgets."""
    notebooks = sorted(EXECUTED.glob("*.ipynb"), key=lambda path: (path.stem.split("-eps")[0], budget(path)))
    if not notebooks:
        raise StudyError(f"{EXECUTED} holds no notebook: run the study first (make study)")
    files = [
        "method",
        "mechanism",
        "models",
        "recipe",
        "data",
        "phantom",
        "references",
        *(f"executed/{path.stem}" for path in notebooks),
    ]
    parts = [
        {"caption": caption, "chapters": [{"file": f} for f in files if Path(f).name.startswith(tuple(prefixes))]}
        for caption, prefixes in PARTS.items()
    ]
    contents = {"format": "jb-book", "root": "intro", "parts": [part for part in parts if part["chapters"]]}
    (BOOK / "_toc.yml").write_text(yaml.safe_dump(contents, sort_keys=False))


def budget(notebook: Path) -> float:
    """The epsilon in a notebook's name (`03_dp_finetune-eps1`), to sort by."""
    return float(notebook.stem.rpartition("-eps")[2]) if "-eps" in notebook.stem else 0.0


def check_pages() -> None:
    """Raise StudyError unless every chapter has its page, and every figure of a notebook is on it."""
    for source in [*BOOK.glob("*.md"), *EXECUTED.glob("*.ipynb")]:
        page = (HTML / source.relative_to(BOOK)).with_suffix(".html")
        if not page.exists():
            raise StudyError(f"{page}: the build made no such page")
        if source.suffix == ".ipynb":
            outputs = [o for cell in nbformat.read(source, 4).cells for o in cell.get("outputs", [])]
            if any(output.output_type == "error" for output in outputs):
                raise StudyError(f"{source}: its execution ended in an error; run the study again")
            figures = sum("bk-" in output.get("data", {}).get("text/html", "")[:20] for output in outputs)
            html = page.read_text()
            if html.count('<div class="bk-') != figures or (outputs and "cell_output" not in html):
                raise StudyError(f"{page}: outputs of the notebook are missing ({figures} figures expected)")


def main() -> None:
    """Fetch what's vendored, write the contents, build without a warning, check what was built."""
    fetch_vendored()
    write_contents()
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [str(jupyter_book), "build", str(BOOK), "--all", "-W", "-n", "--keep-going"]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise StudyError("the book did not build; the warnings above say why")
    check_pages()
    print(f"The book is at {HTML / 'index.html'}")


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        sys.exit(f"{type(error).__name__}: {error}")
