"""The study: which stage needs which.

A stage's folder is `runs/<stage>-<key>`; the key hashes its settings and the keys of the stages before it, so the same
settings are never trained twice and changed ones never reuse a result. `metrics.json` is written last and says that a
stage is complete.
"""

import hashlib
import json
import math
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock
from pydantic import BaseModel

from cardiac_ldm import shipped
from cardiac_ldm.cohort import Cohort, Patients, Volumes, load_manifest, prepare, require_releasable
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.evaluation import control
from cardiac_ldm.evaluation.features import InceptionEncoder
from cardiac_ldm.evaluation.foreign import read_folder
from cardiac_ldm.evaluation.intervals import records
from cardiac_ldm.evaluation.measured import Measured, measure, measure_real
from cardiac_ldm.evaluation.membership import attacks
from cardiac_ldm.evaluation.memorisation import Embedded, embed_real, memorised
from cardiac_ldm.evaluation.metrics import compare, differences, estimate
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.evaluation.utility import (
    Budget,
    Utility,
    labelled_volumes,
    tabulate_arms,
    training_patients,
    utility,
)
from cardiac_ldm.models.anatomy import HeartFinder, PhaseClassifier, Segmenter
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.parameters import CohortParameters, Parameters
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness, Record, Standing, public_ledger
from cardiac_ldm.privacy.bounds import BOUNDS
from cardiac_ldm.privacy.canaries import draw_canaries, ledger_scores, weights_scores, with_canaries
from cardiac_ldm.profile import AnatomySettings, Profile, Role
from cardiac_ldm.progress import awaited
from cardiac_ldm.training.anatomy import train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import reconstruct, train_autoencoder
from cardiac_ldm.training.checkpoint import load_weights, save_weights
from cardiac_ldm.training.finetune import denoising, finetune, finetune_decoder
from cardiac_ldm.training.leaks import sensitivities
from cardiac_ldm.training.pretrain import Latents, held_out_loss, pretrain
from cardiac_ldm.training.private import is_first_process, shared_decision, train_privately

ROOT = Path(__file__).resolve().parents[1]
_AUDITED = 600
"""Places in an audit from end to end."""
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A completed stage and the folder that holds what it left."""

    stage: str
    key: str
    folder: Path

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured."""
        return json.loads((self.folder / "metrics.json").read_text())

    @property
    def ledger(self) -> Ledger:
        """What the model's training spent."""
        return Ledger.load(self.folder / "privacy.json")


