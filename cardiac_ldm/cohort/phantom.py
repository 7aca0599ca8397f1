"""Simulated patients: a bi-ventricular heart whose every attribute is known, imaged as a short-axis bSSFP stack.

Every contour of a slice is a radius as a function of the angle round that slice's centre, a table of N_ANGLES angles.
Areas, volumes, thickness and centres are integrals over these tables: the truth doesn't depend on voxels. Volumes are
sums of slices, as in clinical reports, and the anatomy is scaled so that they're the volumes that were drawn.
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from einops import repeat
from scipy import ndimage

from cardiac_ldm.cohort.attributes import angle_between, wall_thickness
from cardiac_ldm.cohort.volumes import GRID, Patient, Phase, Volume

N_ANGLES = 720
THETA = 2 * np.pi * np.arange(N_ANGLES) / N_ANGLES
DZ, PIXEL = GRID.spacing_mm[0], GRID.spacing_mm[1]
SLICE_THICKNESS = 8.0
"""mm; UK Biobank's protocol leaves a gap of 2 mm (Petersen et al., JCMR 18:8, 2016)."""
MYOCARDIAL_DENSITY = 1.05
"""g/mL, the convention of cardiac MRI."""

Population = Literal["clinics", "biobank"]


@dataclass(frozen=True)
class Disease:
    """How a group departs from health: factors on volume and mass, mean and spread of the ejection fractions (%)."""

    lv_volume: float = 1.0
    lv_ef: tuple[float, float] | None = None
    rv_ef: tuple[float, float] | None = None
    mass: float = 1.0
    septal_bulge: float = 0.0
    thin_sector: float = 0.0
    sphericity: float = 1.0


DISEASES: dict[str, Disease] = {
    "NOR": Disease(),
    "DCM": Disease(lv_volume=1.75, lv_ef=(25, 7), rv_ef=(38, 9), mass=1.6, sphericity=1.12),
    "HCM": Disease(lv_volume=0.95, lv_ef=(67, 6), mass=1.75, septal_bulge=0.55),
    "MINF": Disease(lv_volume=1.25, lv_ef=(33, 7), rv_ef=(50, 8), mass=1.25, thin_sector=0.5, sphericity=1.05),
    "RV": Disease(lv_volume=0.85, rv_ef=(36, 7)),
}
"""ACDC's groups; the values lie within the criteria by which Bernard et al., IEEE TMI 37(11), 2018, define them."""


@dataclass(frozen=True)
class Scanner:
    """Mean intensities of tissues; standard deviations of noise and of blur (pixels); how much the coil shades."""

    lv_blood: float
    rv_blood: float
    myocardium: float
    fat: float
    liver: float
    lung: float
    noise: float
    blur: float
    shading: float


CLINIC_SCANNERS: tuple[Scanner, ...] = (
    Scanner(0.90, 0.76, 0.28, 0.85, 0.30, 0.06, 0.020, 0.45, 0.20),
    Scanner(0.88, 0.66, 0.24, 0.85, 0.24, 0.08, 0.030, 0.60, 0.30),
    Scanner(0.95, 0.85, 0.34, 0.75, 0.36, 0.05, 0.016, 0.40, 0.10),
    Scanner(0.84, 0.74, 0.30, 0.85, 0.32, 0.10, 0.040, 0.75, 0.40),
)
BIOBANK_SCANNER = Scanner(0.84, 0.78, 0.42, 0.62, 0.46, 0.12, 0.024, 0.55, 0.25)


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


@dataclass(frozen=True)
class Contours:
    """Outer radii (mm) at a phase, (n_slices, N_ANGLES), of LV cavity, LV wall and RV; beside the RV the last two meet.

    in_lv, in_rv: (n_slices,) bool, slices below the valves. Above them, the radii are those of the atria.
    """

    endo: np.ndarray
    epi: np.ndarray
    rv: np.ndarray
    in_lv: np.ndarray
    in_rv: np.ndarray

    def of(self, slices: np.ndarray) -> "Contours":
        """Those of some slices alone; slices: (n_slices,) bool."""
        return Contours(*(getattr(self, field.name)[slices] for field in fields(self)))


