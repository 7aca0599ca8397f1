"""Whether the hearts are the ones that were asked for: phase, volumes, ejection fractions, wall thickness."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot

from cardiac_ldm.cohort import (
    ATTRIBUTE_NAMES,
    ATTRIBUTES,
    GRID,
    Patients,
    Volumes,
    measure_attributes,
    require_labelled,
    require_public,
    require_releasable,
)
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS, mean, rows_of
from cardiac_ldm.models.anatomy import N_LABELS, PhaseClassifier, Segmenter
from cardiac_ldm.models.device import device_of
from cardiac_ldm.progress import tqdm

STRUCTURES = {"RV": 1, "myocardium": 2, "LV": 3}
MOVES = ("LVEDV", "LVEF", "RVEDV", "MYOEDTHICK", "ANGLE", "AGE", "SEX")
"""What is moved, one at a time, to see what moves with it."""
STEPS = {a.name: (a.high - a.low) / 6 for a in ATTRIBUTES} | {"SEX": 1.0}
"""How far, in the attribute's unit: a sixth of its fixed public range, a standard deviation of patients who fill it."""
MAGNIFIED = ("LVEDV", "RVEDV", "MYOEDTHICK")
"""What `magnified` changes and an end-diastolic volume tells."""
CALIBRATED = ("LVEDV", "LVESV", "LVEF", "RVEDV", "RVESV", "RVEF", "MYOEDTHICK", "MYOESTHICK", "ANGLE")
"""Attributes whose calibration is shown."""
STEERED = 10
"""Patients whose requests are asked anew, in many ways."""
DIALLED = {"LVEDV": "ED", "LVEF": "ES", "MYOEDTHICK": "ED"}
"""What a reader may move in a picture, and the phase that shows it: an ejection fraction shows at end-systole."""
_BATCH = 8
_ESED, _DEPTH = (ATTRIBUTE_NAMES.index(name) for name in ("ESED", "DEPTH"))
Drawer = Callable[[np.ndarray, np.ndarray], Volumes]
"""Draws volumes for attributes (n, 14) requested by patients (n,)."""
Reader = Callable[[np.ndarray, np.ndarray], pd.DataFrame]
"""Draws volumes for attributes (n, 14) requested by patients (n,) and gives what `read_anatomy` says of them."""


@torch.no_grad()
def read_anatomy(volumes: Volumes, segmenter: Segmenter, classifier: PhaseClassifier) -> pd.DataFrame:
    """Measure what volumes show, beside the attributes requested, NaN where nothing was.

    Returns:
        A tidy table with columns patient, attribute, requested, measured in the attribute's unit: for every patient or
        request one row per attribute that labels tell, NaN where the segmentation lacks the structure, and one ESED
        row per volume, measured as the probability of end-diastole. DEPTH is left out: padding sets it, no heart has
        to be drawn for it.

    Raises:
        ParameterError: a volume's phase isn't given.
    """
    attributes, phases = volumes.attributes, volumes.attributes[:, _ESED]
    if unknown := np.flatnonzero(np.isnan(phases)).tolist():
        raise ParameterError(f"attributes: ESED is missing for volumes {unknown}; ask for 0 (ES) or 1 (ED)")
    labels, looks = [], []
    batches = torch.from_numpy(volumes.images).to(device_of(segmenter)).split(_BATCH)
    for images in tqdm(batches, desc="anatomy", unit="batch", leave=False):
        labels.append(segmenter(images).argmax(dim=1).to(torch.uint8).cpu().numpy())
        looks.append(classifier(images).softmax(dim=1)[:, 1].cpu().numpy())
    segmented, predicted = np.concatenate(labels), np.concatenate(looks)
    rows: list[tuple[int, str, float, float]] = []
    for owner in np.unique(volumes.patient_index):
        own = np.flatnonzero(volumes.patient_index == owner)
        measured = measure_attributes({"ED" if phases[i] else "ES": segmented[i] for i in own}, GRID.spacing_mm)
        requested = dict(zip(ATTRIBUTE_NAMES, attributes[own[0]], strict=True))
        rows += [(owner, name, requested[name], value) for name, value in measured.items() if name != "DEPTH"]
        rows += [(owner, "ESED", phases[i], predicted[i]) for i in own]
    return pd.DataFrame(rows, columns=["patient", "attribute", "requested", "measured"])


