"""Preparation: every patient on one grid, intensities in [0, 1], kept in a chunked store that is read lazily.

Processes take a part of the patients each, write them where they belong, and last a table which says that the part is
complete. So memory doesn't grow with the cohort, and a preparation that was killed goes on where it was.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from cardiac_ldm.cohort.manifest import SPLITS, Manifest, PhantomReader
from cardiac_ldm.cohort.patients import Cohort, open_split, read_rows, table_row, write_patient
from cardiac_ldm.cohort.readers import list_patients, read_patient
from cardiac_ldm.cohort.volumes import GRID
from cardiac_ldm.errors import CohortError, PrivacyError
from cardiac_ldm.progress import tqdm

_PART = 16
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABOUT = "cohort.json"
_PROSE = {"root", "licence", "citation", "obtain", "checksums", "budget"}


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

    The key hashes the manifest, who is in it, the grid, the content of the files and the code of this room; of real
    private patients with a salt that never leaves `store`, because keys of runs are published and a bare hash would let
    anybody test who is in the cohort.

    Whether files are still what was read, their names, sizes and times tell. What a killed or failed preparation has
    done waits in a hidden folder of `store`. Processes are spawned: a script calls this under
    `if __name__ == "__main__"`, a notebook anywhere.

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
    plan = _plan(manifest, members, _salt(store) if manifest.secret else "", on_demand)
    work = store / f".{manifest.name}-{plan[:12]}"
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{work}.lock"):
        path = _found(store, manifest, plan, root, localiser)
        if path is None:
            with _explained(work):
                _own(work, manifest)
                _write(work, manifest, root, members, localiser, on_demand)
                path = _accept(work, store, manifest, plan)
            _warn(path, manifest, localiser)
        shutil.rmtree(work, ignore_errors=True)
    return Cohort(manifest, path, path.name.rpartition("-")[2], partial(_draw, manifest, path) if on_demand else None)


def _draw(manifest: Manifest, path: Path, split: str, number: int, patient_id: str) -> None:
    """Write a phantom that is in the table already. Two processes may: they write the same."""
    write_patient(open_split(path / split), number, place_on_grid(read_patient(manifest, None, patient_id)))


def enrolled(manifest: Manifest, root: Path | None, limits: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Who is in which split.

    A limit would let the next patient in for one who's taken out: that's a change of two, and the guarantee is for one.
    So real private patients to learn from are never limited: there are as many places as the manifest says.
    """
    found = list_patients(manifest, root) if manifest.splits.shares else ()
    members = {split: manifest.patient_ids(split, found) for split in SPLITS}
    if manifest.places:
        n, most = len(members["train"]), limits.get("train", manifest.places)
        if manifest.places > most:
            raise CohortError(
                f"{manifest.name}: splits.train: {manifest.places} places are more than the {most} wanted; give fewer "
                "in the manifest: a limit would let somebody else in for one who is taken out"
            )
        if n > manifest.places:
            raise CohortError(
                f"{manifest.name}: budget.patients: {manifest.places} places are too few for the share of "
                f"{manifest.splits.train}; raise their number, or lower the share"
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
        if error.errno not in _NO_ROOM:
            raise
        raise CohortError(f"{work}: {os.strerror(error.errno)}; make room there and {again}") from error


def _salt(store: Path) -> str:
    """A random number that this store keeps to itself, made at first use."""
    path = store / ".salt"
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_hex(32))
            temporary.replace(path)
    return path.read_text()


def _plan(manifest: Manifest, members: Mapping[str, tuple[str, ...]], salt: str, on_demand: bool) -> str:
    """Hash of all that shapes the cohort except its files; prose about it doesn't, nor where it lies."""
    shaped_by = {
        "salt": salt,
        "on_demand": on_demand,
        "manifest": manifest.model_dump(mode="json", exclude=_PROSE),
        "members": members,
        "grid": [GRID.shape, GRID.spacing_mm],
        "code": [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(Path(__file__).parent.rglob("*.py"))],
    }
    return _digest(shaped_by)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stamper(root: Path | None) -> Callable[[Mapping[str, str]], str]:
    """Tells whether files changed without reading them: sizes and times, and which others lie beside them."""

    @cache
    def beside(folder: Path) -> str:
        return _digest(sorted(entry.name for entry in os.scandir(folder) if entry.is_file()))

    def stamp(files: Mapping[str, str]) -> str:
        if root is None or not files:
            return ""
        try:
            facts = [(file, (found := (root / file).stat()).st_size, found.st_mtime_ns) for file in sorted(files)]
            return _digest([facts, [beside(folder) for folder in sorted({(root / file).parent for file in files})]])
        except OSError:
            return "gone"

    return stamp