def simulate(population: Population, seed: int, index: int) -> Patient:
    """Draw, build and image patient number `index` of a cohort: a pure function of its arguments, on any machine.

    The volumes have GRID's spacing, 96 x 96 in-plane, and exactly the slices that show the ventricles at end-diastole.
    All attributes are those of the contours: volumes are sums over the slices of exact areas, thickness and ANGLE
    likewise. Voxel counts differ from them by rasterisation only. Two machines may differ in a voxel on a contour,
    where their arithmetic rounds differently.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    traits = draw_traits(population, rng)
    z = np.arange(rng.uniform(0, DZ), traits.length + DZ, DZ)[: GRID.n_slices]
    contours = _build(traits, z, rng)
    shown = (z < traits.length) | (contours["ED"].epi.min(axis=1) > PIXEL)
    z, contours = z[shown], {phase: c.of(shown) for phase, c in contours.items()}
    centres = _slice_centres(contours["ED"], z, rng)
    volumes = _image(traits, contours, centres, z, rng)
    return Patient(f"p{index:06d}", traits.group, volumes, _truth(traits, contours, centres))


def draw_traits(population: Population, rng: np.random.Generator) -> Traits:
    """Draw a patient: sex, age and body first, then a heart given these.

    Means and spreads for health are the UK Biobank's (Petersen et al., JCMR 19:18, 2017: LVEDV 166 +- 32 mL in men,
    124 +- 21 in women; LVEF 58 +- 5, 61 +- 5 %; RVEF 54 +- 6, 58 +- 6 %; LV mass 103 +- 21, 70 +- 13 g). Volumes fall
    with age and rise with body size; the slopes, the volume's share of the mass's spread, and that clinics trace the
    wall more generously, by a quarter, are our own choices. Both ventricles eject one stroke volume, except in the
    group RV, whose excess is regurgitated: so RV volumes follow from RVEF.
    """
    clinics = population == "clinics"
    group = str(rng.choice(list(DISEASES))) if clinics else "NOR"
    disease = DISEASES[group]
    male = bool(rng.random() < (0.62 if clinics else 0.48))
    age = float(np.clip(rng.normal(52, 16) if clinics else rng.normal(64, 7.7), 18 if clinics else 45, 88))
    bmi = float(np.clip(rng.normal(26.5, 4.2), 17, 43))
    mean, spread = (166.0, 32.0) if male else (124.0, 21.0)
    size = np.clip(rng.normal(), -2.5, 2.5)
    lvedv = (mean + 0.85 * spread * size - 0.006 * mean * (age - 60) + 0.008 * mean * (bmi - 26.5)) * disease.lv_volume
    lvedv = float(np.clip(lvedv, 70, 340))
    lvef = float(np.clip(rng.normal(*(disease.lv_ef or ((58, 5) if male else (61, 5)))), 12, 78))
    rvef = float(np.clip(rng.normal(*(disease.rv_ef or ((54, 6) if male else (58, 6)))), 15, 75))
    stroke = lvedv * lvef / 100
    regurgitated = rng.uniform(1.0, 1.25) if group == "RV" else 1.0
    rvedv = float(np.clip(stroke * regurgitated / (rvef / 100), 65, 330))
    mean_mass, spread_mass = (103.0, 21.0) if male else (70.0, 13.0)
    mass = (mean_mass + spread_mass * np.clip(0.65 * size + 0.75 * rng.normal(), -1.2, 2.5)) * disease.mass
    mass *= 1.25 if clinics else 1.0
    length = 92 * (lvedv / 150) ** (1 / 3) * np.clip(rng.normal(1, 0.05), 0.88, 1.12) / disease.sphericity
    rotated = clinics and rng.random() < 0.2
    orientation = rng.normal(130, 9) if rotated else rng.normal(203, 13) if clinics else rng.normal(160, 11)
    scanner = CLINIC_SCANNERS[rng.integers(len(CLINIC_SCANNERS))] if clinics else BIOBANK_SCANNER
    return Traits(
        group=group,
        sex=float(male),
        age=age,
        bmi=bmi,
        lvedv=lvedv,
        lvesv=lvedv - stroke,
        rvedv=rvedv,
        rvesv=rvedv * (1 - rvef / 100),
        mass=float(mass),
        length=float(np.clip(length, 62, 118)),
        orientation=float(orientation),
        scanner=scanner,
    )


def _build(traits: Traits, z: np.ndarray, rng: np.random.Generator) -> dict[Phase, Contours]:
    """Contours at both phases. The base descends, the wall thickens so that its continuous volume is conserved."""
    disease = DISEASES[traits.group]
    towards_rv = np.radians(traits.orientation)
    offset = rng.normal(0.25, 0.04)
    lobes = [(k, rng.normal(0, 0.05 / k), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4)]
    shape = 1 + np.sum([a * np.cos(k * THETA + p) for k, a, p in lobes], axis=0)
    shape = shape / np.sqrt((shape**2).mean())
    septum = np.exp(-0.5 * (_wrapped(THETA - towards_rv) / 0.75) ** 2)
    infarct = np.exp(-0.5 * (_wrapped(THETA - towards_rv - rng.uniform(-np.pi, np.pi)) / 0.7) ** 2)
    relative_wall = 1 + disease.septal_bulge * septum - disease.thin_sector * infarct
    for k in (1, 2, 3):
        relative_wall = relative_wall + rng.normal(0, 0.05) * np.cos(k * THETA + rng.uniform(0, 2 * np.pi))
    half_width = np.radians(rng.normal(90, 6))
    skew = rng.normal(0, 0.12)
    rv_end = rng.uniform(0.84, 0.93)
    dense = (np.arange(32) + 0.5) / 32
    profile = 1 - ((dense - offset) / (1 - offset)) ** 2
    tissue = traits.mass / MYOCARDIAL_DENSITY * 1000
    lvef, rvef = 1 - traits.lvesv / traits.lvedv, 1 - traits.rvesv / traits.rvedv
    phases: dict[Phase, Contours] = {}
    for phase, lv_volume, rv_volume in (("ED", traits.lvedv, traits.rvedv), ("ES", traits.lvesv, traits.rvesv)):
        moved = phase == "ES"
        lv_base, rv_base = moved * 0.26 * lvef * traits.length, moved * 0.38 * rvef * traits.length
        length = traits.length - lv_base
        s = (z - lv_base) / length
        in_lv = s >= 0
        with_cavity = in_lv & (s < 1)
        p = np.where(s < 1, 1 - ((np.clip(s, 0, 1) - offset) / (1 - offset)) ** 2, 0)
        largest_area = lv_volume * 1000 / (DZ * p[with_cavity].sum())
        endo = np.sqrt(largest_area * p / np.pi)[:, None] * shape

        # The wall is k t thick, t relative: its volume, length * 2 pi (k <r t> + k^2 <t^2> / 2), is a quadratic in k.
        thinning = 1 - 0.35 * dense
        r_dense = np.sqrt(largest_area * profile / np.pi)
        linear = 2 * np.pi * length * (r_dense * thinning).mean() * (shape * relative_wall).mean()
        square = np.pi * length * (thinning**2).mean() * (relative_wall**2).mean()
        k = (np.sqrt(linear**2 + 4 * square * tissue) - linear) / (2 * square)
        beyond = (np.maximum(s, 1) - 1) * length / (0.65 * k)
        wall = k * (1 - 0.35 * np.clip(s, 0, 1)) * np.sqrt(np.maximum(0, 1 - beyond**2))
        wall = np.where(in_lv, wall, 0.35 * wall)
        epi = endo + wall[:, None] * relative_wall

        # The RV is the crescent from the LV's wall to epi + h g: pi sum(2 h <epi g> + h^2 <g^2>) dz is its volume.
        s_rv = (z - rv_base) / (traits.length - rv_base) / rv_end
        in_rv = (s_rv >= 0) & (s_rv < 1) & in_lv
        reach = np.sqrt(np.maximum(0, 1 - np.clip(s_rv, 0, 1) ** 1.7))
        width = half_width * (0.62 + 0.38 * reach)
        x = _wrapped(THETA - towards_rv) / width[:, None]
        crescent = np.maximum(0, 1 - x**2) ** 0.6 * (1 + skew * x) * reach[:, None]
        mean_g, mean_g2 = (epi * crescent).mean(axis=1)[in_rv].sum(), (crescent**2).mean(axis=1)[in_rv].sum()
        h = (np.sqrt(mean_g**2 + mean_g2 * rv_volume * 1000 / (DZ * np.pi)) - mean_g) / mean_g2
        phases[phase] = Contours(endo, epi, epi + h * crescent, in_lv, in_rv)  # type: ignore[index]
    return phases


def _slice_centres(contours: Contours, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centre (x right, y down; mm) of every slice's contours, (n_slices, 2): a tilted axis, breath-hold jitter.

    The box round the end-diastolic heart is centred, as preparation does it for patients.
    """
    axis = np.outer(z - z.mean(), rng.normal(0, 0.08, 2)) + rng.normal(0, 0.8, (len(z), 2))
    outer = np.maximum(contours.rv, contours.epi)[..., None] * np.stack([np.cos(THETA), -np.sin(THETA)], axis=-1)
    points = axis[:, None, :] + outer
    return axis - (points.max(axis=(0, 1)) + points.min(axis=(0, 1))) / 2 + rng.uniform(-0.5, 0.5, 2) * PIXEL


