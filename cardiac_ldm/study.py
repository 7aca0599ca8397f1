"""The study: its profiles, its notebooks' parameters, and which stage needs which.

A stage's folder is `runs/<stage>-<key>`; the key hashes its settings and the keys of the stages before it, so the same
settings are never trained twice and changed ones never reuse a result. `metrics.json` is written last and says that a
stage is complete.
"""

import builtins
import difflib
import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cardiac_ldm import shipped
from cardiac_ldm.cohort import Cohort, Patients, load_manifest, prepare
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.evaluation.metrics import Measured, compare, measure, measure_real
from cardiac_ldm.evaluation.synthesis import SyntheticCohort, synthesise
from cardiac_ldm.models.anatomy import HeartFinder, PhaseClassifier, Segmenter
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import Ledger, Mechanism, Randomness, public_ledger
from cardiac_ldm.training.anatomy import train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import AutoencoderSettings, reconstruct, train_autoencoder
from cardiac_ldm.training.checkpoint import load_weights, save_weights
from cardiac_ldm.training.finetune import FinetuneSettings, finetune, finetune_decoder
from cardiac_ldm.training.pretrain import DenoiserSettings, Latents, PretrainSettings, held_out_loss, pretrain
from cardiac_ldm.training.private import is_first_process, shared_decision

ROOT = Path(__file__).resolve().parents[1]
PROFILES = Path(__file__).parent / "profiles"
Role = Literal["public", "private"]


class Settings(BaseModel):
    """Base of all settings: frozen, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingSettings(Settings):
    """Length of a supervised training."""

    steps: int
    batch: int
    learning_rate: float


class AnatomySettings(Settings):
    """Training of the two instruments that read synthetic hearts."""

    segmenter: TrainingSettings
    phase: TrainingSettings


class PatientLimits(Settings):
    """At most how many patients of each split are used."""

    train: int
    validation: int
    test: int


class SamplingSettings(Settings):
    """DDIM steps and guidance strength of the synthetic cohorts."""

    steps: int
    guidance: float


class EvaluationSettings(Settings):
    """Bootstrap resamples of the intervals, and pairs of half samples of the two distances."""

    resamples: int
    half_sample_pairs: int


class Profile(Settings):
    """The size of the study: one YAML file in `cardiac_ldm/profiles`, or wherever the `profile` parameter points."""

    patients: dict[Role, PatientLimits]
    autoencoder: AutoencoderSettings
    anatomy: AnatomySettings
    denoiser: DenoiserSettings
    pretrain: PretrainSettings
    finetune: FinetuneSettings
    sampling: SamplingSettings
    evaluation: EvaluationSettings

    @classmethod
    def load(cls, name: str) -> Self:
        """Read a profile by its name or its file's path.

        Raises:
            ParameterError: there is no such profile, or a setting in it is wrong.
        """
        path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
            raise ParameterError(f"profile: there is no {name!r}; choose {known}, or give the path of a YAML file")
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except (ValidationError, yaml.YAMLError) as error:
            raise ParameterError(f"{path}: {_sentence(error)}") from error


def _sentence(error: ValidationError | yaml.YAMLError) -> str:
    """All that is wrong, each with its field and value, on one line."""
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    said = {"missing": "is missing", "extra_forbidden": "is no setting of this study; look for a typo"}
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: "
        + said.get(e["type"], f"{e['input']!r}: {e['msg'].removeprefix('Value error, ')}")
        for e in error.errors()
    )


class Parameters(BaseModel):
    """What every notebook takes.

    profile: a name in `cardiac_ldm/profiles`, or the path of a YAML file. cohort_public, cohort_private: manifests in
    `data_manifests`, or their paths. data_root_public, data_root_private: where the cohorts' files are (else the
    environment or the manifest says). seed: of everything but the randomness that protects real patients.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    profile: str = "quick"
    cohort_public: str = "phantom_public"
    cohort_private: str = "phantom_private"
    data_root_public: str = ""
    data_root_private: str = ""
    seed: int = 0

    @classmethod
    def start(cls, namespace: Mapping[str, object]) -> tuple[Self, "Study"]:
        """Validate what the parameters cell, and papermill after it, put into the notebook's `globals()`.

        Raises:
            ParameterError: a name is unknown or a value is wrong; the message names it and says what is expected.
        """
        given = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_")
            and name not in ("In", "Out")
            and (value is None or isinstance(value, str | int | float | list | dict))
            and not hasattr(builtins, name)
        }
        if unknown := [name for name in given if name not in cls.model_fields]:
            close = difflib.get_close_matches(unknown[0], cls.model_fields, 1)
            hint = f"did you mean {close[0]}?" if close else ""
            raise ParameterError(
                f"{unknown[0]}: no such parameter{'; ' + hint if hint else ''}; "
                f"this notebook takes {', '.join(cls.model_fields)}"
            )
        try:
            parameters = cls.model_validate(given)
        except ValidationError as error:
            raise ParameterError(_sentence(error)) from error
        return parameters, Study(parameters)


