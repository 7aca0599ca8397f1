"""What leaves the house: the synthetic cohort as files, with its attributes and its privacy statement."""

import csv
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cardiac_ldm.cohort import ATTRIBUTE_NAMES
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.evaluation.synthesis import SyntheticCohort
from cardiac_ldm.privacy import Ledger
from cardiac_ldm.report.page import write_page
from cardiac_ldm.report.viewer import nifti

_UNSTATED = "not stated; earlier runs on these patients whose results were looked at add to what is spent"


def privacy_statement(ledger: Ledger) -> str:
    """The guarantee in plain words and its terms, as Markdown."""
    if ledger.guarantee == "public data only":
        return f"**No private patient was used.** Trained on public data only: {ledger.public_data}."
    if ledger.guarantee == "none":
        return f"**No guarantee.** Trained on {ledger.private_data} without privacy: for comparison, never for release."
    odds, unit = math.exp(ledger.epsilon), ledger.unit
    whole = ", with all volumes," if unit == "patient" else ""
    remark = (
        " This page holds only what this guarantee covers, and what is public; how long the run took is not covered."
        if "system" in ledger.randomness
        else (
            " These patients are simulated and the noise is seeded, so that the run can be repeated; "
            "for patients who aren't, it comes from the operating system."
        )
    )
    if unit == "volume":
        remark += (
            f" **A patient gives more than one volume and is protected by ε = {ledger.epsilon_patient:.3g} only**: "
            "for comparison with work that states it so, never for release."
        )
    stages = "".join(
        f"| mechanism: {m.stage} | DP-SGD, rate {m.sampling_rate:.4g}, {m.steps} steps, clip {m.clip:g} "
        f"({m.clipping}), noise multiplier {m.noise_multiplier:.4g}, {m.draws} draw(s) a volume; tuned: {m.tuned} |\n"
        for m in ledger.mechanisms
    )
    return (
        f"**({ledger.epsilon:g}, {ledger.delta:g})-differential privacy per {unit}.** Whatever is computed from this "
        f"model, its chance changes by a factor of at most e^ε = {odds:.3g} (but for a probability of "
        f"δ = {ledger.delta:g}) when one {unit}{whole} is added to or removed from the "
        f"{ledger.n_units} of {ledger.private_data}.{remark}\n\n"
        "| term | value |\n| --- | --- |\n"
        f"| unit | {unit} |\n| adjacency | {ledger.adjacency} |\n{stages}"
        f"| sampler | {ledger.sampler} |\n"
        f"| accountant | {ledger.accountant}: PLD says ε = {ledger.epsilon_pld:.4g}; Rényi DP would have said "
        f"{ledger.epsilon_rdp:.4g} |\n"
        f"| public data | {ledger.public_data} |\n"
        f"| tuning runs | {ledger.tuning_runs or _UNSTATED} |\n| released | {ledger.released} |\n"
        f"| randomness | {ledger.randomness} |\n"
    )


def joint_statement(ledgers: Sequence[Ledger]) -> str:
    """What private models of one cohort reveal together, as Markdown."""
    together = Ledger.compose(ledgers)
    return (
        f"**Together, {len(ledgers)} private model(s) of {together.private_data} spent "
        f"({together.epsilon:.4g}, {together.delta:g}) per {together.unit}.** "
        "Whoever sees several of them learns more than from any one. Models that were deleted, or trained on another "
        "number of these patients or for another δ, are not counted here."
    )


def write_release(cohort: SyntheticCohort, ledger: Ledger, folder: Path, evaluation: Path | None = None) -> Path:
    """Write a synthetic cohort for others: NIfTI volumes, `attributes.csv`, `privacy.json` and `STATEMENT.md`.

    Where the cohort has labels, each volume's lie beside it: `_seg` in the name, 1 RV, 2 myocardium, 3 LV.
    evaluation: folder of the run that measured this cohort; its `metrics.json` goes with the release, and
    `quality.html`, which shows it.

    Raises:
        PrivacyError: the model has no guarantee, or one for volumes alone.
    """
    if ledger.guarantee not in ("patient-level DP", "public data only"):
        raise PrivacyError(
            f"{folder.name}: the model was trained on {ledger.private_data} with guarantee {ledger.guarantee}, "
            "which does not protect patients; not released"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        names = []
        for image, attributes, owner in zip(cohort.images, cohort.attributes, cohort.owners, strict=True):
            phase = "ED" if attributes[ATTRIBUTE_NAMES.index("ESED")] == 1 else "ES"
            names.append(f"synthetic{owner:05d}_{phase}.nii.gz")
            (unfinished / names[-1]).write_bytes(nifti(image))
        for name, labels in zip(names, cohort.labels if cohort.labels is not None else (), strict=False):
            (unfinished / name.replace(".nii", "_seg.nii")).write_bytes(nifti(labels))
        with (unfinished / "attributes.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["patient", "file", *ATTRIBUTE_NAMES])
            for name, owner, attributes in zip(names, cohort.owners, cohort.attributes, strict=True):
                known = ["" if np.isnan(value) else f"{value:.6g}" for value in attributes]
                table.writerow([f"synthetic{owner:05d}", name, *known])
        ledger.save(unfinished / "privacy.json")
        statement = privacy_statement(ledger)
        (unfinished / "STATEMENT.md").write_text(statement + "\n")
        if evaluation:
            shutil.copy(evaluation / "metrics.json", unfinished)
            metrics = json.loads((unfinished / "metrics.json").read_text())
            write_page(metrics, pd.read_csv(evaluation / "anatomy.csv"), cohort, statement, unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