def _truth(traits: Traits, contours: dict[Phase, Contours], centres: np.ndarray) -> dict[str, float]:
    """Attributes, from the contours."""
    truth = {"AGE": traits.age, "SEX": traits.sex, "BMI": traits.bmi}
    for phase, c in contours.items():
        cavity, wall = (np.pi * (r**2).mean(axis=1) * c.in_lv for r in (c.endo, c.epi))
        rv = np.pi * (c.rv**2 - c.epi**2).mean(axis=1) * c.in_rv
        shown = cavity > 0
        truth[f"LV{phase}V"], truth[f"RV{phase}V"] = cavity.sum() * DZ / 1000, rv.sum() * DZ / 1000
        truth[f"MYO{phase}THICK"] = wall_thickness((wall - cavity)[shown], cavity[shown])
    for side in ("LV", "RV"):
        truth[f"{side}EF"] = 100 * (1 - truth[f"{side}ESV"] / truth[f"{side}EDV"])
    ed = contours["ED"]
    direction = np.stack([np.cos(THETA), -np.sin(THETA)])

    def centre(inner: np.ndarray, outer: np.ndarray, shown: np.ndarray) -> np.ndarray:
        areas = ((outer**2 - inner**2) / 2).mean(axis=1) * shown
        moments = (direction[:, None] * (outer**3 - inner**3) / 3).mean(axis=2) * shown
        return (moments.T + areas[:, None] * centres).sum(axis=0) / areas.sum()

    truth["ANGLE"] = angle_between(centre(0 * ed.endo, ed.endo, ed.in_lv), centre(ed.epi, ed.rv, ed.in_rv))
    truth["DEPTH"] = float(len(centres))
    return {name: float(value) for name, value in truth.items()}


