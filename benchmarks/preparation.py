"""What preparing a cohort takes, in time, memory and space: `OMP_NUM_THREADS=1 python -m benchmarks.preparation`.

With names of parts behind it, `memory` or `acdc`, it measures those alone again. The parts on real patients need
CARDIAC_LDM_ROOT_ACDC. Seconds are what the clock showed on all cores; core milliseconds are what the processors did, so
that other work on the machine tells less. Memory is the sum of the largest resident sizes of all processes.
"""

import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks import RESULTS, keep
from cardiac_ldm.cohort import GRID, Patient, load_manifest, prepare
from cardiac_ldm.cohort.grid import labels_of, place_on_grid
from cardiac_ldm.cohort.patients import write_patient
from cardiac_ldm.cohort.readers import read_patient
from cardiac_ldm.models.anatomy import HeartFinder
from cardiac_ldm.training.anatomy import train_segmenter
from cardiac_ldm.training.checkpoint import save_weights

BIOBANK = 30_000
CINE = (210, 208, 10, 50)
"""Voxels and frames of a short-axis cine in UK Biobank, the whole of which is read for two frames."""
SHOWN = 64
PREPARE = """
import json, sys
from pathlib import Path
from cardiac_ldm.cohort import load_manifest, prepare
prepare(load_manifest(sys.argv[1]), store=Path(sys.argv[3]), limits=json.loads(sys.argv[2]))
"""


def whole(cohort: str, limits: dict[str, int]) -> dict[str, float]:
    """Prepare a cohort in processes of its own: seconds, core milliseconds a volume, memory, space."""
    with tempfile.TemporaryDirectory() as store:
        before, start = _core_seconds(), time.perf_counter()
        largest: dict[int, int] = {}
        with subprocess.Popen([sys.executable, "-c", PREPARE, cohort, json.dumps(limits), store]) as running:
            while running.poll() is None:
                largest |= _resident(running.pid)
                time.sleep(0.05)
        if running.returncode:
            raise SystemExit(f"{cohort}: its preparation failed")
        seconds, cores = time.perf_counter() - start, _core_seconds() - before
        (path,) = Path(store).glob(f"{cohort}-*")
        n_patients = sum(len(table.read_text().splitlines()) for table in path.glob("*.jsonl"))
        return {
            "patients": n_patients,
            "seconds": seconds,
            "core_milliseconds": 1000 * cores / (2 * n_patients),
            "megabytes": sum(largest.values()) / 1024,
            "kilobytes": sum(f.stat().st_blocks * 512 for f in path.rglob("*")) / (2 * n_patients) / 1024,
        }


