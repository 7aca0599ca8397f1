"""What leaves the house: a synthetic cohort in BIDS, with its attributes, its privacy statement and what proves it.

BIDS: Gorgolewski et al., Scientific Data 3:160044, 2016. Volumes are written patient by patient; the rest, sums last.
"""

import csv
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES, Volumes
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.evaluation.synthesis import RELEASED
from cardiac_ldm.privacy import Ledger, Record, Standing
from cardiac_ldm.privacy.table import composed
from cardiac_ldm.report import verify
from cardiac_ldm.report.croissant import croissant
from cardiac_ldm.report.datasheet import datasheet, model_card, readme
from cardiac_ldm.report.page import write_page
from cardiac_ldm.report.statement import joint_statement, privacy_statement
from cardiac_ldm.report.viewer import nifti

TABLE = tuple(name for name in ATTRIBUTE_NAMES if name not in ("ESED", "DEPTH"))
"""Attributes in attributes.csv, which the `table` reader takes: it measures DEPTH and knows the phase."""
_BIDS = "1.10.0"
_DESCRIBED = {
    "participant_id": {"Description": "name of the synthetic patient; nobody has it"},
    "sex": {"Description": "sex that was requested", "Levels": {"F": "female", "M": "male"}},
    "age": {"Description": "age that was requested", "Units": "years"},
    "candidates": {"Description": "pairs of volumes that were drawn for this request; the nearest to it stayed"},
    "refused": {"Description": "candidates that the anatomy check called implausible"},
    "distance": {"Description": "mean distance of what was measured from what was requested, in sixths of the ranges"},
    "plausible": {"Description": "whether the anatomy check refuses neither volume", "Levels": {"yes": "", "no": ""}},
}


@dataclass(frozen=True)
class About:
    """What a release says of itself. cohort: the private one's name, or the public one's where no other was used.

    epsilon, delta: of the ledger. profile: its name. attributes: where requests come from. learnt: the stages of the
    ledger's mechanisms, what learnt from private patients. date: ISO 8601.
    """

    name: str
    cohort: str
    simulated: bool
    epsilon: float
    delta: float
    patients: int
    attributes: str
    learnt: tuple[str, ...]
    licence: str
    profile: str
    public_data: str
    date: str
    version: str
    seed: int

    @property
    def guarantee(self) -> str:
        """What is promised, in a few words."""
        if not self.epsilon:
            return "no private patient was used"
        return f"({self.epsilon:g}, {self.delta:g})-differential privacy per patient"


def standing(*ledgers: Ledger, together: Standing | None = None) -> Standing | None:
    """What all models of these ledgers' patients spent together, before anything of them is released.

    together: of simulated patients, what their models spent; of real ones their record says it.

    Raises:
        PrivacyError: one of them has no guarantee, or the record doesn't know it.
    """
    found = None
    for ledger in ledgers:
        if ledger.guarantee not in ("patient-level DP", "public data only"):
            raise PrivacyError(
                f"the model was trained on {ledger.private_data} with guarantee {ledger.guarantee}, "
                "which does not protect patients; not released"
            )
        if ledger.mechanisms:
            found = together if ledger.simulated else Record().vouch(ledger)
    return found


def write_volumes(folder: Path, name: str, volumes: Volumes) -> None:
    """Write a synthetic patient's volumes and labels, with their sidecars."""
    assert volumes.labels is not None
    for image, labels, attributes in zip(volumes.images, volumes.labels, volumes.attributes, strict=True):
        known = dict(zip(ATTRIBUTE_NAMES, attributes.tolist(), strict=True))
        phase = "ED" if known["ESED"] == 1 else "ES"
        said: dict[str, Any] = {
            "Synthetic": True,
            "Description": "drawn by a latent diffusion model; synthetic, no patient's picture",
            "CardiacPhase": {"ED": "end-diastole", "ES": "end-systole"}[phase],
            "BodyPart": "HEART",
            "PulseSequenceType": "looks like balanced steady-state free precession, short axis",
            "Manufacturer": "none",
        }
        requested = {k: round(value, 4) for k, value in known.items() if not math.isnan(value)}
        picture, mask = verify.image(folder, name, phase), verify.labels(folder, name, phase)
        _write(picture, nifti(image, RELEASED), said | {"Requested": requested})
        source = [f"bids:raw:{picture.relative_to(folder).as_posix()}"]
        what = {"Description": "what the decoder meant: 1 RV, 2 myocardium, 3 LV", "Sources": source, "Manual": False}
        _write(mask, nifti(labels, RELEASED), {"Synthetic": True} | what)


