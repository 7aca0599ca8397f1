"""Manifests: one YAML file per cohort says what it is, how it's read, who may see it and who belongs to which split."""

import hashlib
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from cardiac_ldm.errors import CohortError, PrivacyError
from cardiac_ldm.settings import Settings

MANIFEST_FOLDER = Path(__file__).resolve().parents[2] / "data_manifests"
SPLITS = ("train", "validation", "test")
_ROOT = "CARDIAC_LDM_ROOT_{}"


class PhantomReader(Settings):
    """Simulated patients: their population, and the seed that fixes every one of them."""

    kind: Literal["phantom"]
    population: Literal["clinics", "biobank"]
    seed: int = Field(ge=0)


class AcdcReader(Settings):
    """The ACDC challenge's own folder layout, as it's downloaded (training/patient001) or without its outer folder."""

    kind: Literal["acdc"]


class MnmsReader(Settings):
    """The M&Ms challenge's own folder layout; table is its CSV, below the data root."""

    kind: Literal["mnms"]
    table: str = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"


class Mnms2Reader(Settings):
    """The M&Ms-2 challenge's own folder layout; table is its CSV, below the data root."""

    kind: Literal["mnms2"]
    table: str = "dataset_information.csv"


class UkbbReader(Settings):
    """UK Biobank in the layout of the converter ukbb_cardiac; table is a CSV of the fields, below the data root."""

    kind: Literal["ukbb"]
    table: str | None = None


class TableReader(Settings):
    """Any folder of NIfTI files; table is the CSV that lists them, labels maps the files' label values to ours."""

    kind: Literal["table"]
    table: str
    labels: dict[int, Annotated[int, Field(ge=0, le=3)]] | None = None


Reader = PhantomReader | AcdcReader | MnmsReader | Mnms2Reader | UkbbReader | TableReader


def _members(value: Any) -> int | float | tuple[str, ...]:  # noqa: ANN401
    match value:
        case bool():
            pass
        case int() if value > 0:
            return value
        case float() if 0 < value < 1:
            return value
        case list() | tuple() if value and all(isinstance(name, str) and name for name in value):
            return tuple(value)
    raise ValueError(
        f"{_SHORT.repr(value)} won't do; give a list of patients' names (quote those that look like numbers), a share "
        "between 0 and 1, or for a phantom how many are drawn"
    )


Members = Annotated[int | float | tuple[str, ...], BeforeValidator(_members)]


class Splits(Settings):
    """Who belongs where: patients' names, or shares that sum to 1, or for simulated cohorts how many are drawn."""

    train: Members
    validation: Members
    test: Members

    @property
    def shares(self) -> tuple[float, ...]:
        """The splits' shares; empty where members are named or counted."""
        return tuple(members for _, members in self if isinstance(members, float))

    @model_validator(mode="after")
    def _each_patient_once(self) -> Self:
        if len({type(members) for _, members in self}) > 1:
            raise ValueError("numbers, shares and lists of names are mixed; give all three splits in one way")
        if self.shares and not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise ValueError(f"the shares sum to {sum(self.shares):g}; expected 1")
        places: dict[str, list[str]] = {}
        for split, members in self:
            for number, patient in enumerate(members if isinstance(members, tuple) else (), 1):
                places.setdefault(patient, []).append(f"number {number} of {split}")
        if repeated := [" and ".join(listed) for listed in places.values() if len(listed) > 1]:
            raise ValueError("; ".join(repeated) + " are the same name: a patient belongs to exactly one split, once")
        return self


class Budget(Settings):
    """The most that any one real private patient may spend in all runs together; its owner decides it, in public.

    patients: how many places there are to learn from, public too: who joins or leaves fills one or leaves it empty, so
    that the number of files stays secret. Needed where splits are shares; lists of names have as many places as names.
    """

    epsilon: float = Field(gt=0, le=100)
    delta: float = Field(gt=0, lt=1)
    patients: int | None = Field(default=None, gt=0)


