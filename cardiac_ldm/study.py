"""The study: which stage needs which, and what each does, in the order in which data walks through them."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cardiac_ldm.cohort import Cohort, Patients, load_manifest, prepare, require_labelled, require_releasable
from cardiac_ldm.evaluation import control
from cardiac_ldm.evaluation.audit import audit_mechanism, audit_training
from cardiac_ldm.evaluation.features import InceptionEncoder
from cardiac_ldm.evaluation.foreign import read_folder
from cardiac_ldm.evaluation.membership import calibrated, membership
from cardiac_ldm.evaluation.memorisation import Embedded, embed, embed_real, memorisation
from cardiac_ldm.evaluation.metrics import compare, differences, estimate, measure, measure_real
from cardiac_ldm.evaluation.synthesis import SyntheticCohort, synthesise
from cardiac_ldm.evaluation.utility import Budget, LabelledVolumes, Utility, tabulate_arms, utility
from cardiac_ldm.models.anatomy import HeartFinder, PhaseClassifier, Segmenter
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import is_first_process
from cardiac_ldm.parameters import CohortParameters, Parameters
from cardiac_ldm.privacy import Randomness, Record, Standing, public_ledger
from cardiac_ldm.profile import Profile, Role
from cardiac_ldm.progress import awaited
from cardiac_ldm.runs import Run, Stage, place, plain, stage
from cardiac_ldm.spending import Spending
from cardiac_ldm.training import shipped
from cardiac_ldm.training.anatomy import train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import reconstruct, train_autoencoder
from cardiac_ldm.training.finetune import finetune
from cardiac_ldm.training.leaks import sensitivities
from cardiac_ldm.training.pretrain import Latents, held_out_loss, pretrain

ROOT = Path(__file__).resolve().parents[1]
CALIBRATED = ("LVEDV", "LVESV", "LVEF", "RVEDV", "RVESV", "RVEF", "MYOEDTHICK", "MYOESTHICK", "ANGLE")
"""Attributes whose calibration is shown."""
_STEERED = 10
"""Reference patients whose requests are asked anew, in many ways."""
Metrics = Mapping[str, Any]


class Study:
    """Every stage of one study; asking for a stage runs what it lacks first, saying so."""

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
        given = self.public_as_given
        return given if _labelled(given) else self._with_hearts_found("public")

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

    def _with_hearts_found(self, role: Role) -> Cohort:
        """A prepared cohort; the segmenter, trained if need be, finds the hearts that nobody has labelled."""
        declared: Stage = type(self).anatomy
        run = self.shipped(declared)
        if run is None:
            if not self.public_as_given.split("train").labelled.any():
                return self._cohort(role)
            run = declared.planned(self)
            if not run.done and _labelled(given := self._cohort(role)):
                return given
            run = self.anatomy
        return self._cohort(role, HeartFinder(run.folder / "segmenter.safetensors", run.key))

    @awaited("cohorts")
    def _cohort(self, role: Role, localiser: HeartFinder | None = None) -> Cohort:
        manifest, data_root = self.parameters.manifest(role), getattr(self.parameters, f"data_root_{role}")
        root = Path(data_root) if data_root else None
        limits = self.profile.patients[role].model_dump()
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
        """The denoiser, pre-trained on public patients; the model of epsilon 0."""
        patients, settings = self.public.split("train"), self.profile.pretrain
        latents = self.latents(patients, self.public)[:]
        model, losses = pretrain(patients, latents, self.profile.denoiser, settings, self.seed, run.state)
        self._leave_public(run, weights=model)
        return {"losses": losses}

    def _leave_public(self, run: Run, **models: Any) -> None:  # noqa: ANN401
        if not is_first_process():
            return
        run.leave(**models)
        files = run.folder.glob("*.safetensors")
        public_ledger(self.public_as_given.manifest.name).bound(*files).save(run.folder / "privacy.json")

    def described(self, name: str) -> dict[str, object]:
        """What the weights of a public stage depend on, as shipped ones say it."""
        profile, manifest = self.profile, load_manifest(self.parameters.cohort_public)
        settings = {
            "anatomy": [profile.anatomy],
            "autoencoder": [profile.autoencoder],
            "pretrain": [profile.autoencoder, profile.denoiser, profile.pretrain],
        }
        train = profile.patients["public"].train
        cohort = {"name": manifest.name, "reader": plain(manifest.reader), "train": train}
        return {"settings": [plain(part) for part in settings[name]], "cohort": cohort, "seed": self.seed}

    def shipped(self, declared: Stage) -> Run | None:
        """The run of a public stage that came with the library, if it's the one that is asked for."""
        if declared.name not in ("anatomy", "autoencoder", "pretrain"):
            return None
        found = shipped.find(declared.name, self.described(declared.name))
        return found and Run(declared.name, *found)

    # --- Private models ---

    def finetuned(self, epsilon: float) -> Run:
        """The denoiser fine-tuned on private patients with a budget of `epsilon`; 0 is the pre-trained one.

        Real patients are charged in their record, once for each run, before its first step.

        Raises:
            PrivacyError: what is asked for, here or by the study's other budgets, isn't to be had of real patients.
        """
        if epsilon == 0:
            return self.pretrained
        epsilon, patients = float(epsilon), self.private.split("train")
        self.profile.finetune.check(epsilon, patients.name, len(patients), patients.secret)
        if not patients.secret:
            return self.trained_privately(epsilon)
        spending, agreed = self._spending, getattr(self.parameters, "spend", False)
        spending.agree([epsilon, *self.parameters.budgets], self._of_real_patients, agreed)
        declared, run = type(self).trained_privately, self._of_real_patients(epsilon)
        spending.begin(run)
        run = declared.complete(self, run, epsilon, described=self._described_real(epsilon))
        if is_first_process():
            Record().vouch(run.ledger)
        return run

    @stage("finetune", 3, settings=("finetune",), needs=("pretrained", "private"), title="fine-tuning", together=True)
    def trained_privately(self, run: Run, epsilon: float) -> Metrics:
        """A private training, on simulated or on real patients."""
        patients, settings = self.private.split("train"), self.profile.finetune
        seed = None if patients.secret else self.seed
        randomness = Randomness(seed, simulated=patients.simulated, run=run.folder.name)
        plan, public_data = (
            settings.plan(epsilon, settings.delta, patients.places),
            load_manifest(self.parameters.cohort_public).name,
        )
        if patients.secret and is_first_process():
            words = {"tuned": settings.tuned, "private_data": f"{patients.name} ({patients.split})"}
            ledger = plan.ledger(randomness, stage="denoiser", **words, public_data=public_data)
            self._spending.charge(ledger, run.folder)
        latents = self.latents(patients, self.private)
        if patients.secret:
            _ = latents[:]  # else what had been encoded would tell who was in the lots
        model = self.denoiser(self.pretrained)
        left = finetune(
            model,
            patients,
            latents,
            plan,
            settings,
            randomness,
            run.folder,
            public_data,
        )
        if patients.secret and is_first_process():
            Record().finish(left)
        return {"epsilon": plain(epsilon)}

    @property
    def _spending(self) -> Spending:
        return Spending(self.private.split("train"), self.profile.finetune, self.runs)

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

    def would_spend(self, budgets: tuple[float, ...]) -> str | None:
        """What the models of all these budgets would spend of real private patients; None where they are there."""
        return self._spending.planned(budgets, self._of_real_patients)

    def together(self) -> Standing | None:
        """What all private models of this study's private patients spent together; None where there is none."""
        return self._spending.together()

    # --- Synthetic cohorts ---

    @stage("synthesise", 1, settings=("sampling",), needs=("finetuned", "reference_cohort"), title="sampling")
    def synthesised(self, run: Run, epsilon: float) -> Metrics:
        """One synthetic volume for each volume of the reference patients, by the model of a budget."""
        cohort = self._drawn(run, epsilon, self.reference.attributes, self.reference.owners)
        run.leave(synthetic=cohort)
        return {"epsilon": plain(epsilon), "n_volumes": len(cohort.images)}

    @stage(
        "counterfactual",
        1,
        settings=("sampling", "evaluation.resamples"),
        needs=("finetuned", "reference_cohort", "anatomy"),
    )
    def counterfactual(self, run: Run, epsilon: float) -> Metrics:
        """One attribute moves, the noise stays: how far each attribute moves in what is drawn.

        Leaves the table `response`, and in `anatomy` what was read from every volume.
        """
        attributes, owners = control.base_requests(self.reference, _STEERED)
        asked = {"nothing": attributes} | control.counterfactuals(attributes)
        anatomy = pd.concat([self._read(run, epsilon, a, owners).assign(moved=name) for name, a in asked.items()])
        table = control.response(anatomy, attributes, owners, resamples=self._resamples, seed=self.seed)
        run.leave(anatomy=anatomy, response=table)
        return {"epsilon": plain(epsilon), "model": self.finetuned(epsilon).folder.name, "rows": _records(table)}

    @stage(
        "beyond",
        1,
        settings=("sampling", "evaluation.resamples"),
        needs=("finetuned", "reference_cohort", "public", "anatomy"),
    )
    def beyond_range(self, run: Run, epsilon: float) -> Metrics:
        """Hearts smaller and larger than all public ones, asked for and measured at end-diastole.

        Leaves the table `beyond`, and in `anatomy` what was read from every volume.
        """
        attributes, owners = (rows[::2] for rows in control.base_requests(self.reference, _STEERED))
        span = control.public_span(self.public.split("train"))
        asked = {level: control.magnified(attributes, level) for level in control.ladder(*span["LVEDV"])}
        anatomy = pd.concat([self._read(run, epsilon, a, owners).assign(level=level) for level, a in asked.items()])
        table = control.beyond_range(anatomy, span, resamples=self._resamples, seed=self.seed)
        run.leave(anatomy=anatomy, beyond=table)
        return {"epsilon": plain(epsilon), "model": self.finetuned(epsilon).folder.name, "rows": _records(table)}

    @stage("training-cohort", 1, settings=("sampling", "utility.patients"), needs=("finetuned", "public"))
    def training_cohort(self, run: Run, epsilon: float) -> Metrics:
        """Volumes to train on, by the model of a budget, for the attributes of public train patients.

        Asked for those of the reference patients they would know what they're tested on; for those of private train
        patients they would tell them.
        """
        asked = self._learnt_from(self.public)
        run.leave(synthetic=self._drawn(run, epsilon, asked.attributes, asked.owners))
        return {"epsilon": plain(epsilon), "n_requests": len(asked)}

    @stage("reconstruct", 1, needs=("reference_cohort", "autoencoder"))
    def reconstructed(self, run: Run) -> Metrics:
        """The reference patients' volumes, encoded and decoded; beyond their stacks they are empty."""
        volumes = self.reference.images(np.arange(len(self.reference.owners)))
        images = reconstruct(self.load_autoencoder(), volumes, self.seed)
        run.leave(synthetic=SyntheticCohort(images, self.reference.attributes, self.reference.owners))
        return {"n_volumes": len(images)}

    @stage("folder", 1)
    def _of_folder(self, run: Run, path: str, digest: str) -> Metrics:
        run.leave(synthetic=read_folder(Path(path)))
        return {"folder": Path(path).name}

    def _drawn(self, run: Run, epsilon: float, attributes: np.ndarray, owners: np.ndarray) -> SyntheticCohort:
        """Volumes for attributes (n, 14), asked by owners (n,), of a budget's model, whose ledger goes with them."""
        model = self.finetuned(epsilon)
        model.ledger.save(run.folder / "privacy.json")
        return self.draw(self.denoiser(model), attributes, owners)

    def draw(self, denoiser: Denoiser, attributes: np.ndarray, owners: np.ndarray) -> SyntheticCohort:
        """Volumes for attributes (n, 14), asked by owners (n,)."""
        settings = self.profile.sampling.model_dump()
        return synthesise(
            self.load_autoencoder(),
            denoiser,
            attributes,
            owners,
            **settings,
            seed=self.seed,
        )

    def _read(self, run: Run, epsilon: float, attributes: np.ndarray, owners: np.ndarray) -> pd.DataFrame:
        """What the instruments read from volumes drawn for attributes (n, 14), asked by owners (n,)."""
        cohort = self._drawn(run, epsilon, attributes, owners)
        return control.read_anatomy(cohort.images, attributes, owners, *self.instruments, progress=False)

    # --- Evaluation ---

    @stage("loss", 1, needs=("finetuned", "reference_cohort"), title="held-out loss")
    def held_out_loss(self, run: Run, epsilon: float) -> Metrics:
        """The denoising loss of a budget's model on the reference patients, with its standard error."""
        latents = self.latents(self.reference, self.reference_cohort)
        losses = held_out_loss(self.denoiser(self.finetuned(epsilon)), latents, self.reference)
        error = losses.std(ddof=1) / math.sqrt(len(losses))
        return {"mean": float(losses.mean()), "standard_error": float(error), "n_patients": len(losses)}

    def evaluated(self, epsilon: float) -> Run:
        """Everything that is measured on the synthetic cohort of a budget: its report, `metrics.json`."""
        return self.evaluation(self.synthesised(epsilon))

    def evaluated_folder(self, path: str | Path) -> Run:
        """The same of a synthetic cohort that anyone made: a folder of NIfTI files with its `attributes.csv`.

        Raises:
            CohortError: a file in it is missing or wrong; the message names it.
        """
        content = hashlib.sha256()
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
            content.update(str(file.relative_to(path)).encode() + hashlib.sha256(file.read_bytes()).digest())
        return self.evaluation(self._of_folder(str(path), content.hexdigest()))

    @property
    def ceiling(self) -> Run:
        """The reference patients' own reconstructions, evaluated: the best that these latents allow."""
        return self.evaluation(self.reconstructed)

    @stage("evaluate", 1, settings=("evaluation",), needs=("reference_cohort", "anatomy", "real_measured"))
    def evaluation(self, run: Run, cohort: Run) -> Metrics:
        """All measures of the cohort that a run left, beside what the reference patients reach."""
        measured, real = self.measured(cohort).read("measured"), self.real_measured.read("measured")
        size = min(measured.n_patients, real.n_patients) // 2
        bins = [
            control.calibration(measured.anatomy, name, 6, resamples=self._resamples, seed=self.seed)
            for name in CALIBRATED
        ]
        run.leave(anatomy=measured.anatomy, calibration=pd.concat(bins))
        epsilon = cohort.metrics.get("epsilon")
        found = compare(
            estimate(measured, real, size=size, **self._resampling),
            self.floor(size).read("floor"),
            model=cohort.folder.name,
            epsilon=None if epsilon is None else float(epsilon),
            reference_cohort=real.name,
            reference_simulated=self.reference.simulated,
            n_requests=measured.n_patients,
            n_real_patients=real.n_patients,
        )
        return found.model_dump(mode="json")

    @stage("measure", 1, settings=("evaluation",), needs=("reference_cohort", "anatomy"))
    def measured(self, run: Run, cohort: Run) -> Metrics:
        """What the instruments read from the cohort that a run left."""
        drawn = cohort.volumes
        same = len(np.unique(drawn.owners)) == len(self.reference) and cohort.stage != "folder"
        found = measure(
            drawn.images,
            drawn.attributes,
            drawn.owners,
            *self.instruments,
            name=cohort.folder.name,
            seed=self.seed,
            diseases=self.reference.groups if same else None,
            inception=self._inception,
        )
        run.leave(measured=found)
        return {}

    @stage("reference", 1, settings=("evaluation",), needs=("reference_cohort", "anatomy"))
    def real_measured(self, run: Run) -> Metrics:
        """What the instruments read from the reference patients, once for all models."""
        run.leave(measured=measure_real(self.reference, *self.instruments, seed=self.seed, inception=self._inception))
        return {}

    @stage("floor", 1, settings=("evaluation",), needs=("real_measured",))
    def floor(self, run: Run, size: int) -> Metrics:
        """What the reference patients reach among themselves, from half-samples of this size."""
        real = self.real_measured.read("measured")
        run.leave(floor=estimate(real, real, size=size, **self._resampling))
        return {}

    @stage("differ", 1, settings=("evaluation",), needs=("evaluated",))
    def differing(self, run: Run, first: float, second: float) -> Metrics:
        """What one budget's model reaches beyond another's, request by request; the table `differences`."""
        ours, theirs = (self.measured(self.synthesised(epsilon)).read("measured") for epsilon in (first, second))
        real = self.real_measured.read("measured")
        size = min(ours.n_patients, real.n_patients) // 2
        run.leave(differences=differences(ours, theirs, real, size=size, **self._resampling))
        return {"first": plain(first), "second": plain(second)}

    @property
    def _resamples(self) -> int:
        return self.profile.evaluation.resamples

    @property
    def _resampling(self) -> dict[str, Any]:
        return self.profile.evaluation.model_dump(exclude={"inception"}) | {"seed": self.seed}

    @cached_property
    def _inception(self) -> InceptionEncoder | None:
        path = self.profile.evaluation.inception
        return InceptionEncoder(path) if path else None

    @stage("useful-baselines", 1, settings=("utility", "evaluation.resamples"), needs=("reference_cohort", "public"))
    def useful_baselines(self, run: Run) -> Metrics:
        """What real patients are worth as training data, tested on the reference patients.

        Public ones and, where they're simulated, as many private ones and few private ones.
        """
        few = self._few
        cohorts = [self.public] if few is None else [self.public, self.private]
        arms = [replace(LabelledVolumes.of(self._learnt_from(cohort)), name=cohort.manifest.role) for cohort in cohorts]
        found = self._useful(arms if few is None else [*arms, few])
        run.leave(arms=found)
        return {"model": run.folder.name} | self._tabulated(found, found)

    @stage("useful", 1, settings=("utility", "evaluation.resamples"), needs=("training_cohort", "useful_baselines"))
    def useful(self, run: Run, epsilon: float) -> Metrics:
        """What the training cohort of a budget is worth, alone and beside few private patients."""
        drawn, few = self.training_cohort(epsilon).volumes, self._few
        drawn = LabelledVolumes("synthetic", drawn.images, drawn.labels, drawn.attributes, drawn.owners)
        found = self._useful([drawn] if few is None else [drawn, few + drawn])
        return {"epsilon": plain(epsilon), "model": run.folder.name} | self._tabulated(
            found, self.useful_baselines.read("arms")
        )

    # --- What an attacker finds ---

    @stage("audit", 1, needs=("finetuned",))
    def audited(self, run: Run, epsilon: float) -> Metrics:
        """Lower bounds on what the mechanism of a budget's ledger spends, from canaries; touches no patient.

        Raises:
            ParameterError: epsilon is 0: no private patient trained the public model.
        """
        ledger = self.finetuned(epsilon).ledger
        return {"epsilon": plain(epsilon), "stated": plain(ledger.epsilon)} | audit_mechanism(ledger, self.seed)

    @stage("audit-whole", 1, settings=("finetune",), needs=("pretrained", "audited_cohort"))
    def audited_whole(self, run: Run, epsilon: float) -> Metrics:
        """The same from end to end: a private training with canaries, whose final weights an attacker reads."""
        train = self.audited_cohort.split("train")
        denoiser, latents = self.denoiser(self.pretrained), self.latents(train, self.audited_cohort)
        randomness = Randomness(self.seed, simulated=True, run=run.folder.name)
        found = audit_training(
            denoiser,
            train,
            latents,
            epsilon,
            self.profile.finetune,
            randomness,
            run.folder,
        )
        return {"epsilon": plain(epsilon), "stated": plain(epsilon)} | found

    @property
    def audited_cohort(self) -> Cohort:
        """Simulated or public patients, who may train beside canaries."""
        return self.public if load_manifest(self.parameters.cohort_private).secret else self.private

    def attacked(self, epsilon: float) -> Run:
        """Membership inference from losses, against a budget's model and its simulated private patients.

        Raises:
            PrivacyError: the private patients are real.
        """
        require_releasable(self.private.split("train"), "who among private patients trained the model")
        return self.attack(epsilon)

    @stage("attack", 1, needs=("finetuned", "private"))
    def attack(self, run: Run, epsilon: float) -> Metrics:
        """The losses of training patients, the members, and of as many who were held out.

        The reference is the public model, which met neither; of itself, the loss alone is tried. Leaves all losses.
        """
        splits = {name: self.private.split(name) for name in ("train", "validation", "test")}
        everyone = {name: np.arange(len(patients)) for name, patients in splits.items()}
        size = len(everyone["validation"]) + len(everyone["test"])
        everyone["train"] = np.sort(np.random.default_rng(self.seed).permutation(everyone["train"])[:size])
        model = self.denoiser(self.finetuned(epsilon))
        found = {name: self._losses(model, splits[name], self.private, who) for name, who in everyone.items()}
        losses = found["train"], np.concatenate([found["validation"], found["test"]])
        run.leave(losses=losses)
        references = self.attacked(0).read("losses") if epsilon else None
        return {"epsilon": plain(epsilon)} | _attacks(losses, references)

    def memorised(self, epsilon: float) -> Run:
        """Whether a budget's synthetic cohort lies nearer to simulated private patients than to held-out ones.

        The requests are the private test patients' attributes, written without regard to training or validation.

        Raises:
            PrivacyError: the private patients are real.
        """
        require_releasable(self.private.split("train"), "whom among private patients the synthetic volumes resemble")
        return self.memorisation(self.synthesised(epsilon))

    @stage("memorised", 1, settings=("evaluation.resamples",), needs=("private", "autoencoder"))
    def memorisation(self, run: Run, cohort: Run) -> Metrics:
        """The nearest training and held-out patients of every synthetic one."""
        return {"epsilon": cohort.metrics["epsilon"]} | self._memorisation(cohort.volumes, *self._private_parts)

    @stage(
        "overfit",
        1,
        settings=("pretrain", "overfit", "sampling", "evaluation.resamples"),
        needs=("pretrained", "public"),
    )
    def overfitted(self, run: Run) -> Metrics:
        """The positive control: a copy of the public model that learns a few of its patients by heart.

        They are at most 20 training patients, held against as many public validation patients, by the same tests as
        private ones; requests are the public test patients' attributes. The public model, the attack's reference, met
        the few as well, which hides some of what the copy learnt.
        """
        settings = self.profile.pretrain.model_copy(update=self.profile.overfit.model_dump())
        train, held_out, asked = (self.public.split(name) for name in ("train", "validation", "test"))
        few = min(20, len(train), len(held_out))
        known, others, who = train[:few], held_out[:few], np.arange(few)
        latents, public = self.latents(train, self.public)[: train.offsets[few]], self.denoiser(self.pretrained)
        copy, _ = pretrain(known, latents, self.profile.denoiser, settings, self.seed, run.state, start=public)
        cohort = self.draw(copy, asked.attributes, asked.owners)
        self._leave_public(run, weights=copy)
        run.leave(synthetic=cohort)
        losses, references = (
            tuple(self._losses(model, patients, self.public, who) for patients in (train, held_out))
            for model in (copy, self.denoiser(self.pretrained))
        )
        parts = (self._embedded(patients) for patients in (known, others))
        return _attacks(losses, references) | self._memorisation(cohort, *parts)

    @stage("sensitivity", 1, settings=("finetune.clip",), needs=("pretrained", "public"))
    def sensitivities(self, run: Run) -> Metrics:
        """How far one patient moves the sum of clipped gradients, with two habits that break its bound.

        On public patients, who stand for private ones, with the private recipe's clip.
        """
        patients, clip = self.public.split("train")[:8], self.profile.finetune.clip
        found = sensitivities(patients, self.load_autoencoder(), self.denoiser(self.pretrained), clip)
        return {"n_patients": len(patients), "rows": _records(found)}

    def _losses(self, model: Denoiser, patients: Patients, cohort: Cohort, who: np.ndarray) -> np.ndarray:
        """A model's denoising losses (n,) of the patients of a split with these rising indices, over 4 draws."""
        rows = np.flatnonzero(np.isin(patients.owners, who))
        return held_out_loss(model, self.latents(patients, cohort)[rows], patients.subset(who), draws=4)

    @cached_property
    def _private_parts(self) -> tuple[Embedded, Embedded]:
        return self._embedded(self.private.split("train")), self._embedded(self.private.split("validation"))

    def _embedded(self, patients: Patients) -> Embedded:
        return embed_real(patients, self.load_autoencoder())

    def _memorisation(self, cohort: SyntheticCohort, train: Embedded, held_out: Embedded) -> dict[str, Any]:
        synthetic = embed(cohort.images, cohort.owners, self.load_autoencoder())
        resamples = self.profile.evaluation.resamples
        found = memorisation(
            synthetic, train, held_out, permutations=999, resamples=resamples, suspicious=6, seed=self.seed
        )
        return {"memorisation": _records(found.table), "suspicious": _records(found.pairs)}

    def _learnt_from(self, cohort: Cohort) -> Patients:
        """Labelled train patients of a cohort, as many as an arm has, drawn by the seed."""
        patients = require_labelled(cohort.split("train"), "a measure of utility")
        return patients.subset(np.random.default_rng(self.seed).permutation(len(patients)))[
            : self.profile.utility.patients
        ]

    @cached_property
    def _few(self) -> LabelledVolumes | None:
        """The first of the private patients of an arm; None where they're real, so nothing may be trained on them."""
        if load_manifest(self.parameters.cohort_private).secret:
            return None
        few = self._learnt_from(self.private)[: self.profile.utility.few]
        return replace(LabelledVolumes.of(few), name="few private")

    def _useful(self, arms: list[LabelledVolumes]) -> list[Utility]:
        """Every arm's training, tested on the reference patients."""
        settings, resamples = self.profile.utility, self.profile.evaluation.resamples
        segmenter, phase = (Budget(**training.model_dump()) for training in (settings.segmenter, settings.phase))
        measured = partial(utility, segmenter=segmenter, phase=phase, resamples=resamples, seed=self.seed)
        test = LabelledVolumes.of(self.reference)
        return [measured(arm, test) for arm in arms]

    def _tabulated(self, arms: list[Utility], baselines: list[Utility]) -> dict[str, Any]:
        rows = tabulate_arms(arms, baselines, resamples=self.profile.evaluation.resamples, seed=self.seed)
        return {"rows": json.loads(rows.to_json(orient="records", double_precision=15))}

    # --- What stages left ---

    def load_autoencoder(self) -> Autoencoder:
        """The public autoencoder."""
        _ = self.autoencoder.ledger
        return self.autoencoder.load(self.profile.autoencoder.build())

    def denoiser(self, run: Run) -> Denoiser:
        """The denoiser of a run, which must have its ledger, and be what that was written for."""
        _ = run.ledger
        return run.load(self.profile.denoiser.build(self.profile.autoencoder.latent_channels))

    @cached_property
    def instruments(self) -> tuple[Segmenter, PhaseClassifier]:
        """The trained segmenter and phase classifier."""
        return self.anatomy.load(Segmenter(), "segmenter"), self.anatomy.load(PhaseClassifier(), "phase")

    def latents(self, patients: Patients, cohort: Cohort) -> Latents:
        """The cached latents float32 (n_volumes, c, 13, h, w) of a split."""
        path = self.runs / "latents" / f"{patients.name}-{patients.split}-{cohort.key}-{self.autoencoder.key}.zarr"
        latents = Latents(self.load_autoencoder(), patients, path)
        if patients.secret:
            path.chmod(0o700)
        return latents


def _labelled(cohort: Cohort) -> bool:
    return all(cohort.split(name).labelled.all() for name in cohort.splits)


def _attacks(losses: tuple[np.ndarray, ...], references: tuple[np.ndarray, ...] | None) -> dict[str, Any]:
    """Membership of (members, others) from their losses, and from what these are below a reference model's."""
    attacks = {"loss": [-side for side in losses]}
    if references:
        pairs = zip(losses, references, strict=True)
        attacks["loss below the public model's"] = [calibrated(side, reference[None]) for side, reference in pairs]
    rows = [
        {"attack": attack, "measure": measure} | rate._asdict()
        for attack, scores in attacks.items()
        for measure, rate in membership(*scores).items()
    ]
    members, others = map(len, losses)
    return {"n_members": members, "n_others": others, "membership": _records(pd.DataFrame(rows))}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as JSON knows them; what isn't finite becomes None."""
    return json.loads(table.to_json(orient="records"))