def _write(path: Path, content: bytes, sidecar: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    _json(path.with_name(path.name.replace(".nii.gz", ".json")), sidecar)


def write_rest(
    folder: Path,
    about: About,
    ledgers: Sequence[Ledger],
    together: Standing | None,
    rows: Iterable[Mapping[str, Any]],
    evaluation: Path,
    measured: Volumes,
) -> None:
    """Write all that goes with the volumes of a release; sums of all files last.

    ledgers: of the private table of attributes, if there is one, and of the model. rows: one a patient, of `row`.
    evaluation: folder of the run that measured `measured`, some of the cohort.

    Raises:
        PrivacyError: the model has no guarantee, or the record doesn't know it.
    """
    together, ledger = standing(*ledgers, together=together), composed(ledgers, about.epsilon)
    rows = list(rows)
    ledger.model_copy(update={"together": together}).save(folder / "privacy.json")
    statement = privacy_statement(ledger, together) + (
        f"\n{joint_statement(together, ledger.private_data)}\n" if together else ""
    )
    shutil.copy(evaluation / "metrics.json", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    counts = {name: sum(row[name] for row in rows) for name in ("candidates", "refused")} | {
        "implausible": sum(row["plausible"] == "no" for row in rows)
    }
    cautions = warnings_of(metrics, counts["refused"] / max(counts["candidates"], 1))
    said = "".join(f"> **Warning**: {caution}\n\n" for caution in cautions)
    _json(folder / "release.json", asdict(about) | counts | {"warnings": cautions})
    statement += f"\n**Population.** Attributes were requested from: {about.attributes}.\n"
    (folder / "STATEMENT.md").write_text(f"{said}{statement}\n")
    write_page(metrics, pd.read_csv(evaluation / "anatomy.csv"), measured, said + statement, folder)
    (folder / "README").write_text(said + readme(about))
    (folder / "DATASHEET.md").write_text(said + datasheet(about, counts))
    (folder / "MODEL_CARD.md").write_text(said + model_card(about, ledger, metrics))
    _bids(folder, about, rows, cautions)
    _tables(folder, rows)
    _nnunet(folder, about, rows)
    shutil.copyfile(str(verify.__file__), folder / "verify.py")
    _json(folder / "croissant.json", croissant(folder, about, cautions))
    _sums(folder)


def warnings_of(metrics: Mapping[str, Any], refused: float) -> list[str]:
    """What a recipient has to know first, from what was measured; refused: the share of implausible candidates."""
    values = {(row["metric"], row["attribute"]): row for row in metrics["rows"] if not row["group"]}
    found = []
    control = values.get(("correlation", "LVEDV"), {}).get("value")
    if control is None or control < 0.5:
        met = "isn't defined" if control is None else f"is {control:.2f}"
        found.append(f"the correlation of requested and drawn LVEDV {met}: these hearts aren't the ones requested")
    distance = values.get(("FD-EffNet", None), {})
    value, floor = distance.get("value"), distance.get("reference")
    if value and floor and value > 3 * floor:
        found.append(
            f"the distance from held-out patients is {value / floor:.1f} times what these have among themselves"
        )
    if refused > 0.5:
        found.append(f"the anatomy check refused {refused:.0%} of what the model drew: it looks untrained")
    return found


def row(name: str, attributes: Any, measured: Mapping[str, float], **drawn: Any) -> dict[str, Any]:  # noqa: ANN401
    """A patient's row in participants.tsv: attributes (14,) requested and measured, and how it was drawn."""
    known = dict(zip(ATTRIBUTE_NAMES, map(float, attributes), strict=True))
    sex = {0.0: "F", 1.0: "M"}.get(known["SEX"], "n/a")
    said = {"participant_id": name, "age": _cell(known["AGE"]), "sex": sex}
    said |= {n: _cell(known[n]) for n in ATTRIBUTE_NAMES if n not in ("AGE", "SEX", "ESED")}
    return said | {f"{n}_measured": _cell(value) for n, value in measured.items()} | drawn


def _cell(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.6g}"


def _bids(folder: Path, about: About, rows: list[Mapping[str, Any]], cautions: list[str]) -> None:
    made = [{"Name": "cardiac_ldm", "Version": about.version, "Description": "latent diffusion, synthetic"}]
    common = {"BIDSVersion": _BIDS, "License": about.licence, "GeneratedBy": made, "Synthetic": True}
    whose = "simulated patients" if about.simulated else "patients"
    title = f"Synthetic cardiac MRI in place of {whose} of {about.cohort}: {about.guarantee}"
    authors = {"Authors": [f"the holder of {about.cohort}"], "Warnings": cautions}
    _json(folder / "dataset_description.json", {"Name": title, "DatasetType": "raw"} | common | authors)
    segmentation = folder / "derivatives" / "segmentation"
    derived = {"Name": f"Segmentations: {title}", "DatasetType": "derivative", "DatasetLinks": {"raw": "../.."}}
    _json(segmentation / "dataset_description.json", derived | common)
    labels = [("index", "name"), (0, "Background"), (1, "Right ventricle"), (2, "Myocardium"), (3, "Left ventricle")]
    _tsv(segmentation / "desc-heart_dseg.tsv", labels)
    _tsv(folder / "participants.tsv", [tuple(rows[0]), *(tuple(one.values()) for one in rows)])
    units = {attribute.name: attribute for attribute in ATTRIBUTES}
    described: dict[str, Any] = {}
    for name in rows[0]:
        if name in _DESCRIBED:
            described[name] = _DESCRIBED[name]
            continue
        attribute = units[name.removesuffix("_measured")]
        how = "as the public segmenter measures it" if name.endswith("_measured") else "as requested"
        unit = {"Units": attribute.unit} if attribute.unit else {}
        described[name] = {"Description": f"{attribute.description}, {how}"} | unit
    _json(folder / "participants.json", described)
    ignored = "*.md attributes.csv quality.html plotly.min.js metrics.json privacy.json release.json croissant.json "
    ignored += "dataset.json verify.py SHA256SUMS model model/ model/**"
    (folder / ".bidsignore").write_text("\n".join(ignored.split()) + "\n")


def _tables(folder: Path, rows: list[Mapping[str, Any]]) -> None:
    """attributes.csv, which the `table` reader and `read_folder` take: a row for each patient and phase."""
    with (folder / "attributes.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["patient", "phase", "path", "labels", *TABLE])
        for said in rows:
            name = said["participant_id"]
            known = dict(said) | {"AGE": said["age"], "SEX": {"F": "0", "M": "1"}.get(said["sex"], "")}
            values = ["" if known[n] == "n/a" else known[n] for n in TABLE]
            for phase in verify.PHASES:
                paths = (where(folder, name, phase) for where in (verify.image, verify.labels))
                table.writerow([name, phase, *(p.relative_to(folder).as_posix() for p in paths), *values])


def _nnunet(folder: Path, about: About, rows: list[Mapping[str, Any]]) -> None:
    """dataset.json, by which nnU-Net (v2) takes this folder as one of its raw datasets; each volume is a case."""
    cases = {
        f"{said['participant_id']}_{phase}": {
            "images": [verify.image(folder, said["participant_id"], phase).relative_to(folder).as_posix()],
            "label": verify.labels(folder, said["participant_id"], phase).relative_to(folder).as_posix(),
        }
        for said in rows
        for phase in verify.PHASES
    }
    labels = {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3}
    said = {"name": about.name, "licence": about.licence, "channel_names": {"0": "MRI"}, "labels": labels}
    _json(folder / "dataset.json", said | {"numTraining": len(cases), "file_ending": ".nii.gz", "dataset": cases})


def _tsv(path: Path, rows: Iterable[tuple[Any, ...]]) -> None:
    path.write_text("".join("\t".join(map(str, one)) + "\n" for one in rows))


def _json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _sums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines))