def _image(
    traits: Traits, contours: dict[Phase, Contours], centres: np.ndarray, z: np.ndarray, rng: np.random.Generator
) -> tuple[Volume, ...]:
    """Label and image every phase; body, coil and breath-hold are shared by the phases, noise isn't."""
    scanner = traits.scanner
    grid = ((np.arange(GRID.size) - (GRID.size - 1) / 2) * PIXEL).astype(np.float32)
    x = grid[None, None, :] - centres[:, 0, None, None].astype(np.float32)
    y = grid[None, :, None] - centres[:, 1, None, None].astype(np.float32)
    radius = np.sqrt(x * x + y * y)
    angle = np.round(np.arctan2(-y, x) * np.float32(N_ANGLES / (2 * np.pi))).astype(np.int32) % N_ANGLES
    entry = angle + N_ANGLES * np.arange(len(z), dtype=np.int32)[:, None, None]
    gain = {name: 1 + 0.06 * rng.normal() for name in ("lv_blood", "rv_blood", "myocardium", "fat", "liver")}
    level = {name: np.float32(getattr(scanner, name) * g) for name, g in gain.items()}
    texture = _smooth_noise(rng, len(z), 3)
    clouds = _smooth_noise(rng, len(z), 12)
    body, shading = _body(traits, contours["ED"], centres, grid, z, texture, clouds, level, rng)
    fat_thickness = np.float32(np.clip(0.35 * (traits.bmi - 18) + rng.normal(0, 1), 0.8, 7)) * (1 + 0.8 * clouds)
    papillary = np.radians(traits.orientation + 180 + np.array([-55, 60]) + rng.normal(0, 8, 2))
    papillary_size = rng.uniform(3.0, 5.0, 2)
    volumes = []
    for phase, c in contours.items():
        distance = {
            n: radius - r.astype(np.float32).ravel()[entry] for n, r in (("endo", c.endo), ("epi", c.epi), ("rv", c.rv))
        }
        lv = (distance["endo"] < 0) & c.in_lv[:, None, None]
        myocardium = (distance["epi"] < 0) & ~lv & c.in_lv[:, None, None]
        rv = (distance["rv"] < 0) & (distance["epi"] >= 0) & c.in_rv[:, None, None]
        labels = (rv + 2 * myocardium + 3 * lv).astype(np.uint8)

        ragged = {"endo": 0.7 * texture, "epi": 0, "rv": 1.1 * texture}
        cover = {n: _cover(distance[n] + ragged[n], _edge_width(getattr(c, n))) for n in distance}
        outside = np.minimum(distance["epi"], distance["rv"])
        image = body + _cover(outside - 2.5 - fat_thickness) * (level["fat"] * (0.8 + 0.25 * clouds) - body)
        image += _cover(outside - 2.5) * (level["myocardium"] * 1.1 - image)
        image += cover["rv"] * (level["rv_blood"] * (1 + 0.10 * texture) - image)
        image += cover["epi"] * (level["myocardium"] * (1 + 0.08 * texture) - image)
        blood = level["lv_blood"] * (1 + 0.05 * texture)
        mean_endo = c.endo.mean(axis=1)
        fades = np.clip(4 * np.minimum(mean_endo / (mean_endo.max() + 1e-6) - 0.35, 0.9 - z / traits.length), 0, 1)
        for a, size in zip(papillary, papillary_size, strict=True):
            d = np.hypot(
                x - (0.7 * mean_endo * np.cos(a)).astype(np.float32)[:, None, None],
                y + (0.7 * mean_endo * np.sin(a)).astype(np.float32)[:, None, None],
            )
            blood = blood + _cover(d - np.float32(size), 3.0) * (0.85 * fades * c.in_lv).astype(np.float32)[
                :, None, None
            ] * (level["myocardium"] - blood)
        image += cover["endo"] * (blood - image)
        image = ndimage.gaussian_filter(image * shading, (0, scanner.blur, scanner.blur))
        noise = rng.standard_normal((2, *image.shape), np.float32) * np.float32(scanner.noise)
        image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)
        volumes.append(Volume(phase, image, labels, GRID.spacing_mm))
    return tuple(volumes)


