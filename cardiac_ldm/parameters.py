"""What the notebooks take, as papermill hands it over; a wrong name or value is said in one sentence."""

import builtins
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, ValidationError, ValidationInfo, field_validator

from cardiac_ldm.cohort import Manifest, load_manifest
from cardiac_ldm.cohort.prepare import enrolled
from cardiac_ldm.cohort.readers import list_patients
from cardiac_ldm.errors import CohortError, ParameterError, PrivacyError
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS
from cardiac_ldm.privacy.accounting import LEAST
from cardiac_ldm.privacy.table import SHARE
from cardiac_ldm.profile import Profile, Role, sentence
from cardiac_ldm.settings import Settings

MOST_RELEASED = 99999
"""Synthetic patients in one release: their names have five digits."""


def _whole(low: int, high: int, why: str = "") -> BeforeValidator:
    """A whole number in a range, which papermill may hand over as text."""

    def whole(value: object) -> int:
        number = _number(value)
        if number is None or not low <= number <= high or number != int(number):
            raise ValueError(f"must be a whole number from {low}{why} to {high}")
        return int(number)

    return BeforeValidator(whole)


class Parameters(Settings, strict=True):
    """What every notebook takes.

    profile: a name in `cardiac_ldm/profiles`, or the path of a YAML file. cohort_public, cohort_private: manifests in
    `data_manifests`, or their paths. data_root_public, data_root_private: where the cohorts' files are (else the
    environment or the manifest says). seed: of everything but the randomness that protects real patients.
    """

    profile: str = "demo"
    cohort_public: str = "phantom_public"
    cohort_private: str = "phantom_private"
    data_root_public: str = ""
    data_root_private: str = ""
    seed: Annotated[int, _whole(0, 2**32 - 1)] = 0
    fewest_tested: ClassVar[int] = MIN_PATIENTS

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: object, of: ValidationInfo) -> object:
        if cls.model_fields[str(of.field_name)].annotation is str and not isinstance(value, str):
            raise ValueError("must be text; papermill's option -r keeps what looks like a number as it is")
        return value

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets that are asked for, in rising order: none here."""
        return ()

    @classmethod
    def read(cls, namespace: Mapping[str, object]) -> Self:
        """Validate what the parameters cell, and papermill after it, put into the notebook's `globals()`.

        What would stop a stage later on is found here, before any is run: see `check`. A cell that is run again meets
        the variables of later ones, so a notebook that has its `study` isn't searched for unknown names.

        Raises:
            StudyError: a name is unknown or a value is wrong; the message names it and says what is expected.
        """
        plain = str | int | float | list | dict | None
        again = not isinstance(namespace.get("study"), plain)
        given = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_")
            and name not in ("In", "Out")
            and isinstance(value, plain)
            and not hasattr(builtins, name)
            and (name in cls.model_fields or not again)
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
            raise ParameterError(sentence(error)) from error
        parameters.check()
        return parameters

    def check(self) -> None:
        """Find what would stop a stage, as far as that's cheap: nothing of a patient is read.

        Raises:
            ParameterError: the profile isn't sound, or no private training of its can spend a budget.
            CohortError: a manifest isn't sound, or patients aren't where it says.
            PrivacyError: the private cohort's patients would be exposed.
        """
        profile, patients = Profile.load(self.profile), dict[str, dict[str, tuple[str, ...]]]()
        profile.check_networks()
        roles: tuple[Role, Role] = ("public", "private")
        for role in roles:
            limits = profile.patients[role].model_dump()
            patients[role] = _present(self.manifest(role), getattr(self, f"data_root_{role}"), limits)
        private = self.manifest("private")
        places = private.places or len(patients["private"]["train"])
        for epsilon in filter(None, self.budgets):
            profile.finetune.check(epsilon, private.name, places, private.secret)
        reference = "private" if private.simulated else "public"
        if (tested := len(patients[reference]["test"])) < self.fewest_tested:
            raise ParameterError(
                f"patients.{reference}.test: {tested}; at least {self.fewest_tested} are needed for an interval"
            )

    def manifest(self, role: Role) -> Manifest:
        """The manifest of the public or the private cohort.

        Raises:
            PrivacyError: the public one is private.
            CohortError: it isn't sound.
        """
        manifest = load_manifest(getattr(self, f"cohort_{role}"))
        if role == "public" and manifest.role != "public":
            raise PrivacyError(f"cohort_public: {manifest.name} is private; pre-training would reveal its patients")
        return manifest


def _number(value: object) -> float | None:
    """A number, which papermill may hand over as text; None where it's none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _yes_or_no(value: object) -> object:
    """A truth value, which papermill may hand over as text."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


YesOrNo = Annotated[bool, BeforeValidator(_yes_or_no)]


def _path(given: str) -> Path | None:
    return Path(given) if given else None


def _present(manifest: Manifest, root: str, limits: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """A cohort's patients by split, all of whom must be where its files are."""
    place = manifest.data_root(_path(root))
    members, found = enrolled(manifest, place, limits), list_patients(manifest, place)
    wanted = [patient for split in members.values() for patient in split] if place else []
    if missing := [patient for patient in wanted if patient not in set(found)]:
        named = "" if manifest.secret else f" ({', '.join(missing[:3])}{', ...' if missing[3:] else ''})"
        raise CohortError(
            f"{manifest.name}: {len(missing)} of {len(wanted)} patients{named} aren't in {place}; is this the data "
            f"root? `python -m cardiac_ldm.cohort check` with this manifest says all that is wrong with it"
        )
    return members


