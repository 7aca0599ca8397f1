"""Whether the hearts are the ones that were asked for: phase, volumes, ejection fractions, wall thickness."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from tqdm import tqdm

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Patients, measure_attributes, require_labelled
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.anatomy import N_LABELS, PhaseClassifier, Segmenter

STRUCTURES = {"RV": 1, "myocardium": 2, "LV": 3}
_BATCH = 8
_ESED = ATTRIBUTE_NAMES.index("ESED")


@torch.no_grad()
def read_anatomy(
    images: np.ndarray,
    attributes: np.ndarray,
    owners: np.ndarray,
    segmenter: Segmenter,
    classifier: PhaseClassifier,
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure what volumes (n, 13, 96, 96) show, beside the attributes (n, 14) asked for, NaN where nothing was asked.

    Returns:
        A tidy table with columns owner, attribute, asked, measured in the attribute's unit: for every patient or
        request one row per attribute that labels tell, NaN where the segmentation lacks the structure, and one ESED
        row per volume, measured as the probability of end-diastole. DEPTH is left out: padding sets it, no heart has
        to be drawn for it.

    Raises:
        ParameterError: a volume's phase isn't given.
    """
    if unknown := np.flatnonzero(np.isnan(attributes[:, _ESED])).tolist():
        raise ParameterError(f"attributes: ESED is missing for volumes {unknown}; ask for 0 (ES) or 1 (ED)")
    labels, phases = [], []
    for start in tqdm(range(0, len(images), _BATCH), desc="anatomy", unit="batch", disable=not progress, leave=False):
        volumes = torch.from_numpy(images[start : start + _BATCH])
        labels.append(segmenter(volumes).argmax(dim=1).to(torch.uint8).numpy())
        phases.append(classifier(volumes).softmax(dim=1)[:, 1].numpy())
    segmented, predicted = np.concatenate(labels), np.concatenate(phases)
    rows: list[tuple[int, str, float, float]] = []
    for owner in np.unique(owners):
        own = np.flatnonzero(owners == owner)
        by_phase = {"ED" if attributes[i, _ESED] else "ES": segmented[i] for i in own}
        measured = measure_attributes(by_phase, GRID.spacing_mm)
        asked = dict(zip(ATTRIBUTE_NAMES, attributes[own[0]], strict=True))
        rows += [(owner, name, asked[name], value) for name, value in measured.items() if name != "DEPTH"]
        rows += [(owner, "ESED", attributes[i, _ESED], predicted[i]) for i in own]
    return pd.DataFrame(rows, columns=["owner", "attribute", "asked", "measured"])


def phase_accuracy(table: pd.DataFrame) -> tuple[Callable[[np.ndarray], float], int]:
    """Share of volumes whose predicted phase is the one asked for: the statistic over patients, and their number."""
    volumes = table[(table.attribute == "ESED") & table.asked.notna()]
    right = (
        (volumes.asked == (volumes.measured > 0.5)).groupby(volumes.owner).agg(["sum", "count"]).to_numpy(np.float64)
    )
    return lambda patients: float(right[patients, 0].sum() / right[patients, 1].sum()), len(right)


def phase_order(table: pd.DataFrame) -> tuple[Callable[[np.ndarray], float], int]:
    """Share of requests for both phases whose end-diastole looks more like one: the statistic, and their number.

    A dilated heart at end-systole looks like many another's end-diastole, even in real patients; rarely like its own.
    """
    volumes = table[(table.attribute == "ESED") & table.asked.notna()]
    pairs = volumes.pivot_table(index="owner", columns="asked", values="measured").reindex(columns=[0.0, 1.0]).dropna()
    right = (pairs[1.0] > pairs[0.0]).to_numpy(np.float64)
    return lambda patients: float(right[patients].mean()), len(right)


def agreement(table: pd.DataFrame, attribute: str) -> tuple[dict[str, Callable[[np.ndarray], float]], int]:
    """Pearson's r, bias (measured - asked) and mean absolute error: statistics over patients, and their number.

    Patients whose attribute wasn't asked for, or can't be measured, don't count. r is NaN where a side is constant.
    """
    known = table[table.attribute == attribute].dropna()
    asked, measured = known.asked.to_numpy(np.float64), known.measured.to_numpy(np.float64)

    def correlation(patients: np.ndarray) -> float:
        x, y = asked[patients], measured[patients]
        return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else float("nan")

    def bias(patients: np.ndarray) -> float:
        return float((measured[patients] - asked[patients]).mean())

    def error(patients: np.ndarray) -> float:
        return float(np.abs(measured[patients] - asked[patients]).mean())

    return {"correlation": correlation, "bias": bias, "mean absolute error": error}, len(known)


def segmentation_dice(segmenter: Segmenter, patients: Patients) -> pd.DataFrame:
    """Dice of every whole volume against the labels it was given: one column per structure, NaN where it's absent.

    Raises:
        CohortError: no patient has labels but predicted ones.
    """
    patients = require_labelled(patients, "the Dice score")
    volumes = np.arange(len(patients.owners))
    return volume_dice(segmenter, patients.images(volumes), patients.labels(volumes))


@torch.no_grad()
def volume_dice(segmenter: Segmenter, images: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Dice of images (n, 13, 96, 96) against labels of that shape: one column per structure, NaN where it's absent."""
    score = DiceMetric(include_background=False, reduction="none")
    for start in range(0, len(images), _BATCH):
        some = slice(start, start + _BATCH)
        predicted = segmenter(torch.from_numpy(images[some])).argmax(dim=1, keepdim=True)
        score(one_hot(predicted, N_LABELS), one_hot(torch.from_numpy(labels[some])[:, None], N_LABELS))
    return pd.DataFrame(score.aggregate().numpy(), columns=list(STRUCTURES))
