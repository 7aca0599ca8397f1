"""A made-up hospital's export on its way from a folder to a sound cohort: `python -m benchmarks.hospital_export`.

Thirty simulated patients leave the hospital as exports do: .nii beside .nii.gz, a table from a German Excel (a BOM,
semicolons, decimal commas), labels for half of them, one shuffled, one mirrored, one scanned twice, one withdrawn. What
the commands print, and what is mended because they say so, is kept as the transcript that stands in the book.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks import RESULTS
from cardiac_ldm.cohort.__main__ import main as command
from cardiac_ldm.cohort.grid import Localiser
from cardiac_ldm.cohort.phantom import simulate
from cardiac_ldm.training.shipped import ShippedFinder

PATIENTS = 30
SHUFFLED, MIRRORED, TWICE, WITHDRAWN = "P04", "P06", "P10", "P20"


def export(folder: Path) -> None:
    """Write the export."""
    rows = [["patient", "phase", "path", "labels", "AGE", "BMI", "SEX"]]
    for number in range(1, PATIENTS + 1):
        name, rng = f"P{number:02d}", np.random.default_rng(number)
        patient = simulate("clinics", 2026, number)
        known = patient.attributes
        said = [f"{known['AGE']:.1f}".replace(".", ","), f"{known['BMI']:.1f}".replace(".", ",")]
        order = rng.permutation(len(patient.volumes[0].image)) if name == SHUFFLED else slice(None)
        for v in patient.volumes:
            files = {"": np.round(1000 * v.image).astype(np.int16)} | ({"_gt": v.labels} if number % 2 == 0 else {})
            names = {}
            for end, array in files.items():
                stored = np.asarray(array)[order][:, :, :: -1 if name == MIRRORED else 1]
                names[end] = f"{name}\\{v.phase}{end}.nii{'.gz' if number % 3 else ''}"
                place = folder / names[end].replace("\\", "/")
                place.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(stored.T, np.diag([*v.spacing_mm[::-1], 1])), place)
            row = [name, v.phase, names[""], names.get("_gt", "n/a"), *said, "FM"[int(known["SEX"])]]
            rows += [row] * (2 if name == TWICE else 1)
    text = "".join(";".join(row) + "\r\n" for row in rows)
    (folder / "patients.csv").write_bytes(text.encode("utf-8-sig"))


def unshuffle(folder: Path, printed: str) -> str:
    """Bring the slices into the order that the check says."""
    way = re.search(rf"{SHUFFLED}/ED\S*: its slices .*? they'd be ([\d, ]+) \(from 0\)", printed.replace("\\", "/"))
    assert way
    order = [int(k) for k in way[1].split(",")]
    rewrite(folder / SHUFFLED, lambda a: a[..., order])
    return f"{SHUFFLED}: its slices are brought into the order {way[1]}, in images and labels"


def unmirror(folder: Path, printed: str) -> str:
    """Turn the columns round, as the check says."""
    assert "mirrored left to right" in printed
    rewrite(folder / MIRRORED, lambda a: a[::-1])
    return f"{MIRRORED}: its columns are turned round, in images and labels"


def once(folder: Path, printed: str) -> str:
    """Keep one scan's rows."""
    table = folder / "patients.csv"
    table.write_bytes(b"".join(dict.fromkeys(table.read_bytes().splitlines(keepends=True))))
    return f"{TWICE}: the rows of the second scan are taken out of patients.csv"


def rewrite(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the voxels of a patient's files."""
    for file in folder.iterdir():
        nifti = nib.load(file)
        nib.save(nib.Nifti1Image(np.ascontiguousarray(change(np.asarray(nifti.dataobj))), nifti.affine), file)


def withdraw(manifest: Path) -> str:
    """Name who withdrew in the manifest."""
    manifest.write_text(manifest.read_text().replace("exclude: []", f"exclude: [{WITHDRAWN}]"))
    return f"{WITHDRAWN} withdrew: my_hospital.yaml now says `exclude: [{WITHDRAWN}]`"


def journey(place: Path, localiser: Localiser | None) -> list[str]:
    """Export, look, check, mend, check again; the lines of the transcript. localiser: as the command has it."""
    folder, manifest = place / "my_hospital", place / "my_hospital.yaml"
    export(folder)
    said: list[str] = []

    def run(*arguments: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            code = command(arguments, localiser)
        text = printed.getvalue().replace(f"{os.path.realpath(place)}/", "").replace(f"{place}/", "")
        shown = " ".join(argument.replace(f"{place}/", "") for argument in arguments)
        said.append(f"$ python -m cardiac_ldm.cohort {shown}\n{text.rstrip()}\n(exit code {code})")
        return text

    run("new", str(folder), "--out", str(manifest))
    said.append(f"# {withdraw(manifest)}")
    printed = run("check", str(manifest))
    said += [f"# {mend(folder, printed)}" for mend in (unshuffle, unmirror, once)]
    run("check", str(manifest))
    return said


def main() -> None:
    """Write results/hospital_export.txt."""
    with tempfile.TemporaryDirectory() as place:
        text = "\n\n".join(journey(Path(place), ShippedFinder())) + "\n"
    (RESULTS / "hospital_export.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