class CohortParameters(Parameters):
    """Of the notebook about cohorts. cohort_beside: a third cohort to hold beside them, which the study doesn't use."""

    cohort_beside: str = ""
    data_root_beside: str = ""


class ModelParameters(Parameters):
    """Of a notebook about one model. epsilon: the budget; 0 is the public model alone, inf trains without privacy."""

    epsilon: float = 10
    lowest: ClassVar[float] = 0

    @field_validator("epsilon", mode="before")
    @classmethod
    def _in_range(cls, value: object) -> float:
        bound = "above 0" if cls.lowest else "at least 0 (0 is the public model alone)"
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < cls.lowest:
            raise ValueError(f"must be a number {bound}, such as 1 or 10; inf means no privacy")
        return float(value)


class FinetuneParameters(ModelParameters):
    """Of the fine-tuning notebook: epsilon is above 0."""

    lowest: ClassVar[float] = float(np.nextafter(0, 1))


class CompareParameters(Parameters):
    """Of a notebook that compares models. epsilons: budgets, separated by commas."""

    epsilons: str = "0, 1, 10, inf"

    @field_validator("epsilons", mode="before")
    @classmethod
    def _all_in_range(cls, value: object) -> object:
        for part in str(value).split(","):
            try:
                ModelParameters(epsilon=float(part))
            except ValueError as error:
                raise ValueError(f"{part.strip()!r} must be a number of at least 0; separate them by commas") from error
        return str(value)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets as numbers, in rising order."""
        return tuple(sorted(float(part) for part in self.epsilons.split(",")))


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

    def _cohort(self, role: Role, localiser: HeartFinder | None = None) -> Cohort:
        name, data_root = (getattr(self.parameters, f"{field}_{role}") for field in ("cohort", "data_root"))
        manifest = load_manifest(name)
        if role == "public" and manifest.role != "public":
            raise PrivacyError(f"cohort_public: {manifest.name} is private; pre-training would reveal its patients")
        root = Path(data_root) if data_root else None
        limits = self.profile.patients[role].model_dump()
        store, on_demand = self.runs / "cohorts", role == "private"
        return prepare(manifest, store=store, data_root=root, limits=limits, localiser=localiser, on_demand=on_demand)

    def beside(self, parameters: "CohortParameters") -> list[Cohort]:
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
    def autoencoder(self) -> Run:
        """Stage: the autoencoder, trained on public patients."""
        settings = self.profile.autoencoder

        def work(folder: Path) -> dict[str, Any]:
            model, losses = train_autoencoder(self.public.split("train"), settings, self.seed, folder / "state.pt")
            save_weights(model, folder / "weights.safetensors")
            public_ledger(self.public.manifest.name).save(folder / "privacy.json")
            return {"losses": losses}

        return self._shipped("autoencoder") or self._run("autoencoder", settings, [self.public.key], work)

    @property
    def _anatomy(self) -> tuple[str, AnatomySettings, list[str]]:
        return "anatomy", self.profile.anatomy, [self._public_as_given.key]

    @cached_property
    def anatomy(self) -> Run:
        """Stage: the segmenter and the phase classifier, trained on public labels."""
        settings = self.profile.anatomy

        def work(folder: Path) -> dict[str, Any]:
            patients = self._public_as_given.split("train")
            segmenter, dice = train_segmenter(patients, **settings.segmenter.model_dump(), seed=self.seed)
            phase, entropy = train_phase_classifier(patients, **settings.phase.model_dump(), seed=self.seed)
            save_weights(segmenter, folder / "segmenter.safetensors")
            save_weights(phase, folder / "phase.safetensors")
            public_ledger(self._public_as_given.manifest.name).save(folder / "privacy.json")
            return {"segmenter": dice, "phase": entropy}

        return self._shipped("anatomy") or self._run(*self._anatomy, work)

    @cached_property
    def pretrained(self) -> Run:
        """Stage: the denoiser, pre-trained on public patients; the model of epsilon 0."""
        settings = self.profile.pretrain

        def work(folder: Path) -> dict[str, Any]:
            patients = self.public.split("train")
            latents = self.latents(patients, self.public)[:]
            model, losses = pretrain(patients, latents, self.profile.denoiser, settings, self.seed, folder / "state.pt")
            save_weights(model, folder / "weights.safetensors")
            public_ledger(self.public.manifest.name).save(folder / "privacy.json")
            return {"losses": losses}

        return self._shipped("pretrain") or self._run(
            "pretrain", [settings, self.profile.denoiser], [self.autoencoder.key], work
        )

    def described(self, stage: str) -> dict[str, object]:
        """What the weights of a public stage depend on, as shipped ones say it."""
        profile, manifest = self.profile, load_manifest(self.parameters.cohort_public)
        settings: dict[str, list[Settings | BaseModel]] = {
            "anatomy": [profile.anatomy],
            "autoencoder": [profile.autoencoder],
            "pretrain": [profile.autoencoder, profile.denoiser, profile.pretrain],
        }
        cohort = {
            "name": manifest.name,
            "reader": _plain(manifest.reader),
            "patients": _plain(profile.patients["public"]),
        }
        return {"settings": _plain(settings[stage]), "cohort": cohort, "seed": self.seed}

    def _shipped(self, stage: str) -> Run | None:
        """The run of a public stage that came with the library, if it's the one that is asked for."""
        found = shipped.find(stage, self.described(stage))
        return found and Run(stage, *found)

    def finetuned(self, epsilon: float) -> Run:
        """Stage: the denoiser fine-tuned on private patients with a budget of `epsilon`; 0 is the pre-trained one.

        Raises:
            PrivacyError: an infinite budget on real private patients.
        """
        if epsilon == 0:
            return self.pretrained
        patients, settings = self.private.split("train"), self.profile.finetune
        if patients.secret and math.isinf(epsilon):
            raise PrivacyError(f"epsilon: inf on {patients.name} would reveal real private patients; give a finite one")
        if patients.secret and settings.unit != "patient":
            raise PrivacyError(f"unit: {patients.name} holds real patients, who are protected whole; set it to patient")

        def work(folder: Path) -> dict[str, Any]:
            randomness = Randomness(None if patients.secret else self.seed, simulated=patients.simulated)
            before: tuple[Mechanism, ...] = ()
            budget = (settings.delta, settings.unit, len(patients))
            model, public_data = self.denoiser(self.pretrained), load_manifest(self.parameters.cohort_public).name
            if first := settings.decoder:
                plan, autoencoder = first.plan(first.share * epsilon, *budget), self.load_autoencoder()
                where = folder / "decoder"
                before = finetune_decoder(autoencoder, patients, plan, first, randomness, where, public_data).mechanisms
            latents, plan = self.latents(patients, self.private), settings.plan(epsilon, *budget, before)
            if patients.secret:
                _ = latents[:]  # else what had been encoded would tell who was in the lots
            schedule = self.profile.denoiser.schedule
            finetune(model, patients, latents, plan, settings, schedule, randomness, folder, public_data)
            return {"epsilon": _plain(epsilon)}

        upstream = [self.pretrained.key, self.private.key]
        return self._run("finetune", [settings, epsilon], upstream, work, together=True)

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

    def private_ledgers(self) -> list[Ledger]:
        """Ledgers of all private models in `runs` that learnt from this study's private patients, finished or not.

        A run that died in its decoder's stage has that stage's ledger; models with no guarantee, of another number of
        patients or another delta (other profiles) are left out: `Ledger.compose` makes no joint claim with them.
        """
        places = [(run / "privacy.json", run / "decoder" / "privacy.json") for run in self.runs.glob("finetune-*")]
        found = [Ledger.load(next(filter(Path.exists, place))) for place in places if any(map(Path.exists, place))]
        patients, delta = self.private.split("train"), self.profile.finetune.delta
        own = ("patient-level DP", f"{patients.name} ({patients.split})", len(patients), delta)
        mine = [x for x in found if (x.guarantee, x.private_data, x.n_units, x.delta) == own]
        return sorted(mine, key=lambda ledger: ledger.epsilon)

    def synthesised(self, epsilon: float) -> Run:
        """Stage: one synthetic volume for each volume of the reference patients, by the model of a budget."""
        model, settings = self.finetuned(epsilon), self.profile.sampling

        def work(folder: Path) -> dict[str, Any]:
            model.ledger.save(folder / "privacy.json")
            cohort = synthesise(
                self.load_autoencoder(model),
                self.denoiser(model),
                self.profile.denoiser.schedule,
                self.reference.attributes,
                self.reference.owners,
                steps=settings.steps,
                guidance=settings.guidance,
                seed=self.seed,
            )
            cohort.save(folder / "synthetic.npz")
            return {"epsilon": _plain(epsilon), "n_volumes": len(cohort.images)}

        return self._run("synthesise", settings, [model.key, self._reference_key], work)

    def evaluated(self, epsilon: float) -> Run:
        """Stage: everything that is measured on the synthetic cohort of a budget."""
        synthetic = self.synthesised(epsilon)

        def work(folder: Path) -> dict[str, Any]:
            cohort = SyntheticCohort.load(synthetic.folder / "synthetic.npz")
            return {"epsilon": _plain(epsilon), "model": synthetic.folder.name} | self._evaluate(cohort, folder)

        return self._run("evaluate", self.profile.evaluation, [synthetic.key, self.anatomy.key], work)

    @cached_property
    def ceiling(self) -> Run:
        """Stage: the reference patients' own reconstructions, evaluated: the best that these latents allow."""

        def work(folder: Path) -> dict[str, Any]:
            volumes = self.reference.images(np.arange(len(self.reference.owners)))
            images = reconstruct(self.load_autoencoder(), volumes, self.seed)
            cohort = SyntheticCohort(images, self.reference.attributes, self.reference.owners)
            cohort.save(folder / "synthetic.npz")
            return {"model": folder.name} | self._evaluate(cohort, folder)

        upstream = [self._reference_key, self.anatomy.key, self.autoencoder.key]
        return self._run("ceiling", self.profile.evaluation, upstream, work)

    @cached_property
    def real_measured(self) -> Measured:
        """What the instruments read from the reference patients, once for all models."""

        def work(folder: Path) -> dict[str, Any]:
            measured = measure_real(self.reference, *self.instruments, seed=self.seed)
            (folder / "measured.pkl").write_bytes(pickle.dumps(measured))
            return {"n_patients": len(self.reference)}

        run = self._run("reference", "", [self._reference_key, self.anatomy.key], work)
        return pickle.loads((run.folder / "measured.pkl").read_bytes())

    def _evaluate(self, cohort: SyntheticCohort, folder: Path) -> dict[str, Any]:
        measured = measure(
            cohort.images, cohort.attributes, cohort.owners, *self.instruments, name=folder.name, seed=self.seed
        )
        measured.anatomy.to_csv(folder / "anatomy.csv", index=False)
        return compare(measured, self.real_measured, **self.profile.evaluation.model_dump(), seed=self.seed).model_dump(
            mode="json"
        )

    def load_autoencoder(self, run: Run | None = None) -> Autoencoder:
        """The public autoencoder; for the model of a `run`, with the decoder that was tuned for it, if any."""
        tuned = run and run.folder / "decoder" / "weights.safetensors"
        model = self.profile.autoencoder.build()
        load_weights(model, tuned if tuned and tuned.exists() else self.autoencoder.folder / "weights.safetensors")
        return model.eval()

    def denoiser(self, run: Run) -> Denoiser:
        """The denoiser of a run, which must have its ledger."""
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
        return Latents(self.load_autoencoder(), patients, path)

    @property
    def _reference_key(self) -> str:
        return self.private.key if self.reference.role == "private" else self.public.key

    def _planned(self, stage: str, settings: object, upstream: list[str]) -> Run:
        """The run of a stage, done or not."""
        key = hashlib.sha256(json.dumps(self._described(stage, settings, upstream), sort_keys=True).encode())
        return Run(stage, key.hexdigest()[:12], self.runs / f"{stage}-{key.hexdigest()[:12]}")

    def _described(self, stage: str, settings: object, upstream: list[str]) -> dict[str, object]:
        return {"stage": stage, "settings": _plain(settings), "upstream": upstream, "seed": self.seed}

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


def _plain(settings: object) -> object:
    """Settings as JSON knows them; an infinite epsilon becomes a word."""
    if isinstance(settings, BaseModel):
        return settings.model_dump(mode="json")
    if isinstance(settings, list):
        return [_plain(part) for part in settings]
    return str(settings) if isinstance(settings, float) and math.isinf(settings) else settings