class Manifest(Settings):
    """A cohort: its name, whether it's public or private, simulated or real, its terms of use, reader and splits.

    obtain: how to get the data, and what of it is public. budget: needed of real private patients. checksums:
    a file in sha256sum's format, paths below the data root, against which everything that is read is compared.
    exclude: patients who are left out of every split, because they withdrew, say; their places stay, empty.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    role: Literal["public", "private"]
    simulated: bool
    licence: str
    citation: str
    obtain: str = ""
    root: Path | None = None
    checksums: Path | None = Field(default=None, exclude=True)
    reader: Annotated[Reader, Field(discriminator="kind")]
    splits: Splits
    budget: Budget | None = None
    exclude: tuple[str, ...] = ()
    _folder: Path = PrivateAttr(default=MANIFEST_FOLDER)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        phantom = isinstance(self.reader, PhantomReader)
        if self.simulated != phantom:
            kind = self.reader.kind
            raise ValueError(f"simulated is {self.simulated} but the reader is {kind}: phantoms alone are simulated")
        if isinstance(self.splits.train, int) != phantom:
            ways = "splits of a phantom are numbers of patients, splits of files are lists of their names, or shares"
            raise ValueError(ways)
        if twice := [name for name, n in Counter(self.exclude).items() if n > 1]:
            raise ValueError(f"exclude: {twice[0]} is listed twice; list each patient once")
        if self.secret and not self.budget:
            raise ValueError(
                "budget: is missing; say what may be spent on real private patients by all runs together, such as "
                "budget: {epsilon: 10, delta: 1.0e-5}"
            )
        if self.places and self.budget and self.budget.delta * self.places >= 1:
            raise ValueError(
                f"budget.delta: {self.budget.delta:g} isn't below one in {self.places} places, so a run could give a "
                "patient away whole and stay within; give less, such as 1.0e-5"
            )
        if self.secret and self.budget and self.splits.shares and not self.budget.patients:
            raise ValueError(
                "budget.patients: is missing; with shares the number of patients to learn from would be counted from "
                "the secret folder and published: say how many places there are"
            )
        return self

    @property
    def secret(self) -> bool:
        """Whether it holds real private patients."""
        return self.role == "private" and not self.simulated

    @property
    def places(self) -> int | None:
        """How many places real private patients to learn from have, filled or not; it's public. None for others."""
        names = self.splits.train if isinstance(self.splits.train, tuple) else ()
        return (self.budget.patients or len(names)) if self.budget and self.secret else None

    def patient_ids(self, split: str, found: Sequence[str] = ()) -> tuple[str, ...]:
        """Names of a split's patients, in order. Simulated ones are p000000, p000001, ..., each in one split.

        found: the patients that are there (readers.list_patients); where splits are shares, a hash of the cohort's and
        the patient's name puts each of them in one. So one patient more or fewer moves nobody else, which is what the
        adjacency of the privacy guarantee needs. Raises CohortError for an unknown split, and one that stays empty.
        """
        self.require_split(split)
        self._refuse_unknown(found)
        members, before = getattr(self.splits, split), [getattr(self.splits, s) for s in SPLITS[: SPLITS.index(split)]]
        if isinstance(members, int):
            members = tuple(f"p{index:06d}" for index in range(sum(before), sum(before) + members))
        elif isinstance(members, float):
            if not found:
                kind = self.reader.kind
                raise CohortError(f"{self.name}: no patients of the layout {kind} are there; is the root right?")
            low, high = sum(before), 1.0 if split == SPLITS[-1] else sum(before) + members
            share, members = members, [patient for patient in found if low <= self._draw(self.person(patient)) < high]
            if not members:
                raise CohortError(
                    f"{self.name}: no patient falls in the split {split}, a share of {share:g}; enlarge it, or name "
                    "its patients"
                )
        stay = tuple(patient for patient in members if not {patient, self.person(patient)} & set(self.exclude))
        if not stay:
            raise CohortError(f"{self.name}: exclude leaves nobody in the split {split}; enlarge it")
        return stay

    def require_split(self, name: str) -> None:
        """Raise CohortError if there's no split of that name."""
        if name not in SPLITS:
            raise CohortError(f"{self.name}: there's no split {name!r}; the splits are {', '.join(SPLITS)}")

    def _refuse_unknown(self, found: Sequence[str]) -> None:
        """Raise CohortError where somebody is excluded who isn't in the cohort: a slip would keep the one who left."""
        known = set(found)
        if isinstance(self.splits.train, int):
            known = {f"p{index:06d}" for index in range(sum(n for _, n in self.splits))} if self.exclude else set()
        elif isinstance(self.splits.train, tuple):
            known = {name for _, members in self.splits for name in members}
        known |= set(map(self.person, known))
        for number, patient in enumerate(self.exclude if known else (), 1):  # else the folder is wrong, not the name
            if patient not in known:  # who withdrew is nobody else's business: no name is told
                raise CohortError(
                    f"{self.name}: exclude: number {number} is no patient of this cohort; correct the name, or take it "
                    "out of the list if their files are gone"
                )

    def person(self, patient: str) -> str:
        """Who a patient's name stands for: UK Biobank's <eid>_2_0 and <eid>_3_0 are two visits of one participant."""
        return patient.partition("_")[0] if isinstance(self.reader, UkbbReader) else patient

    def _draw(self, patient: str) -> float:
        """A number in [0, 1) that this patient of this cohort always gets."""
        digest = hashlib.sha256(f"{self.name}/{patient}".encode(errors="backslashreplace")).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    def data_root(self, given: Path | None = None) -> Path | None:
        """Folder of the cohort's files: the one given, else the environment's, else the manifest's; None for phantoms.

        Raises CohortError where none is named, or the one named isn't there; PrivacyError where a public cohort's
        folder is, contains or lies in that of a real private one (manifests beside this one and in data_manifests/).
        """
        if isinstance(self.reader, PhantomReader):
            return None
        variable = _ROOT.format(self.name.upper())
        named = {"the parameter data_root": given, f"the environment variable {variable}": os.environ.get(variable)}
        ways = f"say where its files are through {', '.join(named)} or the manifest's field root (in this order)"
        named["the manifest's field root"] = self.root
        source, place = next(((s, Path(p)) for s, p in named.items() if p), (None, None))
        if place is None:
            raise CohortError(f"{self.name}: no data folder is named; {ways}")
        if not place.is_dir():
            raise CohortError(f"{self.name}: {place}, which {source} names, is no folder; {ways}")
        for other, private in _private_roots({MANIFEST_FOLDER, self._folder}) if self.role == "public" else ():
            here = place.resolve()
            if here.is_relative_to(private) or private.is_relative_to(here):
                raise PrivacyError(
                    f"{self.name} is public, but its data folder {place} shares files with {private}, which holds the "
                    f"private patients of {other}; keep the two apart, or correct the one that is wrong"
                )
        return place


