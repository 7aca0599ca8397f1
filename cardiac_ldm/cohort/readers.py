"""Readers: from a manifest and a patient's name to that patient's volumes as acquired.

A reader is one function that knows a layout: which files hold a patient's phases, and what the tables say of them. What
follows is the same for all: files are hashed, read, checked, labels brought to ours, stacks turned base first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cardiac_ldm.cohort.anatomy import Finding, Sources, examine
from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES
from cardiac_ldm.cohort.files import LV_FIRST, OURS, Reading, Stack
from cardiac_ldm.cohort.manifest import (
    AcdcReader,
    Manifest,
    Mnms2Reader,
    MnmsReader,
    PhantomReader,
    TableReader,
    UkbbReader,
)
from cardiac_ldm.cohort.orientation import flipped
from cardiac_ldm.cohort.phantom import simulate
from cardiac_ldm.cohort.tables import ukbb_field
from cardiac_ldm.cohort.volumes import Patient, Phase

PHASES: tuple[Phase, Phase] = ("ED", "ES")
UKBB_FIELDS = {
    "31-0.0": "SEX",
    "21003-2.0": "AGE",
    "21001-2.0": "BMI",
    "22421-2.0": "LVEDV",
    "22422-2.0": "LVESV",
    "22420-2.0": "LVEF",
    "24100-2.0": "LVEDV",
    "24101-2.0": "LVESV",
    "24103-2.0": "LVEF",
    "24106-2.0": "RVEDV",
    "24107-2.0": "RVESV",
    "24109-2.0": "RVEF",
}
"""UK Biobank's fields at the imaging visit (biobank.ndph.ox.ac.uk/showcase); a later line goes before an earlier one.

22420 to 22422 are the scanner's inline analysis, 24100 to 24109 those of Bai et al., Nature Medicine 26:1654, 2020.
"""
_FOLDERS: Mapping[str, tuple[str, Sequence[str]]] = {
    "acdc": ("patient[0-9]*", ("", "training", "testing")),
    "mnms": ("[!.]*", ("Training/Labeled", "Training/Unlabeled", "Validation", "Testing")),
    "mnms2": ("[0-9]*", ("dataset",)),
    "ukbb": ("[0-9]*", ("",)),
}
"""Of each layout, which folders are patients', and in which they lie."""
_TABLE_ATTRIBUTES = tuple(name for name in ATTRIBUTE_NAMES if name not in ("ESED", "DEPTH"))


@dataclass(frozen=True)
class Found:
    """What a layout says of a patient: stacks of ED and ES; attributes as (where it's said, our name, the text)."""

    group: str | None
    stacks: Sequence[Stack]
    attributes: Sequence[tuple[str, str, object]] = ()


def list_patients(manifest: Manifest, root: Path | None) -> tuple[str, ...]:
    """Names of the patients that are under root, by the layout's folders or by the table, sorted; none for phantoms.

    Of a person who came several times, the first visit.

    Raises CohortError if the table can't be read.
    """
    if isinstance(manifest.reader, PhantomReader):
        return ()
    reading = Reading(manifest, root)
    if isinstance(manifest.reader, TableReader):
        return tuple(dict.fromkeys(_listed(reading, manifest.reader.table).index))
    pattern, folders = _FOLDERS[manifest.reader.kind]
    names = {path.name for folder in folders for path in (reading.root / folder).glob(pattern) if path.is_dir()}
    first: dict[str, str] = {}
    for name in sorted(names):
        first.setdefault(manifest.person(name), name)
    return tuple(first.values())


def read_patient(manifest: Manifest, root: Path | None, patient_id: str, imaged: bool = True) -> Patient:
    """Read one patient of a cohort whose files lie under root (None for phantoms).

    imaged: False gives a phantom's labels in place of its images, quickly; the files of others are always read.

    Raises CohortError with every problem of every file of this patient, one a line: file, what is wrong, remedy.
    """
    if isinstance(manifest.reader, PhantomReader):
        return simulate(manifest.reader.population, manifest.reader.seed, int(patient_id.removeprefix("p")), imaged)
    patient, findings, reading = open_patient(manifest, root, patient_id)
    reading.problems += [str(reading.error(finding.file, finding.says)) for finding in findings if not finding.doubt]
    reading.raise_problems()
    return patient


