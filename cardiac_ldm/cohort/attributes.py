"""The fourteen medical attributes that condition the synthesis, and how they're measured from labels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RV, MYOCARDIUM, LV = 1, 2, 3


_LITRES = (("litres", 1000.0),)
_FRACTION = (("a fraction", 100.0),)
_LENGTHS = (("centimetres", 10.0), ("metres", 1000.0))


@dataclass(frozen=True)
class Attribute:
    """An attribute with its unit, and the FIXED, public range (low, high) that maps it to 0..1 for the networks.

    A value outside limits is no patient's: it's an error. slips: units that such values often turn out to be in, each
    with the factor to ours.
    """

    name: str
    unit: str
    low: float
    high: float
    description: str
    limits: tuple[float, float]
    slips: tuple[tuple[str, float], ...] = ()


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("LVEDV", "mL", 60, 350, "left ventricular volume at end-diastole", (10, 900), _LITRES),
    Attribute("LVESV", "mL", 15, 280, "left ventricular volume at end-systole", (2, 850), _LITRES),
    Attribute("LVEF", "%", 10, 80, "left ventricular ejection fraction", (2, 95), _FRACTION),
    Attribute("RVEDV", "mL", 50, 350, "right ventricular volume at end-diastole", (10, 900), _LITRES),
    Attribute("RVESV", "mL", 10, 250, "right ventricular volume at end-systole", (2, 850), _LITRES),
    Attribute("RVEF", "%", 10, 80, "right ventricular ejection fraction", (2, 95), _FRACTION),
    Attribute(
        "MYOESTHICK", "mm", 4, 24, "mean thickness of the left ventricle's wall at end-systole", (2, 60), _LENGTHS
    ),
    Attribute(
        "MYOEDTHICK", "mm", 3, 18, "mean thickness of the left ventricle's wall at end-diastole", (2, 50), _LENGTHS
    ),
    Attribute("AGE", "years", 18, 90, "age at the scan", (1, 120), (("months", 1 / 12), ("days", 1 / 365.25))),
    Attribute("SEX", "", 0, 1, "0 female, 1 male", (0, 1)),
    Attribute("BMI", "kg/m2", 15, 45, "body mass index", (8, 100), (("g/cm2", 10.0), ("lb/in2", 703.07))),
    Attribute("ESED", "", 0, 1, "phase of the volume: 0 end-systole, 1 end-diastole", (0, 1)),
    Attribute(
        "ANGLE", "degrees", 90, 270, "direction from the LV's to the RV's centre; 0 right, 90 up, 180 left", (0, 360)
    ),
    Attribute("DEPTH", "slices", 4, 13, "slices that show the ventricles; the others are zero padding", (1, 300)),
)
"""In the order of Daum et al., arXiv 2407.16405.

The ranges are chosen from the literature and never from a cohort, so that they give nothing away. Those of the hearts
start about three standard deviations below the mean of healthy women (Petersen et al., JCMR 19:18, 2017), and reach
beyond that of healthy men to diseased hearts (Kawel-Boehm et al., JCMR 22:87, 2020). A value may lie outside.
"""

ATTRIBUTE_NAMES: tuple[str, ...] = tuple(attribute.name for attribute in ATTRIBUTES)


def implausible(name: str, value: float) -> str | None:
    """What is wrong with a value given for an attribute, with the unit it's likely in; None for one within limits."""
    attribute = ATTRIBUTES[ATTRIBUTE_NAMES.index(name)]
    low, high = attribute.limits
    if name == "SEX" and value not in (0, 1):
        return f"SEX is {value:g}; expected 0 or F for female, 1 or M for male"
    if low <= value <= high:
        return None
    units = (f"; it looks like {unit}: give {value * f:.4g}" for unit, f in attribute.slips if low <= value * f <= high)
    return f"{name} is {value:g}, expected {low:g} to {high:g} {attribute.unit}".rstrip() + next(units, "; correct it")


