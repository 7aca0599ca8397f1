"""A profile is the size of the study: every setting of every stage, in one YAML file."""

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.training.autoencoder import AutoencoderSettings
from cardiac_ldm.training.finetune import FinetuneSettings
from cardiac_ldm.training.pretrain import DenoiserSettings, PretrainSettings

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
    """Bootstrap resamples of the intervals, pairs of half samples of the distances, and what gives FID its name.

    inception: the path of an Inception-v3 in TorchScript (see `InceptionEncoder`); null leaves FID out.
    """

    resamples: int
    half_sample_pairs: int
    inception: Path | None


class UtilitySettings(Settings):
    """Patients in an arm of the comparison of training data, those of the `few`, and the trainings, alike for all."""

    patients: int
    few: int
    segmenter: TrainingSettings
    phase: TrainingSettings


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
            raise ParameterError(f"{path}: {sentence(error)}") from error


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
