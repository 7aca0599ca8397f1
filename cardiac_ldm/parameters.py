"""What the notebooks take, as papermill hands it over; a wrong name or value is said in one sentence."""

import builtins
import difflib
import math
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.profile import sentence


class Parameters(BaseModel):
    """What every notebook takes.

    profile: a name in `cardiac_ldm/profiles`, or the path of a YAML file. cohort_public, cohort_private: manifests in
    `data_manifests`, or their paths. data_root_public, data_root_private: where the cohorts' files are (else the
    environment or the manifest says). seed: of everything but the randomness that protects real patients.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    profile: str = "demo"
    cohort_public: str = "phantom_public"
    cohort_private: str = "phantom_private"
    data_root_public: str = ""
    data_root_private: str = ""
    seed: int = 0

    @classmethod
    def read(cls, namespace: Mapping[str, object]) -> Self:
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
            return cls.model_validate(given)
        except ValidationError as error:
            raise ParameterError(sentence(error)) from error


class CohortParameters(Parameters):
    """Of the notebook about cohorts. cohort_beside: a third cohort to hold beside them, which the study doesn't use."""

    cohort_beside: str = ""
    data_root_beside: str = ""


class ModelParameters(Parameters):
    """Of a notebook about one model. epsilon: the budget; 0 is the public model alone, inf trains without privacy.

    spend: agrees to what training on real private patients would spend, which is said first.
    """

    epsilon: float = 10
    spend: bool = False
    lowest: ClassVar[float] = 0

    @field_validator("epsilon", mode="before")
    @classmethod
    def _in_range(cls, value: object) -> float:
        bound = "above 0" if cls.lowest else "at least 0 (0 is the public model alone)"
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < cls.lowest:
            raise ValueError(f"must be a number {bound}, such as 1 or 10; inf means no privacy")
        return float(value)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budget."""
        return (self.epsilon,)


class FinetuneParameters(ModelParameters):
    """Of the fine-tuning notebook: epsilon is above 0."""

    lowest: ClassVar[float] = float(np.nextafter(0, 1))


class CompareParameters(Parameters):
    """Of a notebook that compares models. epsilons: budgets, separated by commas. spend: as of one model."""

    epsilons: str = "0, 1, 10, inf"
    spend: bool = False

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


class EvaluateParameters(CompareParameters):
    """Of the notebook that evaluates. folder: a synthetic cohort that anyone made, measured beside the models."""

    folder: str = ""