class CohortParameters(Parameters):
    """Of the notebook about cohorts. cohort_beside: a third cohort to hold beside them, which the study doesn't use."""

    cohort_beside: str = ""
    data_root_beside: str = ""
    fewest_tested: ClassVar[int] = 1

    def check(self) -> None:
        """The same, and that the third cohort is there."""
        super().check()
        if self.cohort_beside:
            _present(load_manifest(self.cohort_beside), self.data_root_beside, {})


class ModelParameters(Parameters):
    """Of a notebook about one model. epsilon: the budget; 0 is the public model alone, inf trains without privacy.

    spend: agrees to what training on real private patients would spend, which is said first.
    """

    epsilon: float = 10
    spend: YesOrNo = False
    lowest: ClassVar[float] = 0
    fewest_tested: ClassVar[int] = 1

    @field_validator("epsilon", mode="before")
    @classmethod
    def _in_range(cls, value: object) -> float:
        number = _number(value)
        if number is None or number < cls.lowest:
            bound = "above 0" if cls.lowest else "at least 0 (0 is the public model alone)"
            raise ValueError(f"must be a number {bound}, such as 1 or 10; inf means no privacy")
        return number

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budget that is asked for."""
        return (self.epsilon,)


class FinetuneParameters(ModelParameters):
    """Of the fine-tuning notebook: epsilon is above 0."""

    lowest: ClassVar[float] = math.nextafter(0, 1)


class ReleaseParameters(ModelParameters):
    """Of the notebook that releases. patients: how many synthetic ones.

    attributes: what is requested of them: `public`, those of public train patients; `private`, those of a table that
    learns from private patients, for which table_share of epsilon is spent: 1 draws their population by the public
    model; or the path of a CSV with a row of attributes a patient, taken in turn. licence: under which the holder gives
    the release away. share_model: whether weights and ledgers go with it.
    """

    patients: Annotated[int, _whole(MIN_PATIENTS, MOST_RELEASED, ", which measures need,")] = 100
    attributes: str = "public"
    table_share: float = SHARE
    licence: str = "no licence: the holder has not chosen one yet"
    share_model: YesOrNo = False

    @field_validator("table_share", mode="before")
    @classmethod
    def _part(cls, value: object) -> float:
        number = _number(value)
        if number is None or not 0 < number <= 1:
            raise ValueError("must be above 0 and at most 1, the table of attributes alone")
        return number

    @property
    def table_epsilon(self) -> float:
        """The budget of the private table of attributes; 0 where none is asked for."""
        return self.table_share * self.epsilon if self.attributes == "private" else 0.0

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budget that is asked for; none of a model where the table spends all."""
        return () if 0 < self.epsilon <= self.table_epsilon else (self.epsilon,)

    def check(self) -> None:
        """The same, and that what would be released protects patients and has requests."""
        if math.isinf(self.epsilon):
            raise PrivacyError("epsilon: inf has no guarantee, so nothing of it is released; name a budget, or 0")
        if self.attributes == "private" and not self.table_epsilon >= LEAST:
            raise ParameterError(
                f"table_share: {self.table_share:g} of epsilon {self.epsilon:g} is too little for a table of private "
                f"attributes, which takes {LEAST}; give more, or request public attributes"
            )
        if self.attributes not in ("public", "private") and not Path(self.attributes).is_file():
            raise ParameterError(f"attributes: {self.attributes!r} is neither public nor private nor the path of a CSV")
        super().check()


class CompareParameters(Parameters):
    """Of a notebook that compares models. epsilons: their budgets, as a list or as text with commas between them.

    spend: as of one model.
    """

    epsilons: tuple[float, ...] = (0, 1, 10, math.inf)
    spend: YesOrNo = False

    @field_validator("epsilons", mode="before")
    @classmethod
    def _in_range(cls, value: object) -> tuple[float, ...]:
        given = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        numbers = {part.strip() if isinstance(part, str) else str(part): _number(part) for part in given}
        for part, number in numbers.items():
            if number is None or number < 0:
                raise ValueError(f"{part!r} must be a number of at least 0; separate them by commas")
        if not numbers:
            raise ValueError("must hold at least one budget, such as 1")
        return tuple(sorted({number for number in numbers.values() if number is not None}))

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets that are asked for, in rising order."""
        return self.epsilons


class EvaluateParameters(CompareParameters):
    """Of the notebook that evaluates. folder: a synthetic cohort that anyone made, measured beside the models."""

    folder: str = ""

    def check(self) -> None:
        """The same, and that the folder is there, and isn't the private patients'."""
        super().check()
        if self.folder and not Path(self.folder, "attributes.csv").is_file():
            raise CohortError(f"folder: {self.folder} has no attributes.csv; name a folder of volumes that has one")
        private = self.manifest("private")
        if self.folder and private.secret and (root := private.data_root(_path(self.data_root_private))):
            here, theirs = Path(self.folder).resolve(), root.resolve()
            if here.is_relative_to(theirs) or theirs.is_relative_to(here):
                raise PrivacyError(f"folder: {self.folder} shares files with {private.name}, whom it would show")
