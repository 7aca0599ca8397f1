"""Who the simulated patients are: body, heart and disease with their joint distribution, and their scanner."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from cardiac_ldm.cohort.phantom.scanner import Scanner

Population = Literal["clinics", "biobank"]
Moments = tuple[float, float]
"""Mean and standard deviation."""


@dataclass(frozen=True)
class Heart:
    """A group's means and standard deviations: end-diastolic volumes (mL), ejection fractions (%), LV mass (g)."""

    lvedv: Moments
    lvef: Moments
    rvedv: Moments
    rvef: Moments
    mass: Moments


HEALTHY: Mapping[str, Heart] = {
    "male": Heart(lvedv=(166, 32), lvef=(58, 5), rvedv=(182, 36), rvef=(54, 6), mass=(103, 21)),
    "female": Heart(lvedv=(124, 21), lvef=(61, 5), rvedv=(130, 24), rvef=(58, 6), mass=(70, 13)),
}
"""UK Biobank's reference cohort, 368 men and 432 women: Petersen et al., JCMR 19:18, 2017."""

GROUPS: Mapping[str, Heart] = {
    "NOR": Heart(lvedv=(130, 27), lvef=(60, 5), rvedv=(156, 39), rvef=(56, 9), mass=(102, 26)),
    "DCM": Heart(lvedv=(287, 42), lvef=(18, 7), rvedv=(172, 69), rvef=(35, 17), mass=(178, 26)),
    "HCM": Heart(lvedv=(130, 35), lvef=(69, 8), rvedv=(120, 36), rvef=(62, 10), mass=(178, 56)),
    "MINF": Heart(lvedv=(176, 44), lvef=(31, 8), rvedv=(119, 40), rvef=(54, 11), mass=(123, 21)),
    "RV": Heart(lvedv=(107, 40), lvef=(55, 6), rvedv=(198, 54), rvef=(32, 15), mass=(74, 27)),
}
"""ACDC's groups: the annotations of 16 patients each (Bernard et al., IEEE TMI 37(11), 2018; features as published by
Khened et al., Medical Image Analysis 51, 2019). Muscle is given there in mL; 1.05 g/mL. So ACDC is no independent
check of these volumes, only of the images."""


@dataclass(frozen=True)
class Remodelling:
    """How a group's shape departs from health: fractions of wall thickness, of radius and of length."""

    septal_bulge: float = 0.0
    thin_sector: float = 0.0
    akinesia: float = 0.0
    flat_septum: float = 0.0
    sphericity: float = 1.0


REMODELLING: Mapping[str, Remodelling] = {
    "NOR": Remodelling(),
    "DCM": Remodelling(sphericity=1.12),
    "HCM": Remodelling(septal_bulge=0.5),
    "MINF": Remodelling(thin_sector=0.45, akinesia=0.3, sphericity=1.05),
    "RV": Remodelling(flat_septum=0.16),
}


@dataclass(frozen=True)
class Traits:
    """What is drawn for a patient. Volumes in mL, mass in g, lengths in mm, angles in degrees."""

    group: str
    sex: float
    age: float
    bmi: float
    lvedv: float
    lvesv: float
    rvedv: float
    rvesv: float
    mass: float
    length: float
    orientation: float
    scanner: Scanner