def _unchanged(root: Path | None, localiser: Localiser | None) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a prepared patient is what would be prepared now."""
    stamp, key = _stamper(root), localiser and localiser.key
    return lambda row: row["stamp"] == stamp(row["files"]) and (row["labelled"] or row["localiser"] == key)


def _found(store: Path, manifest: Manifest, plan: str, root: Path | None, localiser: Localiser | None) -> Path | None:
    """The finished cohort of this plan whose files are unchanged, if any."""
    unchanged = _unchanged(root, localiser)
    for about in store.glob(f"{manifest.name}-*/{_ABOUT}"):
        rows = (row for split in SPLITS for row in read_rows(about.parent, split))
        if json.loads(about.read_text())["plan"] == plan and all(map(unchanged, rows)):
            return about.parent
    return None


def _write(
    work: Path,
    manifest: Manifest,
    root: Path | None,
    members: Mapping[str, tuple[str, ...]],
    localiser: Localiser | None,
    on_demand: bool,
) -> None:
    """Prepare what isn't yet, by a pool of processes, spawned (safe beside threads) and of one thread each.

    Threads of a linear algebra library would fight over the cores: the matrices are small. What goes to and fro is
    names and problems, so nothing piles up. The progress of real private patients is shown on a terminal alone: what a
    notebook catches may be published.
    """
    unchanged = _unchanged(root, localiser)
    parts, left = _parts(members), []
    for split, ids in members.items():
        open_split(work / "store" / split, len(ids))
    for part in parts:
        table = part.table(work)
        if not (table.exists() and all(unchanged(json.loads(line)) for line in table.read_text().splitlines())):
            left.append(part)
    n_patients, n_left = (sum(len(part.ids) for part in some) for some in (parts, left))
    if not left:
        return
    problems: list[str] = []
    with (
        patch.dict(os.environ, ONE_THREAD),
        ProcessPoolExecutor(min(os.cpu_count() or 1, len(left)), get_context("spawn")) as pool,
        tqdm(
            total=n_patients,
            initial=n_patients - n_left,
            unit=" patients",
            desc=f"preparing {manifest.name}",
            disable=None if manifest.secret else False,
        ) as progress,
    ):
        for part, found in zip(
            left, pool.map(partial(_prepare_part, manifest, root, localiser, on_demand, work), left), strict=True
        ):
            problems += found
            progress.update(len(part.ids))
    if problems:
        said = f"{len(problems)} patient(s) can't be prepared"
        raise CohortError(_for_holders_eyes(manifest, work.parent, said, "\n  ".join(["", *problems])))


def _parts(members: Mapping[str, tuple[str, ...]]) -> list[_Part]:
    return [_Part(split, n, ids[n : n + _PART]) for split, ids in members.items() for n in range(0, len(ids), _PART)]


def _prepare_part(
    manifest: Manifest, root: Path | None, localiser: Localiser | None, on_demand: bool, work: Path, part: _Part
) -> list[str]:
    """Prepare and write a part, its table last; give its problems, which leave it without a table.

    on_demand: write the table alone.
    """
    _end_with_parent()
    arrays, stamp = open_split(work / "store" / part.split), _stamper(root)
    read = partial(read_patient, imaged=False) if on_demand else read_patient
    rows, problems = [], []
    for number, patient_id in enumerate(part.ids, part.first):
        try:
            patient = read(manifest, root, patient_id)
            record = place_on_grid(patient, localiser)
        except CohortError as error:
            problems.append(str(error))
            continue
        used = None if record.labelled or localiser is None else localiser.key
        voxels = [_voxels(volume.image) for volume in patient.volumes if root]  # no phantom is there twice
        files = {
            "person": manifest.person(patient_id),
            "voxels": voxels,
            "files": dict(patient.files),
            "stamp": stamp(patient.files),
            "localiser": used,
        }
        rows.append((table_row(record) if on_demand else write_patient(arrays, number, record)) | files)
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
def _end_with_parent() -> None:
    """Let this process die with the one that spawned it, once: orphans of a killed one would go on writing."""
    parent = parent_process()

    def wait() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    if parent:
        Thread(target=wait, daemon=True).start()


def _accept(work: Path, store: Path, manifest: Manifest, plan: str) -> Path:
    """Join the tables, look for copies, and give the cohort its name."""
    built, digest = work / "store", hashlib.sha256(plan.encode())
    for torn in built.glob("*/*/*.partial"):
        torn.unlink()
    for split in SPLITS:
        with (built / f"{split}.jsonl").open("w") as joined:
            for table in sorted(work.glob(f"{split}-*.jsonl")):
                joined.write(table.read_text())
        for row in read_rows(built, split):
            digest.update(json.dumps([row["files"], row["localiser"]], sort_keys=True).encode())
    about = {"plan": plan} | manifest.model_dump(mode="json", include={"name", "role", "simulated"})
    (built / _ABOUT).write_text(json.dumps(about))
    path = store / f"{manifest.name}-{digest.hexdigest()[:12]}"
    _own(built, manifest)
    _refuse_twins(built, manifest, store)
    with FileLock(store / ".accept.lock"):
        _refuse_copies(built, manifest, store)
        os.sync()
        if path.is_dir():  # the same content, seen at other times
            for split in SPLITS:
                (built / f"{split}.jsonl").replace(path / f"{split}.jsonl")
        else:
            built.replace(path)
    return path


def _files(path: Path) -> Iterator[tuple[str, str]]:
    """Hash and name of what was read for a prepared cohort; ACDC's .cfg, a few numbers, may well be alike by chance."""
    for split in SPLITS:
        for row in read_rows(path, split):
            yield from ((sha256, file) for file, sha256 in row["files"].items() if not file.endswith(".cfg"))
            yield from ((voxels, f"a picture of {row['id']}") for voxels in row["voxels"])


