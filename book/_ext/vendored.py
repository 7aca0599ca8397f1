"""NiiVue and MathJax, fetched once from npm into `assets/vendor/`: `python book/_ext/vendored.py`.

The book's Sphinx extension does the same when they're lacking, so that `jupyter-book build book` is all it takes.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from cardiac_ldm.errors import StudyError

VENDOR = Path(__file__).resolve().parents[1] / "assets" / "vendor"

# folder: npm package and version, sha256 of its archive, and what of it is used (path or folder inside the archive ->
# path or folder inside ours)
PACKAGES = {
    "niivue": (
        "@niivue/niivue@0.69.0",
        "6e9a6a471b428eb3b258a0086beca9187d95e43a781a39e8a519c6da246af485",
        {"package/dist/niivue.umd.js": "niivue.umd.js"},
    ),
    "mathjax": (
        "mathjax@3.2.2",
        "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
        {
            "package/es5/tex-mml-chtml.js": "tex-mml-chtml.js",
            "package/es5/output/chtml/fonts/": "output/chtml/fonts/",
        },
    ),
}


def fetch() -> None:
    """Put each package into its folder, whole or not at all; returns at once when they're there.

    Raises:
        StudyError: npm isn't there, could not fetch a package, or brought another one than the one pinned here.
    """
    for folder, (package, checksum, members) in PACKAGES.items():
        source = f"{package} {checksum}\n"
        stamp = VENDOR / folder / "SOURCE"
        if stamp.exists() and stamp.read_text() == source:
            continue
        VENDOR.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=VENDOR, prefix=".") as scratch:  # Sphinx leaves hidden files out
            archive = _pack(package, Path(scratch))
            if hashlib.sha256(archive.read_bytes()).hexdigest() != checksum:
                raise StudyError(f"{package}: the archive fetched is not the one pinned in {Path(__file__).name}")
            fresh = Path(scratch) / folder
            _extract(archive, members, fresh)
            (fresh / stamp.name).write_text(source)
            shutil.rmtree(VENDOR / folder, ignore_errors=True)
            fresh.replace(VENDOR / folder)


def sources(vendor: Path) -> dict[str, str]:
    """What lies in a folder of vendored packages: folder -> package, version and checksum."""
    return {stamp.parent.name: stamp.read_text() for stamp in vendor.glob("*/SOURCE")}


def _pack(package: str, folder: Path) -> Path:
    """Fetch a package's archive; gives up within a minute, as the book can do without."""
    npm = shutil.which("npm", path=str(Path(sys.executable).parent)) or shutil.which("npm")
    if npm is None:
        raise StudyError(f'{package}: npm is needed to fetch it; pip install "cardiac-ldm[book]" brings it')
    command = [npm, "pack", "--silent", "--no-update-notifier", "--fetch-retries=1", "--fetch-timeout=20000"]
    command += ["--fetch-retry-mintimeout=1000", package]
    packed = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if packed.returncode:
        raise StudyError(f"{package}: npm could not fetch it; is there a network?")
    return folder / packed.stdout.split()[-1]


def _extract(archive: Path, members: dict[str, str], target: Path) -> None:
    """Unpack the files named by `members` (path or folder inside the archive -> path or folder under `target`)."""
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            for source, destination in members.items():
                if member.name.startswith(source):
                    path = target / (destination + member.name.removeprefix(source))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as content:  # type: ignore[union-attr]
                        path.write_bytes(content.read())


if __name__ == "__main__":
    try:
        fetch()
    except StudyError as error:
        sys.exit(f"{error}\nThe book can be built without: its volumes don't turn then, and its equations aren't set.")
