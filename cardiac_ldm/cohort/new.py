"""A manifest for a folder that nobody has described yet: its layout is guessed, said, and written to be corrected."""

import csv
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cardiac_ldm.cohort.manifest import MANIFEST_FOLDER, Manifest
from cardiac_ldm.cohort.nifti import ENDINGS, on_a_line
from cardiac_ldm.cohort.readers import list_patients
from cardiac_ldm.cohort.tables import header_of, read_table, ukbb_field
from cardiac_ldm.errors import CohortError

_PHASES = dict.fromkeys(("ed", "dia", "diastole", "diastolic"), "ED")
_PHASES |= dict.fromkeys(("es", "sys", "systole", "systolic"), "ES")
_LABELS = ("gt", "seg", "label", "labels", "mask", "segmentation", "contours")
_TABLE = "patients.csv"
_HEAD = """\
# Guessed from the folder's content by `python -m cardiac_ldm.cohort new`: correct it, then
#   python -m cardiac_ldm.cohort check {path}
# role: private unless everybody may see these patients; then public.
# budget: what all runs together may spend of these patients; patients: how many places there are, which is public.
# exclude: names of patients to leave out, because they withdrew, say.
"""


def new(folder: Path, out: Path | None = None) -> Path:
    """Write a manifest for a data folder, to `out` or data_manifests/, print what was guessed, and return its path.

    Nothing is overwritten. Of NIfTI files that no table lists, one is written into the folder. Raises CohortError where
    the folder holds no layout that's known, or a file is in the way.
    """
    if not folder.is_dir():
        raise CohortError(f"{folder}: there's no such folder; give the one that holds the files")
    name = re.sub(r"[^a-z0-9_]+", "_", folder.resolve().name.lower()).strip("_")
    name = name if name[:1].isalpha() else f"cohort_{name}".rstrip("_")
    out = out or MANIFEST_FOLDER / f"{name}.yaml"
    if out.suffix not in (".yaml", ".yml") or not out.absolute().parent.is_dir():
        raise CohortError(f"{out}: give a file that ends in .yaml, in a folder that is there")
    if out.exists():
        raise CohortError(f"{out}: is there already and isn't overwritten; name another file with --out")
    reader, said = _guess(folder)
    said += [
        "role: private, as long as nobody says otherwise",
        "splits: 80, 5 and 15 % of the patients, by their names",
        "budget: what all runs together may spend, and the places to learn from, which are public: a round number",
    ]
    manifest: dict[str, Any] = {"name": name, "role": "private", "simulated": False}
    manifest |= dict.fromkeys(("licence", "citation", "obtain"), "to be filled in")
    manifest |= {"root": str(folder.resolve()), "reader": reader, "exclude": []}
    manifest |= {"splits": {"train": 0.8, "validation": 0.05, "test": 0.15}}
    manifest["budget"] = {"epsilon": 10.0, "delta": 1e-5, "patients": _places(manifest, folder)}
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(_HEAD.format(path=out) + yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise CohortError(f"{out}: can't be written ({on_a_line(error)}); name another file with --out") from error
    print(f"{out}: written; it's a guess, to be corrected:")
    print("\n".join(f"  {line}" for line in said))
    print(f"then: python -m cardiac_ldm.cohort check {out}")
    return out


def _places(manifest: Mapping[str, Any], folder: Path) -> int:
    """A round number of patients that the train split won't exceed; who reads it learns no more than that."""
    try:
        found = list_patients(Manifest.model_validate({**manifest, "role": "public"}), folder)
    except CohortError:  # the table is wrong somewhere: the check that comes next says where
        found = ()
    return max(10, -(-len(found) // 10) * 10)


def _guess(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The reader's settings, and what was seen that speaks for them."""
    if infos := [p for outer in ("", "training", "testing") for p in (folder / outer).glob("patient[0-9]*/Info.cfg")]:
        return {"kind": "acdc"}, [f"reader: acdc, for {len(infos)} folders patientNNN with Info.cfg"]
    tables = {path.name: _columns(path) for path in sorted(folder.glob("*.csv"))}
    for name, columns in tables.items():
        if "External code" in columns and any((folder / part).is_dir() for part in ("Training", "Validation")):
            return {"kind": "mnms", "table": name}, [f"reader: mnms, for {name} and the challenge's folders"]
        if "SUBJECT_CODE" in columns and (folder / "dataset").is_dir():
            return {"kind": "mnms2", "table": name}, [f"reader: mnms2, for {name} and the folder dataset"]
    if cines := [p for end in ENDINGS for p in folder.glob(f"[0-9]*/sa{end}")]:
        fields = next((n for n, columns in tables.items() if "eid" in map(ukbb_field, columns)), None)
        said = [
            f"reader: ukbb, for {len(cines)} cines <eid>/sa.nii.gz",
            f"table of fields: {fields or 'none is there'}",
        ]
        return {"kind": "ukbb"} | ({"table": fields} if fields else {}), said
    for name, columns in tables.items():
        if {"patient", "phase", "path"} <= set(columns):
            said = [f"reader: table, for {name}, which has the columns {', '.join(columns)}"]
            try:
                table = read_table(folder / name, 0, "patient", ("phase", "path"), ("labels",))
                labelled = int((table["labels"] != "").sum()) if "labels" in table else 0
                said.append(f"{table.index.nunique()} patients in {len(table)} rows, {labelled} of them with labels")
            except ValueError as error:
                said.append(f"{name} {error}")
            return {"kind": "table", "table": name}, said
    return _listed(folder, tables)


def _columns(path: Path) -> list[str]:
    """The names in a CSV's first line, as the readers see them; none of what isn't UTF-8 text."""
    try:
        return header_of(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return []


def _listed(folder: Path, tables: dict[str, list[str]]) -> tuple[dict[str, Any], list[str]]:
    """Write a table of the NIfTI files, by what their names say. Raises CohortError."""
    rows, unclear = _rows(folder)
    if not rows:
        seen = f"{len(unclear)} NIfTI files whose names don't say ED or ES" if unclear else "no NIfTI file"
        hint = f"; {', '.join(tables)} lacks the columns patient, phase, path" if tables else ""
        raise CohortError(
            f"{folder}: holds {seen}{hint}; list the files in a CSV with the columns patient, phase, path (and labels, "
            "frame), and call this again"
        )
    table = folder / _TABLE
    try:
        with table.open("x", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("patient", "phase", "path", "labels"), *rows])
    except OSError as error:
        raise CohortError(
            f"{table}: can't be written ({on_a_line(error)}); nothing is overwritten: rename it"
        ) from error
    said = [f"reader: table, for {_TABLE}, which was written from the files' names: look through it"]
    said.append(
        f"{len({row[0] for row in rows})} patients in {len(rows)} rows, {sum(bool(r[3]) for r in rows)} labelled"
    )
    said += [f"{file}: doesn't say ED or ES, or not whose it is; left out" for file in unclear[:10]]
    return {"kind": "table", "table": _TABLE}, said


def _rows(folder: Path) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """Rows (patient, phase, path, labels), and the files whose names don't tell.

    A patient's name is their folder's; where folders don't tell patients apart, as `images` and `labels` don't, files'.
    """
    told: list[tuple[Path, str, str, bool]] = []
    unclear = []
    for path in sorted(path for end in ENDINGS for path in folder.rglob(f"*{end}") if path.is_file()):
        file = path.relative_to(folder)
        words = [word for word in re.split(r"[_\-. ]+", re.sub(r"\.nii(\.gz)?$", "", file.name)) if word]
        phase = next((_PHASES[word.lower()] for word in words if word.lower() in _PHASES), None)
        if phase is None:
            unclear.append(file.as_posix())
            continue
        rest = [word for word in words if word.lower() not in (*_LABELS, *_PHASES)]
        told.append((file, "_".join(rest), phase, any(word.lower() in _LABELS for word in words)))
    by_folder = {file: "_".join(file.parent.parts) or name for file, name, *_ in told}
    for names in (by_folder, {file: name for file, name, *_ in told}, by_folder):
        met: dict[tuple[str, str], dict[bool, str]] = defaultdict(dict)
        for file, _, phase, labels in reversed(told):
            met[names[file], phase][labels] = file.as_posix()
        left = {file for files in met.values() for file in files.values() if False in files}
        if len(left) == len(told) and all(names.values()):
            break
    rows = [(*who, files[False], files.get(True, "")) for who, files in sorted(met.items()) if False in files]
    return rows, unclear + sorted(file.as_posix() for file, *_ in told if file.as_posix() not in left)
