"""Manifests: one YAML file per cohort says what it is, how it's read, who may see it and who belongs to which split."""

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from cardiac_ldm.errors import CohortError

MANIFEST_FOLDER = Path(__file__).resolve().parents[2] / "data_manifests"
SPLITS = ("train", "validation", "test")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhantomReader(_Strict):
    """Simulated patients: which population they're drawn from, and the seed that fixes every one of them."""

    kind: Literal["phantom"]
    population: Literal["clinics", "biobank"]
    seed: int = Field(ge=0)


class AcdcReader(_Strict):
    """The ACDC challenge's own folder layout."""

    kind: Literal["acdc"]


class Splits(_Strict):
    """Who belongs where: patients' names, or for simulated cohorts how many are drawn."""

    train: PositiveInt | Annotated[tuple[str, ...], Field(min_length=1)]
    validation: PositiveInt | Annotated[tuple[str, ...], Field(min_length=1)]
    test: PositiveInt | Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_patient_once(self) -> Self:
        named = {name: value for name in SPLITS if not isinstance(value := getattr(self, name), int)}
        times = Counter(patient for patients in named.values() for patient in patients)
        repeated = [
            f"{patient} is listed {n} times ({', '.join(s for s in named if patient in named[s])})"
            for patient, n in times.items()
            if n > 1
        ]
        if repeated:
            raise ValueError("; ".join(repeated) + ": a patient belongs to exactly one split, once")
        return self


class Manifest(_Strict):
    """A cohort: its name, whether it's public or private, simulated or real, its terms of use, reader and splits."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    role: Literal["public", "private"]
    simulated: bool
    licence: str
    citation: str
    root: Path | None = None
    reader: Annotated[PhantomReader | AcdcReader, Field(discriminator="kind")]
    splits: Splits

    @model_validator(mode="after")
    def _reader_fits(self) -> Self:
        phantom = isinstance(self.reader, PhantomReader)
        if self.simulated != phantom:
            raise ValueError(
                f"simulated is {self.simulated} but the reader is {self.reader.kind}: phantoms alone are simulated"
            )
        if any(isinstance(getattr(self.splits, name), int) != phantom for name in SPLITS):
            raise ValueError("splits of a phantom are numbers of patients, splits of files are lists of their names")
        return self

    @property
    def secret(self) -> bool:
        """Whether it holds real private patients."""
        return self.role == "private" and not self.simulated

    def patient_ids(self, split: str) -> tuple[str, ...]:
        """Names of a split's patients, in order. Simulated ones are p000000, p000001, ..., each in one split."""
        if split not in SPLITS:
            raise CohortError(f"{self.name}: there's no split {split!r}; the splits are {', '.join(SPLITS)}")
        members = getattr(self.splits, split)
        if not isinstance(members, int):
            return members
        first = sum(getattr(self.splits, name) for name in SPLITS[: SPLITS.index(split)])
        return tuple(f"p{index:06d}" for index in range(first, first + members))

    def data_root(self, given: Path | None = None) -> Path | None:
        """Folder of the cohort's files: the one given, else the environment's, else the manifest's; None for phantoms.

        Raises CohortError where none is named, or the one named isn't there.
        """
        if isinstance(self.reader, PhantomReader):
            return None
        variable = f"CARDIAC_LDM_ROOT_{self.name.upper()}"
        named = {"the parameter data_root": given, f"the environment variable {variable}": os.environ.get(variable)}
        named["the manifest's field root"] = self.root
        source, place = next(((s, Path(p)) for s, p in named.items() if p), (None, None))
        ways = f"say where its files are through {', '.join(list(named)[:2])} or {list(named)[2]} (in this order)"
        if place is None:
            raise CohortError(f"{self.name}: no data folder is named; {ways}")
        if not place.is_dir():
            raise CohortError(f"{self.name}: {place}, which {source} names, is no folder; {ways}")
        return place


def load_manifest(name_or_path: str | Path) -> Manifest:
    """Read a manifest: of data_manifests/ by its name ("phantom_public"), or any by the path of its YAML file.

    A relative `root` counts from the manifest's folder. Raises CohortError with every problem found, each with its
    field, value and remedy.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = MANIFEST_FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in MANIFEST_FOLDER.glob("*.yaml")))
        raise CohortError(f"{path}: there's no such manifest; give the path of one, or a name: {known}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CohortError(f"{path.name}: this isn't YAML: {error}") from error
    if not isinstance(content, dict):
        raise CohortError(f"{path.name}: expected fields (name: ..., role: ...), found {content!r}")
    if isinstance(content.get("root"), str):
        content["root"] = path.parent / Path(content["root"]).expanduser()
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_explained(problem)}" for problem in error.errors())
        raise CohortError(f"{path.name}: {error.error_count()} problem(s)\n{problems}") from error


def _explained(problem: Any) -> str:  # noqa: ANN401
    field = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            return f"{field}: is missing; add it"
        case "extra_forbidden":
            return f"{field}: no such field (its value is {problem['input']!r}); remove it, or correct its spelling"
        case "value_error":
            return f"{field}: {problem['ctx']['error']}".removeprefix(": ")
        case _:
            return f"{field}: {problem['input']!r} won't do; {problem['msg'][0].lower()}{problem['msg'][1:]}"
