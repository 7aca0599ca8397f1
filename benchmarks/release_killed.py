"""Whether a release that was killed is the one that wasn't: `python -m benchmarks.release_killed` (an hour).

The `demo` profile's private model of the simulated cohort draws 1,000 patients; the sampler takes 3 steps instead of
8, which changes what a patient costs and nothing else here. The same is drawn again by the same command, whose
processes all get SIGKILL when a quarter, half and three quarters of the patients are there; at last it ends. All files
of both folders are compared, byte by byte. A second run on the same day takes the unkilled release of the first.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import psutil
import yaml

from benchmarks import keep
from cardiac_ldm.trained import ROOT

EPSILON, STEPS, KILLED_AT = 1, 3, (0.25, 0.5, 0.75)
_FOLDERS = {"CARDIAC_LDM_RUNS": "runs", "CARDIAC_LDM_RECORD": "record"}


def drawn(place: Path) -> int:
    """How many patients of an unfinished release are there."""
    return len(list((place / "runs").glob("release-*/rows/*.json")))


def release(place: Path, patients: int, until: float = 1.0) -> float:
    """Ask for the release by papermill; below 1, kill all its processes at that part of it. Gives the seconds."""
    command = [sys.executable, "-m", "papermill", "notebooks/08_release.ipynb", str(place / "out.ipynb")]
    for name, value in {"epsilon": EPSILON, "patients": patients, "profile": place / "demo.yaml"}.items():
        command += ["-p", name, str(value)]
    environment = os.environ | {name: str(place / folder) for name, folder in _FOLDERS.items()}
    begun = time.perf_counter()
    with (place / "log.txt").open("a") as log:
        given = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, **given)
        while process.poll() is None:
            time.sleep(0.2)
            if until < 1 and drawn(place) >= until * patients:
                for one in (*psutil.Process(process.pid).children(recursive=True), process):
                    one.kill()
                process.wait()
                return time.perf_counter() - begun
    if process.returncode or until < 1:
        sys.exit(f"{place / 'log.txt'} says why it ended with {process.returncode}")
    return time.perf_counter() - begun


def content(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Release, move it away, release again through three kills, compare; results/release_killed.json is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--place", type=Path, default=Path("runs/release_killed"))
    given = parser.parse_args()
    place = given.place.resolve()
    whole = place / f"whole-{date.today()}"  # a release states its day
    place.mkdir(parents=True, exist_ok=True)
    profile = yaml.safe_load((ROOT / "cardiac_ldm/profiles/demo.yaml").read_text())
    profile["sampling"]["steps"] = STEPS
    (place / "demo.yaml").write_text(yaml.safe_dump(profile))
    if not whole.exists():
        seconds = release(place, given.patients)
        print(f"{given.patients} patients in {seconds:.0f} s", flush=True)
        (made,) = (place / "runs/release").iterdir()
        made.rename(whole)
    for left in (place / "runs").glob("release*"):
        shutil.rmtree(left)
    killed_at = []
    for until in KILLED_AT:
        release(place, given.patients, until)
        killed_at.append(drawn(place))
        print(f"killed at {killed_at[-1]} patients", flush=True)
    release(place, given.patients)
    (made,) = (place / "runs/release").iterdir()
    expected, found = content(whole), content(made)
    differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    print(*differing[:20], sep="\n")
    keep(
        "release_killed",
        patients=given.patients,
        killed_at=killed_at,
        files=len(expected),
        megabytes=sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) / 1e6,
        differing=len(differing),
    )
    shutil.rmtree(made)


if __name__ == "__main__":
    main()