def phase_accuracy(table: pd.DataFrame) -> tuple[Callable[[np.ndarray], float], int]:
    """Share of volumes whose predicted phase is the one requested: the statistic over patients, and their number."""
    volumes = table[(table.attribute == "ESED") & table.requested.notna()]
    right = (volumes.requested == (volumes.measured > 0.5)).groupby(volumes.patient).agg(["sum", "count"])
    found, requested = right.to_numpy(np.float64).T
    return lambda patients: float(found[patients].sum() / requested[patients].sum()), len(right)


def phase_order(table: pd.DataFrame) -> tuple[Callable[[np.ndarray], float], int]:
    """Share of requests for both phases whose end-diastole looks more like one: the statistic, and their number.

    A dilated heart at end-systole looks like many another's end-diastole, even in real patients; rarely like its own.
    """
    volumes = table[(table.attribute == "ESED") & table.requested.notna()]
    pairs = (
        volumes.pivot_table(index="patient", columns="requested", values="measured")
        .reindex(columns=[0.0, 1.0])
        .dropna()
    )
    right = (pairs[1.0] > pairs[0.0]).to_numpy(np.float64)
    return lambda patients: float(right[patients].mean()), len(right)


def agreement(table: pd.DataFrame, attribute: str) -> tuple[dict[str, Callable[[np.ndarray], float]], int]:
    """Pearson's r, slope, bias (measured - asked) and mean absolute error: statistics over patients, and their number.

    The slope is that of measured on asked, by least squares: a model that draws the mean, whatever is asked, has 0.
    Patients whose attribute wasn't asked for, or can't be measured, don't count. r is NaN where a side is constant, the
    slope where all ask for the same.
    """
    known = table[table.attribute == attribute].dropna()
    requested, measured = known.requested.to_numpy(np.float64), known.measured.to_numpy(np.float64)

    def correlation(patients: np.ndarray) -> float:
        x, y = requested[patients], measured[patients]
        return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else float("nan")

    def slope(patients: np.ndarray) -> float:
        x, y = requested[patients] - requested[patients].mean(), measured[patients]
        return float(x @ y / (x @ x)) if x.any() else float("nan")

    statistics = {
        "correlation": correlation,
        "slope": slope,
        "bias": lambda patients: float((measured[patients] - requested[patients]).mean()),
        "mean absolute error": lambda patients: float(np.abs(measured[patients] - requested[patients]).mean()),
    }
    return statistics, len(known)


def segmentation_dice(segmenter: Segmenter, patients: Patients) -> pd.DataFrame:
    """Dice of every whole volume against the labels it was given: one column per structure, NaN where it's absent.

    Raises:
        CohortError: no patient has labels but predicted ones.
    """
    patients = require_labelled(patients, "the Dice score")
    volumes = np.arange(len(patients.patient_index))
    return volume_dice(segmenter, patients.images(volumes), patients.labels(volumes))


