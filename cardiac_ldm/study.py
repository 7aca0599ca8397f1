"""The study: what is drawn by its models, measured on that, and found by attackers; each a stage, declared once."""

import math
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cardiac_ldm.cohort import Cohort, Patients, Volumes, load_manifest, require_releasable
from cardiac_ldm.evaluation import control
from cardiac_ldm.evaluation.audit import audit_mechanism, audit_training
from cardiac_ldm.evaluation.external import content_of, read_folder
from cardiac_ldm.evaluation.features import InceptionEncoder
from cardiac_ldm.evaluation.intervals import records
from cardiac_ldm.evaluation.measured import Measured, measure, measure_real
from cardiac_ldm.evaluation.membership import attacks
from cardiac_ldm.evaluation.memorisation import Embedded, embed_real, memorised
from cardiac_ldm.evaluation.metrics import compare, differences, estimate
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.evaluation.utility import Utility, labelled_volumes, tabulate_training_sets, training_patients, utility
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import Randomness
from cardiac_ldm.runs import Run, plain, stage
from cardiac_ldm.trained import Metrics, Trained
from cardiac_ldm.training.autoencoder import reconstruct
from cardiac_ldm.training.leaks import sensitivities
from cardiac_ldm.training.pretrain import held_out_loss, pretrain

_STEERED, _USEFUL = ("sampling", "evaluation.resamples"), ("utility", "evaluation.resamples")


