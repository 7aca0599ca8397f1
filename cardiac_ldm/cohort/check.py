"""The check of a cohort: read everybody, print all that is wrong, doubted or mended, and show the slices on a page."""

import html
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from plotly.utils import image_array_to_data_uri
from scipy.ndimage import binary_erosion

from cardiac_ldm.cohort.anatomy import CROSS
from cardiac_ldm.cohort.attributes import ATTRIBUTES, LV, MYOCARDIUM, RV, known_attributes
from cardiac_ldm.cohort.grid import Localiser, place_on_grid
from cardiac_ldm.cohort.manifest import SPLITS, Manifest, load_manifest
from cardiac_ldm.cohort.prepare import ONE_THREAD
from cardiac_ldm.cohort.readers import list_patients, open_patient
from cardiac_ldm.cohort.volumes import Volume, labels_by_phase
from cardiac_ldm.errors import CohortError, PrivacyError
from cardiac_ldm.progress import tqdm

_COLOURS = {RV: (90, 160, 255), MYOCARDIUM: (255, 190, 60), LV: (255, 90, 90)}
_TILE, _MARGIN_MM = 96, 20.0
"""Pixels of a thumbnail's longer side, and what it shows beside the labels."""


@dataclass(frozen=True)
class Summary:
    """What is kept of a patient, images left out.

    pictures: thumbnails as data URIs by phase, if asked for. files: images' names and SHA-256. labelled: by volume.
    """

    problems: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    labelled: tuple[bool, ...] = ()
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    attributes: Mapping[str, float] = field(default_factory=dict)


def summarise(
    manifest: Manifest, root: Path | None, patient_id: str, pictured: bool = False, localiser: Localiser | None = None
) -> Summary:
    """Read a patient, keep a few numbers. Raises nothing of what is wrong with the files: that's in the summary.

    pictured: keep thumbnails. localiser: labels what nobody has labelled, for the check alone.
    """
    try:
        patient, findings, reading = open_patient(manifest, root, patient_id)
        problems = tuple(str(reading.error(finding.file, finding.says)) for finding in findings if not finding.doubt)
        doubts, volumes = patient.doubts, patient.volumes
        if localiser and not problems and any(v.labels is None for v in volumes):
            doubts = place_on_grid(patient, localiser).doubts
    except CohortError as error:
        return Summary(problems=tuple(str(error).splitlines()))
    labels = labels_by_phase(volumes)
    known = (known_attributes(labels, volumes[0].spacing_mm) if labels else {}) | dict(patient.attributes)
    return Summary(
        problems,
        doubts,
        patient.repairs,
        pictures={v.phase: _thumbnail(v) for v in volumes} if pictured else {},
        files={name: digest for name, digest in patient.files.items() if ".nii" in name},
        group=patient.group,
        labelled=tuple(v.labels is not None for v in volumes),
        shape=volumes[0].image.shape,
        spacing_mm=volumes[0].spacing_mm,
        attributes={name: value for name, value in known.items() if value == value},
    )


def check(
    name_or_path: str | Path,
    data_root: Path | None = None,
    page: Path | None = None,
    localiser: Localiser | None = None,
) -> bool:
    """Print what a cohort's files hold, every problem, doubt and repair; return whether all is sound: doubts may stay.

    page: an HTML file of thumbnails to write, with what is said of each patient. localiser: labels what nobody has.

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
    with patch.dict(os.environ, ONE_THREAD), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        one = partial(summarise, manifest, root, pictured=page is not None, localiser=localiser)
        read = tqdm(pool.map(one, split_of, chunksize=4), f"checking {manifest.name}", len(split_of))
        summaries: dict[str, Summary] = dict(zip(split_of, read, strict=True))
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
    columns = {split: _counted([summaries[p] for p in split_of if split_of[p] == split]) for split in SPLITS}
    print("\n" + pd.DataFrame(columns, dtype=object).fillna("").to_string())
    if page:
        _write_page(page, manifest, summaries)
        print(f"\nthumbnails: {page}" + (", which shows private patients: don't release it" if manifest.secret else ""))
    n_wrong = len({patient for patient, _ in problems})
    print(f"\n{manifest.name}: {len(split_of)} patients, " + (f"{n_wrong} with problems" if problems else "all sound"))
    return not problems


def _shared(summaries: Mapping[str, Summary]) -> list[tuple[tuple[str, ...], str]]:
    """Patients with the very same image, and its names."""
    patient_index: dict[str, dict[str, str]] = defaultdict(dict)
    for patient, summary in summaries.items():
        for name, digest in summary.files.items():
            patient_index[digest][patient] = name
    return [(tuple(o), " = ".join(o.values())) for o in patient_index.values() if len(o) > 1]


def _list(title: str, entries: list[tuple[str, str]]) -> None:
    if entries:
        print(f"\n{title}:")
        print("\n".join(f"  {patient}: {line}" if line else f"  {patient}" for patient, line in entries))


def _counted(summaries: list[Summary]) -> dict[str, int | str]:
    """A split in numbers: a column of the table that's printed."""
    sound = [s for s in summaries if not s.problems]
    rows: dict[str, int | str] = {"patients": len(summaries), "read without problems": len(sound)}
    rows |= {"volumes": sum(len(s.labelled) for s in sound), "with labels": sum(sum(s.labelled) for s in sound)}
    rows |= {f"group {g or 'unknown'}": n for g, n in sorted(Counter(s.group for s in sound).items(), key=str)}
    if sound:
        rows["slices"] = _range(s.shape[0] for s in sound)
        rows |= {f"spacing {axis} (mm)": _range(s.spacing_mm[i] for s in sound) for i, axis in enumerate("zyx")}
    for attribute in ATTRIBUTES:
        if values := [s.attributes[attribute.name] for s in sound if attribute.name in s.attributes]:
            rows[f"{attribute.name} {attribute.unit}".strip()] = f"{_range(values)} (of {len(values)})"
    return rows


