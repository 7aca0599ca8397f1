"""Does a segmenter that has seen phantoms alone find real hearts? `python -m benchmarks.sim_to_real [--data DIR]`.

The study's segmenter, in the study's way of training, on phantoms (a few minutes; or the better part of an hour) and on
one half of ACDC; all are tested on ACDC after the study's own preparation. Dice is that of whole volumes, over both
phases; intervals are over patients. Rows that were trained before are only tested again.

The phantoms were shaped by looking at pictures of the first half and of two patients of the second, and by this Dice on
the first half: the second is the fairer test.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from benchmarks import keep
from benchmarks.acdc import RUNS, halves, parser
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Patients, load_manifest, prepare
from cardiac_ldm.evaluation.control import segmentation_dice
from cardiac_ldm.evaluation.intervals import bootstrap
from cardiac_ldm.models.anatomy import Segmenter
from cardiac_ldm.training.anatomy import train_segmenter
from cardiac_ldm.training.checkpoint import save_weights

ROWS = {
    "phantoms, minutes": {"patients": 400, "steps": 1200, "batch": 3, "learning_rate": 5e-3},
    "phantoms, better": {"patients": 1500, "steps": 4000, "batch": 4, "learning_rate": 5e-3},
    "half of ACDC": {"patients": None, "steps": 1200, "batch": 3, "learning_rate": 5e-3},
}


def trained(row: str, real: Patients) -> Segmenter:
    """The segmenter of a row, trained now or before."""
    settings = dict(ROWS[row])
    n = settings.pop("patients")
    phantoms = load_manifest("phantom_public")
    limits = {"train": n, "validation": 1, "test": 1}
    patients = prepare(phantoms, store=RUNS / "cohorts", limits=limits).split("train") if n else real
    key = hashlib.sha256(json.dumps([patients.path.name, settings], sort_keys=True).encode()).hexdigest()[:12]
    path = RUNS / "sim_to_real" / f"{key}.safetensors"
    if path.exists():
        segmenter = Segmenter()
        segmenter.load_state_dict(load_file(path))
        return segmenter.eval()
    segmenter, _ = train_segmenter(patients, **settings, seed=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(segmenter, path)
    return segmenter


def tested(segmenter: Segmenter, cohorts: Sequence[Patients]) -> pd.DataFrame:
    """Dice of every volume, with its patient, group and phase."""
    parts = []
    for patients in cohorts:
        dice, patient_index = segmentation_dice(segmenter, patients), patients.patient_index
        phase = np.where(patients.attributes[:, ATTRIBUTE_NAMES.index("ESED")] == 1, "ED", "ES")
        who = {
            "patient": np.array(patients.ids)[patient_index],
            "group": np.array(patients.groups)[patient_index],
            "phase": phase,
        }
        parts.append(dice.assign(**who))
    return pd.concat(parts, ignore_index=True)


def summary(dice: pd.DataFrame) -> dict[str, object]:
    """Mean Dice of each structure over volumes, its interval over patients, and the means by phase and group."""
    structures = [column for column in dice if column not in ("patient", "group", "phase")]
    said: dict[str, object] = {"n_patients": int(dice.patient.nunique())}
    for structure in structures:
        means = dice.groupby("patient")[structure].mean().to_numpy(np.float64)
        estimate = bootstrap(
            lambda chosen, means=means: float(np.nanmean(means[chosen])), len(means), resamples=1000, seed=0
        )
        said |= {
            f"{structure} dice": estimate.value,
            f"{structure} low": estimate.low,
            f"{structure} high": estimate.high,
        }
        said |= {f"{structure} {name}": value for name, value in dice.groupby("phase")[structure].mean().items()}
        said |= {f"{structure} {name}": value for name, value in dice.groupby("group")[structure].mean().items()}
    return said


def main() -> None:
    """Train what has not been trained, test, keep one result a row and test set."""
    arguments = parser(__doc__)
    arguments.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which rows; all unless told")
    given = arguments.parse_args()
    first, second = halves(given.data)
    rows = []
    for row in given.rows or ROWS:
        segmenter = trained(row, first[0])
        rest = tested(segmenter, second)
        if row != "half of ACDC":
            everyone = pd.concat([tested(segmenter, first), rest])
            rows.append({"trained on": row, "tested on": "all of ACDC", **ROWS[row], **summary(everyone)})
        rows.append({"trained on": row, "tested on": "second half", **ROWS[row], **summary(rest)})
        print(rows[-1], flush=True)
    keep("sim_to_real", rows=rows)


if __name__ == "__main__":
    main()
