"""What leaves the house: the synthetic cohort as files, with its attributes and its privacy statement."""

import csv
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Volumes
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.privacy import Ledger, Record, Standing
from cardiac_ldm.report.page import write_page
from cardiac_ldm.report.statement import joint_statement, privacy_statement
from cardiac_ldm.report.viewer import nifti


def write_release(
    cohort: Volumes, ledger: Ledger, folder: Path, evaluation: Path | None = None, together: Standing | None = None
) -> Path:
    """Write a synthetic cohort for others: NIfTI volumes, `attributes.csv`, `privacy.json` and `STATEMENT.md`.

    Where the cohort has labels, each volume's lie beside it: `_seg` in the name, 1 RV, 2 myocardium, 3 LV.
    The statement says what all runs on these patients spent together: of real ones their record does, which has to know
    this very model.

    evaluation: folder of the run that measured this cohort; its `metrics.json` goes with the release, and
    `quality.html`, which shows it. together: of simulated patients, what their models spent.

    Raises:
        PrivacyError: the model has no guarantee, or the record doesn't know it.
    """
    if ledger.guarantee not in ("patient-level DP", "public data only"):
        raise PrivacyError(
            f"{folder.name}: the model was trained on {ledger.private_data} with guarantee {ledger.guarantee}, "
            "which does not protect patients; not released"
        )
    if ledger.mechanisms and not ledger.simulated:
        together = Record().vouch(ledger)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        names = []
        for image, attributes, owner in zip(cohort.images, cohort.attributes, cohort.patient_index, strict=True):
            phase = "ED" if attributes[ATTRIBUTE_NAMES.index("ESED")] == 1 else "ES"
            names.append(f"synthetic{owner:05d}_{phase}.nii.gz")
            (unfinished / names[-1]).write_bytes(nifti(image))
        for name, labels in zip(names, cohort.labels if cohort.labels is not None else (), strict=False):
            (unfinished / name.replace(".nii", "_seg.nii")).write_bytes(nifti(labels))
        with (unfinished / "attributes.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["patient", "file", *ATTRIBUTE_NAMES])
            for name, owner, attributes in zip(names, cohort.patient_index, cohort.attributes, strict=True):
                known = ["" if np.isnan(value) else f"{value:.6g}" for value in attributes]
                table.writerow([f"synthetic{owner:05d}", name, *known])
        ledger.model_copy(update={"together": together}).save(unfinished / "privacy.json")
        statement = privacy_statement(ledger, together)
        if together:
            statement += f"\n{joint_statement(together, ledger.private_data)}\n"
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
