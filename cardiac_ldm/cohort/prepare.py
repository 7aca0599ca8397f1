"""Preparation: every patient on one grid, intensities in [0, 1], kept in a file each that is read when asked for.

Processes take a part of the patients each, write their files, and last a table which says that the part is complete. So
memory doesn't grow with the cohort, and a preparation that was killed goes on where it was.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import current_process, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from filelock import FileLock

from cardiac_ldm.cohort.grid import Localiser, place_on_grid
from cardiac_ldm.cohort.guards import ABOUT, for_holders_eyes, own, refuse_copies, refuse_twins, salt
from cardiac_ldm.cohort.manifest import SPLITS, Manifest, PhantomReader
from cardiac_ldm.cohort.patients import Cohort, read_rows, table_row, write_patient
from cardiac_ldm.cohort.readers import list_patients, read_patient
from cardiac_ldm.cohort.volumes import GRID
from cardiac_ldm.errors import CohortError
from cardiac_ldm.progress import tqdm

VERSION = 1
"""Raise it when prepared volumes change: it's in the key of every cohort, and source text isn't."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The environment of processes that share the cores: threads of a linear algebra library would fight over them."""
_PART = 16
_PROSE = {"root", "licence", "citation", "obtain", "checksums", "budget"}
"""Fields of a manifest that shape nothing that's prepared."""


class _Job(NamedTuple):
    """What the processes need to know, and the folder in which they work."""

    manifest: Manifest
    root: Path | None
    localiser: Localiser | None
    on_demand: bool
    work: Path

    def used(self, labelled: bool) -> str | None:
        """Key of the localiser that a patient needs."""
        return None if labelled or self.localiser is None else self.localiser.key

    def unchanged(self, row: Mapping[str, Any]) -> bool:
        """Whether the patient of a table's row is what would be prepared now."""
        return bool(row["stamp"] == _stamp(self.root, row["files"]) and row["localiser"] == self.used(row["labelled"]))


class _Part(NamedTuple):
    """Patients `ids` of a split, who have rows first, first + 1, ... in its arrays."""

    split: str
    first: int
    ids: tuple[str, ...]

    def table(self, work: Path) -> Path:
        """The file that's written last."""
        return work / f"{self.split}-{self.first:06d}.jsonl"


def prepare(
    manifest: Manifest,
    *,
    store: Path,
    data_root: Path | None = None,
    limits: Mapping[str, int] | None = None,
    localiser: Localiser | None = None,
    on_demand: bool = False,
) -> Cohort:
    """Prepare a cohort under store/<name>-<key>, go on with it, or return at once where it's done.

    data_root: where the cohort's files are; else the environment or the manifest says so. limits: at most this many
    patients of each split, the first ones. localiser: finds the hearts of patients without labels; without
    it the middle of the field of view is taken for the heart, with a warning. on_demand: of phantoms, write the tables
    alone, a tenth of the work, and draw patients when they're first read; other cohorts pay no heed.

    The key hashes the manifest, who is in it, the grid, VERSION and the content of the files; of real private patients
    with a salt that never leaves `store`. Whether files are still what was read, their names, sizes and times tell.

    What a killed or failed preparation has done waits in a hidden folder of `store`. Processes are spawned: a script
    calls this under `if __name__ == "__main__"`, a notebook anywhere.

    Raises:
        CohortError: the problems of all patients together, or a want of space or memory.
        PrivacyError: real public patients share a file with real private ones of this store.
    """
    if getattr(current_process(), "_inheriting", False):  # a spawned process, which imports the script that spawned it
        sys.exit('this script starts processes, which run it anew: put its calls under `if __name__ == "__main__":`')
    limits = dict(limits or {})
    if wrong := {k: n for k, n in limits.items() if k not in SPLITS or n < 1}:
        raise CohortError(f"{manifest.name}: limits {wrong}: expected at least 1 patient for {', '.join(SPLITS)}")
    root = manifest.data_root(data_root)
    members = enrolled(manifest, root, limits)
    on_demand &= isinstance(manifest.reader, PhantomReader)
    store.mkdir(parents=True, exist_ok=True)
    shaped_by = {
        "version": VERSION,
        "salt": salt(store) if manifest.secret else "",
        "on_demand": on_demand,
        "manifest": manifest.model_dump(mode="json", exclude=_PROSE),
        "members": members,
        "grid": [GRID.shape, GRID.spacing_mm],
    }
    plan = _digest(shaped_by)
    work = store / f".{manifest.name}-{plan[:12]}"
    job = _Job(manifest, root, localiser, on_demand, work)
    with FileLock(f"{work}.lock"):
        path = _found(job, store, plan)
        if path is None:
            with _explained(work):
                own(work, manifest)
                _write(job, members)
                path = _accept(work, store, manifest, plan)
            _warn(path, manifest, localiser)
        shutil.rmtree(work, ignore_errors=True)
    return Cohort(manifest, path, path.name.rpartition("-")[2], partial(_draw, manifest, path) if on_demand else None)