class Study:
    """Every stage of one study; asking for a stage runs what it lacks first, saying so."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters, self.seed = parameters, parameters.seed
        self.profile = Profile.load(parameters.profile)
        self.runs = Path(os.environ.get("CARDIAC_LDM_RUNS", ROOT / "runs"))

    @cached_property
    def _public_as_given(self) -> Cohort:
        """The prepared public cohort, from whose labels the instruments learn."""
        return self._cohort("public")

    @cached_property
    def public(self) -> Cohort:
        """The prepared public cohort."""
        given = self._public_as_given
        return given if all(given.split(s).labelled.all() for s in given.splits) else self._with_hearts_found("public")

    @cached_property
    def private(self) -> Cohort:
        """The prepared private cohort."""
        return self._with_hearts_found("private")

    def _with_hearts_found(self, role: Role) -> Cohort:
        """A prepared cohort; the segmenter, trained if need be, finds the hearts that nobody has labelled."""
        run = self._shipped("anatomy")
        if run is None:
            if not self._public_as_given.split("train").labelled.any():
                return self._cohort(role)
            run = self._planned(*self._anatomy)
        finder = HeartFinder(run.folder / "segmenter.safetensors", run.key)
        try:
            return self._cohort(role, finder)
        except FileNotFoundError:
            if finder.weights.exists():
                raise
            _ = self.anatomy
            return self._cohort(role, finder)

    @awaited("cohorts")
    def _cohort(self, role: Role, localiser: HeartFinder | None = None) -> Cohort:
        manifest, data_root = self.parameters.manifest(role), getattr(self.parameters, f"data_root_{role}")
        root = Path(data_root) if data_root else None
        limits = self.profile.patients[role].model_dump()
        store = self.runs / "cohorts"
        return prepare(manifest, store=store, data_root=root, limits=limits, localiser=localiser, on_demand=True)

    def beside(self, parameters: CohortParameters) -> list[Cohort]:
        """The cohort to hold beside the study's own; none where none is named."""
        if not parameters.cohort_beside:
            return []
        root = Path(parameters.data_root_beside) if parameters.data_root_beside else None
        return [prepare(load_manifest(parameters.cohort_beside), store=self.runs / "cohorts", data_root=root)]

    @cached_property
    def reference(self) -> Patients:
        """The held-out patients whose attributes are asked for and against whom models are measured.

        They come from the private cohort where it is simulated. Held-out patients of a real private cohort are not
        covered by the guarantee, so the public ones stand in for them.
        """
        simulated = load_manifest(self.parameters.cohort_private).simulated
        return (self.private if simulated else self.public).split("test")

    @cached_property
    @awaited("autoencoder")
    def autoencoder(self) -> Run:
        """Stage: the autoencoder, trained on public patients."""
        settings = self.profile.autoencoder

        def work(folder: Path) -> dict[str, Any]:
            model, losses = train_autoencoder(self.public.split("train"), settings, self.seed, folder / "state.pt")
            save_weights(model, folder / "weights.safetensors")
            _leave_public_ledger(self.public, folder)
            return {"losses": losses}

        return self._shipped("autoencoder") or self._run("autoencoder", settings, [self.public.key], work)

    @property
    def _anatomy(self) -> tuple[str, AnatomySettings, list[str]]:
        return "anatomy", self.profile.anatomy, [self._public_as_given.key]

    @cached_property
    @awaited("segmenter and phase classifier")
    def anatomy(self) -> Run:
        """Stage: the segmenter and the phase classifier, trained on public labels."""
        settings = self.profile.anatomy

        def work(folder: Path) -> dict[str, Any]:
            patients = self._public_as_given.split("train")
            segmenter, dice = train_segmenter(patients, **settings.segmenter.model_dump(), seed=self.seed)
            phase, entropy = train_phase_classifier(patients, **settings.phase.model_dump(), seed=self.seed)
            save_weights(segmenter, folder / "segmenter.safetensors")
            save_weights(phase, folder / "phase.safetensors")
            _leave_public_ledger(self._public_as_given, folder)
            return {"segmenter": dice, "phase": entropy}

        return self._shipped("anatomy") or self._run(*self._anatomy, work)

    @cached_property
    @awaited("pretraining")
    def pretrained(self) -> Run:
        """Stage: the denoiser, pre-trained on public patients; the model of epsilon 0."""
        settings = self.profile.pretrain

        def work(folder: Path) -> dict[str, Any]:
            patients = self.public.split("train")
            latents = self.latents(patients, self.public)[:]
            model, losses = pretrain(patients, latents, self.profile.denoiser, settings, self.seed, folder / "state.pt")
            save_weights(model, folder / "weights.safetensors")
            _leave_public_ledger(self.public, folder)
            return {"losses": losses}

        return self._shipped("pretrain") or self._run(
            "pretrain", [settings, self.profile.denoiser], [self.autoencoder.key], work
        )

    def described(self, stage: str) -> dict[str, object]:
        """What the weights of a public stage depend on, as shipped ones say it."""
        profile, manifest = self.profile, load_manifest(self.parameters.cohort_public)
        settings: dict[str, list[BaseModel]] = {
            "anatomy": [profile.anatomy],
            "autoencoder": [profile.autoencoder],
            "pretrain": [profile.autoencoder, profile.denoiser, profile.pretrain],
        }
        cohort = {
            "name": manifest.name,
            "reader": _plain(manifest.reader),
            "train": profile.patients["public"].train,
        }
        return {"settings": _plain(settings[stage]), "cohort": cohort, "seed": self.seed}

    def _shipped(self, stage: str) -> Run | None:
        """The run of a public stage that came with the library, if it's the one that is asked for."""
        found = shipped.find(stage, self.described(stage))
        return found and Run(stage, *found)

    @awaited("fine-tuning")
    def finetuned(self, epsilon: float) -> Run:
        """Stage: the denoiser fine-tuned on private patients with a budget of `epsilon`; 0 is the pre-trained one.

        Real patients are charged in their record, once for each run, before its first step.

        Raises:
            PrivacyError: what is asked for, here or by the study's other budgets, isn't to be had of real patients.
        """
        if epsilon == 0:
            return self.pretrained
        epsilon, patients, settings = float(epsilon), self.private.split("train"), self.profile.finetune
        settings.check(epsilon, patients.name, len(patients), patients.secret)
        if patients.secret:
            self._agree_to_spend([epsilon, *self.parameters.budgets])

        def work(folder: Path) -> dict[str, Any]:
            seed = None if patients.secret else self.seed
            randomness = Randomness(seed, simulated=patients.simulated, run=folder.name)
            model, public_data = self.denoiser(self.pretrained), load_manifest(self.parameters.cohort_public).name
            first, plan = self._plans(epsilon)
            if patients.secret and is_first_process():
                words = {"tuned": settings.tuned, "private_data": f"{patients.name} ({patients.split})"}
                self._charge(plan.ledger(randomness, stage="denoiser", **words, public_data=public_data), folder)
            if settings.decoder and first:
                autoencoder, where = self.load_autoencoder(), folder / "decoder"
                stage = finetune_decoder(autoencoder, patients, first, settings.decoder, randomness, where, public_data)
                plan = replace(plan, before=stage.mechanisms)
            latents = self.latents(patients, self.private)
            if patients.secret:
                _ = latents[:]  # else what had been encoded would tell who was in the lots
            schedule = self.profile.denoiser.schedule
            left = finetune(model, patients, latents, plan, settings, schedule, randomness, folder, public_data)
            if patients.secret and is_first_process():
                Record().finish(left)
            return {"epsilon": _plain(epsilon)}

        if not patients.secret:  # 2: lots and noise are each run's own
            upstream = [self.pretrained.key, self.private.key]
            return self._run("finetune", [settings, epsilon, {"version": 2}], upstream, work, together=True)
        self._begin(self._planned("finetune", self._of_real_patients(epsilon), []))
        run = self._run("finetune", self._of_real_patients(epsilon), [], work, together=True)
        if is_first_process():
            Record().vouch(run.ledger)
        return run

    def _plans(self, epsilon: float) -> tuple[PrivatePlan | None, PrivatePlan]:
        """The plans of a budget's two stages on the private patients: the decoder's, if any, and the denoiser's."""
        settings = self.profile.finetune
        terms = settings.delta, settings.unit, self.private.split("train").places
        first = settings.decoder.plan(settings.decoder.share * epsilon, *terms) if settings.decoder else None
        return first, settings.plan(epsilon, *terms, first.mechanisms("decoder", "decoder") if first else ())

    def _of_real_patients(self, epsilon: float) -> list[object]:
        """What a model of real patients depends on: no seed, no source text, no version of a library.

        So it's trained again, and they are charged again, only where something else is asked for.
        """
        patients = self.private.split("train")
        public = [Ledger.load(run.folder / "privacy.json").weights for run in (self.pretrained, self.autoencoder)]
        who = hashlib.sha256(repr(sorted(Record().hashes(patients.people))).encode()).hexdigest()
        profile = self.profile
        return [profile.finetune, profile.denoiser, profile.autoencoder, epsilon, public, who, patients.places]

    def would_spend(self, budgets: Iterable[float]) -> str | None:
        """What the models of all these budgets would spend of real private patients; None where they are there.

        Raises:
            PrivacyError: more than the manifest's budget, or something that would reveal them; the message names it.
            ParameterError: a budget that no plan reaches.
        """
        patients, settings, record = self.private.split("train"), self.profile.finetune, Record()
        asked = sorted(set(map(float, budgets)) - {0})
        for epsilon in asked:
            settings.check(epsilon, patients.name, patients.places, patients.secret)
        new = {epsilon: self._plans(epsilon)[1].mechanisms("denoiser", settings.tuned) for epsilon in asked}
        people = record.hashes(patients.people)
        self._none_unknown()
        if any(self.runs.glob("finetune-*")):  # else the public stages, which may take hours, need not be there to know
            runs = {epsilon: self._planned("finetune", self._of_real_patients(epsilon), []) for epsilon in asked}
            new = {epsilon: stages for epsilon, stages in new.items() if not self._charged(runs[epsilon])}
        return record.covered(patients.name, people, patients.budget, *new.values()) if new else None

    def _agree_to_spend(self, budgets: Iterable[float]) -> None:
        """Look at all budgets of this study before one is spent. Raises PrivacyError unless told to spend."""
        said = self.would_spend(budgets)
        if said and not getattr(self.parameters, "spend", False):
            raise PrivacyError(f"{said}. Nothing is spent yet; to agree, set the parameter spend to True")
        if said and is_first_process():
            print(f"{said}. It's recorded in {str(Record().path).replace(str(Path.home()), '~')}")

    def _none_unknown(self) -> None:
        """Raise PrivacyError where `runs` holds a model of real patients of which the record knows nothing."""
        record = Record()
        known = {spend.run for spend in record.spends}
        for path in self.runs.glob("finetune-*/privacy.json"):
            began = any(path.parent.rglob("state.pt")) or any(path.parent.rglob("*.safetensors"))
            if began and not (ledger := Ledger.load(path)).simulated and ledger.run not in known:
                record.vouch(ledger)

    def _charged(self, run: Run) -> bool:
        """Whether real patients have been charged for the run in this folder, which is done or can go on."""
        path, record = run.folder / "privacy.json", Record()
        if not path.exists():
            return False
        ledger, left = Ledger.load(path), record.finished
        if ledger.run not in {spend.run for spend in record.spends}:
            return False
        whole = (run.folder / "weights.safetensors").exists()
        return ledger.run not in left or (whole and left[ledger.run] == ledger.weights)

    def _begin(self, run: Run) -> None:
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

    def _charge(self, ledger: Ledger, folder: Path) -> None:
        """Charge real private patients for a run before its first step; one that goes on was charged."""
        patients, path = self.private.split("train"), folder / "privacy.json"
        folder.chmod(0o700)
        if not path.exists():  # on the disk first: a kill before the next lines has neither spent nor charged
            ledger.model_copy(update={"run": secrets.token_hex(16)}).save(path)
        begun, record = Ledger.load(path), Record()
        people = record.hashes(patients.people)
        together = record.charge(begun, patients.name, people, patients.budget)
        begun.model_copy(update={"together": together}).save(path)

    @awaited("held-out loss")
    def held_out_loss(self, epsilon: float) -> Run:
        """Stage: the denoising loss of a budget's model on the reference patients, with its standard error."""
        model = self.finetuned(epsilon)

        def work(folder: Path) -> dict[str, Any]:
            cohort = self.private if self.reference.role == "private" else self.public
            latents, schedule = self.latents(self.reference, cohort), self.profile.denoiser.schedule
            losses = held_out_loss(self.denoiser(model), schedule, latents, self.reference)
            error = losses.std(ddof=1) / math.sqrt(len(losses))
            return {"mean": float(losses.mean()), "standard_error": float(error), "n_patients": len(losses)}

        return self._run("loss", "", [model.key, self._reference_key], work)

    def audited(self, epsilon: float) -> Run:
        """Stage: lower bounds on what the mechanism of a budget's ledger spends, from canaries; touches no patient.

        For a finite budget the same with a tenth of the noise too: the positive control, which states too little.

        Raises:
            ParameterError: epsilon is 0: no private patient trained the public model.
        """
        model = self.finetuned(epsilon)
        ledger = model.ledger

        def work(folder: Path) -> dict[str, Any]:
            rows = []
            for noise in (1.0, 0.1) if math.isfinite(ledger.epsilon) else (1.0,):
                scores, included = ledger_scores(ledger, self.seed, noise=noise)
                rows += [
                    {"noise": noise, "bound": name, "shown": bound(scores, included, ledger.delta)}
                    | {"at_most": bound(included.astype(float), included, ledger.delta)}
                    for name, bound in BOUNDS.items()
                ]
            told = {"stated": _plain(ledger.epsilon), "delta": ledger.delta, "n_canaries": len(scores)}
            return {"epsilon": _plain(epsilon)} | told | {"rows": rows}

        return self._run("audit", "", [model.key], work)

    def audited_whole(self, epsilon: float) -> Run:
        """Stage: the same from end to end: a private training with canaries, whose final weights an attacker reads.

        Most places of a small cohort are canaries'; the others are simulated or public patients', with the real loss.
        The plan's ledger is stated either way; noise 0 is the positive control, left out of the loop alone.
        """
        recipe, private = self.profile.finetune, load_manifest(self.parameters.cohort_private)

        def work(folder: Path) -> dict[str, Any]:
            cohort = self.public if private.secret else self.private
            train, n, rows = cohort.split("train"), _AUDITED, []
            known = min(16, len(train))
            patients, size = (
                train.subset(np.arange(n) % len(train)),
                n - known,
            )  # whoever is last makes room for canaries
            latents, schedule = self.latents(train, cohort)[: train.offsets[known]], self.profile.denoiser.schedule
            settings = recipe.model_copy(update={"steps": 8, "expected_batch": n // 2, "decoder": None})
            plan = settings.plan(epsilon, settings.delta, "patient", n)
            for noise in (1.0, 0.0) if math.isfinite(epsilon) else (0.0,):
                randomness = Randomness(self.seed, simulated=True, run=f"{folder.name}-{noise}")
                tuned, loss = denoising(self.denoiser(self.pretrained), patients, latents, plan, settings, schedule)
                weights = list(tuned.values())
                before = [weight.detach().clone() for weight in weights]
                included, signs = draw_canaries(size, weights, np.random.default_rng(self.seed))
                words = {"private_data": "canaries", "public_data": self.public.manifest.name}
                ledger = plan.ledger(randomness, stage="denoiser", tuned=settings.tuned, **words)
                run = replace(plan, noise_multiplier=noise * plan.noise_multiplier)
                with_them = with_canaries(loss, included, signs, plan, weights)
                where = folder / f"noise-{noise}"
                train_privately(tuned, with_them, run, settings, randomness, ledger, patients, where)
                shutil.rmtree(where)
                scores = weights_scores(before, [weight.detach() for weight in weights], signs)
                rows += [
                    {"noise": noise, "bound": name, "shown": bound(scores, included, plan.delta)}
                    | {"at_most": bound(included.astype(float), included, plan.delta)}
                    for name, bound in BOUNDS.items()
                ]
            told = {"stated": _plain(ledger.epsilon), "delta": plan.delta, "n_canaries": size, "n_patients": known}
            return {"epsilon": _plain(epsilon)} | told | {"rows": rows}

        upstream = [self.pretrained.key, (self.public if private.secret else self.private).key]
        return self._run("audit-whole", [recipe, float(epsilon)], upstream, work)

    def attacked(self, epsilon: float) -> Run:
        """Stage: membership inference from losses, against a budget's model and its simulated private patients.

        Members are training patients, as many as were held out. The reference is the public model, which met neither;
        of itself, the loss alone is tried. Leaves every patient's loss in `losses.npz`.

        Raises:
            PrivacyError: the private patients are real.
        """
        splits = {name: self.private.split(name) for name in ("train", "validation", "test")}
        require_releasable(splits["train"], "who among private patients trained the model")
        model, public = self.finetuned(epsilon), None if epsilon == 0 else self.attacked(0)

        def work(folder: Path) -> dict[str, Any]:
            everyone = {name: np.arange(len(patients)) for name, patients in splits.items()}
            size = len(everyone["validation"]) + len(everyone["test"])
            everyone["train"] = np.sort(np.random.default_rng(self.seed).permutation(everyone["train"])[:size])
            found = {name: self._losses(model, splits[name], self.private, who) for name, who in everyone.items()}
            losses = found["train"], np.concatenate([found["validation"], found["test"]])
            np.savez(folder / "losses.npz", *losses)
            references = tuple(np.load(public.folder / "losses.npz").values()) if public else None
            return {"epsilon": _plain(epsilon)} | attacks(losses, references)

        return self._run("attack", "", [model.key, self.private.key], work)

    def memorised(self, epsilon: float) -> Run:
        """Stage: whether a budget's synthetic cohort lies nearer to simulated private patients than to held-out ones.

        The requests are the private test patients' attributes, written without regard to training or validation.

        Raises:
            PrivacyError: the private patients are real.
        """
        require_releasable(self.private.split("train"), "whom among private patients the synthetic volumes resemble")
        synthetic = self.synthesised(epsilon)

        def work(folder: Path) -> dict[str, Any]:
            cohort = Volumes.load(synthetic.folder / "synthetic.npz")
            return {"epsilon": _plain(epsilon)} | self._memorisation(cohort, *self._private_parts)

        return self._run("memorised", self.profile.evaluation.resamples, [synthetic.key], work)

    @cached_property
    def overfitted(self) -> Run:
        """Stage: the positive control: a copy of the public model that learns a few of its patients by heart.

        They are at most 20 training patients, held against as many public validation patients, by the same tests as
        private ones; requests are the public test patients' attributes. The public model, the attack's reference, met
        the few as well, which hides some of what the copy learnt. Leaves `synthetic.npz` too.
        """
        settings = self.profile.pretrain.model_copy(update=self.profile.overfit.model_dump())

        def work(folder: Path) -> dict[str, Any]:
            train, held_out, asked = (self.public.split(name) for name in ("train", "validation", "test"))
            few = min(20, len(train), len(held_out))
            known, others, who = train[:few], held_out[:few], np.arange(few)
            latents, public = self.latents(train, self.public)[: train.offsets[few]], self.denoiser(self.pretrained)
            model, _ = pretrain(
                known, latents, self.profile.denoiser, settings, self.seed, folder / "state.pt", start=public
            )
            save_weights(model, folder / "weights.safetensors")
            _leave_public_ledger(self.public, folder)
            copy = Run("overfit", "", folder)
            cohort = self._drawn(copy, asked.attributes, asked.owners)
            cohort.save(folder / "synthetic.npz")
            losses, references = (
                tuple(self._losses(run, patients, self.public, who) for patients in (train, held_out))
                for run in (copy, self.pretrained)
            )
            parts = (self._embedded(patients) for patients in (known, others))
            return attacks(losses, references) | self._memorisation(cohort, *parts)

        upstream = [self.pretrained.key, self.public.key]
        every = [settings, self.profile.sampling, self.profile.evaluation.resamples]
        return self._run("overfit", every, upstream, work)

    @cached_property
    def sensitivities(self) -> Run:
        """Stage: how far one patient moves the sum of clipped gradients, with two habits that break its bound.

        On public patients, who stand for private ones, with the private recipe's clip.
        """
        recipe = self.profile.finetune

        def work(folder: Path) -> dict[str, Any]:
            patients, schedule = self.public.split("train")[:8], self.profile.denoiser.schedule
            models = self.load_autoencoder(), self.denoiser(self.pretrained)
            found = sensitivities(patients, *models, schedule, recipe.clip, recipe.clipping)
            return {"n_patients": len(patients), "rows": records(found)}

        return self._run("sensitivity", [recipe.clip, recipe.clipping], [self.pretrained.key, self.public.key], work)

    def _losses(self, model: Run, patients: Patients, cohort: Cohort, who: np.ndarray) -> np.ndarray:
        """A model's denoising losses (n,) of the patients of a split with these rising indices, over 4 draws."""
        rows = np.flatnonzero(np.isin(patients.owners, who))
        latents, schedule = self.latents(patients, cohort)[rows], self.profile.denoiser.schedule
        return held_out_loss(self.denoiser(model), schedule, latents, patients.subset(who), draws=4)

    @cached_property
    def _private_parts(self) -> tuple[Embedded, Embedded]:
        return self._embedded(self.private.split("train")), self._embedded(self.private.split("validation"))

    def _embedded(self, patients: Patients) -> Embedded:
        return embed_real(patients, self.load_autoencoder())

    def _memorisation(self, cohort: Volumes, train: Embedded, held_out: Embedded) -> dict[str, Any]:
        resamples = self.profile.evaluation.resamples
        return memorised(cohort, train, held_out, self.load_autoencoder(), resamples=resamples, seed=self.seed)

    def private_ledgers(self) -> list[Ledger]:
        """Ledgers of all private models in `runs` that learnt from this study's simulated patients, finished or not.

        A run that died in its decoder's stage has that stage's ledger. Models with no guarantee are left out.
        """
        places = [(run / "privacy.json", run / "decoder" / "privacy.json") for run in self.runs.glob("finetune-*")]
        found = [Ledger.load(next(filter(Path.exists, place))) for place in places if any(map(Path.exists, place))]
        patients = self.private.split("train")
        own = ("patient-level DP", f"{patients.name} ({patients.split})")
        return sorted((x for x in found if (x.guarantee, x.private_data) == own), key=lambda ledger: ledger.epsilon)

    def together(self) -> Standing | None:
        """What all private models of this study's private patients spent together; None where there is none.

        Of real patients their record says it, whatever `runs` holds; of simulated ones the ledgers in `runs` do.
        """
        patients, record = self.private.split("train"), Record()
        if patients.secret:
            standing = record.standing(record.hashes(patients.people), patients.budget.delta)
            return standing if standing.runs else None
        ledgers = self.private_ledgers()
        return Ledger.compose(ledgers) if ledgers else None

    @awaited("sampling")
    def synthesised(self, epsilon: float) -> Run:
        """Stage: one synthetic volume for each volume of the reference patients, by the model of a budget."""
        model, settings = self.finetuned(epsilon), self.profile.sampling

        def work(folder: Path) -> dict[str, Any]:
            model.ledger.save(folder / "privacy.json")
            cohort = self._drawn(model, self.reference.attributes, self.reference.owners)
            cohort.save(folder / "synthetic.npz")
            return {"epsilon": _plain(epsilon), "n_volumes": len(cohort.images)}

        return self._run("synthesise", settings, [model.key, self._reference_key], work)

    def counterfactual(self, epsilon: float) -> Run:
        """Stage: one attribute moves, the noise stays: how far each attribute moves in what is drawn.

        Leaves `response.csv`, and in `anatomy.csv` what was read from every volume.
        """
        model, resamples = self.finetuned(epsilon), self.profile.evaluation.resamples

        def work(folder: Path) -> dict[str, Any]:
            model.ledger.save(folder / "privacy.json")
            read = partial(self._read, model)
            anatomy, table = control.steer(self.reference, read, resamples=resamples, seed=self.seed)
            anatomy.to_csv(folder / "anatomy.csv", index=False)
            table.to_csv(folder / "response.csv", index=False)
            return {"epsilon": _plain(epsilon), "model": model.folder.name, "rows": records(table)}

        settings = [self.profile.sampling, resamples]
        return self._run("counterfactual", settings, [model.key, self._reference_key, self.anatomy.key], work)

    def beyond_range(self, epsilon: float) -> Run:
        """Stage: hearts smaller and larger than all public ones, asked for and measured at end-diastole.

        Leaves `beyond.csv`, and in `anatomy.csv` what was read from every volume.
        """
        model, resamples = self.finetuned(epsilon), self.profile.evaluation.resamples

        def work(folder: Path) -> dict[str, Any]:
            model.ledger.save(folder / "privacy.json")
            public, read = self.public.split("train"), partial(self._read, model)
            anatomy, table = control.reach(self.reference, public, read, resamples=resamples, seed=self.seed)
            anatomy.to_csv(folder / "anatomy.csv", index=False)
            table.to_csv(folder / "beyond.csv", index=False)
            return {"epsilon": _plain(epsilon), "model": model.folder.name, "rows": records(table)}

        upstream = [model.key, self._reference_key, self.public.key, self.anatomy.key]
        return self._run("beyond", [self.profile.sampling, resamples], upstream, work)

    def _drawn(self, model: Run, attributes: np.ndarray, owners: np.ndarray) -> Volumes:
        """Volumes for attributes (n, 14), asked by owners (n,)."""
        settings = self.profile.sampling
        return synthesise(
            self.load_autoencoder(model),
            self.denoiser(model),
            self.profile.denoiser.schedule,
            attributes,
            owners,
            steps=settings.steps,
            guidance=settings.guidance,
            seed=self.seed,
        )

    def _read(self, model: Run, attributes: np.ndarray, owners: np.ndarray) -> pd.DataFrame:
        """What the instruments read from volumes drawn for attributes (n, 14), asked by owners (n,)."""
        cohort = self._drawn(model, attributes, owners)
        return control.read_anatomy(cohort, *self.instruments)

    @awaited("evaluation")
    def evaluated(self, epsilon: float) -> Run:
        """Stage: everything that is measured on the synthetic cohort of a budget: its report, `metrics.json`."""
        return self._evaluated(self.synthesised(epsilon), epsilon)

    def evaluated_folder(self, path: str | Path) -> Run:
        """Stage: the same of a synthetic cohort that anyone made: a folder of NIfTI files with its `attributes.csv`.

        Raises:
            CohortError: a file in it is missing or wrong; the message names it.
        """
        folder, content = Path(path), hashlib.sha256()
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            content.update(str(file.relative_to(folder)).encode() + hashlib.sha256(file.read_bytes()).digest())

        def work(run: Path) -> dict[str, Any]:
            read_folder(folder).save(run / "synthetic.npz")
            return {"folder": folder.name}

        return self._evaluated(self._run("folder", "", [content.hexdigest()], work), None)

    @cached_property
    def reconstructed(self) -> Run:
        """Stage: the reference patients' volumes, encoded and decoded; beyond their stacks they are empty."""

        def work(folder: Path) -> dict[str, Any]:
            volumes = self.reference.images(np.arange(len(self.reference.owners)))
            images = reconstruct(self.load_autoencoder(), volumes, self.seed)
            cohort = Volumes("reconstructed", images, self.reference.attributes, self.reference.owners)
            cohort.save(folder / "synthetic.npz")
            return {"n_volumes": len(images)}

        return self._run("reconstruct", "empty beyond the stack", [self._reference_key, self.autoencoder.key], work)

    @cached_property
    def ceiling(self) -> Run:
        """Stage: the reference patients' own reconstructions, evaluated: the best that these latents allow."""
        return self._evaluated(self.reconstructed, None)

    def differing(self, first: float, second: float) -> Run:
        """Stage: what one budget's model reaches beyond another's, request by request; `differences.csv`."""

        def work(folder: Path) -> dict[str, Any]:
            ours, theirs = (self._measured(self.synthesised(epsilon)) for epsilon in (first, second))
            size = min(ours.n_patients, self.real_measured.n_patients) // 2
            table = differences(ours, theirs, self.real_measured, size=size, **self._resampling)
            table.to_csv(folder / "differences.csv", index=False)
            return {"first": _plain(first), "second": _plain(second)}

        upstream = [self.evaluated(epsilon).key for epsilon in (first, second)]
        return self._run("differ", "", upstream, work)

    def _evaluated(self, cohort: Run, epsilon: float | None) -> Run:
        def work(folder: Path) -> dict[str, Any]:
            measured, real = self._measured(cohort), self.real_measured
            size, resamples = min(measured.n_patients, real.n_patients) // 2, self.profile.evaluation.resamples
            measured.anatomy.to_csv(folder / "anatomy.csv", index=False)
            bins = control.calibration(measured.anatomy, resamples=resamples, seed=self.seed)
            bins.to_csv(folder / "calibration.csv", index=False)
            found = estimate(measured, real, size=size, **self._resampling)
            simulated = self.reference.simulated
            return compare(found, self._floor(size), measured, real, epsilon=epsilon, reference_simulated=simulated)

        upstream = [cohort.key, self._reference_key, self.anatomy.key]
        return self._run("evaluate", self.profile.evaluation, upstream, work)

    def _measured(self, run: Run) -> Measured:
        """What the instruments read from the cohort that a run left."""

        def work() -> Measured:
            cohort = Volumes.load(run.folder / "synthetic.npz")
            same = cohort.n_patients == len(self.reference) and run.stage != "folder"
            diseases = self.reference.groups if same else None
            return measure(cohort, *self.instruments, seed=self.seed, diseases=diseases, inception=self._inception)

        return self._kept("measure", [run.key, self.anatomy.key], work)

    @cached_property
    def real_measured(self) -> Measured:
        """What the instruments read from the reference patients, once for all models."""

        def work() -> Measured:
            return measure_real(self.reference, *self.instruments, seed=self.seed, inception=self._inception)

        return self._kept("reference", [self._reference_key, self.anatomy.key], work)

    def _floor(self, size: int) -> pd.DataFrame:
        """What the reference patients reach among themselves, from half-samples of this size."""

        def work() -> pd.DataFrame:
            return estimate(self.real_measured, self.real_measured, size=size, **self._resampling)

        return self._kept("floor", [self._reference_key, self.anatomy.key, f"{size}, a table"], work)

    @property
    def _resampling(self) -> dict[str, Any]:
        settings = self.profile.evaluation
        return {
            "resamples": settings.resamples,
            "half_sample_pairs": settings.half_sample_pairs,
            "seed": self.seed,
        }

    @cached_property
    def _inception(self) -> InceptionEncoder | None:
        path = self.profile.evaluation.inception
        return InceptionEncoder(path) if path else None

    def _kept(self, stage: str, upstream: list[str], work: Callable[[], T]) -> T:
        """What `work` gives, pickled in its run's folder."""

        def keep(folder: Path) -> dict[str, Any]:
            (folder / "kept.pkl").write_bytes(pickle.dumps(work()))
            return {}

        run = self._run(stage, self.profile.evaluation, upstream, keep)
        return pickle.loads((run.folder / "kept.pkl").read_bytes())

    def training_cohort(self, epsilon: float) -> Run:
        """Stage: volumes to train on, by the model of a budget, for the attributes of public train patients.

        Asked for those of the reference patients they would know what they're tested on; for those of private train
        patients they would tell them.
        """
        model, asked = self.finetuned(epsilon), self._learnt_from(self.public)

        def work(folder: Path) -> dict[str, Any]:
            model.ledger.save(folder / "privacy.json")
            self._drawn(model, asked.attributes, asked.owners).save(folder / "synthetic.npz")
            return {"epsilon": _plain(epsilon), "n_requests": len(asked)}

        settings = [self.profile.sampling, self.profile.utility.patients]
        return self._run("training-cohort", settings, [model.key, self.public.key], work)

    @cached_property
    def useful_baselines(self) -> Run:
        """Stage: what real patients are worth as training data, tested on the reference patients.

        Public ones and, where they're simulated, as many private ones and few private ones.
        """
        cohorts = [self.public] if self._few is None else [self.public, self.private]

        def work(folder: Path) -> dict[str, Any]:
            arms = [
                replace(labelled_volumes(self._learnt_from(cohort)), name=cohort.manifest.role) for cohort in cohorts
            ]
            found = self._useful(arms if self._few is None else [*arms, self._few])
            (folder / "arms.pkl").write_bytes(pickle.dumps(found))
            return {"model": folder.name} | self._tabulated(found, found)

        upstream = [self._reference_key, *(cohort.key for cohort in cohorts)]
        return self._run("useful-baselines", self._useful_settings, upstream, work)

    def useful(self, epsilon: float) -> Run:
        """Stage: what the training cohort of a budget is worth, alone and beside few private patients."""
        trained_on, baselines = self.training_cohort(epsilon), self.useful_baselines

        def work(folder: Path) -> dict[str, Any]:
            drawn = replace(Volumes.load(trained_on.folder / "synthetic.npz"), name="synthetic")
            found = self._useful([drawn] if self._few is None else [drawn, self._few + drawn])
            known: list[Utility] = pickle.loads((baselines.folder / "arms.pkl").read_bytes())
            return {"epsilon": _plain(epsilon), "model": folder.name} | self._tabulated(found, known)

        return self._run("useful", self._useful_settings, [trained_on.key, baselines.key], work)

    @property
    def _useful_settings(self) -> list[object]:
        return [_plain(self.profile.utility), self.profile.evaluation.resamples]

    def _learnt_from(self, cohort: Cohort) -> Patients:
        """Labelled train patients of a cohort, as many as an arm has, drawn by the seed."""
        return training_patients(cohort.split("train"), self.profile.utility.patients, self.seed)

    @cached_property
    def _few(self) -> Volumes | None:
        """The first of the private patients of an arm; None where they're real, so nothing may be trained on them."""
        if load_manifest(self.parameters.cohort_private).secret:
            return None
        few = self._learnt_from(self.private)[: self.profile.utility.few]
        return replace(labelled_volumes(few), name="few private")

    def _useful(self, arms: list[Volumes]) -> list[Utility]:
        """Every arm's training, tested on the reference patients."""
        settings, resamples = self.profile.utility, self.profile.evaluation.resamples
        segmenter, phase = (Budget(**training.model_dump()) for training in (settings.segmenter, settings.phase))
        test = labelled_volumes(self.reference)
        return utility(arms, test, segmenter=segmenter, phase=phase, resamples=resamples, seed=self.seed)

    def _tabulated(self, arms: list[Utility], baselines: list[Utility]) -> dict[str, Any]:
        rows = tabulate_arms(arms, baselines, resamples=self.profile.evaluation.resamples, seed=self.seed)
        return {"rows": records(rows, 15)}

    def load_autoencoder(self, run: Run | None = None) -> Autoencoder:
        """The public autoencoder; for the model of a `run`, with the decoder that was tuned for it, if any."""
        tuned = run and run.folder / "decoder" / "weights.safetensors"
        weights = tuned if tuned and tuned.exists() else self.autoencoder.folder / "weights.safetensors"
        Ledger.load(weights.with_name("privacy.json"))
        model = self.profile.autoencoder.build()
        load_weights(model, weights)
        return model.eval()

    def denoiser(self, run: Run) -> Denoiser:
        """The denoiser of a run, which must have its ledger, and be what that was written for."""
        _ = run.ledger
        model = self.profile.denoiser.build(self.profile.autoencoder.latent_channels)
        load_weights(model, run.folder / "weights.safetensors")
        return model.eval()

    @cached_property
    def instruments(self) -> tuple[Segmenter, PhaseClassifier]:
        """The trained segmenter and phase classifier."""
        segmenter, phase = Segmenter(), PhaseClassifier()
        load_weights(segmenter, self.anatomy.folder / "segmenter.safetensors")
        load_weights(phase, self.anatomy.folder / "phase.safetensors")
        return segmenter.eval(), phase.eval()

    def latents(self, patients: Patients, cohort: Cohort) -> Latents:
        """The cached latents float32 (n_volumes, c, 13, h, w) of a split."""
        path = self.runs / "latents" / f"{patients.name}-{patients.split}-{cohort.key}-{self.autoencoder.key}.zarr"
        latents = Latents(self.load_autoencoder(), patients, path)
        if patients.secret:
            path.chmod(0o700)
        return latents

    @property
    def _reference_key(self) -> str:
        return self.private.key if self.reference.role == "private" else self.public.key

    def _planned(self, stage: str, settings: object, upstream: list[str]) -> Run:
        """The run of a stage, done or not."""
        key = hashlib.sha256(json.dumps(self._described(stage, settings, upstream), sort_keys=True).encode())
        return Run(stage, key.hexdigest()[:12], self.runs / f"{stage}-{key.hexdigest()[:12]}")

    def _described(self, stage: str, settings: object, upstream: list[str]) -> dict[str, object]:
        """What a stage's key hashes. The seed means nothing to a run without upstream: one on real private patients."""
        described: dict[str, object] = {"stage": stage, "settings": _plain(settings), "upstream": upstream}
        return described | ({"seed": self.seed} if upstream else {})

    def _run(
        self,
        stage: str,
        settings: object,
        upstream: list[str],
        work: Callable[[Path], dict[str, Any]],
        together: bool = False,
    ) -> Run:
        """The finished run of a stage; does the work where there is none. Two processes never do the same work.

        together: torchrun's processes do the work side by side; the first one alone writes.
        """
        run = self._planned(stage, settings, upstream)
        done = run.folder / "metrics.json"
        if done.exists() and not together:
            return run
        if together and not is_first_process():
            if shared_decision():
                work(run.folder)
            return run
        run.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(run.folder / "lock"):
            missing = not done.exists()
            if together:
                missing = shared_decision(missing)
            if missing:
                print(f"{stage}: not done yet with these settings; running it in {run.folder.name}")
                (run.folder / "settings.yaml").write_text(
                    yaml.safe_dump(self._described(stage, settings, upstream), sort_keys=False)
                )
                metrics = work(run.folder)
                temporary = done.with_suffix(".tmp")
                temporary.write_text(json.dumps(metrics, indent=1))
                temporary.replace(done)
                for state in run.folder.glob("*.pt"):
                    state.unlink()
        return run


def _leave_public_ledger(cohort: Cohort, folder: Path) -> None:
    """Bind what the weights in a folder are: trained on a public cohort alone."""
    public_ledger(cohort.manifest.name).bound(*folder.glob("*.safetensors")).save(folder / "privacy.json")


def _plain(settings: object) -> object:
    """Settings as JSON knows them; an infinite epsilon becomes a word."""
    if isinstance(settings, BaseModel):
        return settings.model_dump(mode="json")
    if isinstance(settings, list):
        return [_plain(part) for part in settings]
    return str(settings) if isinstance(settings, float) and math.isinf(settings) else settings
