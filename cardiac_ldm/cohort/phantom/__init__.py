"""Simulated patients, from a seed and a number: volumes, exact labels and exact attributes.

`population` draws who they are, `contours` builds their hearts, `scene` paints what lies round them, and `scanner`
images it.
"""

from collections.abc import Mapping

import numpy as np

from cardiac_ldm.cohort.attributes import angle_between, wall_thickness
from cardiac_ldm.cohort.phantom.contours import DZ, N_ANGLES, PIXEL, THETA, Contours, build, place
from cardiac_ldm.cohort.phantom.population import Population, Traits, draw_traits
from cardiac_ldm.cohort.phantom.scene import image_patient
from cardiac_ldm.cohort.volumes import GRID, Patient, Phase, Volume

__all__ = ["Population", "simulate"]


def simulate(population: Population, seed: int, index: int, imaged: bool = True) -> Patient:
    """Draw, build and image patient number `index` of a cohort: a pure function of its arguments, on any machine.

    The volumes have GRID's spacing, 96 x 96 in-plane, and the slices that show the ventricles at end-diastole; the
    stack may stop short of the apex, by less than a slice. All attributes are those of the contours: volumes are sums
    over the slices of exact areas, as in clinical reports, thickness and ANGLE likewise. Voxel counts differ from them
    by rasterisation only. Two machines may differ in a voxel on a contour, where their arithmetic rounds differently.

    imaged: False leaves out the scanner, nine tenths of the time; the labels then stand in the images' place.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    traits = draw_traits(population, rng)
    z = np.arange(rng.uniform(0, DZ), traits.length - rng.uniform(0, DZ), DZ)[: GRID.n_slices]
    contours = build(traits, z, rng)
    centres = place(contours["ED"], z, rng)
    labels = {phase: _labels(contours[phase], centres) for phase in contours}
    if imaged:
        images = image_patient(traits, contours, centres, z, rng)
    else:
        images = {phase: labels[phase].astype(np.float32) for phase in labels}
    volumes = tuple(Volume(phase, images[phase], labels[phase], GRID.spacing_mm) for phase in contours)
    return Patient(f"p{index:06d}", traits.group, volumes, _truth(traits, contours, centres))


def _truth(traits: Traits, contours: Mapping[Phase, Contours], centres: np.ndarray) -> dict[str, float]:
    """Attributes, from the contours of the slices' own planes."""
    truth = {"AGE": traits.age, "SEX": traits.sex, "BMI": traits.bmi, "DEPTH": len(centres)}
    for phase, c in contours.items():
        cavity, wall, rv = c.areas()
        truth[f"LV{phase}V"], truth[f"RV{phase}V"] = cavity.sum() * DZ / 1000, rv.sum() * DZ / 1000
        truth[f"MYO{phase}THICK"] = wall_thickness(wall[cavity > 0], cavity[cavity > 0])
    for side in ("LV", "RV"):
        truth[f"{side}EF"] = 100 * (1 - truth[f"{side}ESV"] / truth[f"{side}EDV"])
    endo, epi, rv = (radii[:, 1] for radii in (contours["ED"].endo, contours["ED"].epi, contours["ED"].rv))
    direction = np.stack([np.cos(THETA), -np.sin(THETA)])

    def centre(inner: np.ndarray, outer: np.ndarray, below: np.ndarray) -> np.ndarray:
        areas = ((outer**2 - inner**2) / 2).mean(axis=1) * (below >= 0)
        moments = (direction[:, None] * (outer**3 - inner**3) / 3).mean(axis=2) * (below >= 0)
        return (moments.T + areas[:, None] * centres).sum(axis=0) / areas.sum()

    lv = centre(0 * endo, endo, contours["ED"].below_mitral[:, 1])
    truth["ANGLE"] = angle_between(lv, centre(epi, rv, contours["ED"].below_tricuspid[:, 1]))
    return {name: float(value) for name, value in truth.items()}


def _labels(contours: Contours, centres: np.ndarray) -> np.ndarray:
    """Labels of the slices' own planes, uint8 (n_slices, 96, 96)."""
    grid = (np.arange(GRID.size) - (GRID.size - 1) / 2) * PIXEL
    x, y = grid[None, None, :] - centres[:, 0, None, None], centres[:, 1, None, None] - grid[None, :, None]
    entry = np.round(np.arctan2(y, x) * (N_ANGLES / (2 * np.pi))).astype(np.int32) % N_ANGLES
    entry += N_ANGLES * np.arange(len(centres), dtype=np.int32)[:, None, None]
    radius = np.hypot(x, y)
    endo, epi, rv = (radius < np.take(r[:, 1].ravel(), entry) for r in (contours.endo, contours.epi, contours.rv))
    in_lv, in_rv = ((b[:, 1] >= 0)[:, None, None] for b in (contours.below_mitral, contours.below_tricuspid))
    return ((rv & ~epi & in_rv) + 2 * (epi & ~endo & in_lv) + 3 * (endo & in_lv)).astype(np.uint8)
