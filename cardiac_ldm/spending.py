"""Models and tables of private patients: what they spent together; of real ones, what would be is agreed to first."""

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from cardiac_ldm.cohort import Patients
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.models.device import is_first_process
from cardiac_ldm.privacy import Ledger, Record, Standing
from cardiac_ldm.privacy.table import TableRecipe
from cardiac_ldm.runs import Run
from cardiac_ldm.training.finetune import FinetuneSettings
from cardiac_ldm.training.rehearsed import verdict

_KINDS = {"finetune": "model", "attributes": "table of attributes"}
"""What stages that learn from private patients leave, by their names."""


@dataclass(frozen=True)
class Wanted:
    """A model or a table of a budget that is asked for.

    run: its run, done or not; asked only where there are others of its stage.
    """

    stage: str
    epsilon: float
    recipe: FinetuneSettings | TableRecipe
    run: Callable[[float], Run]


@dataclass(frozen=True)
class Spending:
    """What is spent of `patients` by the models and tables in the folder `runs`."""

    patients: Patients
    runs: Path

    @property
    def who(self) -> str:
        """Who the patients are, as nobody can tell who lacks the record's salt."""
        return hashlib.sha256(repr(sorted(Record().hashes(self.patients.people))).encode()).hexdigest()

    def planned(self, wanted: Iterable[Wanted]) -> str | None:
        """What all these models and tables would spend together, in words; None where they are there.

        And what rehearsals on public patients say of whether the models will be the better for it.

        Raises:
            PrivacyError: more than the manifest's budget, or something that would reveal patients; it's named.
            ParameterError: a budget that no plan reaches.
        """
        patients, record = self.patients, Record()
        asked = {(one.stage, one.epsilon): one for one in wanted}
        for (_, epsilon), one in sorted(asked.items(), key=lambda item: item[0]):
            one.recipe.check(epsilon, patients.name, patients.places, patients.secret)
        new = {kind: one.recipe.mechanisms(one.epsilon, patients.places) for kind, one in asked.items()}
        people = record.hashes(patients.people)
        self._none_unknown()
        for (stage, epsilon), one in asked.items():
            # without runs the public stages, which may take hours, need not be there to know
            if any(self._folders(stage)) and self._charged(one.run(epsilon)):
                del new[stage, epsilon]
        kinds = " and ".join(name for stage, name in _KINDS.items() if stage in {kind for kind, _ in new})
        cohort = f"{patients.name} ({kinds})" if "table" in kinds else patients.name
        if not new:
            return None
        said = record.covered(cohort, people, patients.budget, *new.values())
        recipes = ((epsilon, asked[stage, epsilon].recipe) for stage, epsilon in new)
        worth = [verdict(r, epsilon, patients.places) for epsilon, r in recipes if isinstance(r, FinetuneSettings)]
        return ". ".join([said, *dict.fromkeys(worth)])

    def agree(self, wanted: Iterable[Wanted], spend: bool) -> None:
        """Look at all that a study asks for before any of it is spent. Raises PrivacyError unless told to spend."""
        said = self.planned(wanted)
        if said and not spend:
            raise PrivacyError(f"{said}. Nothing is spent yet; to agree, set the parameter spend to True")
        if said and is_first_process():
            print(f"{said}. It's recorded in {str(Record().path).replace(str(Path.home()), '~')}")

    def begin(self, run: Run) -> None:
        """Make room for a run that is yet to be charged: what a folder has kept of another can't be gone on with.

        That one was finished elsewhere, from a copy of the folder, or its weights are gone; its charge stays.
        """
        if is_first_process() and run.folder.exists():
            with FileLock(run.folder / "lock"):
                for left in () if self._charged(run) else [*run.folder.iterdir()]:
                    if left.is_dir():
                        shutil.rmtree(left)
                    elif left.name != "lock":
                        left.unlink()

    def charge(self, ledger: Ledger, folder: Path) -> None:
        """Charge the patients for a run before its first step; one that goes on was charged, and its ledger stays."""
        path = folder / "privacy.json"
        folder.chmod(0o700)
        if not path.exists():  # on the disk first: a kill before the next lines has neither spent nor charged
            ledger.model_copy(update={"run": secrets.token_hex(16)}).save(path)
        begun, record = Ledger.load(path), Record()
        people = record.hashes(self.patients.people)
        together = record.charge(begun, self.patients.name, people, self.patients.budget)
        begun.model_copy(update={"together": begun.together or together}).save(path)

    def together(self) -> Standing | None:
        """What all private models of the patients spent together; None where there is none.

        Of real patients their record says it, whatever `runs` holds; of simulated ones the ledgers in `runs` do.
        """
        if self.patients.secret:
            record = Record()
            standing = record.standing(record.hashes(self.patients.people), self.patients.budget.delta)
            return standing if standing.runs else None
        ledgers = self.ledgers()
        return Ledger.compose(ledgers) if ledgers else None

    def ledgers(self) -> list[Ledger]:
        """Ledgers of all private models and tables in `runs` of these patients, finished or not, by epsilon.

        Those with no guarantee are left out.
        """
        found = [Ledger.load(path) for path in self._folders()]
        own = ("patient-level DP", f"{self.patients.name} ({self.patients.split})")
        return sorted((x for x in found if (x.guarantee, x.private_data) == own), key=lambda ledger: ledger.epsilon)

    def _folders(self, *kinds: str) -> Iterator[Path]:
        """The ledgers of what learnt from private patients, by the stages of these names or any."""
        return (path for kind in kinds or _KINDS for path in self.runs.glob(f"{kind}-*/privacy.json"))

    def _charged(self, run: Run) -> bool:
        """Whether the patients have been charged for the run in this folder, which is done or can go on."""
        if not (run.folder / "privacy.json").exists():
            return False
        ledger, record = run.ledger, Record()
        if ledger.run not in {spend.run for spend in record.spends}:
            return False
        whole = bool(ledger.weights) and all((run.folder / name).exists() for name in ledger.weights)
        return ledger.run not in record.finished or (whole and record.finished[ledger.run] == ledger.weights)

    def _none_unknown(self) -> None:
        """Raise PrivacyError where `runs` holds a model of real patients of which the record knows nothing."""
        record = Record()
        known = {spend.run for spend in record.spends}
        for path in self._folders():
            began = any(any(path.parent.rglob(name)) for name in ("state.pt", "selection.npz", "*.safetensors"))
            if began and not (ledger := Ledger.load(path)).simulated and ledger.run not in known:
                record.vouch(ledger)