def _body(
    traits: Traits,
    heart: Contours,
    centres: np.ndarray,
    grid: np.ndarray,
    z: np.ndarray,
    texture: np.ndarray,
    clouds: np.ndarray,
    level: dict[str, np.float32],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What lies round the heart, (n_slices, 96, 96): lungs, liver, aorta, chest wall; and the coil's shading.

    The body turns with the heart: seen from the LV, the chest wall lies behind the RV, the liver a right angle further.
    """
    scanner = traits.scanner
    height = (z / traits.length).astype(np.float32)[:, None, None] - np.float32(0.5)

    def along(degrees: float) -> np.ndarray:
        a = np.radians(degrees)
        return (grid[None, None, :] * np.cos(a) - grid[None, :, None] * np.sin(a)).astype(np.float32)

    outline = np.maximum(heart.epi, heart.rv)

    def reach(degrees: float) -> float:
        a = np.radians(degrees)
        own = centres @ (np.cos(a), -np.sin(a))
        return float((own[:, None] + outline * np.cos(THETA - a)).max())

    toward_wall_at = traits.orientation + rng.normal(-25, 8)
    liver_at = traits.orientation + rng.normal(82, 10)
    toward_wall, across = along(toward_wall_at), along(toward_wall_at + 90)
    wall_depth: np.ndarray = toward_wall - np.float32(reach(toward_wall_at) + rng.uniform(4, 14))
    wall_depth = wall_depth + height * np.float32(rng.uniform(-4, 10))
    wall_depth = wall_depth + across**2 / np.float32(rng.uniform(300, 520)) + 1.5 * clouds
    liver_depth = along(liver_at) - np.float32(reach(liver_at) + rng.uniform(1, 8)) + height * np.float32(16)
    liver_depth = liver_depth + across * np.float32(rng.normal(0, 0.12)) + 3 * clouds
    body = np.float32(scanner.lung) * (1 + 0.4 * clouds) + np.maximum(texture - 1.7, 0) * np.float32(0.35)
    liver = level["liver"] * (1 + 0.12 * clouds) + np.maximum(np.abs(texture) - 1.4, 0) * np.float32(0.25)
    body += _cover(-liver_depth) * (liver - body)
    body += _cover(np.abs(liver_depth) - 1.2) * (level["fat"] * np.float32(0.6) - body)
    aorta = along(traits.orientation + 118) - np.float32(reach(traits.orientation + 118) + rng.uniform(12, 22))
    beside = along(traits.orientation + 208) - np.float32(rng.normal(0, 8))
    vessel = np.sqrt(aorta**2 + beside**2) - np.float32(rng.uniform(9, 13))
    body = body + _cover(vessel - 2) * (level["myocardium"] - body)
    body += _cover(vessel) * (level["lv_blood"] - body)
    fat = np.float32(np.clip(1.1 * (traits.bmi - 15) + rng.normal(0, 2), 5, 30))
    muscle = np.float32(rng.uniform(7, 11))
    body += _cover(-wall_depth) * (level["myocardium"] * (0.75 + 0.2 * texture) - body)
    body += _cover(muscle - wall_depth) * (level["fat"] * (1 + 0.06 * texture) - body)
    body += _cover(muscle + fat - wall_depth) * (np.float32(0.01) - body)
    shading = 1 + np.float32(scanner.shading) * (toward_wall / np.float32(90) + np.float32(0.25) * clouds)
    return body, np.maximum(shading, np.float32(0.25))


def _cover(distance: np.ndarray, width: np.ndarray | float = PIXEL) -> np.ndarray:
    """Fraction of a voxel inside a contour at this signed distance (negative inside), a ramp of `width` mm."""
    return np.clip(np.float32(0.5) - distance / np.asarray(width, np.float32), 0, 1)


def _edge_width(radii: np.ndarray) -> np.ndarray:
    """Width of a contour's edge in a thick slice, (n_slices, 1, 1): a pixel and the wall's slant through the slice."""
    slant = np.abs(np.gradient(radii.mean(axis=1), DZ)) if len(radii) > 1 else np.zeros(1)
    return (PIXEL + np.minimum(slant * SLICE_THICKNESS, 5))[:, None, None].astype(np.float32)


def _smooth_noise(rng: np.random.Generator, n: int, grain: int) -> np.ndarray:
    """Random field (n, 96, 96) of unit variance whose grains are `grain` pixels wide."""
    coarse = rng.standard_normal((n, GRID.size // grain, GRID.size // grain), np.float32)
    field = repeat(coarse, "n h w -> n (h a) (w b)", a=grain, b=grain)
    for _ in range(2):
        field = ndimage.uniform_filter(field, (1, grain, grain), mode="wrap")
    return field / field.std()


def _wrapped(angle: np.ndarray) -> np.ndarray:
    return (angle + np.pi) % (2 * np.pi) - np.pi
