"""The data holder's path from a folder to a release that verifies: `python -m benchmarks.release_path [--patients N]`.

The real patients of ACDC stand in for a hospital's: their folder (CARDIAC_LDM_ROOT_ACDC) is taken as private. Commands
are those of a new user, in processes of their own, each timed; runs and record lie in a folder of their own. Kept are
commands, times and what `verify.py` says: nothing of the patients. Last, every file of the release is searched
for their names, paths and hashes, and their attributes are held against those of the release.
"""

import argparse
import csv
import gzip
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import keep
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, load_manifest
from cardiac_ldm.parameters import ReleaseParameters
from cardiac_ldm.study import Study

EPSILON, PLACES = 10, 100


def run(place: Path, steps: list[dict[str, object]], shown: str, *command: str, expected: int = 0) -> str:
    """Run a command, which is `shown`, and keep how long it took; what it prints."""
    begun = time.perf_counter()
    environment = os.environ | {"CARDIAC_LDM_RUNS": str(place / "runs"), "CARDIAC_LDM_RECORD": str(place / "record")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != expected:
        sys.exit(f"{shown}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    steps.append({"command": shown, "seconds": time.perf_counter() - begun})
    print(steps[-1], flush=True)
    return done.stdout


def leaks(release: Path, names: set[str], hashes: set[str], paths: set[str]) -> int:
    """In how many files of a release a patient's name, hash or path stands."""
    found, words = 0, [re.escape(word).encode() for word in names | hashes | paths]
    pattern = re.compile(b"|".join(words))
    for path in release.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += bool(pattern.search(gzip.decompress(data) if path.suffix == ".gz" else data))
    return found


def same_attributes(release: Path, known: np.ndarray) -> int:
    """Released patients whose ventricular volumes are all some private volume's (n, 14), to half a per cent."""
    columns = [ATTRIBUTE_NAMES.index(name) for name in ("LVEDV", "LVESV", "RVEDV", "RVESV")]
    rows = list(csv.DictReader((release / "attributes.csv").open()))[::2]
    requested = np.array([[float(row[ATTRIBUTE_NAMES[i]]) for i in columns] for row in rows])
    apart = np.abs(requested[:, None] / known[None, :, columns] - 1).max(axis=2)
    return int((apart < 0.005).any(axis=1).sum())


def main() -> None:
    """Walk the path, and keep results/release_path.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--place", type=Path, default=Path("runs/release_path"))
    given = parser.parse_args()
    root, place = Path(os.environ["CARDIAC_LDM_ROOT_ACDC"]).resolve(), given.place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    manifest, python, steps = place / "my_hospital.yaml", sys.executable, list[dict[str, object]]()
    manifest.unlink(missing_ok=True)
    new = (python, "-m", "cardiac_ldm.cohort", "new", str(root), "--out", str(manifest))
    run(place, steps, "python -m cardiac_ldm.cohort new /data/mri --out my_hospital.yaml", *new)
    text = re.sub(r"^  patients: .*", f"  patients: {PLACES}", manifest.read_text(), flags=re.MULTILINE)
    manifest.write_text(re.sub(r"^name: .*", "name: my_hospital", text, flags=re.MULTILINE))
    check = (python, "-m", "cardiac_ldm.cohort", "check", str(manifest))
    said = run(place, steps, "python -m cardiac_ldm.cohort check my_hospital.yaml", *check, expected=1)
    twins = {names.split(", ")[1] for names in re.findall(r"^  (\w+, \w+): share the file", said, re.MULTILINE)}
    excluded = f"exclude: [{', '.join(sorted(twins))}]"  # one picture under two names: the second goes, as it's told
    manifest.write_text(re.sub(r"^exclude: .*", excluded, manifest.read_text(), flags=re.MULTILINE))
    run(place, steps, "python -m cardiac_ldm.cohort check my_hospital.yaml", *check)
    chosen = {"epsilon": EPSILON, "patients": given.patients, "profile": "demo", "cohort_private": str(manifest)}
    chosen |= {"spend": True, "licence": "CC-BY-4.0"}
    words = {
        name: value for name, value in chosen.items() if name not in ("cohort_private", "patients", "licence", "spend")
    }
    says = ("--epsilons", str(EPSILON), "--profile", "demo", "--cohort-private", str(manifest))
    shown = f"--epsilons {EPSILON} --profile demo --cohort-private my_hospital.yaml"
    run(
        place,
        steps,
        f"python -m cardiac_ldm.privacy would-spend {shown}",
        python,
        "-m",
        "cardiac_ldm.privacy",
        "would-spend",
        *says,
    )
    papermill = [python, "-m", "papermill"]
    options = [
        part
        for name, value in (words | {"cohort_private": manifest, "spend": True}).items()
        for part in ("-p", name, str(value))
    ]
    shown = " ".join(options).replace(str(manifest), "my_hospital.yaml")
    out = str(place / "out.ipynb")
    run(
        place,
        steps,
        f"papermill notebooks/03_dp_finetune.ipynb out.ipynb {shown}",
        *papermill,
        "notebooks/03_dp_finetune.ipynb",
        out,
        *options,
    )
    options += ["-p", "patients", str(given.patients), "-p", "licence", "CC-BY-4.0"]
    shown = " ".join(options).replace(str(manifest), "my_hospital.yaml")
    run(
        place,
        steps,
        f"papermill notebooks/08_release.ipynb out.ipynb {shown}",
        *papermill,
        "notebooks/08_release.ipynb",
        out,
        *options,
    )
    release = max((place / "runs" / "release").glob("my_hospital-*"), key=lambda path: path.stat().st_mtime)
    verified = run(place, steps, "python verify.py", python, str(release / "verify.py"))
    os.environ |= {"CARDIAC_LDM_RUNS": str(place / "runs"), "CARDIAC_LDM_RECORD": str(place / "record")}
    private = Study(ReleaseParameters(**chosen)).private
    splits = [private.split(name) for name in ("train", "validation", "test")]
    names = {name for split in splits for name in split.ids}
    hashes = {word for split in splits for person in split.people for word in person[1:]}
    known = np.concatenate([split.attributes for split in splits])
    summary = {
        "places": load_manifest(manifest).places,
        "epsilon": EPSILON,
        "synthetic_patients": given.patients,
        "claims_that_hold": verified.count("HOLDS"),
        "files_with_a_name_hash_or_path": leaks(release, names, hashes, {str(root), str(place)}),
        "patients_with_a_private_ones_volumes": same_attributes(release, known),
    }
    keep("release_path", steps=steps, summary=[summary], verify=verified.split("To be trusted")[0].splitlines())


if __name__ == "__main__":
    main()