class Study(Trained):
    """Every stage of one study; asking for a stage runs what it lacks first, saying so."""

    # --- Synthetic cohorts ---

    @stage("synthesise", 1, settings=("sampling",), needs=("finetuned", "reference_cohort"), title="sampling")
    def synthesised(self, run: Run, epsilon: float) -> Metrics:
        """One synthetic volume for each volume of the reference patients, by the model of a budget."""
        cohort = self._drawn(run, epsilon, self.reference.attributes, self.reference.patient_index)
        run.leave(synthetic=cohort)
        return {"epsilon": plain(epsilon), "n_volumes": len(cohort.images)}

    @stage("training-cohort", 1, settings=("sampling", "utility.patients"), needs=("finetuned", "public"))
    def training_cohort(self, run: Run, epsilon: float) -> Metrics:
        """Volumes to train on, by the model of a budget, for the attributes of public train patients.

        Asked for those of the reference patients they would know what they're tested on; for those of private train
        patients they would tell them.
        """
        requested = self._learnt_from(self.public)
        run.leave(synthetic=self._drawn(run, epsilon, requested.attributes, requested.patient_index))
        return {"epsilon": plain(epsilon), "n_requests": len(requested)}

    @stage("reconstruct", 1, needs=("reference_cohort", "autoencoder"))
    def reconstructed(self, run: Run) -> Metrics:
        """The reference patients' volumes, encoded and decoded; beyond their stacks they are empty."""
        patients = self.reference
        images = reconstruct(
            self.load_autoencoder(), patients.images(np.arange(len(patients.patient_index))), self.seed
        )
        run.leave(synthetic=Volumes("reconstructed", images, patients.attributes, patients.patient_index))
        return {"n_volumes": len(images)}

    @stage("folder", 1)
    def _of_folder(self, run: Run, path: str, content: str) -> Metrics:
        run.leave(synthetic=read_folder(Path(path)))
        return {"folder": Path(path).name}

    def _drawn(self, run: Run, epsilon: float, attributes: np.ndarray, patient_index: np.ndarray) -> Volumes:
        """Volumes of a budget's model for attributes (n, 14) of patients (n,); its ledger goes with them."""
        model = self.finetuned(epsilon)
        model.ledger.save(run.folder / "privacy.json")
        return self.draw(self.denoiser(model), attributes, patient_index)

    def draw(self, denoiser: Denoiser, attributes: np.ndarray, patient_index: np.ndarray) -> Volumes:
        """Volumes for attributes (n, 14) of patients (n,)."""
        settings = self.profile.sampling.model_dump()
        return synthesise(self.load_autoencoder(), denoiser, attributes, patient_index, **settings, seed=self.seed)

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
        return self.evaluation(self._of_folder(str(path), content_of(Path(path))))

    @property
    def ceiling(self) -> Run:
        """The reference patients' own reconstructions, evaluated: the best that these latents allow."""
        return self.evaluation(self.reconstructed)

    @stage("evaluate", 1, settings=("evaluation",), needs=("measured", "real_measured"))
    def evaluation(self, run: Run, cohort: Run) -> Metrics:
        """All measures of the cohort that a run left, beside what the reference patients reach."""
        measured, real = self._read(cohort), self._read()
        bins = control.calibration(measured.anatomy, **self._bootstrap)
        run.leave(anatomy=measured.anatomy, calibration=bins)
        size, epsilon = min(measured.n_patients, real.n_patients) // 2, cohort.metrics.get("epsilon")
        return compare(
            estimate(measured, real, size=size, **self._resampling),
            self.floor(size).read("floor"),
            measured,
            real,
            epsilon=None if epsilon is None else float(epsilon),
            reference_simulated=self.reference.simulated,
        )

    @stage("measure", 1, settings=("evaluation",), needs=("reference_cohort", "anatomy"))
    def measured(self, run: Run, cohort: Run) -> Metrics:
        """What the segmenter, the phase classifier and encoders read from the cohort that a run left."""
        volumes = replace(cohort.volumes, name=cohort.folder.name)
        same = volumes.n_patients == len(self.reference) and cohort.stage not in ("folder", "release")
        diseases = self.reference.groups if same else None
        found = measure(volumes, *self.anatomy_networks, seed=self.seed, diseases=diseases, inception=self._inception)
        run.keep("measured", found)
        return {}

    @stage("reference", 1, settings=("evaluation",), needs=("reference_cohort", "anatomy"))
    def real_measured(self, run: Run) -> Metrics:
        """The same of the reference patients, once for all models."""
        found = measure_real(self.reference, *self.anatomy_networks, seed=self.seed, inception=self._inception)
        run.keep("measured", found)
        return {}

    @stage("floor", 1, settings=("evaluation",), needs=("real_measured",))
    def floor(self, run: Run, size: int) -> Metrics:
        """What the reference patients reach among themselves, from half-samples of this size."""
        real = self._read()
        run.keep("floor", estimate(real, real, size=size, **self._resampling))
        return {}

    @stage("differ", 1, settings=("evaluation",), needs=("evaluated",))
    def differing(self, run: Run, first: float, second: float) -> Metrics:
        """What one budget's model reaches beyond another's, request by request; the table `differences`."""
        ours, theirs = (self._read(self.synthesised(epsilon)) for epsilon in (first, second))
        size = min(ours.n_patients, self._read().n_patients) // 2
        run.leave(differences=differences(ours, theirs, self._read(), size=size, **self._resampling))
        return {"first": plain(first), "second": plain(second)}

    def _read(self, cohort: Run | None = None) -> Measured:
        """What was read from the cohort that a run left; else from the reference patients."""
        return (self.measured(cohort) if cohort else self.real_measured).read("measured")

    @stage("counterfactual", 1, settings=_STEERED, needs=("finetuned", "reference_cohort", "anatomy"))
    def counterfactual(self, run: Run, epsilon: float) -> Metrics:
        """One attribute moves, the noise stays: how far each attribute moves in what is drawn; the table `response`."""
        anatomy, table = control.steer(self.reference, partial(self._read_drawn, run, epsilon), **self._bootstrap)
        run.leave(anatomy=anatomy, response=table)
        return {"epsilon": plain(epsilon), "model": self.finetuned(epsilon).folder.name, "rows": records(table)}

    @stage("levels", 1, settings=("sampling",), needs=("finetuned", "reference_cohort", "anatomy"))
    def levels(self, run: Run, epsilon: float) -> Metrics:
        """One patient's request with one attribute at several levels, the noise kept; the table `levels`."""
        draw = partial(self._drawn, run, epsilon)
        volumes, table = control.draw_levels(self.reference, draw, *self.anatomy_networks)
        run.leave(synthetic=volumes, levels=table)
        return {"epsilon": plain(epsilon), "model": self.finetuned(epsilon).folder.name, "rows": records(table)}

    @stage("beyond", 2, settings=_STEERED, needs=("finetuned", "reference_cohort", "pretrained", "anatomy"))
    def beyond_range(self, run: Run, epsilon: float) -> Metrics:
        """Hearts smaller and larger than all public ones, measured at end-diastole; the table `beyond`."""
        span, read = self.pretrained.metrics["span"], partial(self._read_drawn, run, epsilon)
        anatomy, table = control.reach(self.reference, span, read, **self._bootstrap)
        run.leave(anatomy=anatomy, beyond=table)
        return {"epsilon": plain(epsilon), "model": self.finetuned(epsilon).folder.name, "rows": records(table)}

    def _read_drawn(self, run: Run, epsilon: float, *requested: np.ndarray) -> pd.DataFrame:
        """What is read from volumes that a budget's model draws for attributes (n, 14) of patients (n,)."""
        return control.read_anatomy(self._drawn(run, epsilon, *requested), *self.anatomy_networks)

    @property
    def _bootstrap(self) -> dict[str, Any]:
        return {"resamples": self.profile.evaluation.resamples, "seed": self.seed}

    @property
    def _resampling(self) -> dict[str, Any]:
        return self._bootstrap | {"half_sample_pairs": self.profile.evaluation.half_sample_pairs}

    @cached_property
    def _inception(self) -> InceptionEncoder | None:
        path = self.profile.evaluation.inception
        return InceptionEncoder(path) if path else None

    @stage("useful-baselines", 1, settings=_USEFUL, needs=("reference_cohort", "public"))
    def useful_baselines(self, run: Run) -> Metrics:
        """What real patients are worth as training data, tested on the reference patients.

        Public ones and, where they're simulated, as many private ones and few private ones.
        """
        few = self._few
        cohorts = [self.public, self.private] if few else [self.public]
        training_sets = [replace(labelled_volumes(self._learnt_from(x)), name=x.manifest.role) for x in cohorts]
        found = self._useful([*training_sets, few] if few else training_sets)
        run.keep("training_sets", found)
        return {"model": run.folder.name, "rows": records(tabulate_training_sets(found, found, **self._bootstrap), 15)}

    @stage("useful", 1, settings=_USEFUL, needs=("training_cohort", "useful_baselines"))
    def useful(self, run: Run, epsilon: float) -> Metrics:
        """What the training cohort of a budget is worth, alone and beside few private patients."""
        drawn, few = replace(self.training_cohort(epsilon).volumes, name="synthetic"), self._few
        found = self._useful([drawn, few + drawn] if few else [drawn])
        known = self.useful_baselines.read("training_sets")
        rows = records(tabulate_training_sets(found, known, **self._bootstrap), 15)
        return {"epsilon": plain(epsilon), "model": run.folder.name, "rows": rows}

    def _learnt_from(self, cohort: Cohort) -> Patients:
        """Labelled train patients of a cohort, as many as a training set has, drawn by the seed."""
        return training_patients(cohort.split("train"), self.profile.utility.patients, self.seed)

    @cached_property
    def _few(self) -> Volumes | None:
        """The first of the private patients of an arm; None where they're real, so nothing may be trained on them."""
        if load_manifest(self.parameters.cohort_private).secret:
            return None
        return replace(
            labelled_volumes(self._learnt_from(self.private)[: self.profile.utility.few]), name="few private"
        )

    def _useful(self, training_sets: list[Volumes]) -> list[Utility]:
        """Every training set's training, tested on the reference patients."""
        settings, test = self.profile.utility, labelled_volumes(self.reference)
        return utility(training_sets, test, segmenter=settings.segmenter, phase=settings.phase, **self._bootstrap)

    # --- What an attacker finds ---

    @stage("audit", 1, needs=("finetuned",))
    def audited(self, run: Run, epsilon: float) -> Metrics:
        """Lower bounds on what the mechanism of a budget's ledger spends, from canaries; touches no patient.

        Raises:
            ParameterError: epsilon is 0: no private patient trained the public model.
        """
        ledger = self.finetuned(epsilon).ledger
        return {"epsilon": plain(epsilon), "stated": plain(ledger.epsilon)} | audit_mechanism(ledger, self.seed)

    @stage("audit-whole", 1, settings=("finetune",), needs=("start", "audited_cohort"))
    def audited_whole(self, run: Run, epsilon: float) -> Metrics:
        """The same from end to end: a private training with canaries, whose final weights an attacker reads."""
        train = self.audited_cohort.split("train")
        denoiser, latents = self.denoiser(self.pretrained), self.latents(train, self.audited_cohort)
        randomness = Randomness(self.seed, simulated=True, run=run.folder.name)
        given = self.profile.finetune, randomness, run.folder, self.load_directions()
        found = audit_training(denoiser, train, latents, epsilon, *given)
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
        splits = [self.private.split(name) for name in ("train", "validation", "test")]
        n_members = len(splits[1]) + len(splits[2])
        members = np.sort(np.random.default_rng(self.seed).permutation(len(splits[0]))[:n_members])
        model = self.denoiser(self.finetuned(epsilon))
        who = [members, *(np.arange(len(split)) for split in splits[1:])]
        found = [self._losses(model, split, self.private, some) for split, some in zip(splits, who, strict=True)]
        losses = found[0], np.concatenate(found[1:])
        run.keep("losses", losses)
        references = self.attacked(0).read("losses") if epsilon else None
        return {"epsilon": plain(epsilon)} | attacks(losses, references)

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
        found = memorised(cohort.volumes, *self._private_parts, self.load_autoencoder(), **self._bootstrap)
        return {"epsilon": cohort.metrics["epsilon"]} | found

    @cached_property
    def _private_parts(self) -> tuple[Embedded, Embedded]:
        train, held_out = (embed_real(self.private.split(x), self.load_autoencoder()) for x in ("train", "validation"))
        return train, held_out

    @stage("overfit", 1, settings=("pretrain", "overfit", *_STEERED), needs=("pretrained", "public"))
    def overfitted(self, run: Run) -> Metrics:
        """The positive control: a copy of the public model that learns a few of its patients by heart.

        They are at most 20 training patients, held against as many public validation patients, by the same tests as
        private ones; requests are the public test patients' attributes. The public model, the attack's reference, met
        the few as well, which hides some of what the copy learnt.
        """
        settings = self.profile.pretrain.model_copy(update=self.profile.overfit.model_dump())
        train, held_out, requested = (self.public.split(name) for name in ("train", "validation", "test"))
        few = min(20, len(train), len(held_out))
        known, others, who = train[:few], held_out[:few], np.arange(few)
        latents, public = self.latents(train, self.public)[: train.offsets[few]], self.denoiser(self.pretrained)
        copy, _ = pretrain(known, latents, public, settings, self.seed, run.state)
        self._leave_public(run, weights=copy)
        cohort, autoencoder = self.draw(copy, requested.attributes, requested.patient_index), self.load_autoencoder()
        run.leave(synthetic=cohort)
        losses, references = (
            [self._losses(model, patients, self.public, who) for patients in (train, held_out)]
            for model in (copy, self.denoiser(self.pretrained))
        )
        met, unmet = (embed_real(patients, autoencoder) for patients in (known, others))
        return attacks(losses, references) | memorised(cohort, met, unmet, autoencoder, **self._bootstrap)

    @stage("sensitivity", 1, settings=("finetune.clip",), needs=("pretrained", "public"))
    def sensitivities(self, run: Run) -> Metrics:
        """How far one patient moves the sum of clipped gradients, with two violations that break its bound.

        On public patients, who stand for private ones, with the private recipe's clip.
        """
        patients, clip = self.public.split("train")[:8], self.profile.finetune.clip
        found = sensitivities(patients, self.load_autoencoder(), self.denoiser(self.pretrained), clip)
        return {"n_patients": len(patients), "rows": records(found)}

    def _losses(self, model: Denoiser, patients: Patients, cohort: Cohort, who: np.ndarray) -> np.ndarray:
        """A model's denoising losses (n,) of the patients of a split with these rising indices, over 4 draws."""
        rows = np.flatnonzero(np.isin(patients.patient_index, who))
        return held_out_loss(model, self.latents(patients, cohort)[rows], patients.subset(who), draws=4)

    @cached_property
    def anatomy_networks(self) -> tuple[Segmenter, PhaseClassifier]:
        """The trained segmenter and phase classifier."""
        return self.anatomy.load(Segmenter(), "segmenter"), self.anatomy.load(PhaseClassifier(), "phase")