def wall_thickness(myocardial_areas: np.ndarray, cavity_areas: np.ndarray) -> float:
    """Mean wall thickness: myocardial volume over mid-wall surface, from areas (slices,) of the slices with a cavity.

    With the radii of the circles of equal area, r_in and r_out, one slice's myocardium is
    pi (r_out^2 - r_in^2) = (r_out - r_in) * pi (r_out + r_in): thickness times mid-wall length. Slices are pooled, so
    that the small apical ones weigh little. Unit: the root of the areas' unit; NaN where there's no such slice.
    """
    r_in = np.sqrt(cavity_areas / np.pi)
    r_out = np.sqrt((cavity_areas + myocardial_areas) / np.pi)
    mid_wall = np.pi * (r_in + r_out).sum()
    return float(myocardial_areas.sum() / mid_wall) if mid_wall > 0 else float("nan")


def angle_between(lv_centre_xy: np.ndarray, rv_centre_xy: np.ndarray) -> float:
    """Direction in [0, 360) degrees from the LV's to the RV's centre, counter-clockwise from the picture's right.

    Centres are (column, row) in mm, rows running down. An RV on the left lies far from the jump at 0 = 360.
    """
    column, row = rv_centre_xy - lv_centre_xy
    return float(np.degrees(np.arctan2(-row, column)) % 360)


def known_attributes(labels: Mapping[str, np.ndarray], spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    """What `measure_attributes` measures, NaN for what labels leave out: an RV that nobody drew isn't empty."""
    measured = measure_attributes(labels, spacing_mm)
    for side, structure in (("LV", LV), ("RV", RV)):
        for phase in (phase for phase, one in labels.items() if not (one == structure).any()):
            measured[f"{side}{phase}V"] = measured[f"{side}EF"] = np.nan
    return measured


def measure_attributes(labels: Mapping[str, np.ndarray], spacing_mm: tuple[float, float, float]) -> dict[str, float]:
    """Measure what labels tell of one patient: volumes (mL), ejection fractions (%), wall thickness (mm), ANGLE, DEPTH.

    labels: at least one phase ("ED", "ES") -> uint8 (slices, rows, columns): 0 background, 1 RV, 2 myocardium, 3 LV.
    spacing_mm: (z, y, x). Volumes are sums of slices, papillary muscles part of the cavity. What needs a phase or a
    structure that isn't there is NaN. ANGLE is taken at end-diastole where there is one; DEPTH counts the slices that
    are labelled in any phase.
    """
    dz, dy, dx = spacing_mm
    measured: dict[str, float] = {}
    for phase in ("ED", "ES"):
        if phase not in labels:
            measured |= {f"LV{phase}V": np.nan, f"RV{phase}V": np.nan, f"MYO{phase}THICK": np.nan}
            continue
        area = {k: (labels[phase] == k).sum(axis=(1, 2)) * (dy * dx) for k in (RV, MYOCARDIUM, LV)}
        measured[f"LV{phase}V"] = float(area[LV].sum() * dz / 1000)
        measured[f"RV{phase}V"] = float(area[RV].sum() * dz / 1000)
        with_cavity = (area[LV] > 0) & (area[MYOCARDIUM] > 0)
        measured[f"MYO{phase}THICK"] = wall_thickness(area[MYOCARDIUM][with_cavity], area[LV][with_cavity])
    for side in ("LV", "RV"):
        full, empty = measured[f"{side}EDV"], measured[f"{side}ESV"]
        measured[f"{side}EF"] = 100 * (full - empty) / full if full > 0 else np.nan
    shown = labels["ED"] if "ED" in labels else labels["ES"]
    lv, rv = (np.argwhere(shown == k)[:, :0:-1] * (dx, dy) for k in (LV, RV))
    measured["ANGLE"] = angle_between(lv.mean(axis=0), rv.mean(axis=0)) if len(lv) and len(rv) else np.nan
    measured["DEPTH"] = float(np.any([v.any(axis=(1, 2)) for v in labels.values()], axis=0).sum())
    return measured