def _range(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def refuse_release(path: Path, manifest: Manifest) -> None:
    """Refuse to put a private cohort's page where synthetic cohorts are released from. Raises PrivacyError."""
    if not path.absolute().parent.is_dir():
        raise CohortError(f"{path}: there's no folder {path.parent}; make it, or name another")
    if manifest.secret and "release" in path.resolve().parts:
        raise PrivacyError(
            f"{path}: shows private patients, and what lies under `release` is given away; keep it apart"
        )


def _thumbnail(v: Volume) -> str:
    """All slices of a volume in a row, round the heart where there are labels, these as outlines; a PNG data URI."""
    low, high = np.percentile(v.image, (1, 99))
    labels = np.zeros(v.image.shape, np.uint8) if v.labels is None else v.labels
    shown = [slice(None)]
    for where, mm in zip(np.nonzero(labels.any(axis=0)), v.spacing_mm[1:], strict=True) if labels.any() else ():
        margin = round(_MARGIN_MM / mm)
        shown.append(slice(max(int(where.min()) - margin, 0), int(where.max()) + margin))
    grey = np.clip((v.image[tuple(shown)] - low) / max(high - low, 1e-9), 0, 1)
    picture = np.repeat(np.round(255 * grey).astype(np.uint8)[..., None], 3, axis=-1)
    for structure, colour in _COLOURS.items():
        inside = labels[tuple(shown)] == structure
        picture[inside & ~binary_erosion(inside, CROSS)] = colour
    every = max(1, round(max(picture.shape[1:3]) / _TILE))
    return str(image_array_to_data_uri(np.concatenate(picture[:, ::every, ::every], axis=1), "pypng", compression=6))


def _write_page(path: Path, manifest: Manifest, summaries: Mapping[str, Summary]) -> None:
    """Write the page, patients with problems first, then those in doubt; nobody but its owner may read it."""
    order = sorted(summaries.items(), key=lambda entry: (not entry[1].problems, not entry[1].doubts, entry[0]))
    warning = "<p><b>It shows private patients: for their holder's eyes alone. Don't release or send it.</b></p>"
    page = (
        f"<!doctype html><meta charset=utf-8><title>{manifest.name}</title>"
        "<style>body{font:15px sans-serif;margin:2em}img{max-width:100%;background:#000}.wrong{color:#b00}"
        ".doubt{color:#860}</style>"
        f"<h1>{manifest.name}: {len(order)} patients</h1>{warning if manifest.secret else ''}"
        "<p>Each row is a phase, base first; outlines are RV blue, wall yellow, LV red.</p>"
    )
    for patient, summary in order:
        page += f"<h2>{html.escape(patient)}</h2>"
        for kind, lines in (("wrong", summary.problems), ("doubt", summary.doubts)):
            page += "".join(f"<p class={kind}>{html.escape(line)}</p>" for line in lines)
        page += "".join(f'<p>{phase}<br><img alt="{phase}" src="{uri}"></p>' for phase, uri in summary.pictures.items())
    temporary = path.with_name(f".{path.name}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(page)
    temporary.replace(path)