def draw_traits(population: Population, rng: np.random.Generator) -> Traits:
    """Draw a patient: normal variables of which the heart's depend on age, body and each other, cut off at 3.

    Volumes fall with age and rise with body size (correlations of -0.2 and 0.25), muscle goes with the volume (0.7). In
    the biobank both ventricles eject one stroke volume, so RV volumes follow from RVEF, which goes with it (0.33: thus
    the spread of RVEDV is the published one). In clinics valves leak: RV and LV volumes correlate (0.6), RVEF goes with
    what equal stroke volumes would need (0.8), and larger hearts are rather men's. The correlations are our own choice.
    """
    age, bmi, size, lv, muscle, rv, ejection, rv_ejection = np.clip(rng.standard_normal(8), -3, 3)
    size = -0.2 * age + 0.25 * bmi + np.sqrt(1 - 0.2**2 - 0.25**2) * size
    muscle = 0.7 * size + np.sqrt(1 - 0.7**2) * muscle
    if population == "biobank":
        group, male = "NOR", bool(rng.random() < 0.48)
        heart = HEALTHY["male" if male else "female"]
    else:
        group = str(rng.choice(list(GROUPS)))
        heart, male = GROUPS[group], bool(0.6 * size + 0.8 * lv > -0.3)
    lvedv, mass = _positive(heart.lvedv, size), _positive(heart.mass, muscle)
    lvef = _fraction(heart.lvef, ejection)
    lv_spread, ef_spread, rv_spread = (sd / mean for mean, sd in (heart.lvedv, heart.lvef, heart.rvedv))
    if population == "biobank":
        stroke = (lv_spread * size + ef_spread * ejection) / np.hypot(lv_spread, ef_spread)
        rvef = _fraction(heart.rvef, 0.33 * stroke + np.sqrt(1 - 0.33**2) * rv_ejection)
        rvedv = lvedv * lvef / rvef
    else:
        rv = 0.6 * size + 0.8 * rv
        needed = lv_spread * size + ef_spread * ejection - rv_spread * rv
        needed /= np.sqrt(lv_spread**2 + ef_spread**2 + rv_spread**2 - 2 * 0.6 * lv_spread * rv_spread)
        rvef, rvedv = _fraction(heart.rvef, 0.8 * needed + 0.6 * rv_ejection), _positive(heart.rvedv, rv)
    length = 92 * (lvedv / 150) ** (1 / 3) * np.clip(rng.normal(1, 0.05), 0.88, 1.12) / REMODELLING[group].sphericity
    rotated = population == "clinics" and rng.random() < 0.2
    direction = (130, 9) if rotated else (203, 13) if population == "clinics" else (160, 11)
    return Traits(
        group=group,
        sex=float(male),
        age=float(np.clip(52 + 16 * age, 18, 90)) if population == "clinics" else float(64 + 7.7 * age),
        bmi=float(26.5 * np.exp(0.155 * bmi)),
        lvedv=lvedv,
        lvesv=lvedv * (1 - lvef / 100),
        rvedv=float(rvedv),
        rvesv=float(rvedv * (1 - rvef / 100)),
        mass=mass,
        length=float(np.clip(length, 62, 122)),
        orientation=float(rng.normal(*direction)),
        scanner=draw_scanner(population, rng),
    )


def draw_scanner(population: Population, rng: np.random.Generator) -> Scanner:
    """Draw a scanner: the biobank's one protocol (Petersen et al., JCMR 18:8, 2016), or any of the clinics'.

    Clinics have both fields, slices of 5 to 10 mm, and ranges of the other settings that vendors' protocols span.
    """
    if population == "biobank":
        return Scanner(1.5, 2.6, 80, 8, sampled=(0.7, 0.9), noise=0.05, shading=0.15, off_resonance=25)
    field = 3.0 if rng.random() < 0.35 else 1.5
    return Scanner(
        field=field,
        repetition_time=rng.uniform(2.7, 3.6),
        flip=rng.uniform(40, 55) if field > 2 else rng.uniform(50, 75),
        thickness=float(rng.choice([5, 6, 8, 10])),
        sampled=(rng.uniform(0.55, 0.85), rng.uniform(0.65, 0.95)),
        noise=rng.uniform(0.02, 0.09),
        shading=rng.uniform(-0.1, 0.4),
        off_resonance=rng.uniform(15, 40) * field / 1.5,
    )


def _positive(moments: Moments, z: float) -> float:
    """A gamma-distributed value of this mean and standard deviation, from a standard normal one."""
    shape = (moments[0] / moments[1]) ** 2
    return float(moments[0] * special.gammaincinv(shape, float(special.ndtr(z))) / shape)


def _fraction(moments: Moments, z: float) -> float:
    """A beta-distributed percentage of this mean and standard deviation, from a standard normal value."""
    mean, variance = moments[0] / 100, (moments[1] / 100) ** 2
    total = mean * (1 - mean) / variance - 1
    return float(100 * special.betaincinv(mean * total, (1 - mean) * total, float(special.ndtr(z))))