@torch.no_grad()
def volume_dice(segmenter: Segmenter, images: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Dice of images (n, 13, 96, 96) against labels of that shape: one column per structure, NaN where it's absent."""
    score = DiceMetric(include_background=False, reduction="none")
    for start in range(0, len(images), _BATCH):
        some = slice(start, start + _BATCH)
        predicted = segmenter(torch.from_numpy(images[some]).to(device_of(segmenter))).argmax(dim=1, keepdim=True).cpu()
        score(one_hot(predicted, N_LABELS), one_hot(torch.from_numpy(labels[some])[:, None], N_LABELS))
    return pd.DataFrame(score.aggregate().numpy(), columns=list(STRUCTURES))


def calibration(table: pd.DataFrame, bins: int = 6, *, resamples: int, seed: int) -> pd.DataFrame:
    """Mean measured of patients who ask for about the same: at most `bins` bins of equally many, at least 8 in each.

    Returns:
        A row per bin of each attribute in CALIBRATED, in rising order of the request: attribute, requested (mean),
        measured (mean), low, high (95 % interval of the latter over patients), n_patients. One row, of NaN, where fewer
        than 8 patients are known.
    """
    rows = []
    for attribute in CALIBRATED:
        known = table[table.attribute == attribute].dropna().sort_values("requested")
        for rows_of_bin in np.array_split(np.arange(len(known)), max(1, min(bins, len(known) // MIN_PATIENTS))):
            part = known.iloc[rows_of_bin]
            about = {"attribute": attribute, "requested": part.requested.mean()}
            rows.append(about | _interval("measured", part.measured.to_numpy(np.float64), resamples, seed))
    return pd.DataFrame(rows)


def base_conditions(patients: Patients, n_patients: int) -> tuple[np.ndarray, np.ndarray]:
    """What at most `n_patients` ask for, at end-diastole and end-systole: attributes (2n, 14), patients int64 (2n,).

    They are spread over the split, since cohorts are often sorted by disease.

    Raises:
        PrivacyError: the patients are private and not simulated.
        ParameterError: fewer than 8 of them have both phases.
    """
    require_releasable(patients, "the attributes of patients, through what is asked for")
    phases = patients.attributes[:, _ESED]
    both = [rows for rows in rows_of(patients.patient_index) if {0.0, 1.0} <= set(phases[rows])]
    if min(len(both), n_patients) < MIN_PATIENTS:
        raise ParameterError(
            f"{patients.name}: {len(both)} patients ({patients.split}) have both phases, and {n_patients} are wanted; "
            f"their requests need at least {MIN_PATIENTS} for an interval"
        )
    some = np.linspace(0, len(both) - 1, min(len(both), n_patients)).round().astype(np.int64)
    rows = np.array([[both[i][phases[both[i]] == phase][0] for phase in (1, 0)] for i in some])
    return patients.attributes[rows.ravel()], np.repeat(np.arange(len(some)), 2)


def moved(attributes: np.ndarray, name: str, by: np.ndarray | float) -> np.ndarray:
    """Requests (n, 14) with one attribute moved by so much, in its unit.

    What physics ties to it follows, or no heart could have both: EF = 100 (EDV - ESV) / EDV leaves two of three to
    choose. EF stays where EDV moves, and ESV goes in proportion; EDV stays where EF moves, and ESV follows. MYOESTHICK
    goes in proportion to MYOEDTHICK: a wall thickens by its share. All else stays, ventricles' stroke volumes too,
    which may differ, as where a valve leaks.
    """
    columns = dict(zip(ATTRIBUTE_NAMES, attributes.astype(np.float64).T, strict=True))
    before = columns[name]
    after = columns[name] = before + by
    if name in ("LVEDV", "RVEDV"):
        columns[f"{name[:2]}ESV"] = columns[f"{name[:2]}ESV"] * after / before
    elif name in ("LVEF", "RVEF"):
        columns[f"{name[:2]}ESV"] = columns[f"{name[:2]}EDV"] * (1 - after / 100)
    elif name == "MYOEDTHICK":
        columns["MYOESTHICK"] = columns["MYOESTHICK"] * after / before
    return np.stack(list(columns.values()), axis=1).astype(np.float32)


def counterfactuals(attributes: np.ndarray) -> dict[str, np.ndarray]:
    """The requests (n, 14) anew for every attribute in MOVES, moved by one step towards the middle of its range.

    So nobody is asked for what no patient has, and SEX becomes the other. Drawn by a call of `synthesise` each, with
    the same patients in the same order as the requests themselves, they start from the same noise. Attributes that not
    all patients know are left out.
    """
    known = [name for name in MOVES if np.isfinite(attributes[:, ATTRIBUTE_NAMES.index(name)]).all()]
    return {name: moved(attributes, name, STEPS[name] * _direction(attributes, name)) for name in known}


def _direction(attributes: np.ndarray, name: str) -> np.ndarray:
    """Int (n,): where the middle of the attribute's range lies from each request, 1 above it or -1 below."""
    number = ATTRIBUTE_NAMES.index(name)
    return np.where(attributes[:, number] < (ATTRIBUTES[number].low + ATTRIBUTES[number].high) / 2, 1, -1)


def steer(patients: Patients, read: Reader, *, resamples: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Move one attribute of STEERED patients' requests at a time: what was read of all volumes, and its `response`.

    Raises:
        PrivacyError, ParameterError: as `base_conditions`.
    """
    attributes, patient_index = base_conditions(patients, STEERED)
    conditions = {"nothing": attributes} | counterfactuals(attributes)
    anatomy = pd.concat([read(some, patient_index).assign(moved=name) for name, some in conditions.items()])
    return anatomy, response(anatomy, attributes, patient_index, resamples=resamples, seed=seed)


def at_levels(attributes: np.ndarray) -> dict[tuple[str, float], np.ndarray]:
    """Requests (n, 14) anew with each attribute in DIALLED, by its name, `moved` to each of five levels.

    The levels are a step (STEPS) apart and lie round the middle of the attribute's fixed public range.
    """
    numbers = {name: ATTRIBUTE_NAMES.index(name) for name in DIALLED}
    levels = {name: np.linspace(ATTRIBUTES[i].low, ATTRIBUTES[i].high, 7)[1:-1] for name, i in numbers.items()}
    return {
        (name, float(level)): moved(attributes, name, level - attributes[:, numbers[name]])
        for name, some in levels.items()
        for level in some
    }


def draw_levels(
    patients: Patients, draw: Drawer, segmenter: Segmenter, classifier: PhaseClassifier
) -> tuple[Volumes, pd.DataFrame]:
    """Draw one patient's request `at_levels`, always from the same noise: the volumes that show it, and what was read.

    Returns:
        One volume per attribute and level, in the phase that shows the attribute, and a table with a row for each:
        attribute, phase, requested and measured in the attribute's unit, NaN where the segmentation lacks it.

    Raises:
        PrivacyError, ParameterError: as `base_conditions`; or no patient has all attributes that are moved.
    """
    attributes, patient_index = base_conditions(patients, STEERED)
    known = np.isfinite(attributes[::2, [ATTRIBUTE_NAMES.index(name) for name in DIALLED]]).all(axis=1)
    if not known.any():
        raise ParameterError(f"{patients.name}: none of {len(known)} patients has all of {', '.join(DIALLED)}")
    pair = slice(2 * known.argmax(), 2 * known.argmax() + 2)
    rows, images, shown = [], [], []
    for (name, level), requested in at_levels(attributes[pair]).items():
        drawn = draw(requested, patient_index[pair])  # a call each: the noise of the texture depends on the row
        read = read_anatomy(drawn, segmenter, classifier).set_index("attribute").measured
        rows.append({"attribute": name, "phase": DIALLED[name], "requested": level, "measured": read[name]})
        row = ("ED", "ES").index(DIALLED[name])
        images.append(drawn.images[row])
        shown.append(requested[row])
    volumes = Volumes("levels", np.stack(images), np.stack(shown), np.repeat(patient_index[pair][:1], len(rows)))
    return volumes, pd.DataFrame(rows)


def response(
    table: pd.DataFrame, attributes: np.ndarray, patient_index: np.ndarray, *, resamples: int, seed: int
) -> pd.DataFrame:
    """How far every attribute moves, in what is drawn, when one of them is moved by one step and the noise stays.

    table: of `read_anatomy`, for the requests, attributes (n, 14) of patients (n,), and their `counterfactuals`, with
    the column moved: "nothing" or which attribute.

    Returns:
        A row per moved and measured attribute: moved, attribute, requested and change (means over patients, as if all
        had been moved upwards), low, high (the change's 95 % interval over patients), n_patients, in the measured
        attribute's unit; and requested_steps, change_steps, low_steps, high_steps in its step (STEPS). Where each
        attribute obeys alone, change equals requested: 1 step where it's the one moved, 0 where it stays. NaN where
        fewer than 8 patients' can be measured both times.
    """
    read = {
        name: part.pivot(index="patient", columns="attribute", values=["requested", "measured"])
        for name, part in table[table.attribute != "ESED"].groupby("moved")
    }
    base, rows = read["nothing"], []
    for name in (n for n in MOVES if n in read):
        direction = pd.Series(_direction(attributes, name), patient_index).groupby(level=0).first()
        change = (read[name] - base).mul(direction, axis="index")
        for attribute in (a for a in ATTRIBUTE_NAMES if a in base["measured"]):
            patients = change.xs(attribute, axis="columns", level="attribute").dropna()
            about = {"moved": name, "attribute": attribute, "requested": patients.requested.mean()}
            rows.append(about | _interval("change", patients.measured.to_numpy(np.float64), resamples, seed))
    found = pd.DataFrame(rows)
    numbers = found[["requested", "change", "low", "high"]]
    return found.join(numbers.div(found.attribute.map(STEPS), axis="index").add_suffix("_steps"))


def public_span(patients: Patients) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of the attributes in MAGNIFIED among public patients.

    Raises:
        PrivacyError: they are private, simulated or not.
    """
    require_public(patients, "the smallest and the largest hearts among its patients")
    columns = {name: patients.attributes[:, ATTRIBUTE_NAMES.index(name)].astype(np.float64) for name in MAGNIFIED}
    return {name: (float(np.nanmin(column)), float(np.nanmax(column))) for name, column in columns.items()}


def ladder(low: float, high: float) -> np.ndarray:
    """Values (10,) to ask for: 60, 35, 10 % below `low`, four in equal ratios from `low` to `high`, as far above it."""
    beyond = np.array([0.1, 0.35, 0.6])
    return np.concatenate([low * (1 - beyond[::-1]), np.geomspace(low, high, 4), high * (1 + beyond)])


def magnified(attributes: np.ndarray, lvedv: float) -> np.ndarray:
    """Requests (n, 14) for hearts of the same shape with this LVEDV (mL), as if each were magnified.

    Volumes go in proportion to LVEDV, wall thickness and DEPTH (in whole slices, no more than the grid has) to its cube
    root; ejection fractions, ANGLE and who the patient is stay.
    """
    scale = lvedv / attributes[:, ATTRIBUTE_NAMES.index("LVEDV")].astype(np.float64)
    power = {"mL": 1.0, "mm": 1 / 3, "slices": 1 / 3}
    after = attributes * np.stack([scale ** power.get(a.unit, 0.0) for a in ATTRIBUTES], axis=1)
    after[:, _DEPTH] = after[:, _DEPTH].round().clip(1, GRID.n_slices)
    return after.astype(np.float32)


def reach(
    patients: Patients, span: Mapping[str, Sequence[float]], read: Reader, *, resamples: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Request hearts smaller and larger than all public patients', at end-diastole: what was read, and `beyond_range`.

    span: `public_span` of the public patients.

    Raises:
        PrivacyError, ParameterError: as `base_conditions` of patients.
    """
    attributes, patient_index = (rows[::2] for rows in base_conditions(patients, STEERED))
    levels = ladder(*span["LVEDV"])
    anatomy = pd.concat([read(magnified(attributes, level), patient_index).assign(level=level) for level in levels])
    return anatomy, beyond_range(anatomy, span, resamples=resamples, seed=seed)


def beyond_range(
    table: pd.DataFrame, span: Mapping[str, Sequence[float]], *, resamples: int, seed: int
) -> pd.DataFrame:
    """What is measured against what is asked, inside and outside of the values that public patients have.

    The segmenter hasn't seen hearts outside either: what it can't read shows here as if it weren't drawn.

    table: of `read_anatomy`, for requests of `magnified` at several LVEDVs, which the column level tells. span: of
    `public_span`.

    Returns:
        A row per attribute in MAGNIFIED and level: attribute, level, requested and measured (means over patients), low,
        high (95 % interval of the latter), n_patients, and where: whether level lies "below", "inside" or "above" the
        public LVEDVs. NaN where fewer than 8 patients' can be measured.
    """
    smallest, largest = span["LVEDV"]
    rows = []
    for attribute in MAGNIFIED:
        for level, own in table[table.attribute == attribute].groupby("level"):
            patients = own.dropna()
            about = {"attribute": attribute, "level": level, "requested": patients.requested.mean()}
            rows.append(about | _interval("measured", patients.measured.to_numpy(np.float64), resamples, seed))
    found = pd.DataFrame(rows)
    return found.assign(where=np.select([found.level < smallest, found.level > largest], ["below", "above"], "inside"))


def _interval(name: str, values: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """The mean over patients (n,) under this name, with low, high and n_patients; NaN where they are too few."""
    found = mean(values, resamples=resamples, seed=seed)
    return {name: found.value, "low": found.low, "high": found.high, "n_patients": found.n_patients}
