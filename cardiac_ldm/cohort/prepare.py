"""Preparation: every patient on one grid, intensities in [0, 1], kept in a chunked store that is read lazily."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import zarr
from einops import einsum
from filelock import FileLock
from tqdm import tqdm

from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES, measure_attributes
from cardiac_ldm.cohort.manifest import SPLITS, Manifest
from cardiac_ldm.cohort.patients import Cohort, PatientRecord
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.cohort.volumes import GRID, Patient
from cardiac_ldm.errors import CohortError

MAX_VOLUMES = 3
"""Volumes a patient may have."""
_CHUNK = 4
_BLOCK = 8 * _CHUNK
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def prepare(
    manifest: Manifest, *, store: Path, data_root: Path | None = None, limits: Mapping[str, int] | None = None
) -> Cohort:
    """Prepare a cohort under store/<name>-<key>, or return at once where that has been done.

    data_root: where the cohort's files are; else the environment or the manifest says so. limits: at most this many
    patients of each split, the manifest's first ones. The key hashes the manifest, the limits, the grid, the sizes of
    the files and the code of this room; of real private patients with a salt that never leaves `store`, because keys of
    runs are published and a bare hash would let anybody test who is in the cohort. Raises CohortError with the problems
    of all patients; then nothing is left behind. Processes are spawned: a script calls this under
    `if __name__ == "__main__"`, a notebook anywhere.
    """
    limits = dict(limits or {})
    if wrong := {k: n for k, n in limits.items() if k not in SPLITS or n < 1}:
        raise CohortError(f"{manifest.name}: limits {wrong}: expected at least 1 patient for {', '.join(SPLITS)}")
    root = manifest.data_root(data_root)
    members = {split: manifest.patient_ids(split)[: limits.get(split)] for split in SPLITS}
    key = _key(manifest, root, members, _salt(store) if manifest.secret else "")
    path = store / f"{manifest.name}-{key}"
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / f".{path.name}.lock"):
        if not path.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=store))
            try:
                _write(unfinished, manifest, root, members)
                unfinished.replace(path)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return Cohort(manifest, path, key)


def place_on_grid(patient: Patient) -> PatientRecord:
    """Resample, crop and pad a patient to GRID and scale intensities to [0, 1]; ED and ES alike.

    In-plane the field is centred on the box round the labels. Stacks within 1 mm of the grid's slice spacing keep their
    slices, others are resampled; slices without ventricles in any phase become padding, and what remains is centred.
    In-plane a tent kernel as wide as the coarser of the two grids interpolates (linear, antialiased), and labels take
    the class of largest weight. Between slices images are linear and labels the nearest slice's, counted from the
    middle one: of a stack at 5 mm, every second slice stays as acquired. A stack that is on the grid already is taken
    as it is. Attributes are measured on the labels as acquired, DEPTH on the grid.
    """
    images, labels = _resampled(patient)
    shown = np.flatnonzero(labels.any(axis=(0, 2, 3)))
    shown = np.arange(shown[0], shown[-1] + 1)
    surplus = max(0, len(shown) - GRID.n_slices)
    shown = shown[surplus // 2 : len(shown) - (surplus - surplus // 2)]
    start = (GRID.n_slices - len(shown)) // 2
    placed_images = np.zeros((len(images), *GRID.shape), np.float32)
    placed_labels = np.zeros((len(images), *GRID.shape), np.uint8)
    placed_labels[:, start : start + len(shown)] = labels[:, shown]
    for image, placed in zip(images[:, shown], placed_images, strict=True):
        placed[start : start + len(shown)] = _scaled(image)
    known = measure_attributes({v.phase: v.labels for v in patient.volumes}, patient.volumes[0].spacing_mm)
    known |= patient.attributes
    known["DEPTH"] = float(len(shown))
    attributes = [
        [known.get(name, np.nan) if name != "ESED" else float(v.phase == "ED") for name in ATTRIBUTE_NAMES]
        for v in patient.volumes
    ]
    return PatientRecord(patient.id, patient.group, placed_images, placed_labels, np.asarray(attributes, np.float32))


def _resampled(patient: Patient) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 and labels uint8, (v, slices, 96, 96), with the grid's spacing and as many slices as it takes."""
    images = np.stack([v.image for v in patient.volumes])
    labels = np.stack([v.labels for v in patient.volumes])
    dz, dy, dx = patient.volumes[0].spacing_mm
    if (dz, dy, dx) == GRID.spacing_mm and images.shape[2:] == GRID.shape[1:]:
        return images, labels
    heart = np.asarray((labels > 0).any(axis=0))
    field = (np.arange(GRID.size) - (GRID.size - 1) / 2) * GRID.spacing_mm[1]
    rows, columns = (
        _tent(
            np.arange(n) * spacing,
            field + np.unique(at)[[0, -1]].mean() * spacing,
            spacing,
            max(spacing, GRID.spacing_mm[1]),
        )
        for n, spacing, at in zip(heart.shape[1:], (dy, dx), np.nonzero(heart)[1:], strict=True)
    )
    in_plane = [rows @ stack.astype(np.float32) @ columns.T for stack in (images, *(labels == k for k in range(4)))]
    images, labels = in_plane[0], np.argmax(in_plane[1:], axis=0).astype(np.uint8)
    if abs(dz - GRID.spacing_mm[0]) <= 1:
        return images, labels
    depth = (np.arange(len(heart)) - len(heart) // 2) * dz
    reach = GRID.spacing_mm[0] * np.arange(-len(heart), len(heart) + 1)
    wanted = reach[(reach >= depth[0]) & (reach <= depth[-1])]
    nearest = np.abs(wanted[:, None] - depth).argmin(axis=1)
    return einsum(_tent(depth, wanted, dz, dz), images, "new old, v old h w -> v new h w"), labels[:, nearest]


def _tent(old: np.ndarray, new: np.ndarray, spacing: float, half_width: float) -> np.ndarray:
    """Weights (new, old) of a tent kernel between positions in mm; new ones outside the old field get zeros."""
    distance = np.abs(new[:, None] - old[None, :])
    weights = np.maximum(0, 1 - distance / half_width)
    inside = distance.min(axis=1, keepdims=True) <= spacing / 2 + 1e-6
    return (inside * weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)).astype(np.float32)


