"""The models of a study: its cohorts, what is trained on public patients, and what on private ones."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cardiac_ldm.cohort import Cohort, Patients, load_manifest, prepare
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.evaluation.control import public_span
from cardiac_ldm.models.anatomy import HeartFinder
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import is_first_process, wait_for_all
from cardiac_ldm.parameters import CohortParameters, Parameters
from cardiac_ldm.privacy import Randomness, Record, Standing, public_ledger
from cardiac_ldm.privacy.accounting import epsilon_pld, terms_of
from cardiac_ldm.privacy.table import Table, TableRecipe, tabulate
from cardiac_ldm.profile import Profile, Role
from cardiac_ldm.progress import awaited
from cardiac_ldm.runs import Run, Stage, place, plain, stage
from cardiac_ldm.spending import Spending, Wanted
from cardiac_ldm.training import shipped
from cardiac_ldm.training.anatomy import train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import train_autoencoder
from cardiac_ldm.training.finetune import FinetuneSettings, finetune
from cardiac_ldm.training.pretrain import Latents, PretrainSettings, pretrain
from cardiac_ldm.training.selection import Selection
from cardiac_ldm.training.subspace import Directions, public_directions

ROOT = Path(__file__).resolve().parents[1]
Metrics = Mapping[str, Any]


class Trained:
    """The cohorts and the models of one study; asking for a stage runs what it lacks first, saying so."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters, self.seed = parameters, parameters.seed
        self.profile = Profile.load(parameters.profile)
        self.runs = Path(os.environ.get("CARDIAC_LDM_RUNS", ROOT / "runs"))

    # --- Cohorts ---

    @cached_property
    def public_as_given(self) -> Cohort:
        """The prepared public cohort, from whose labels the segmenter and the phase classifier learn."""
        return self._cohort("public")

    @cached_property
    def public(self) -> Cohort:
        """The prepared public cohort."""
        return self._public_with(None)

    def _public_with(self, train: int | None) -> Cohort:
        """The public cohort with this many train patients, or with the profile's."""
        given = self._cohort("public", train=train) if train else self.public_as_given
        return given if _labelled(given) else self._with_hearts_found("public", train)

    @cached_property
    def private(self) -> Cohort:
        """The prepared private cohort."""
        return self._with_hearts_found("private")

    @cached_property
    def reference_cohort(self) -> Cohort:
        """The private cohort where it's simulated.

        Held-out patients of a real private cohort are not covered by the guarantee, so public ones stand in for them.
        """
        return self.private if load_manifest(self.parameters.cohort_private).simulated else self.public

    @property
    def reference(self) -> Patients:
        """The held-out patients whose attributes are asked for and against whom models are measured."""
        return self.reference_cohort.split("test")

    def beside(self, parameters: CohortParameters) -> list[Cohort]:
        """The cohort to hold beside the study's own; none where none is named."""
        if not parameters.cohort_beside:
            return []
        root = Path(parameters.data_root_beside) if parameters.data_root_beside else None
        return [prepare(load_manifest(parameters.cohort_beside), store=self.runs / "cohorts", data_root=root)]

    def _with_hearts_found(self, role: Role, train: int | None = None) -> Cohort:
        """A prepared cohort; the segmenter, trained if need be, finds the hearts that nobody has labelled."""
        declared: Stage = type(self).anatomy
        run = self.shipped(declared)
        if run is None:
            if not self.public_as_given.split("train").labelled.any():
                return self._cohort(role, train=train)
            run = declared.planned(self)
            if not run.done and _labelled(given := self._cohort(role, train=train)):
                return given
            run = self.anatomy
        return self._cohort(role, HeartFinder(run.folder / "segmenter.safetensors", run.key), train)

    @awaited("cohorts")
    def _cohort(self, role: Role, localiser: HeartFinder | None = None, train: int | None = None) -> Cohort:
        manifest, data_root = self.parameters.manifest(role), getattr(self.parameters, f"data_root_{role}")
        root = Path(data_root) if data_root else None
        limits = self.profile.patients[role].model_dump() | ({"train": train} if train else {})
        store = self.runs / "cohorts"
        return prepare(manifest, store=store, data_root=root, limits=limits, localiser=localiser, on_demand=True)

    # --- Public models ---

    @stage("autoencoder", 1, settings=("autoencoder",), needs=("public",), together=True)
    def autoencoder(self, run: Run) -> Metrics:
        """The autoencoder, trained on public patients."""
        model, losses = train_autoencoder(self.public.split("train"), self.profile.autoencoder, self.seed, run.state)
        self._leave_public(run, weights=model)
        return {"losses": losses}

    @stage(
        "anatomy",
        1,
        settings=("anatomy",),
        needs=("public_as_given",),
        title="segmenter and phase classifier",
        together=True,
    )
    def anatomy(self, run: Run) -> Metrics:
        """The segmenter and the phase classifier, trained on public labels."""
        patients, settings = self.public_as_given.split("train"), self.profile.anatomy
        given: dict[str, Any] = settings.segmenter.model_dump() | {"state": run.folder / "segmenter.pt"}
        segmenter, dice = train_segmenter(patients, seed=self.seed, **given)
        given = settings.phase.model_dump() | {"state": run.folder / "phase.pt"}
        phase, entropy = train_phase_classifier(patients, seed=self.seed, **given)
        self._leave_public(run, segmenter=segmenter, phase=phase)
        return {"segmenter": dice, "phase": entropy}

    @stage("pretrain", 1, settings=("pretrain", "denoiser"), needs=("autoencoder",), title="pretraining", together=True)
    def pretrained(self, run: Run) -> Metrics:
        """The denoiser, pre-trained on public patients; the model of epsilon 0.

        Goes on from the shipped model that had most of the wanted cycles. Leaves which ranges the last cycle's patients
        had.
        """
        settings, (begun, shipped) = self.profile.pretrain, self._begun
        model, losses = (self.denoiser(shipped), shipped.metrics["losses"]) if shipped else (self.profile.denoiser, [])
        for number in range(begun, 1 + len(settings.further)):
            cohort, patients = self._taught_in(number)
            latents, state = self.latents(cohort.split("train"), cohort), run.state.with_stem(f"state-{number}")
            model, found = pretrain(patients, latents, model, settings.cycle(number), self.seed + number, state)
            before = sum(settings.cycle(earlier).steps for earlier in range(number))
            losses += [row | {"step": before + row["step"]} for row in found]
        self._leave_public(run, weights=model)
        return {"losses": losses, "span": public_span(patients)}

    def _taught_in(self, cycle: int) -> tuple[Cohort, Patients]:
        """The public patients of a cycle of pre-training, with their cohort."""
        few = self.profile.patients["public"].train
        train = self.profile.pretrain.further[cycle - 1].patients if cycle else few
        cohort = self._public_with(train) if train > few else self.public
        return cohort, cohort.split("train")[:train]

    @property
    def _begun(self) -> tuple[int, Run | None]:
        """How many of the wanted cycles of pre-training a shipped model had, and its run; none where there is none."""
        settings = self.profile.pretrain
        for cycles in range(len(settings.further), 0, -1):
            fewer = settings.model_copy(update={"further": settings.further[: cycles - 1]})
            if found := shipped.find("pretrain", self.described("pretrain", fewer)):
                return cycles, Run("pretrain", *found)
        return 0, None

    def _leave_public(self, run: Run, **models: Any) -> None:  # noqa: ANN401
        if not is_first_process():
            return
        run.leave(**models)
        files = run.folder.glob("*.safetensors")
        public_ledger(self.public_as_given.manifest.name).bound(*files).save(run.folder / "privacy.json")

    def described(self, name: str, pretraining: PretrainSettings | None = None) -> dict[str, object]:
        """What the weights of a public stage depend on, as shipped ones say it; pretraining: else the profile's."""
        profile, manifest = self.profile, load_manifest(self.parameters.cohort_public)
        stages: dict[str, list[str]] = {"pretrain": ["autoencoder", "pretrained"]}
        settings: dict[str, list[object]] = {
            "anatomy": [profile.anatomy],
            "autoencoder": [profile.autoencoder],
            "pretrain": [profile.autoencoder, profile.denoiser, pretraining or profile.pretrain],
        }
        train = profile.patients["public"].train
        cohort = {"name": manifest.name, "reader": plain(manifest.reader), "train": train}
        versions = [getattr(type(self), stage).version for stage in stages.get(name, [name])]
        described = {"settings": [plain(part) for part in settings[name]], "versions": versions}
        return described | {"cohort": cohort, "seed": self.seed}

    def shipped(self, declared: Stage) -> Run | None:
        """The run of a public stage that came with the library, if it's the one that is asked for."""
        if declared.name not in ("anatomy", "autoencoder", "pretrain"):
            return None
        found = shipped.find(declared.name, self.described(declared.name))
        return found and Run(declared.name, *found)

    # --- Private models ---

    @property
    def start(self) -> Run:
        """Where private training starts: the public model, or the public directions along which it goes on."""
        return self.directions if self.profile.finetune.subspace else self.pretrained

    @stage("subspace", 2, settings=("finetune.subspace",), needs=("pretrained",), title="public directions")
    def directions(self, run: Run) -> Metrics:
        """The directions along which private training moves the public model, from public patients' gradients."""
        settings = self.profile.finetune.along
        patients = self.public.split("train")[: settings.patients]
        latents = self.latents(self.public.split("train"), self.public)[: patients.offsets[-1]]
        found, variance = public_directions(self.denoiser(self.pretrained), patients, latents, settings)
        run.leave(weights=found)
        return {"variance": variance.tolist(), "sizes": found.sizes}

    def finetuned(self, epsilon: float) -> Run:
        """The denoiser fine-tuned on private patients with a budget of `epsilon`; 0 is the pre-trained one.

        Real patients are charged in their record, once for each run, before its first step.

        Raises:
            PrivacyError: what is asked for, here or by the study's other budgets, isn't to be had of real patients.
        """
        if epsilon == 0:
            return self.pretrained
        epsilon, patients = float(epsilon), self.private.split("train")
        self.profile.finetune.check(epsilon, patients.name, patients.places, patients.secret)
        if not patients.secret:
            return self.trained_privately(epsilon)
        self._agree([*self._wanted((epsilon,)), *self._asked])
        return self._vouched(type(self).trained_privately, self._described_real(epsilon), epsilon)

    def _vouched(self, learning: Stage, described: dict[str, object], epsilon: float) -> Run:
        """The finished run of real patients, whose record knows of it."""
        self._spending.begin(place(self.runs, learning.name, described))
        run = learning.complete(self, described, epsilon)
        if is_first_process():
            Record().vouch(run.ledger)
        return run

    @stage("finetune", 3, settings=("finetune",), needs=("start", "private"), title="fine-tuning", together=True)
    def trained_privately(self, run: Run, epsilon: float) -> Metrics:
        """A private training, on simulated or on real patients; ask `finetuned` for it."""
        patients, settings = self.private.split("train"), self.profile.finetune
        self._require_agreed(run, self._of_real_patients(epsilon) if patients.secret else run)
        seed = None if patients.secret else self.seed
        randomness = Randomness(seed, simulated=patients.simulated, run=run.folder.name)
        plan = settings.plan(epsilon, settings.delta, patients.places)
        public_data, known = load_manifest(self.parameters.cohort_public).name, self.load_public()
        if patients.secret and is_first_process():
            words = {"tuned": settings.tuned, "private_data": f"{patients.name} ({patients.split})"}
            ledger = plan.ledger(randomness, stage="denoiser", **words, public_data=public_data)
            self._spending.charge(ledger, run.folder)
        latents = self.latents(patients, self.private)
        if patients.secret:
            for volume in range(len(latents)):  # else what had been encoded would tell who was in the batches
                _ = latents[volume : volume + 1]
        model = self.denoiser(self.pretrained)
        given = patients, latents, plan, settings, randomness, run.folder, public_data
        left = finetune(model, *given, *known)
        if patients.secret and is_first_process():
            Record().finish(left)
        return {"epsilon": plain(epsilon)}

    @property
    def _spending(self) -> Spending:
        return Spending(self.private.split("train"), self.runs)

    def _wanted(self, models: Iterable[float] = (), tables: Iterable[float] = ()) -> list[Wanted]:
        """What budgets ask for of private patients; 0, the public model and table, asks for nothing."""
        recipe = self.profile.finetune
        kinds: list[tuple[str, FinetuneSettings | TableRecipe, Callable[[float], Run], Iterable[float]]] = [
            ("finetune", recipe, self._of_real_patients, models),
            ("attributes", TableRecipe(recipe.delta), self._table_of_real_patients, tables),
        ]
        return [
            Wanted(stage, epsilon, how, run)
            for stage, how, run, budgets in kinds
            for epsilon in sorted(set(map(float, budgets)) - {0.0})
        ]

    @property
    def _asked(self) -> list[Wanted]:
        """All that the parameters ask for: before any of it is spent, it's looked at together."""
        table = getattr(self.parameters, "table_epsilon", 0.0)
        return self._wanted([self.beside_table(epsilon, table) for epsilon in self.parameters.budgets], [table])

    def _agree(self, wanted: list[Wanted]) -> None:
        self._spending.agree(wanted, getattr(self.parameters, "spend", False))
        wait_for_all()  # nobody is charged while another process still looks at what is spent

    def _require_agreed(self, run: Run, agreed: Run) -> None:
        """Raise PrivacyError where real patients would be charged for a run that nobody agreed to, a seed's own."""
        if run.key != agreed.key:
            name = {"finetune": "finetuned", "attributes": "tabulated"}[run.stage]
            raise PrivacyError(f"{run.stage}: of real patients only `{name}` gives it, once it's agreed to; ask that")

    def _described_real(self, epsilon: float) -> dict[str, object]:
        """What a model of real patients depends on: no seed, no version.

        So it's trained again, and they are charged again, only where something else is asked for.
        """
        profile, places = self.profile, self.private.split("train").places
        settings = [plain(part) for part in (profile.finetune, profile.denoiser, profile.autoencoder, epsilon)]
        public = [run.ledger.weights for run in (self.pretrained, self.autoencoder)]
        return {"stage": "finetune", "settings": [*settings, public, self._spending.who, places]}

    def _of_real_patients(self, epsilon: float) -> Run:
        return place(self.runs, "finetune", self._described_real(epsilon))

    # --- The private table of attributes ---

    def table(self, epsilon: float) -> Table:
        """What the private patients' attributes are distributed like, for a budget of `epsilon`; 0: the public ones'.

        Real patients are charged in their record, once for each table, before anything is measured.

        Raises:
            PrivacyError: what is asked for isn't to be had of real patients.
        """
        return (
            Table.of_public(self.public.split("train")) if epsilon == 0 else Table.load(self.tabulated(epsilon).folder)
        )

    def tabulated(self, epsilon: float) -> Run:
        """The run that leaves the table of a budget above 0, with its ledger."""
        epsilon, patients = float(epsilon), self.private.split("train")
        TableRecipe(self.profile.finetune.delta).check(epsilon, patients.name, patients.places, patients.secret)
        if not patients.secret:
            return self.attributes(epsilon)
        own = epsilon == getattr(self.parameters, "table_epsilon", 0.0)
        self._agree([*self._wanted(tables=(epsilon,)), *(self._asked if own else [])])
        return self._vouched(type(self).attributes, self._described_table(epsilon), epsilon)

    @stage("attributes", 1, settings=("finetune.delta",), needs=("public", "private"), title="table of attributes")
    def attributes(self, run: Run, epsilon: float) -> Metrics:
        """The table of simulated or of real private patients' attributes; ask `tabulated` for it."""
        patients, recipe = self.private.split("train"), TableRecipe(self.profile.finetune.delta)
        self._require_agreed(run, self._table_of_real_patients(epsilon) if patients.secret else run)
        seed = None if patients.secret else self.seed
        randomness = Randomness(seed, simulated=patients.simulated, run=run.folder.name)
        plan, public_data = recipe.plan(epsilon, patients.places), load_manifest(self.parameters.cohort_public).name
        if patients.secret:
            words = {"private_data": f"{patients.name} ({patients.split})", "public_data": public_data}
            self._spending.charge(plan.ledger(randomness, **words), run.folder)
        left = tabulate(patients, self.public.split("train"), plan, randomness, run.folder, public_data)
        if patients.secret:
            Record().finish(left)
        return {"epsilon": plain(epsilon)}

    def beside_table(self, epsilon: float, of_table: float) -> float:
        """The budget of a fine-tuning that, with a table of a budget of `of_table`, spends `epsilon` and no more.

        0, which asks for the public model, where the table spends all.
        """
        if not of_table or of_table >= epsilon:
            return 0.0 if of_table else epsilon
        recipe, places = self.profile.finetune, self.private.split("train").places
        before = TableRecipe(recipe.delta).mechanisms(of_table, places)
        both = recipe.plan(epsilon, recipe.delta, places, before).mechanisms("denoiser", recipe.tuned)
        return math.floor(1e4 * epsilon_pld(terms_of(both[len(before) :]), recipe.delta)) / 1e4

    def _described_table(self, epsilon: float) -> dict[str, object]:
        """What a table of real patients depends on, as `_described_real` says it of a model."""
        settings = [self.profile.finetune.delta, plain(epsilon), self.public.key]
        return {"stage": "attributes", "settings": [*settings, self._spending.who, self.private.split("train").places]}

    def _table_of_real_patients(self, epsilon: float) -> Run:
        return place(self.runs, "attributes", self._described_table(epsilon))

    def would_spend(self, budgets: Iterable[float] = (), tables: Iterable[float] = ()) -> str | None:
        """What models and tables of these budgets would spend of real private patients; None where they are there."""
        return self._spending.planned(self._wanted(budgets, tables))

    def together(self) -> Standing | None:
        """What all private models and tables of this study's patients spent together; None where there is none."""
        return self._spending.together()

    # --- What stages left ---

    def load_autoencoder(self) -> Autoencoder:
        """The public autoencoder."""
        _ = self.autoencoder.ledger
        return self.autoencoder.load(self.profile.autoencoder.build())

    def denoiser(self, run: Run) -> Denoiser:
        """The denoiser of a run, which must have its ledger, and be what that was written for."""
        _ = run.ledger
        return run.load(self.profile.denoiser.build(self.profile.autoencoder.latent_channels))

    def load_directions(self) -> Directions | None:
        """The public directions along which a model's weights learn; None where others learn."""
        found = self.directions if self.profile.finetune.subspace else None
        return found and found.load(Directions(found.metrics["sizes"]))

    def load_public(self) -> tuple[Directions | None, Selection | None]:
        """What public patients give a private training beside the weights that it starts from: see `finetune`."""
        profile = self.profile
        if profile.finetune.selection is None:
            return self.load_directions(), None
        cohort, patients = self._taught_in(cycles := len(profile.pretrain.further))
        latents = self.latents(cohort.split("train"), cohort)
        return self.load_directions(), Selection(
            profile.finetune.selection, patients, latents, profile.pretrain, self.seed + 1 + cycles
        )

    def latents(self, patients: Patients, cohort: Cohort) -> Latents:
        """The cached latents float32 (n_volumes, c, 13, h, w) of a split."""
        path = self.runs / "latents" / f"{patients.name}-{patients.split}-{cohort.key}-{self.autoencoder.key}.zarr"
        latents = Latents(self.load_autoencoder(), patients, path)
        if patients.secret:
            path.chmod(0o700)
        return latents


def _labelled(cohort: Cohort) -> bool:
    return all(cohort.split(name).labelled.all() for name in cohort.splits)
