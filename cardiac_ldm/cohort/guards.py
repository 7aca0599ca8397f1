"""The guards on private patients, and on who is in a cohort twice: at preparation, and wherever patients are used."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from cardiac_ldm.cohort.manifest import SPLITS, Manifest
from cardiac_ldm.cohort.patients import Patients, read_rows
from cardiac_ldm.errors import CohortError, PrivacyError

ABOUT = "cohort.json"
"""The file that says what a prepared cohort is: its plan, name and role."""


def require_public(patients: Patients, leak: str) -> None:
    """Refuse private patients, simulated or not, to whatever takes a statistic, chooses or fits without noise.

    leak completes "this would reveal ...". Raises PrivacyError.
    """
    if patients.role != "public":
        raise PrivacyError(f"{patients.name} is private, and this would reveal {leak}; give a public cohort here")


def require_releasable(patients: Patients, leak: str) -> None:
    """Refuse real private patients to whatever shows them or evaluates against them; simulated ones expose nobody.

    leak completes "this would reveal ...". Raises PrivacyError.
    """
    if patients.secret:
        raise PrivacyError(
            f"{patients.name} holds real private patients, and this would reveal {leak}; "
            "give a public or a simulated cohort"
        )


def require_labelled(patients: Patients, purpose: str) -> Patients:
    """Those of the patients whose labels were given, for what predicted ones won't do; purpose says for what.

    Raises CohortError where there are none.
    """
    if not patients.labelled.any():
        raise CohortError(
            f"{patients.name}: no patient ({patients.split}) has labels; {purpose} needs a cohort with some"
        )
    return patients if patients.labelled.all() else patients.subset(np.flatnonzero(patients.labelled))


def salt(store: Path) -> str:
    """A random number that this store keeps to itself, made at first use.

    It enters the keys of real private cohorts: they're published, and a bare hash would let anybody test who is in.
    """
    path = store / ".salt"
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_hex(32))
            temporary.replace(path)
    return path.read_text()


def own(folder: Path, manifest: Manifest) -> None:
    """Make a folder; one of real private patients is its owner's alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if manifest.secret:
        folder.chmod(0o700)


def for_holders_eyes(manifest: Manifest, store: Path, said: str, names: str) -> str:
    """What is said where something names patients; of real private ones that goes to a file, which is its owner's."""
    if not manifest.secret:
        return f"{manifest.name}: {said}{names}"
    log = store / f".{manifest.name}-problems.txt"
    log.touch(mode=0o600)
    log.write_text(f"{manifest.name}: {said}{names}\n")
    return f"{manifest.name}: {said}; who, and what to do: {store.name}/{log.name}, for their holder's eyes"


def refuse_twins(built: Path, manifest: Manifest, store: Path) -> None:
    """Raise CohortError where one picture has two patients' names: in two splits, or of real private patients at all.

    The guarantee is for one person: somebody with two names would have half of it. Pictures are the same if their
    voxels are, however they are stored; and one person's visits are one person's.
    """
    patient_index: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        for row in read_rows(built, split):
            for what in (row["person"], *row["voxels"]):
                name, its_split = patient_index.setdefault(what, (row["id"], split))
                if name != row["id"] and (manifest.secret or its_split != split):
                    names = f": {name} ({its_split}) and {row['id']} ({split}); take one of them out of the cohort"
                    raise CohortError(for_holders_eyes(manifest, store, "one person has two names", names))


def refuse_copies(built: Path, manifest: Manifest, store: Path) -> None:
    """Raise PrivacyError where real public patients share a file with real private ones, whichever came first."""
    mine = dict(_files(built))
    for about in store.glob(f"*/{ABOUT}") if mine else ():
        other = json.loads(about.read_text())
        if other["role"] == manifest.role:
            continue
        for sha256, file in _files(about.parent):
            if sha256 in mine:
                ours, theirs = (manifest.name, mine[sha256]), (other["name"], file)
                public, private = (theirs, ours) if manifest.secret else (ours, theirs)
                raise PrivacyError(
                    f"{public[0]}: {public[1]} is the same as a file of {private[0]}, of real private patients, whom "
                    "the public cohort would reveal; take it out of the public one"
                )


def _files(path: Path) -> Iterator[tuple[str, str]]:
    """Hash and name of what was read for a prepared cohort; ACDC's .cfg, a few numbers, may well be alike by chance."""
    for split in SPLITS:
        for row in read_rows(path, split):
            yield from ((sha256, file) for file, sha256 in row["files"].items() if not file.endswith(".cfg"))
            yield from ((voxels, f"a picture of {row['id']}") for voxels in row["voxels"])
