"""What is requested of a model: one row of attributes for each synthetic patient, whose physics holds.

Rows come from public patients, from a private table of attributes, or from a table that somebody wrote. What a row
leaves open of the heart is taken from a public patient who is like it: a model that is asked for an ejection fraction
alone, with no volumes, doesn't heed it.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from cardiac_ldm.cohort.attributes import ATTRIBUTE_NAMES, ATTRIBUTES
from cardiac_ldm.cohort.guards import require_public
from cardiac_ldm.cohort.patients import Patients
from cardiac_ldm.cohort.tables import UNKNOWN
from cardiac_ldm.errors import CohortError, PrivacyError

OPEN = ("AGE", "SEX", "BMI")
"""Attributes that stay unknown where a row doesn't tell them: they are no heart's."""
_DONORS = 10
"""Public patients most like a row, one of whom completes it."""
_ESED = ATTRIBUTE_NAMES.index("ESED")
_SAME = 4
"""So many values that agree with a private patient's, and none that doesn't, are no coincidence."""


def of_public(public: Patients) -> np.ndarray:
    """The attributes of public patients, float32 (n, 14), a row each; those alone whose heart is known and consistent.

    Raises:
        PrivacyError: they're private.
        CohortError: nobody is left.
    """
    require_public(public, "their attributes, without noise")
    rows = public.attributes[public.offsets[:-1]].copy()
    rows[:, _ESED] = np.nan
    heart = [i for i, name in enumerate(ATTRIBUTE_NAMES) if name not in (*OPEN, "ESED")]
    sound = np.isfinite(rows[:, heart]).all(axis=1)
    for side in ("LV", "RV"):
        full, empty = (rows[:, ATTRIBUTE_NAMES.index(side + what)] for what in ("EDV", "ESV"))
        sound &= empty < full
    if not sound.any():
        raise CohortError(f"{public.name}: no patient ({public.split}) has all attributes of the heart; name a CSV")
    return rows[sound]


def of_table(path: Path) -> np.ndarray:
    """The rows of a CSV whose columns are attributes by our names, in our units: float32 (n, 14), NaN where empty.

    Raises:
        CohortError: a column or value is wrong, or physics forbids it; the message names file and value.
    """
    try:
        text = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").rename(columns=str.strip)
        if not isinstance(text.index, pd.RangeIndex):  # pandas would take the first cells for names of rows
            raise ValueError("a row has more cells than the header; remove those, or a comma at the rows' ends")
        names = list(text)
        wanted = [name for name in ATTRIBUTE_NAMES if name in names and name != "ESED"]
        if unknown := [name for name in names if name not in wanted]:
            known = ", ".join(name for name in ATTRIBUTE_NAMES if name != "ESED")
            raise ValueError(f"has the column {unknown[0]!r}; columns are attributes: {known}")
        if not len(text):
            raise ValueError("has no rows; add the patients that are wanted")
    except (OSError, ValueError) as error:
        raise CohortError(f"attributes: {path}: {error}") from error
    rows = np.full((len(text), len(ATTRIBUTES)), np.nan, np.float64)
    for name in wanted:
        for number, cell in enumerate(text[name]):
            rows[number, ATTRIBUTE_NAMES.index(name)] = _number(path, name, cell)
    for side in ("LV", "RV"):
        full, empty, fraction = (rows[:, ATTRIBUTE_NAMES.index(side + what)] for what in ("EDV", "ESV", "EF"))
        for a, b, ef in zip(full, empty, fraction, strict=True):
            if b >= a:
                raise CohortError(f"attributes: {path}: {side}ESV {b:g} mL isn't below {side}EDV {a:g} mL; correct it")
            if abs(100 * (1 - b / a) - ef) > 1:
                raise CohortError(
                    f"attributes: {path}: {side}EF is {ef:g} %, but {a:g} and {b:g} mL make {100 * (1 - b / a):.0f} %; "
                    "leave one of the three empty"
                )
            left = {"EDV": (a, b / (1 - ef / 100)), "ESV": (b, a * (1 - ef / 100)), "EF": (ef, 100 * (1 - b / a))}
            for what, (given, follows) in left.items():
                attribute = ATTRIBUTES[ATTRIBUTE_NAMES.index(side + what)]
                if np.isnan(given) and (follows < attribute.low or follows > attribute.high):
                    raise CohortError(
                        f"attributes: {path}: the other two make {side}{what} {follows:.0f} {attribute.unit}; expected "
                        f"{attribute.low:g} to {attribute.high:g}, the range that models know"
                    )
    return rows.astype(np.float32)


def _number(path: Path, name: str, cell: str) -> float:
    cell = cell.strip()
    if cell.lower() in UNKNOWN:
        return np.nan
    attribute = ATTRIBUTES[ATTRIBUTE_NAMES.index(name)]
    try:
        value = float({"F": "0", "M": "1"}.get(cell, cell) if name == "SEX" else cell)
    except ValueError:
        value = np.nan
    if not attribute.low <= value <= attribute.high or (name == "SEX" and value not in (0, 1)):
        raise CohortError(
            f"attributes: {path}: {name} is {cell}; expected {attribute.low:g} to {attribute.high:g} "
            f"{attribute.unit}".rstrip()
            + ", the range that models know"
        )
    return value


def refuse_private(path: Path, rows: np.ndarray, patients: Patients, root: Path | None) -> None:
    """Raise PrivacyError where a table lies with real private patients' files, or holds their attributes."""
    instead = (
        "attributes of private patients leave with noise alone: request `private`, a table learnt under the guarantee, "
        "or `public`"
    )
    if not patients.secret:
        return
    if root is not None and path.resolve().is_relative_to(root.resolve()):
        raise PrivacyError(f"attributes: {path} lies in the folder of {patients.name}; {instead}")
    for known in patients.attributes:
        both = np.isfinite(rows) & np.isfinite(known)
        same = np.isclose(rows, known, rtol=1e-2, atol=0.05) & both
        if ((same.sum(axis=1) >= _SAME) & (same == both).all(axis=1)).any():
            raise PrivacyError(f"attributes: {path} holds attributes of patients of {patients.name}; {instead}")


