"""What leaves the house: the synthetic cohort as files, with its attributes and its privacy statement."""

import csv
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Volumes
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.privacy import Ledger, Record, Standing
from cardiac_ldm.report.page import write_page
from cardiac_ldm.report.viewer import nifti


def privacy_statement(ledger: Ledger, together: Standing | None = None) -> str:
    """The guarantee on one page, for whoever decides on a release, as Markdown.

    together: what all runs on these patients have spent by now; else what they had when this one began.
    """
    if ledger.guarantee == "public data only":
        return f"**No private patient was used.** Trained on public data only: {ledger.public_data}."
    if ledger.guarantee == "none":
        return f"**No guarantee.** Trained on {ledger.private_data} without privacy: for comparison, never for release."
    odds, unit, together = math.exp(ledger.epsilon), ledger.unit, together or ledger.together
    whole = ", with all volumes," if unit == "patient" else ""
    remark = (
        " These patients are simulated and the noise is seeded, so that the run can be repeated; "
        "for patients who aren't, it comes from the operating system."
        if ledger.simulated
        else " This page holds only what this guarantee covers and what is public; how long the run took isn't covered."
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
        f"δ = {ledger.delta:g}) when one {unit}{whole} is taken out of {ledger.private_data} and the place stays "
        f"empty. Who wavers evenly whether a certain {unit} is there, and knows all others, is right afterwards with a "
        f"chance of at most {min(1.0, (odds + ledger.delta) / (1 + odds)):.3%}.{remark}\n\n"
        f"{_decisions(ledger, together)}\n"
        "| term | value |\n| --- | --- |\n"
        f"| unit | {unit} |\n| neighbouring cohorts | {ledger.adjacency} |\n{stages}"
        f"| sampler | {ledger.sampler} |\n"
        f"| accountant | {ledger.accountant}: PLD says ε = {ledger.epsilon_pld:.4g}; Rényi DP would have said "
        f"{ledger.epsilon_rdp:.4g} |\n"
        f"| public data | {ledger.public_data} |\n"
        f"| runs on these patients | {_counted(ledger, together)} |\n| released | {ledger.released} |\n"
        f"| randomness | {ledger.randomness} |\n"
        f"| SHA-256 of the weights | {', '.join(ledger.weights.values()) or 'not there yet'} |\n"
        f"| written | {ledger.date}, cardiac-ldm {ledger.version} |\n"
    )


def _counted(ledger: Ledger, together: Standing | None) -> str:
    """All runs on the patients of a model, those included that only tried settings out."""
    if together is None:
        return "not counted: they are simulated" if ledger.simulated else "not charged yet"
    return f"{together.runs}, this one included; together they spent ({together.epsilon:.4g}, {together.delta:g})"


def _decisions(ledger: Ledger, together: Standing | None) -> str:
    """What there is to decide on a model of real patients, as Markdown; nothing of simulated ones."""
    if ledger.simulated or ledger.unit == "volume":
        return ""
    spent = together.epsilon if together else ledger.epsilon
    weak = (
        "- **ε above 20 is a figure without a promise**: it excludes no attack. Release only what would do no harm "
        "without a guarantee.\n"
        if ledger.epsilon > 20
        else ""
    )
    return (
        f"- **Is ε = {ledger.epsilon:g} little enough, and ε = {spent:.4g} for everything that was tried?** The second "
        "figure is the one that a patient has really given, if more than this model was shown. NIST SP 800-226 sets "
        "no limit; 1 is strong, 10 rests on attacks being far weaker than the worst case.\n"
        f"{weak}"
        "- **What is covered**: the weights and all that is computed from them, by whoever, with whatever else they "
        "know. What is not: what is learnt of groups of patients, which is the purpose, and all else that leaves the "
        "house.\n"
        "- **A patient withdraws**: take them out of the cohort (`exclude:` in its manifest). Models made before can't "
        "forget them; this guarantee is what protects them there. A model made anew spends anew.\n"
    )


def joint_statement(together: Standing, private_data: str) -> str:
    """What private models of one cohort reveal together, as Markdown."""
    return (
        f"**Together, {together.runs} private model(s) of {private_data} spent "
        f"({together.epsilon:.4g}, {together.delta:g}) per patient.** Whoever sees several of them learns more than "
        "from any one. It's the most that any one patient has spent, those who have left since included."
    )


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
        PrivacyError: the model has no guarantee, or one for volumes alone, or the record doesn't know it.
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