def _draw(manifest: Manifest, path: Path, split: str, number: int, patient_id: str) -> None:
    """Write a phantom that is in the table already. Two processes may: they write the same."""
    write_patient(path, split, number, place_on_grid(read_patient(manifest, None, patient_id)))


def enrolled(manifest: Manifest, root: Path | None, limits: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Who is in which split.

    A limit would let the next patient in for one who's taken out: that's a change of two, and the guarantee is for one.
    So real private patients to learn from are never limited: there are as many places as the manifest says.
    """
    found = list_patients(manifest, root) if manifest.splits.shares else ()
    members = {split: manifest.patient_ids(split, found) for split in SPLITS}
    if manifest.places:
        if manifest.places > (most := limits.get("train", manifest.places)):
            raise CohortError(
                f"{manifest.name}: splits.train: {manifest.places} places are more than the {most} wanted; give fewer "
                "in the manifest: a limit would let somebody else in for one who is taken out"
            )
        if len(members["train"]) > manifest.places:
            raise CohortError(
                f"{manifest.name}: budget.patients: {manifest.places} places are too few for splits.train; raise their "
                "number, or let fewer in"
            )
    return {split: members[split][: limits.get(split)] for split in SPLITS}


@contextmanager
def _explained(work: Path) -> Iterator[None]:
    """Say what to do where the machine fell short."""
    again = "prepare again: what is done is kept"
    try:
        yield
    except (BrokenProcessPool, MemoryError) as error:
        why = "memory may be short, or a script lacks `if __name__ == '__main__'`"
        raise CohortError(f"{work}: a process died: {why}; mend that and {again}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CohortError(f"{work}: {os.strerror(error.errno)}; make room there and {again}") from error


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stamp(root: Path | None, files: Iterable[str]) -> str:
    """Changes where files do, or what lies beside them: made of sizes and times, the folders' too; reads nothing."""
    facts: list[object] = []
    try:
        for file, place in ((file, root / file) for file in sorted(files) if root):
            found = place.stat()
            facts += [file, found.st_size, found.st_mtime_ns, place.parent.stat().st_mtime_ns]
    except OSError:
        return "gone"
    return _digest(facts)


def _found(job: _Job, store: Path, plan: str) -> Path | None:
    """The finished cohort of this plan whose files are unchanged, if any."""
    for about in store.glob(f"{job.manifest.name}-*/{ABOUT}"):
        rows = (row for split in SPLITS for row in read_rows(about.parent, split))
        if json.loads(about.read_text())["plan"] == plan and all(map(job.unchanged, rows)):
            return about.parent
    return None


def _write(job: _Job, members: Mapping[str, tuple[str, ...]]) -> None:
    """Prepare what isn't yet, by a pool of processes, spawned (safe beside threads) and of one thread each.

    What goes to and fro is names and problems, so nothing piles up. The progress of real private patients is shown on a
    terminal alone: what a notebook catches may be published.
    """
    left: list[_Part] = []
    for split, ids in members.items():
        for part in (_Part(split, n, ids[n : n + _PART]) for n in range(0, len(ids), _PART)):
            table = part.table(job.work)
            if not (table.exists() and all(job.unchanged(json.loads(line)) for line in table.read_text().splitlines())):
                left.append(part)
    if not left:
        return
    n_patients, n_left = sum(map(len, members.values())), sum(len(part.ids) for part in left)
    problems: list[str] = []
    with (
        patch.dict(os.environ, ONE_THREAD),
        ProcessPoolExecutor(min(os.cpu_count() or 1, len(left)), get_context("spawn")) as pool,
        tqdm(
            total=n_patients,
            initial=n_patients - n_left,
            unit=" patients",
            desc=f"preparing {job.manifest.name}",
            disable=None if job.manifest.secret else False,
        ) as progress,
    ):
        for part, found in zip(left, pool.map(partial(_prepare_part, job), left), strict=True):
            problems += found
            progress.update(len(part.ids))
    if problems:
        said = f"{len(problems)} patient(s) can't be prepared"
        raise CohortError(for_holders_eyes(job.manifest, job.work.parent, said, "\n  ".join(["", *problems])))


def _prepare_part(job: _Job, part: _Part) -> list[str]:
    """Prepare and write a part, its table last; give its problems, which leave it without a table."""
    end_with_parent()
    manifest, root, localiser, on_demand, work = job
    read = partial(read_patient, imaged=False) if on_demand else read_patient
    rows, problems = [], []
    for number, patient_id in enumerate(part.ids, part.first):
        try:
            patient = read(manifest, root, patient_id)
            record = place_on_grid(patient, localiser)
        except CohortError as error:
            problems.append(str(error))
            continue
        files = {
            "person": manifest.person(patient_id),
            "voxels": [_voxels(volume.image) for volume in patient.volumes if root],  # no phantom is there twice
            "files": dict(patient.files),
            "stamp": _stamp(root, patient.files),
            "localiser": job.used(record.labelled),
        }
        if not on_demand:
            write_patient(work / "store", part.split, number, record)
        rows.append(table_row(record) | files)
    if not problems:
        os.sync()
        temporary = part.table(work).with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(part.table(work))
    return problems


def _voxels(image: np.ndarray) -> str:
    """Hash of the voxels of a picture (slices, rows, columns), the same however it's stored, turned or padded."""
    return hashlib.sha256(np.sort(image[image > image.min()]).tobytes()).hexdigest()


@cache
def end_with_parent() -> None:
    """Let this process die with the one that spawned it, once: orphans of a killed one would go on writing."""
    if parent := parent_process():

        def wait() -> None:
            parent.join()
            os._exit(1)

        Thread(target=wait, daemon=True).start()


def _accept(work: Path, store: Path, manifest: Manifest, plan: str) -> Path:
    """Join the tables, look for copies, and give the cohort its name."""
    built, digest = work / "store", hashlib.sha256(plan.encode())
    own(built, manifest)
    for torn in built.glob("*/*.tmp"):
        torn.unlink()
    for split in SPLITS:
        tables = sorted(work.glob(f"{split}-*.jsonl"))
        (built / f"{split}.jsonl").write_text("".join(table.read_text() for table in tables))
        for row in read_rows(built, split):
            digest.update(json.dumps([row["files"], row["localiser"]], sort_keys=True).encode())
    about = {"plan": plan} | manifest.model_dump(mode="json", include={"name", "role", "simulated"})
    (built / ABOUT).write_text(json.dumps(about))
    path = store / f"{manifest.name}-{digest.hexdigest()[:12]}"
    refuse_twins(built, manifest, store)
    with FileLock(store / ".accept.lock"):
        refuse_copies(built, manifest, store)
        os.sync()
        if path.is_dir():  # the same content, seen at other times
            for split in SPLITS:
                (built / f"{split}.jsonl").replace(path / f"{split}.jsonl")
        else:
            built.replace(path)
    return path


def _warn(path: Path, manifest: Manifest, localiser: Localiser | None) -> None:
    """Say once what was mended and whose labels are missing; of real private patients where to read it, and no more.

    What a notebook catches may be published, and even a number would tell something of them.
    """
    where = f"{path.parent.name}/{path.name}/*.jsonl"
    instead = "the middle of the field of view was" if localiser is None else "labels of a public segmenter were"
    found = []
    if manifest.secret:
        found.append(f"what was mended or doubted is in {where}; where there are no labels, {instead} taken")
    else:
        rows = [row for split in SPLITS for row in read_rows(path, split)]
        if unlabelled := sum(not row["labelled"] for row in rows):
            found.append(f"{unlabelled} patient(s) have no labels; {instead} taken")
        for what, field in (("repair(s)", "repairs"), ("doubt(s)", "doubts")):
            if remarks := [remark for row in rows for remark in row[field]]:
                found.append(f"{len(remarks)} {what}, all in {where}: {'; '.join(remarks[:10])}")
    if found:
        warnings.warn(f"{manifest.name}: {'; '.join(found)}", stacklevel=3)
