"""A profile is the size of the study: every setting of every stage, in one YAML file."""

from pathlib import Path
from typing import Literal, Self

import torch
import yaml
from pydantic import Field, FilePath, ValidationError, model_validator

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID
from cardiac_ldm.cohort.manifest import UniqueKeys
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS
from cardiac_ldm.models.diffusion import TIMESTEPS
from cardiac_ldm.settings import Count, Settings, TrainingSettings, Weight
from cardiac_ldm.training.autoencoder import AutoencoderSettings
from cardiac_ldm.training.finetune import FinetuneSettings
from cardiac_ldm.training.pretrain import DenoiserSettings, PretrainSettings

PROFILES = Path(__file__).parent / "profiles"
Role = Literal["public", "private"]


class AnatomySettings(Settings):
    """Training of the two networks that read synthetic hearts."""

    segmenter: TrainingSettings
    phase: TrainingSettings


class PatientLimits(Settings):
    """At most how many patients of each split are used."""

    train: Count
    validation: Count
    test: Count


class SamplingSettings(Settings):
    """DDIM steps and guidance strength of the synthetic cohorts."""

    steps: int = Field(ge=1, le=TIMESTEPS)
    guidance: Weight


class EvaluationSettings(Settings):
    """Bootstrap resamples of the intervals, pairs of half samples of the distances, and what gives FID its name.

    inception: the path of an Inception-v3 in TorchScript (see `InceptionEncoder`); null leaves FID out.
    """

    resamples: Count
    half_sample_pairs: int = Field(ge=2)
    inception: FilePath | None


class UtilitySettings(Settings):
    """Patients in a training set that is compared, those of the `few`, and the trainings, alike for all."""

    patients: int = Field(ge=MIN_PATIENTS)
    few: int = Field(ge=MIN_PATIENTS)
    segmenter: TrainingSettings
    phase: TrainingSettings

    @model_validator(mode="after")
    def _few_of_them(self) -> Self:
        if self.few > self.patients:
            raise ValueError(
                f"few: {self.few} of a training set's {self.patients} patients; give fewer few, or more patients"
            )
        return self


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
    utility: UtilitySettings
    overfit: TrainingSettings

    @model_validator(mode="after")
    def _both_roles(self) -> Self:
        if len(self.patients) < 2:
            raise ValueError("patients: must say how many are public and how many private")
        return self

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
            return cls.model_validate(yaml.load(path.read_text(encoding="utf-8"), UniqueKeys))
        except (ValidationError, yaml.YAMLError) as error:
            raise ParameterError(f"{path}: {sentence(error)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ParameterError(f"{path}: can't be read ({error}); save it as UTF-8, for you to read") from error

    def check_networks(self) -> None:
        """Build the networks without memory, and try their shapes.

        Raises:
            ParameterError: their settings don't fit each other.
        """
        try:
            with torch.device("meta"):
                channels, size = self.autoencoder.latent_channels, GRID.size // self.autoencoder.build().reduction
                denoiser, one = self.denoiser.build(channels), torch.zeros(1, dtype=torch.int64)
                denoiser(torch.empty(1, channels, GRID.n_slices, size, size), one, torch.empty(1, len(ATTRIBUTE_NAMES)))
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ParameterError(f"profile: autoencoder or denoiser can't be built: {said}") from error


def sentence(error: ValidationError | yaml.YAMLError) -> str:
    """All that is wrong, each with its field and value, on one line."""
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    said = {"missing": "is missing", "extra_forbidden": "is no setting of this study; look for a typo"}
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: "
        + said.get(e["type"], f"{e['input']!r}: {e['msg'].removeprefix('Value error, ')}")
        for e in error.errors()
    )