def _private_roots(folders: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Manifests of real private cohorts, sound or not, each with every folder that it or the environment names."""
    for path in sorted({p for folder in folders for suffix in ("yaml", "yml") for p in folder.glob(f"*.{suffix}")}):
        try:
            content = _parsed(path)
        except CohortError:
            continue
        if "role" not in content or content["role"] == "public" or content.get("simulated") is True:
            continue
        for root in (os.environ.get(_ROOT.format(str(content.get("name")).upper())), content.get("root")):
            if isinstance(root, (str, Path)) and root:
                yield path, Path(os.path.realpath(root))


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
    content = _parsed(path)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_explained(problem)}" for problem in error.errors())
        raise CohortError(f"{path.name}: {error.error_count()} problem(s)\n{problems}") from error
    manifest._folder = path.parent
    return manifest


class UniqueKeys(yaml.SafeLoader):
    """Refuses a field that is given twice; YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The fields of a mapping."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key, n in Counter(keys).items() if n > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parsed(path: Path) -> dict[str, Any]:
    """The manifest's fields, paths made absolute. Raises CohortError if it's no YAML of fields."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise CohortError(f"{path.name}: this isn't YAML that can be read: {error}") from error
    if not isinstance(content, dict):
        raise CohortError(f"{path.name}: expected fields (name: ..., role: ...), found {_SHORT.repr(content)}")
    for field in ("root", "checksums"):
        if isinstance(content.get(field), str):
            try:
                content[field] = path.parent.absolute() / Path(content[field]).expanduser()
            except RuntimeError as error:
                raise CohortError(f"{path.name}: {field}: {error}; write the path in full") from error
    return content


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = 0  # a list may hold patients' names


def _explained(problem: Any) -> str:  # noqa: ANN401
    field, value = ".".join(str(part) for part in problem["loc"]), _SHORT.repr(problem["input"])
    match problem["type"]:
        case "missing":
            return f"{field}: is missing; add it"
        case "extra_forbidden":
            return f"{field}: no such field (its value is {value}); remove it, or correct its spelling"
        case "value_error":
            return f"{field}: {problem['ctx']['error']}".removeprefix(": ")
        case _:
            return f"{field}: {value} won't do; {problem['msg'][0].lower()}{problem['msg'][1:]}"