def completed(rows: np.ndarray, public: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows (n, 14) with a whole heart; public: rows (m, 14) of `of_public`, one of which gives what a row leaves open.

    Of EDV, ESV and EF the third follows from two that are given; EF goes before EDV, ESV follows.
    """
    span = np.array([attribute.high - attribute.low for attribute in ATTRIBUTES])
    done = rows.astype(np.float64)
    for row in done:
        apart = (
            np.nanmean(np.abs(np.where(np.isfinite(row), public - row, np.nan)) / span, axis=1)
            if (np.isfinite(row).any())
            else rng.random(len(public))
        )
        donor = public[rng.choice(np.argsort(np.nan_to_num(apart, nan=np.inf))[:_DONORS])].astype(np.float64)
        for side in ("LV", "RV"):
            full, empty, fraction = (ATTRIBUTE_NAMES.index(side + what) for what in ("EDV", "ESV", "EF"))
            if np.isnan(row[fraction]):
                both = np.isfinite(row[[full, empty]]).all()
                row[fraction] = 100 * (1 - row[empty] / row[full]) if both else donor[fraction]
            if np.isnan(row[full]):
                row[full] = row[empty] / (1 - row[fraction] / 100) if np.isfinite(row[empty]) else donor[full]
            row[empty] = row[full] * (1 - row[fraction] / 100)
        for i, name in enumerate(ATTRIBUTE_NAMES):
            if np.isnan(row[i]) and name not in (*OPEN, "ESED"):
                row[i] = donor[i]
    depth = ATTRIBUTE_NAMES.index("DEPTH")
    done[:, depth] = done[:, depth].round()
    return done.astype(np.float32)


def with_end_systole(rows: np.ndarray) -> np.ndarray:
    """Rows float64 (n, 14) as float32: end-systolic volumes are what ejection fractions leave of end-diastolic ones.

    They stay within their own ranges; ejection fractions are then those of the volumes. What is missing stays missing.
    """
    done = rows.astype(np.float64)
    for side in ("LV", "RV"):
        full, fraction, empty = (ATTRIBUTE_NAMES.index(side + what) for what in ("EDV", "EF", "ESV"))
        low, high = ATTRIBUTES[empty].low, ATTRIBUTES[empty].high
        done[:, empty] = np.clip(done[:, full] * (1 - done[:, fraction] / 100), low, high)
        of_volumes = 100 * (1 - done[:, empty] / done[:, full])
        done[:, fraction] = np.where(np.isnan(of_volumes), done[:, fraction], of_volumes)
    return done.astype(np.float32)


def both_phases(row: np.ndarray) -> np.ndarray:
    """A row (14,) at end-diastole and at end-systole: (2, 14)."""
    pair = np.stack([row, row])
    pair[:, _ESED] = 1, 0
    return pair