def open_patient(manifest: Manifest, root: Path | None, patient_id: str) -> tuple[Patient, list[Finding], Reading]:
    """Read one patient, who isn't a phantom, and check their anatomy; give what was found instead of raising it.

    Raises CohortError where files can't be read, or aren't one patient's.
    """
    reading, found = Reading(manifest, root), Found(None, ())
    with reading.noting():
        found = _READERS[manifest.reader.kind](reading, manifest.reader, patient_id)
    attributes, stacks = reading.attributes(found.attributes), found.stacks
    volumes = [volume for stack in stacks if (volume := reading.volume(stack))]
    reading.raise_problems()
    reading.compare(stacks, volumes)
    axes = reading.turns(stacks[0], volumes)
    turned = flipped(volumes, axes)
    table = found.attributes[0][0].rpartition(": ") if found.attributes else ("", "", "")
    sources = Sources(
        images={stack.phase: stack.image for stack in stacks},
        labels={stack.phase: stack.labels or stack.image for stack in stacks},
        table=table[0] if isinstance(manifest.reader, UkbbReader) else "".join(table),
        values=stacks[0].values,
        reverse=0 in axes,
    )
    findings = examine(turned, attributes, sources)
    doubts = tuple(f"{finding.file}: {finding.says}" for finding in findings if finding.doubt)
    files, repairs = reading.files, tuple(reading.repairs)
    return Patient(patient_id, found.group, turned, attributes, files, repairs, doubts), findings, reading


def read_acdc(reading: Reading, reader: AcdcReader, patient: str) -> Found:
    """One patient of the ACDC challenge (Bernard et al., IEEE TMI 37(11), 2018, doi:10.1109/TMI.2018.2837502).

    patientNNN, under training or testing as it's downloaded, holds Info.cfg (ED and ES frame numbers, Group),
    patientNNN_frameFF.nii.gz and, beside each, patientNNN_frameFF_gt.nii.gz (labels as ours), stored (x, y, z). Height
    and weight, where Info.cfg has them (cm, kg), become the body mass index.
    """
    folder = reading.folder(patient, _FOLDERS["acdc"][1])
    file = f"{folder}/Info.cfg"
    info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in reading.text(file).splitlines())}
    stacks = []
    for phase in PHASES:
        with reading.noting():
            stem = f"{folder}/{patient}_frame{reading.frame(file, phase, info.get(phase, '')):02d}"
            stacks.append(Stack(phase, f"{stem}.nii.gz", f"{stem}_gt.nii.gz"))
    size = info.get("Height", ""), info.get("Weight", "")
    return Found(info.get("Group"), stacks, reading.body_mass_index(file, *size))


def read_mnms(reading: Reading, reader: MnmsReader, patient: str) -> Found:
    """One patient of the M&Ms challenge (Campello et al., IEEE TMI 40(12), 2021, doi:10.1109/TMI.2021.3090082).

    The table has External code, Pathology, ED and ES (frames, from 0), Age, Sex, Height (cm) and Weight (kg). The
    folder <code> under Training/Labeled, Training/Unlabeled, Validation or Testing holds the cine <code>_sa.nii.gz,
    stored (x, y, z, t), and <code>_sa_gt.nii.gz, labelled at ED and ES alone. The unlabelled ones' is empty: it's left.
    """
    columns = ("Pathology", "ED", "ES", "Age", "Sex", "Height", "Weight")
    row, where = reading.row(reader.table, "External code", (patient,), columns), f"{reader.table}: {patient}"
    folder = reading.folder(patient, _FOLDERS["mnms"][1])
    labels = None if "Unlabeled" in folder else f"{folder}/{patient}_sa_gt.nii.gz"
    stacks = []
    for phase in PHASES:
        with reading.noting():
            frame = reading.frame(where, phase, row[phase])
            stacks.append(Stack(phase, f"{folder}/{patient}_sa.nii.gz", labels, frame, LV_FIRST))
    bmi = reading.body_mass_index(where, row["Height"], row["Weight"])
    return Found(row["Pathology"] or None, stacks, [(where, "AGE", row["Age"]), (where, "SEX", row["Sex"]), *bmi])


def read_mnms2(reading: Reading, reader: Mnms2Reader, patient: str) -> Found:
    """One patient of the M&Ms-2 challenge (Martin-Isla et al., IEEE JBHI 27(7), 2023, doi:10.1109/JBHI.2023.3267857).

    The table has SUBJECT_CODE and DISEASE. dataset/NNN holds NNN_SA_ED.nii.gz, NNN_SA_ED_gt.nii.gz, ES likewise.
    """
    number = patient.lstrip("0")
    row = reading.row(reader.table, "SUBJECT_CODE", (patient, number, f"{number}.0"), ("DISEASE",))
    stem = f"{reading.folder(patient, _FOLDERS['mnms2'][1])}/{patient}_SA"
    stacks = [Stack(p, f"{stem}_{p}.nii.gz", f"{stem}_{p}_gt.nii.gz", values=LV_FIRST) for p in PHASES]
    return Found(row["DISEASE"] or None, stacks)