def _scaled(image: np.ndarray) -> np.ndarray:
    """Scale to [0, 1] between the 1st and 99th percentile, and clip."""
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


def _salt(store: Path) -> str:
    """A random number that this store keeps to itself, made at first use."""
    path = store / ".salt"
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(secrets.token_hex(32))
            temporary.replace(path)
    return path.read_text()


def _key(manifest: Manifest, root: Path | None, members: Mapping[str, tuple[str, ...]], salt: str) -> str:
    files = [] if root is None else [f for ids in members.values() for i in ids for f in sorted((root / i).glob("*"))]
    shaped_by = {
        "salt": salt,
        "manifest": manifest.model_dump(mode="json", exclude={"root"}),
        "members": {split: len(ids) for split, ids in members.items()},
        "grid": [GRID.shape, GRID.spacing_mm],
        "files": [(f.name, f.stat().st_size) for f in files],
        "code": [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(Path(__file__).parent.rglob("*.py"))],
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()[:12]


def _write(path: Path, manifest: Manifest, root: Path | None, members: Mapping[str, tuple[str, ...]]) -> None:
    """Write every split as it's prepared by a pool of processes, spawned (safe beside threads) and of one thread each.

    Threads of a linear algebra library would fight over the cores: the matrices are small.
    """
    prepare_one = partial(_prepare_one, manifest, root)
    n_patients = sum(map(len, members.values()))
    workers = min(os.cpu_count() or 1, n_patients)
    problems: list[str] = []
    group = zarr.open_group(path, mode="w", zarr_format=3)
    with tqdm(total=n_patients, unit=" patients", desc=f"preparing {manifest.name}") as progress:

        def sound(outcomes: Iterable[PatientRecord | CohortError]) -> Iterator[PatientRecord]:
            for outcome in outcomes:
                progress.update()
                if isinstance(outcome, PatientRecord):
                    yield outcome
                else:
                    problems.append(str(outcome))

        with patch.dict(os.environ, _ONE_THREAD), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for split, ids in members.items():
                _write_split(group.create_group(split), sound(pool.map(prepare_one, ids, chunksize=4)), len(ids))
    if problems:
        raise CohortError(f"{manifest.name}: {len(problems)} patient(s) can't be prepared\n  " + "\n  ".join(problems))


def _prepare_one(manifest: Manifest, root: Path | None, patient_id: str) -> PatientRecord | CohortError:
    try:
        return place_on_grid(read_patient(manifest, root, patient_id))
    except CohortError as error:
        return error


def _write_split(group: zarr.Group, records: Iterator[PatientRecord], n_patients: int) -> None:
    arrays = {
        name: group.create_array(
            name,
            shape=(n_patients * MAX_VOLUMES, *GRID.shape),
            chunks=(_CHUNK, *GRID.shape),
            dtype=dtype,
        )
        for name, dtype in (("images", "float16"), ("labels", "uint8"))
    }
    waiting: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
    written, ids, groups, attributes, counts = 0, [], [], [], [0]

    def flush(n: int) -> None:
        nonlocal written
        for name, array in arrays.items():
            array[written : written + n] = np.stack(waiting[name][:n])
            del waiting[name][:n]
        written += n

    for record in records:
        waiting["images"] += [image.astype(np.float16) for image in record.images]
        waiting["labels"] += list(record.labels)
        ids.append(record.id)
        groups.append(record.group)
        attributes.append(record.attributes)
        counts.append(len(record.images))
        if len(waiting["images"]) >= _BLOCK:
            flush(_BLOCK)
    if waiting["images"]:
        flush(len(waiting["images"]))
    for array in arrays.values():
        array.resize((written, *GRID.shape))
    group.create_array(
        "attributes", data=np.concatenate([np.empty((0, len(ATTRIBUTE_NAMES)), np.float32), *attributes])
    )
    group.create_array("offsets", data=np.cumsum(counts, dtype=np.int64))
    group.attrs.update({"ids": ids, "groups": groups})