def _core_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(process: int) -> dict[int, int]:
    """Largest resident size so far, in KiB, of a process and all that it started."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return {}
    sizes = {pid: size for child in children for pid, size in _resident(int(child)).items()}
    if largest := re.search(r"VmHWM:\s+(\d+)", status):
        sizes[process] = int(largest[1])
    return sizes


def memory() -> list[dict[str, float]]:
    """Cohorts of two sizes."""
    return [whole("phantom_private", {"train": n, "validation": 1, "test": 1}) for n in (200, 4000)]


def costs() -> list[dict[str, Any]]:
    """Core milliseconds a volume of every step, in this process."""
    private, acdc = load_manifest("phantom_private"), load_manifest("acdc")
    rows: list[dict[str, Any]] = []
    for step, read, then in (
        ("simulate", partial(read_patient, private, None), "scale what was simulated"),
        (
            "read ACDC's files, with checksums",
            partial(read_patient, acdc, acdc.data_root()),
            "resample and crop ACDC's",
        ),
    ):
        patients, milliseconds = _timed(read, (private if step == "simulate" else acdc).patient_ids("train")[:SHOWN])
        placed, more = _timed(place_on_grid, patients)
        rows += [{"step": step, "milliseconds": milliseconds / 2}, {"step": then, "milliseconds": more / 2}]
    with tempfile.TemporaryDirectory() as folder:
        numbered = list(enumerate(placed))
        milliseconds = _timed(lambda one: write_patient(Path(folder), "train", *one), numbered)[1]
    return [*rows, {"step": "write", "milliseconds": milliseconds / 2}]


def _timed(work: Callable[[Any], Any], items: Any) -> tuple[list[Any], float]:  # noqa: ANN401
    """Results, and core milliseconds of one, warmed up."""
    work(items[0])
    start = time.process_time()
    results = [work(item) for item in items]
    return results, 1000 * (time.process_time() - start) / len(items)


def localisation() -> list[dict[str, Any]]:
    """ACDC with labels withheld: how far from the middle of their box the heart is looked for, and what is cut off.

    The segmenter has seen simulated patients alone.
    """
    manifest = load_manifest("acdc")
    with tempfile.TemporaryDirectory() as folder:
        limits = {"train": 300, "validation": 1, "test": 1}
        phantoms = prepare(load_manifest("phantom_public"), store=Path(folder), limits=limits).split("train")
        segmenter, _ = train_segmenter(phantoms, steps=400, batch=4, learning_rate=1e-2, seed=0)
        finder = HeartFinder(Path(folder) / "segmenter.safetensors", "phantoms")
        save_weights(segmenter, finder.weights)
        ways: dict[str, HeartFinder | None] = {"middle of the field": None, "segmenter": finder}
        patients = [
            read_patient(manifest, manifest.data_root(), i)
            for s in ("train", "validation", "test")
            for i in manifest.patient_ids(s)
        ]
        rows = []
        for name, localiser in ways.items():
            found, milliseconds = _timed(partial(_missed, localiser=localiser), patients)
            distances, inside, dice = np.array(found, float).T
            rows.append(
                {
                    "way": name,
                    "mean": distances.mean(),
                    "largest": distances.max(),
                    "inside": int(inside.sum()),
                    "patients": len(patients),
                    "dice": dice.mean(),
                    "milliseconds": milliseconds / 2,
                }
            )
    return rows


def _missed(patient: Patient, localiser: HeartFinder | None) -> tuple[float, bool, float]:
    """Distance (mm) from the true box's middle, whether the field round what was found holds the box, mean Dice."""
    spacing = np.array(patient.volumes[0].spacing_mm[1:])
    truth = np.stack([labels_of(v, None) for v in patient.volumes])
    found = np.stack([labels_of(replace(v, labels=None), localiser) for v in patient.volumes])
    true_low, true_high = _box(truth)
    low, high = _box(found if found.any() else np.ones_like(found))
    middle, half = (low + high) / 2, GRID.size * GRID.spacing_mm[1] / 2
    missed = np.linalg.norm((middle - (true_low + true_high) / 2) * spacing)
    inside = np.all((middle - true_low) * spacing <= half) and np.all((true_high - middle) * spacing <= half)
    overlap = [2 * np.sum((truth == k) & (found == k)) / (np.sum(truth == k) + np.sum(found == k)) for k in (1, 2, 3)]
    return float(missed), bool(inside), float(np.mean(overlap))


def _box(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.argwhere(labels.any(axis=(0, 1)))
    return pixels.min(axis=0), pixels.max(axis=0)


def biobank(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """Hours on two cores and space for UK Biobank, from ACDC's rates and the reading of one cine of its size."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cine = Path(folder) / "sa.nii.gz"
        smooth = rng.gamma(2, 60, (CINE[0] // 2, CINE[1] // 2, *CINE[2:])).repeat(2, axis=0).repeat(2, axis=1)
        nib.save(nib.Nifti1Image(smooth.astype(np.int16), np.eye(4)), cine)
        reading = _timed(_read_cine, [cine] * 5)[1]
        megabytes = cine.stat().st_size / 2**20
    acdc, finding = kept["acdc"], kept["localisation"][-1]["milliseconds"]
    rows = []
    for labels, extra in (("given", 0.0), ("found by the segmenter", finding)):
        milliseconds = reading + 2 * (acdc["core_milliseconds"] + extra)
        rows.append(
            {
                "patients": BIOBANK,
                "labels": labels,
                "core_milliseconds": milliseconds,
                "hours": BIOBANK * milliseconds / 1000 / 2 / 3600,
                "gigabytes": BIOBANK * 2 * acdc["kilobytes"] / 2**20,
                "cine_megabytes": megabytes,
                "cine_milliseconds": reading,
            }
        )
    return rows


def _read_cine(path: Path) -> None:
    np.asarray(nib.load(path).dataobj, dtype=np.float32)
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def main(wanted: list[str]) -> None:
    """Measure everything, or only the parts that are named; print and keep one JSON object."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    path = RESULTS / "preparation.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if wanted and path.exists() else {}
    kept.pop("benchmark", None)
    parts: dict[str, Callable[[], object]] = {
        "acdc": lambda: whole("acdc", {}),
        "memory": memory,
        "costs": costs,
        "localisation": localisation,
        "biobank": lambda: biobank(kept),
    }
    for name in wanted or parts:
        kept[name] = parts[name]()
    keep("preparation", **kept)


if __name__ == "__main__":
    main(sys.argv[1:])
