"""The base of all settings, and the ranges that their values share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16"]


class Settings(BaseModel):
    """Frozen, and a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PublicTraining(Settings):
    """A training on public patients; precision: of the forward pass, weights and gradients are float32 either way.

    Single precision is left out of what is written: runs and shipped weights from before it could be chosen are its.
    """

    precision: Precision = Field("fp32", exclude_if=lambda precision: precision == "fp32")


class TrainingSettings(Settings):
    """Length of a supervised training."""

    steps: Count
    batch: Count
    learning_rate: Positive
