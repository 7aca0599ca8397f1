"""The cohort's budget: what real patients have spent, recorded before it is spent, outside of every run and clone.

The record is a file of JSON lines that only grows. A person is known in it by salted hashes of their decoded volumes
and of their name in the cohort: who shares one is the same person, in whatever cohort, however exported. A line is on
the disk before its run's first step: a kill at any moment leaves what is recorded at or above what was spent.
"""

import hmac
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_data_path
from scipy.cluster.hierarchy import DisjointSet

from cardiac_ldm.cohort import Patients
from cardiac_ldm.cohort.manifest import Budget
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.models.device import is_first_process
from cardiac_ldm.privacy.accounting import Mechanism, Stated, epsilon_pld, merged
from cardiac_ldm.privacy.dpsgd import Randomness
from cardiac_ldm.privacy.ledger import Ledger, Standing

People = tuple[tuple[str, ...], ...]
"""For every person what they are known by; in the record, salted hashes."""
_TORN = b" torn\n"  # ends a line whose writing was killed: nothing was spent on it


def require_charged(patients: Patients, randomness: Randomness, ledger: Ledger) -> None:
    """Raise PrivacyError where a mechanism would meet real patients off their record, or with noise that isn't secret.

    Who was charged has a name in the record, which the ledger on disk holds; only the first process reads that.
    """
    if patients.secret and randomness.simulated:
        raise PrivacyError(f"randomness: simulated, and {patients.name} are real; their noise must be nobody's to draw")
    if patients.secret and is_first_process() and not ledger.run:
        raise PrivacyError(f"run: {patients.name} weren't charged for this one; ask a Study for it, which charges them")


class Spend(Stated):
    """A run that was charged: the mechanisms that `people` went through, planned whole. delta: of their budget."""

    run: str
    date: str
    version: str
    cohort: str
    delta: float
    mechanisms: tuple[Mechanism, ...]
    people: People