def _own(folder: Path, manifest: Manifest) -> None:
    """Make a folder; one of real private patients is its owner's alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if manifest.secret:
        folder.chmod(0o700)


def _for_holders_eyes(manifest: Manifest, store: Path, said: str, names: str) -> str:
    """What is said where something names patients; of real private ones that goes to a file, which is its owner's."""
    if not manifest.secret:
        return f"{manifest.name}: {said}{names}"
    log = store / f".{manifest.name}-problems.txt"
    log.touch(mode=0o600)
    log.write_text(f"{manifest.name}: {said}{names}\n")
    return f"{manifest.name}: {said}; who, and what to do: {store.name}/{log.name}, for their holder's eyes"


def _refuse_twins(built: Path, manifest: Manifest, store: Path) -> None:
    """Raise CohortError where one picture has two patients' names: in two splits, or of real private patients at all.

    The guarantee is for one person: somebody with two names would have half of it. Pictures are the same if their
    voxels are, however they are stored; and one person's visits are one person's.
    """
    owners: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        for row in read_rows(built, split):
            for what in (row["person"], *row["voxels"]):
                name, its_split = owners.setdefault(what, (row["id"], split))
                if name != row["id"] and (manifest.secret or its_split != split):
                    names = f": {name} ({its_split}) and {row['id']} ({split}); take one of them out of the cohort"
                    raise CohortError(_for_holders_eyes(manifest, store, "one person has two names", names))


def _refuse_copies(built: Path, manifest: Manifest, store: Path) -> None:
    """Raise PrivacyError where real public patients share a file with real private ones, whichever came first."""
    mine = dict(_files(built))
    for about in store.glob(f"*/{_ABOUT}") if mine else ():
        other = json.loads(about.read_text())
        if other["role"] != manifest.role:
            for sha256, file in _files(about.parent):
                if sha256 in mine:
                    ours, theirs = (manifest.name, mine[sha256]), (other["name"], file)
                    public, private = (theirs, ours) if manifest.secret else (ours, theirs)
                    raise PrivacyError(
                        f"{public[0]}: {public[1]} is the same as a file of {private[0]}, of real private patients, "
                        "whom the public cohort would reveal; take it out of the public one"
                    )


def _warn(path: Path, manifest: Manifest, localiser: Localiser | None) -> None:
    """Say once what was mended and whose labels are missing; of real private patients where to read it, and no more.

    What a notebook catches may be published, and even a number would tell something of them.
    """
    where = f"{path.parent.name}/{path.name}/*.jsonl"
    instead = "the middle of the field of view was" if localiser is None else "labels of a public segmenter were"
    if manifest.secret:
        said = f"{manifest.name}: what was mended or doubted is in {where}; where there are no labels, {instead} taken"
        warnings.warn(said, stacklevel=3)
        return
    rows = [row for split in SPLITS for row in read_rows(path, split)]
    unlabelled, found = sum(not row["labelled"] for row in rows), []
    if unlabelled:
        found.append(f"{unlabelled} patient(s) have no labels; {instead} taken")
    for what, field in (("repair(s)", "repairs"), ("doubt(s)", "doubts")):
        if remarks := [remark for row in rows for remark in row[field]]:
            found.append(f"{len(remarks)} {what}, all in {where}: {'; '.join(remarks[:10])}")
    if found:
        warnings.warn(f"{manifest.name}: {'; '.join(found)}", stacklevel=3)