def read_ukbb(reading: Reading, reader: UkbbReader, patient: str) -> Found:
    """One participant of UK Biobank, converted by ukbb_cardiac (Bai et al., JCMR 20:65, 2018; baiwenjia on GitHub).

    <eid>/sa.nii.gz is the cine, stored (x, y, z, t). Labels are by hand (label) or else the network's (seg): two files
    label_sa_ED.nii.gz, label_sa_ES.nii.gz with the images sa_ED.nii.gz, sa_ES.nii.gz, or one of all frames,
    label_sa.nii.gz, of which ED is frame 0, as in that code, and ES where the LV cavity is smallest. Without labels ES
    is where the image differs most from ED, which is a repair. The table is a CSV with eid and UKBB_FIELDS, in a
    spelling of tables.ukbb_field; what it says goes before what the labels measure, and a participant may be missing.
    """
    folder = reading.folder(patient, _FOLDERS["ukbb"][1])
    cine, said = f"{folder}/sa.nii.gz", []
    if reader.table:
        with reading.noting():
            said = _ukbb_fields(reading, reader.table, patient.partition("_")[0])
    for prefix in ("label", "seg"):
        pairs = [
            Stack(p, f"{folder}/sa_{p}.nii.gz", f"{folder}/{prefix}_sa_{p}.nii.gz", values=LV_FIRST) for p in PHASES
        ]
        if any(stack.labels and reading.exists(stack.labels) for stack in pairs):
            return Found(None, pairs, said)
        labels = f"{folder}/{prefix}_sa.nii.gz"
        if reading.exists(labels):
            areas = (reading.cine(labels) == 1).sum(axis=(0, 1, 2))
            labelled = np.flatnonzero(areas)
            if len(labelled) < 2 or labelled[0] != 0:
                raise reading.error(
                    labels, "the LV cavity (1) isn't labelled in frame 0 and a later one; label ED and ES"
                )
            frames = 0, int(labelled[areas[labelled].argmin()])
            return Found(None, [Stack(p, cine, labels, f, LV_FIRST) for p, f in zip(PHASES, frames, strict=True)], said)
    beat = reading.cine(cine)
    es = int(np.abs(beat - beat[..., :1]).mean(axis=(0, 1, 2)).argmax())
    reading.mend(cine, f"has no labels: frame {es}, which differs most from frame 0, was taken as ES")
    return Found(None, [Stack(p, cine, None, f) for p, f in zip(PHASES, (0, es), strict=True)], said)


def _ukbb_fields(reading: Reading, table: str, patient: str) -> list[tuple[str, str, object]]:
    """What a table of fields says of a participant. Raises CohortError for a table that says nothing of anybody."""
    rows = reading.table(table, "eid", (), tuple(UKBB_FIELDS), named=ukbb_field)
    if not len(rows.columns):
        known = ", ".join(UKBB_FIELDS)
        raise reading.error(table, f"has none of the fields {known}, by these names or as p31, p21003_i2; export them")
    if patient not in rows.index:
        if rows.index.isin([path.name.partition("_")[0] for path in reading.root.iterdir()]).any():
            return []
        raise reading.error(table, "lists no participant who has a folder; are the eids another application's?")
    row = rows.loc[[patient]]
    if len(row) != 1:
        raise reading.error(table, f"has {len(row)} rows whose eid is {patient}; expected one")
    return [(f"{table}: {patient}: {f}", ours, row[f].iloc[0]) for f, ours in UKBB_FIELDS.items() if f in row]


def read_table(reading: Reading, reader: TableReader, patient: str) -> Found:
    """One patient of any folder of NIfTI files, (x, y, z) or cines (x, y, z, t), that a CSV lists, a row per phase.

    Columns: patient, phase (ED or ES), path, and where there are any labels (a path), frame (from 0, of files that are
    4D), group, and attributes by our names. Paths count from the data root. Cells may be empty.
    """
    where, rows = f"{reader.table}: {patient}", _listed(reading, reader.table)
    rows = rows.loc[rows.index == patient].sort_values("phase")
    if list(rows["phase"]) != list(PHASES):
        met = ", ".join(rows["phase"]) or "none"
        hint = "; of somebody scanned twice keep one scan's rows" if rows["phase"].duplicated().any() else ""
        raise reading.error(where, f"the phases of its rows are {met}; expected one row of ED and one of ES{hint}")
    stacks = []
    for row in rows.to_dict("records"):
        with reading.noting():
            frame = reading.frame(where, "frame", row["frame"]) if row.get("frame") else None
            stacks.append(Stack(row["phase"], row["path"], row.get("labels") or None, frame, reader.labels or OURS))
    said = {}
    for name in ("group", *(column for column in rows if column in _TABLE_ATTRIBUTES)):
        with reading.noting():
            cells = sorted(set(rows.get(name, ())) - {""})
            if len(cells) > 1:
                raise reading.error(where, f"{name} is {' and '.join(cells)}; expected one value a patient")
            said[name] = "".join(cells)
    group = said.pop("group", "") or None
    return Found(group, stacks, [(where, name, text) for name, text in said.items()])


def _listed(reading: Reading, table: str) -> pd.DataFrame:
    optional = ("labels", "frame", "group", *_TABLE_ATTRIBUTES)
    return reading.table(table, "patient", ("phase", "path"), optional, others=False)


_READERS: Mapping[str, Callable[[Reading, Any, str], Found]] = {
    "acdc": read_acdc,
    "mnms": read_mnms,
    "mnms2": read_mnms2,
    "ukbb": read_ukbb,
    "table": read_table,
}
