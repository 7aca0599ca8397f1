"""Does this release prove what it says? `python verify.py` in its folder, or `python verify.py FOLDER`.

Needs Python 3.11, numpy and dp-accounting alone, no network, nothing of the software that made the release. It says in
words what holds and what has to be trusted, and ends with an exit status other than 0 where something doesn't hold.
"""

import csv
import gzip
import hashlib
import json
import math
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

AGREEMENT = 0.015
"""Relative difference that is allowed between a stated and a recomputed epsilon."""
PHASES = ("ED", "ES")


def problems(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """What is checked, in words, each with what is wrong with it."""
    try:
        ledger = json.loads((folder / "privacy.json").read_text())
        about = json.loads((folder / "release.json").read_text())
        statement = (folder / "STATEMENT.md").read_text()
        patients = list(csv.DictReader((folder / "participants.tsv").open(), delimiter="\t"))
    except (OSError, ValueError) as error:
        yield "The files that say what this is can be read", [str(error)]
        return
    yield "Every file is the one that was released, none is missing and none was added", found(files, folder)
    yield "The ledger's mechanisms spend no more than the epsilon that it states", found(spent, ledger)
    yield "The statement and release.json state the ledger's epsilon and delta", found(stated, ledger, about, statement)
    n_patients = about.get("patients") if isinstance(about, dict) else "an unknown number of"
    claim = f"There are {n_patients} synthetic patients, each in the table and with all files"
    yield claim, found(counted, folder, about, patients)
    yield "Every volume says that it's synthetic, in mm, and lies as hearts do", found(volumes, folder, patients)
    if (folder / "model").is_dir():
        yield "The weights of the model are those that the ledger speaks of", found(weights, folder, ledger)


def found(check: Callable[..., Iterator[str]], *given: object) -> list[str]:
    """What a check finds wrong; what is so wrong that the check itself fails is found, too."""
    wrong = []
    try:
        for line in check(*given):
            wrong.append(line)
    except Exception as error:
        wrong.append(f"it can't be checked to the end: {type(error).__name__}: {error}")
    return wrong


def files(folder: Path) -> Iterator[str]:
    """Hold all files against SHA256SUMS."""
    sums = folder / "SHA256SUMS"
    if not sums.exists():
        yield "SHA256SUMS is missing"
        return
    lines = [line.partition("  ") for line in sums.read_text().splitlines()]
    known = {name: digest for digest, _, name in lines}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    yield from (f"{name} is missing" for name in sorted(known.keys() - there))
    yield from (f"{name} was added" for name in sorted(there - known.keys()))
    for name in sorted(there & known.keys()):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != known[name]:
            yield f"{name} was changed"


def spent(ledger: dict[str, Any]) -> Iterator[str]:
    """Recompute epsilon by dp-accounting's privacy loss distributions (Koskela et al., arXiv 1906.03049)."""
    mechanisms, guarantee = ledger["mechanisms"], ledger["guarantee"]
    if not mechanisms:
        if guarantee != "public data only" or ledger["private_data"] != "none":
            yield f"no mechanism is listed, but the guarantee is {guarantee!r} on {ledger['private_data']!r}"
        return
    if guarantee != "patient-level DP":
        yield f"the guarantee is {guarantee!r}, but mechanisms met private patients"
    for m in mechanisms:
        if not math.isclose(m["sampling_rate"] * ledger["n_units"], m["expected_batch"], rel_tol=1e-6):
            yield f"{m['stage']}: its sampling rate isn't its expected batch over {ledger['n_units']} places"
        if not m["noise_multiplier"] > 0:
            yield f"{m['stage']}: no noise"
            return
    stated, together = float(ledger["epsilon"]), ledger.get("together")
    counted = together["epsilon"] if together and together["delta"] <= ledger["delta"] else math.inf
    epsilon = recomputed(mechanisms, ledger["delta"], min(stated, counted))
    if not stated >= (1 - AGREEMENT) * epsilon:
        yield f"they spend {epsilon:.4g} at delta {ledger['delta']:g}, more than the {ledger['epsilon']} that is stated"
    places = ledger["n_units"]
    if not 0 < ledger["delta"] < 1 / places:
        yield f"delta is {ledger['delta']:g}, which isn't below one in {places} places"
    if not together and not ledger["simulated"]:
        yield "it doesn't say what all models of these patients spent together"
    if not counted >= (1 - AGREEMENT) * epsilon:
        yield f"all models together are said to spend {counted}, less than this one"


def recomputed(mechanisms: list[dict[str, Any]], delta: float, stated: float, interval: float = 1e-3) -> float:
    """Epsilon of the mechanisms, composed; on a finer grid where rounding alone may lift it above what is stated."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=interval)
    for m in mechanisms:
        gaussian = dp_accounting.GaussianDpEvent(m["noise_multiplier"])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(m["sampling_rate"], gaussian), m["steps"])
    epsilon, most = float(accountant.get_epsilon(delta)), 3 * interval * math.sqrt(sum(m["steps"] for m in mechanisms))
    if interval > 2e-5 and stated < (1 - AGREEMENT) * epsilon < stated + most:
        return recomputed(mechanisms, delta, stated, interval / 10)
    return epsilon


def stated(ledger: dict[str, Any], about: dict[str, Any], statement: str) -> Iterator[str]:
    """Compare what people read with the ledger."""
    epsilon, delta = float(ledger["epsilon"]), float(ledger["delta"])
    if ledger["mechanisms"]:
        words = f"({epsilon:g}, {delta:g})-differential privacy per patient"
        said = set(re.findall(r"\([^()]*\)-differential privacy per patient", statement))
        if said != {words}:
            yield f"STATEMENT.md says {', '.join(sorted(said)) or 'nothing'}; the ledger is of {words}"
    elif "No private patient was used" not in statement or "differential privacy per patient" in statement:
        yield "STATEMENT.md speaks of a guarantee that the ledger doesn't"
    stages = [m["stage"] for m in ledger["mechanisms"]]
    for file, named in (
        ("STATEMENT.md", re.findall(r"^\| mechanism: (\S+) \|", statement, re.MULTILINE)),
        ("release.json", about.get("learnt")),
    ):
        if named != stages:
            yield f"{file} names the mechanisms {named}, the ledger {stages}"
    if (about.get("epsilon"), about.get("delta")) != (ledger["epsilon"], ledger["delta"]):
        yield f"release.json says epsilon {about.get('epsilon')} and delta {about.get('delta')}"
    together = ledger.get("together")
    if together and f"({together['epsilon']:.4g}, {together['delta']:g}) per patient" not in statement:
        yield "STATEMENT.md doesn't say what all models of these patients spent together"


def counted(folder: Path, about: dict[str, Any], patients: list[dict[str, str]]) -> Iterator[str]:
    """Count rows, folders and files."""
    listed, there = [row["participant_id"] for row in patients], {path.name for path in folder.glob("sub-*")}
    if len(listed) != about.get("patients"):
        yield f"participants.tsv has {len(listed)} rows"
    if len(set(listed)) != len(listed) or set(listed) != there:
        yield f"participants.tsv and the folders don't agree: {sorted(set(listed) ^ there)[:3]}"
    rows = list(csv.DictReader((folder / "attributes.csv").open()))
    if {(row["patient"], row["phase"]) for row in rows} != {(name, phase) for name in listed for phase in PHASES}:
        yield "attributes.csv doesn't list two phases of each patient"
    for name in sorted(there):
        for phase in PHASES:
            for path in (image(folder, name, phase), labels(folder, name, phase)):
                for file in (path, path.with_name(path.name.replace(".nii.gz", ".json"))):
                    if not file.is_file():
                        yield f"{file.relative_to(folder)} is missing"


def image(folder: Path, name: str, phase: str) -> Path:
    """Where a volume lies."""
    return folder / name / "anat" / f"{name}_acq-{phase}_T2w.nii.gz"


def labels(folder: Path, name: str, phase: str) -> Path:
    """Where its labels lie."""
    return folder / "derivatives" / "segmentation" / name / "anat" / f"{name}_acq-{phase}_desc-heart_dseg.nii.gz"


def volumes(folder: Path, patients: list[dict[str, str]]) -> Iterator[str]:
    """Look at headers, sidecars, and the side on which the right ventricle lies."""
    to_the_right = []
    for name in (row["participant_id"] for row in patients):
        for phase in PHASES:
            affines = []
            for path in (image(folder, name, phase), labels(folder, name, phase)):
                file, sidecar = path.relative_to(folder), path.with_name(path.name.replace(".nii.gz", ".json"))
                try:
                    said = json.loads(sidecar.read_text())
                    voxels, affine, units, description = nifti(path)
                except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
                    yield f"{file}: can't be read ({error})"
                    continue
                if said.get("Synthetic") is not True:
                    yield f"{file}: its sidecar doesn't say that it's synthetic"
                if not description.startswith("synthetic"):
                    yield f"{file}: its header doesn't say that it's synthetic"
                if units != 10:
                    yield f"{file}: its units aren't mm and seconds"
                affines.append(affine)
            if len(affines) == 2:
                if not np.array_equal(affines[0], affines[1]):
                    yield f"{name}, {phase}: image and labels don't lie alike"
                if np.isin((1, 3), voxels).all():
                    rv, lv = (np.argwhere(voxels == k).mean(axis=0) for k in (1, 3))
                    to_the_right.append(float((affine[:3, :3] @ (rv - lv))[0]))
    if to_the_right and np.mean(to_the_right) < -10:  # mm; hearts have about 40, and noise next to nothing
        yield "the right ventricle lies on the patient's left of the left one: the hearts are mirrored"


def nifti(path: Path) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Voxels (x, y, z) of an 8-bit NIfTI-1 file, its affine (4, 4) in RAS, the code of its units, its description."""
    content = gzip.decompress(path.read_bytes())
    if struct.unpack_from("<i", content, 0)[0] != 348 or content[344:347] != b"n+1":
        raise ValueError("it's no NIfTI-1 file")
    shape, (datatype,) = struct.unpack_from("<3h", content, 42), struct.unpack_from("<h", content, 70)
    if datatype != 2:
        raise ValueError("it doesn't have 8 bits a voxel")
    start = int(struct.unpack_from("<f", content, 108)[0])
    voxels = np.frombuffer(content, np.uint8, math.prod(shape), start).reshape(shape, order="F")
    affine = np.vstack([np.array(struct.unpack_from("<12f", content, 280)).reshape(3, 4), [0, 0, 0, 1]])
    return voxels, affine, content[123], content[148:228].rstrip(b"\0").decode()


def weights(folder: Path, ledger: dict[str, Any]) -> Iterator[str]:
    """Hold the denoiser's weights, and the table of attributes where one was learnt, against the ledger."""
    for name, digest in ledger["weights"].items():
        path = folder / "model" / ("attributes" if name == "table.safetensors" else "denoiser") / name
        if not path.is_file():
            yield f"{path.relative_to(folder)} is missing"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield f"{path.relative_to(folder)} isn't what the ledger was written for"


TRUST = """To be trusted, since no file can prove it:
- that the training drew patients and added noise as the ledger says; the software is open, and an audit tests it;
- that all private models of these patients, and what tuning spent, are counted in "together";
- that the public data holds none of the private patients, and that the attributes that were requested come from where
  release.json says;
- that the release comes from its holder: whoever changes files can write new sums. Ask the holder, by another way, for
  the SHA-256 of SHA256SUMS, which here is
  {sums}"""


def main(folder: Path) -> int:
    """Print what holds, what doesn't and what must be trusted; 1 where anything doesn't hold, else 0."""
    failed = False
    for claim, wrong in problems(folder):
        print(f"{'HOLDS' if not wrong else 'FAILS'}  {claim}")
        for line in wrong[:10]:
            print(f"       - {line}")
        if len(wrong) > 10:
            print(f"       - and {len(wrong) - 10} more")
        failed |= bool(wrong)
    sums = folder / "SHA256SUMS"
    print(TRUST.format(sums=hashlib.sha256(sums.read_bytes()).hexdigest() if sums.exists() else "missing"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)))