class Record:
    """The record in `folder`; else in the one that CARDIAC_LDM_RECORD names, else in the user's data folder.

    Raises PrivacyError where a relative path is named.
    """

    def __init__(self, folder: Path | None = None) -> None:
        place = Path(folder or os.environ.get("CARDIAC_LDM_RECORD") or user_data_path("cardiac_ldm"))
        if not place.is_absolute():  # commands and notebooks run in different folders
            raise PrivacyError(
                f"CARDIAC_LDM_RECORD: {place} would be another record in every folder; give the whole path"
            )
        self.path = place / "record.jsonl"

    def _lines(self, kind: str) -> Iterator[Any]:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n") or line.endswith(_TORN):
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise PrivacyError(f"{self.path}: line {number} can't be read; restore it from a backup") from error
            yield from [found[kind]] if kind in found else []

    @property
    def spends(self) -> list[Spend]:
        """All runs that were charged, in their order."""
        return [Spend.model_validate(line) for line in self._lines("spend")]

    @property
    def finished(self) -> dict[str, dict[str, str]]:
        """By run, the SHA-256 of the weights that it left."""
        return {line["run"]: line["weights"] for line in self._lines("finished")}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.parent.chmod(0o700)
        with FileLock(self.path.with_suffix(".lock")):
            yield

    def _append(self, **line: object) -> None:
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read(1) == b"\n" else _TORN)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        for folder in self.path.parents[:3]:  # so that the file is found after a power cut, too, if it is new
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    @cached_property
    def _salt(self) -> bytes:
        with self._locked():
            if not [*self._lines("salt")]:
                self._append(salt=secrets.token_hex(32))
        return bytes.fromhex(next(self._lines("salt")))

    def hashes(self, people: People) -> People:
        """How the record knows these people: as nobody does who lacks its salt."""
        return tuple(
            tuple(hmac.digest(self._salt, key.encode(errors="backslashreplace"), "sha256").hex()[:32] for key in person)
            for person in people
        )

    def standing(self, people: People, delta: float, *planned: Sequence[Mechanism]) -> Standing:
        """What all runs that touched any of these (hashed) people spent together, and what is `planned` for them.

        It's the most that any one person has, among all whom these runs touched: also those who have left since.
        """
        spends, same, touched = self.spends, DisjointSet(), defaultdict[str, set[int]](set)
        for person in (*people, *(person for spend in spends for person in spend.people)):
            for key in person:
                same.add(key)
                same.merge(person[0], key)
        first = same.__getitem__
        for number, spend in enumerate(spends):
            for person in spend.people:
                touched[first(person[0])].add(number)
        here = {first(person[0]) for person in people}
        related = {number for person in here for number in touched[person]}
        counted = here | {first(person[0]) for number in related for person in spends[number].people}
        new = [mechanism for run in planned for mechanism in run]
        shares = {(frozenset(touched[person]), person in here) for person in counted}
        terms = {merged([m for n in own for m in spends[n].mechanisms] + new * is_here) for own, is_here in shares}
        epsilon = max((epsilon_pld(each, delta) for each in terms if each), default=0.0)
        return Standing(runs=len(related) + len(planned), epsilon=epsilon, delta=delta)

    def covered(self, cohort: str, people: People, budget: Budget, *planned: Sequence[Mechanism]) -> str:
        """What `planned` runs spend of these people's budget, in words. Raises PrivacyError if it's more."""
        before, after = (self.standing(people, budget.delta, *runs) for runs in ((), planned))
        said = f"{cohort}: this spends {after.epsilon - before.epsilon:.2f} of ({budget.epsilon:g}, {budget.delta:g}); "
        said += f"{before.epsilon:.2f} are spent by {before.runs} run(s)"
        if after.epsilon > budget.epsilon:
            raise PrivacyError(f"{said}: together {after.epsilon:.2f}, more than the manifest's budget; ask for less")
        return said

    def charge(self, ledger: Ledger, cohort: str, people: People, budget: Budget) -> Standing:
        """Write down that `people` go through a ledger's mechanisms, once however often its run is resumed.

        Raises:
            PrivacyError: it would be more than the budget; then nothing is written.
        """
        with self._locked():
            known = self._spend_of(ledger)
            if known and (known.mechanisms != ledger.mechanisms or set(people) - set(known.people)):
                raise PrivacyError(f"{cohort}: run {ledger.run} was charged for something else")
            if not known:
                self.covered(cohort, people, budget, ledger.mechanisms)
                about = ledger.model_dump(mode="json", include={"run", "date", "version", "mechanisms"})
                self._append(spend=about | {"cohort": cohort, "delta": budget.delta, "people": people})
        return self.standing(people, budget.delta)

    def _spend_of(self, ledger: Ledger) -> Spend | None:
        return next((spend for spend in self.spends if spend.run == ledger.run), None)

    def finish(self, ledger: Ledger) -> None:
        """Write down which weights a run left: one charge pays for one model.

        Raises:
            PrivacyError: it left others before, as a copy of its folder does that goes on by itself.
        """
        with self._locked():
            if (weights := self.finished.get(ledger.run)) is None:
                self._append(finished={"run": ledger.run, "weights": ledger.weights})
            elif weights != ledger.weights:
                raise PrivacyError(f"run {ledger.run}: was finished elsewhere with other weights; use those")

    def vouch(self, ledger: Ledger) -> Standing:
        """Where the patients of a real model stand, all their runs counted.

        Raises:
            PrivacyError: the record knows nothing of this run, of these mechanisms or of these weights.
        """
        spend = self._spend_of(ledger)
        if not spend or spend.mechanisms != ledger.mechanisms or self.finished.get(ledger.run) != ledger.weights:
            remedy = "name the record that was charged for it by the variable CARDIAC_LDM_RECORD, or restore it"
            raise PrivacyError(f"{ledger.private_data}: {self.path} doesn't know this model; {remedy}")
        return self.standing(spend.people, spend.delta)
