"""The command line: look at a folder and write a manifest; read all of a cohort and print what is wrong."""

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

from cardiac_ldm.cohort.attributes import ATTRIBUTES, known_attributes
from cardiac_ldm.cohort.grid import Localiser, place_on_grid
from cardiac_ldm.cohort.manifest import SPLITS, Manifest, load_manifest
from cardiac_ldm.cohort.new import new
from cardiac_ldm.cohort.page import Entry, refuse_release, thumbnail, write_page
from cardiac_ldm.cohort.prepare import ONE_THREAD
from cardiac_ldm.cohort.readers import list_patients, open_patient
from cardiac_ldm.errors import CohortError, StudyError
from cardiac_ldm.progress import tqdm

SEGMENTER = Path(__file__).parents[1] / "weights/anatomy/segmenter.safetensors"


@dataclass(frozen=True)
class Summary:
    """What is kept of a patient, images left out: problems, doubts, thumbnails if asked for, what the table counts."""

    problems: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    pictures: tuple[tuple[str, str], ...] = ()
    repairs: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    group: str | None = None
    labelled: tuple[bool, ...] = ()
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    attributes: tuple[tuple[str, float], ...] = ()


class ShippedFinder:
    """The study's shipped segmenter, loaded only where a heart has no labels."""

    key = "shipped"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Labels of an image; see `Localiser`."""
        anatomy = import_module("cardiac_ldm.models.anatomy")  # the command stands above the rooms; this one doesn't
        labels: np.ndarray = anatomy.HeartFinder(SEGMENTER, self.key)(image)
        return labels


def summarise(
    manifest: Manifest, root: Path | None, patient_id: str, pictured: bool = False, finder: Localiser | None = None
) -> Summary:
    """Read a patient, keep a few numbers. Raises nothing of what is wrong with the files: that's in the summary.

    pictured: keep thumbnails. finder: labels what nobody has labelled, for the check alone.
    """
    try:
        patient, findings, reading = open_patient(manifest, root, patient_id)
    except CohortError as error:
        return Summary(problems=tuple(str(error).splitlines()))
    problems = tuple(str(reading.error(f.file, f.says)) for f in findings if not f.doubt)
    doubts, volumes = patient.doubts, patient.volumes
    if finder and not problems and any(v.labels is None for v in volumes):
        try:
            doubts = place_on_grid(patient, finder).doubts
        except CohortError as error:
            problems = tuple(str(error).splitlines())
    labels: dict[str, np.ndarray] = {v.phase: v.labels for v in volumes if v.labels is not None}
    known = (known_attributes(labels, volumes[0].spacing_mm) if labels else {}) | dict(patient.attributes)
    return Summary(
        problems=problems,
        doubts=doubts,
        pictures=tuple((v.phase, thumbnail(v)) for v in volumes) if pictured else (),
        repairs=patient.repairs,
        files=tuple((name, digest) for name, digest in patient.files.items() if ".nii" in name),
        group=patient.group,
        labelled=tuple(v.labels is not None for v in volumes),
        shape=volumes[0].image.shape,
        spacing_mm=volumes[0].spacing_mm,
        attributes=tuple((name, value) for name, value in known.items() if value == value),
    )


def check(name_or_path: str | Path, data_root: Path | None = None, page: Path | None = None) -> bool:
    """Print what a cohort's files hold, every problem, doubt and repair; return whether all is sound: doubts may stay.

    page: an HTML file of thumbnails to write, with what is said of each patient.

    Raises CohortError or PrivacyError where the manifest, its table or its data folder can't be used at all.
    """
    manifest = load_manifest(name_or_path)
    root = manifest.data_root(data_root)
    if root is None:
        raise CohortError(f"{manifest.name}: it's simulated; there are no files to check")
    if manifest.secret:
        print(f"{manifest.name} holds real private patients: what is printed here is for its holder's eyes alone.")
    if page:
        refuse_release(page, manifest)
    found = list_patients(manifest, root)
    split_of = {patient: split for split in SPLITS for patient in manifest.patient_ids(split, found)}
    workers = min(os.cpu_count() or 1, len(split_of))
    summaries: dict[str, Summary] = {}
    with patch.dict(os.environ, ONE_THREAD), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        one = partial(summarise, manifest, root, pictured=page is not None, finder=ShippedFinder())
        read = pool.map(one, split_of, chunksize=4)
        for patient, summary in zip(split_of, tqdm(read, f"checking {manifest.name}", len(split_of)), strict=True):
            summaries[patient] = summary
    problems = [(p, line) for p, s in summaries.items() for line in s.problems]
    shared = [(p, files, manifest.secret or len({split_of[one] for one in p}) > 1) for p, files in _shared(summaries)]
    problems += [(", ".join(p), f"share the file {files}; remove one") for p, files, wrong in shared if wrong]
    _list("problems", problems)
    _list("the same file twice, within one split", [(", ".join(p), files) for p, files, wrong in shared if not wrong])
    _list("doubts, to be looked at", [(p, line) for p, s in summaries.items() for line in s.doubts])
    _list("repairs, made anew at each reading", [(p, line) for p, s in summaries.items() for line in s.repairs])
    _list("excluded", [(p, "") for p in manifest.exclude])
    left = [p for p in found if p not in split_of and p not in manifest.exclude]
    _list("under the data root, but in no split", [(p, "") for p in left])
    _table(split_of, summaries)
    if page:
        write_page(page, manifest, (Entry(p, s.problems, s.doubts, s.pictures) for p, s in summaries.items()))
        print(f"\nthumbnails: {page}" + (", which shows private patients: don't release it" if manifest.secret else ""))
    n_wrong = len({patient for patient, _ in problems})
    print(f"\n{manifest.name}: {len(split_of)} patients, " + (f"{n_wrong} with problems" if problems else "all sound"))
    return not problems


def _shared(summaries: dict[str, Summary]) -> list[tuple[tuple[str, ...], str]]:
    """Patients with the very same image, and its names."""
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for patient, summary in summaries.items():
        for name, digest in summary.files:
            owners[digest][patient] = name
    return [(tuple(o), " = ".join(o.values())) for o in owners.values() if len(o) > 1]


def _list(title: str, entries: list[tuple[str, str]]) -> None:
    if entries:
        print(f"\n{title}:")
        print("\n".join(f"  {patient}: {line}" if line else f"  {patient}" for patient, line in entries))


def _range(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _table(split_of: dict[str, str], summaries: dict[str, Summary]) -> None:
    """Print the cohort, a column per split."""
    columns = {}
    for split in SPLITS:
        sound = [s for p, s in summaries.items() if split_of[p] == split and not s.problems]
        rows: dict[str, int | str] = {
            "patients": sum(of == split for of in split_of.values()),
            "read without problems": len(sound),
        }
        rows["volumes"], rows["with labels"] = (sum(map(f, (s.labelled for s in sound))) for f in (len, sum))
        if sound:
            rows |= {f"group {g or 'unknown'}": n for g, n in sorted(Counter(s.group for s in sound).items(), key=str)}
            rows |= {"slices": _range(s.shape[0] for s in sound)}
            rows |= {f"spacing {a} (mm)": _range(s.spacing_mm[i] for s in sound) for i, a in enumerate("zyx")}
        for attribute in ATTRIBUTES:
            if values := [dict(s.attributes)[attribute.name] for s in sound if attribute.name in dict(s.attributes)]:
                rows[f"{attribute.name} {attribute.unit}".strip()] = f"{_range(values)} (of {len(values)})"
        columns[split] = rows
    print("\n" + pd.DataFrame(columns, dtype=object).fillna("").to_string())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 if all is sound, else 1. Wrong usage exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m cardiac_ldm.cohort", description="Look after a cohort's files.")
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("check", help="read every patient; print what is there, missing, wrong or mended")
    command.add_argument("manifest", help="path of a manifest, or its name in data_manifests/")
    command.add_argument("--data-root", type=Path, help="the data folder, where it's another than the manifest's")
    command.add_argument("--page", type=Path, help="an HTML file to write: every patient's slices, and what is doubted")
    command = commands.add_parser("new", help="look at a data folder, guess its layout and write a manifest to correct")
    command.add_argument("folder", type=Path, help="the data folder")
    command.add_argument("--out", type=Path, help="the manifest to write; else data_manifests/<the folder's name>.yaml")
    given = parser.parse_args(arguments)
    try:
        if given.command == "new":
            new(given.folder, given.out)
            return 0
        return 0 if check(given.manifest, given.data_root, given.page) else 1
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1
