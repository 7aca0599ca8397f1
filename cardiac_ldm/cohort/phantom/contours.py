"""The simulated heart: radii round the left ventricle's axis, slice by slice, from base to apex, at both phases."""

from dataclasses import dataclass

import numpy as np

from cardiac_ldm.cohort.phantom.population import REMODELLING, Traits
from cardiac_ldm.cohort.volumes import GRID, Phase

N_ANGLES = 720
THETA = 2 * np.pi * np.arange(N_ANGLES) / N_ANGLES
"""Counter-clockwise from the picture's right."""
DZ, PIXEL = GRID.spacing_mm[0], GRID.spacing_mm[1]
MYOCARDIAL_DENSITY = 1.05
"""g/mL, the convention of cardiac MRI."""
_PLANES = np.array([-1, 0, 1]) / 3
"""Where a slice is rendered for its partial volumes, in slice thicknesses from its middle."""


@dataclass(frozen=True)
class Contours:
    """Outer radii (mm) at a phase, (n_slices, 3 planes, N_ANGLES), of LV cavity, LV wall and RV.

    The middle plane is the slice's own; the others are for partial volumes. Beside the RV, the last two meet.
    below_mitral, below_tricuspid: (n_slices, 3), how far a plane lies below the valves (mm): above them the LV's radii
    are the left atrium's.
    """

    endo: np.ndarray
    epi: np.ndarray
    rv: np.ndarray
    below_mitral: np.ndarray
    below_tricuspid: np.ndarray

    def areas(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n_slices,) mm2 each: LV cavity, LV wall and RV cavity in the slices' own planes, 0 above the valves."""
        squares = [np.pi * (radii[:, 1] ** 2).mean(axis=1) for radii in (self.endo, self.epi, self.rv)]
        in_lv, in_rv = self.below_mitral[:, 1] >= 0, self.below_tricuspid[:, 1] >= 0
        return squares[0] * in_lv, (squares[1] - squares[0]) * in_lv, (squares[2] - squares[1]) * in_rv


def build(traits: Traits, z: np.ndarray, rng: np.random.Generator) -> dict[Phase, Contours]:
    """Contours at both phases in slices z (n_slices,), mm below the base at end-diastole.

    Cavities are scaled so that the sums over slices are the volumes that were drawn; the wall's continuous volume is
    the mass, at both phases: so it thickens. An infarct contracts less. At end-systole the base has come down by 9 %
    (LV) and 15 % (RV) of a healthy heart's length. A real base moves further, but annotators go on labelling its ring.
    """
    disease = REMODELLING[traits.group]
    from_rv = _wrapped(THETA - np.radians(traits.orientation))
    septum = np.exp(-0.5 * (from_rv / 0.75) ** 2)
    infarct = np.exp(-0.5 * (_wrapped(from_rv - rng.uniform(-np.pi, np.pi)) / 0.7) ** 2)
    round_shape = _uneven(rng, {2: 0.025, 3: 0.017, 4: 0.0125}) - disease.flat_septum * septum
    relative_wall = _uneven(rng, {1: 0.06, 2: 0.06, 3: 0.06})
    relative_wall = relative_wall + disease.septal_bulge * septum - disease.thin_sector * infarct
    widest = rng.normal(0.25, 0.04)
    half_width, skew, leaning = np.radians(rng.normal(60, 6)), rng.normal(0, 0.12), rng.normal(0.25, 0.15)
    bluntness, free_wall = rng.uniform(0.5, 0.8), _uneven(rng, dict.fromkeys((2, 3, 4, 5), 0.07))
    rv_end, tricuspid = rng.uniform(0.84, 0.95), max(0.0, rng.normal(3, 3))
    planes = z[:, None] + traits.scanner.thickness * _PLANES

    phases: dict[Phase, Contours] = {}
    volumes: dict[Phase, tuple[float, float]] = {
        "ED": (traits.lvedv, traits.rvedv),
        "ES": (traits.lvesv, traits.rvesv),
    }
    for phase, (lv_volume, rv_volume) in volumes.items():
        moved = phase == "ES"
        lv_base = moved * 0.16 * (1 - traits.lvesv / traits.lvedv) * traits.length
        rv_base = tricuspid + moved * 0.28 * (1 - traits.rvesv / traits.rvedv) * traits.length
        length = traits.length - lv_base
        shape = round_shape * (1 + moved * disease.akinesia * infarct)
        shape = shape / np.sqrt((shape**2).mean())

        # The LV is an ellipsoid cut off above its widest slice: areas fall with the square of the distance from it.
        def relative_area(s: np.ndarray) -> np.ndarray:
            return np.maximum(0, 1 - ((np.maximum(s, 0) - widest) / (1 - widest)) ** 2)

        s = (planes - lv_base) / length
        largest = lv_volume * 1000 / (DZ * relative_area(s[:, 1])[s[:, 1] >= 0].sum())
        endo = np.sqrt(largest * relative_area(s) / np.pi)[..., None] * shape

        # The wall is k t thick, t relative: its volume, length * 2 pi (k <r t> + k^2 <t^2> / 2), is a quadratic in k.
        dense = (np.arange(32) + 0.5) / 32
        thinning = 1 - 0.35 * dense
        radii = np.sqrt(largest * relative_area(dense) / np.pi)
        linear = 2 * np.pi * length * (radii * thinning).mean() * (shape * relative_wall).mean()
        square = np.pi * length * (thinning**2).mean() * (relative_wall**2).mean()
        tissue = traits.mass / MYOCARDIAL_DENSITY * 1000
        k = (np.sqrt(linear**2 + 4 * square * tissue) - linear) / (2 * square)
        cap = np.sqrt(np.maximum(0, 1 - ((np.maximum(s, 1) - 1) * length / (0.65 * k)) ** 2))
        wall = k * (1 - 0.35 * np.clip(s, 0, 1)) * cap * np.where(s >= 0, 1, 0.35)
        epi = endo + wall[..., None] * relative_wall

        # The RV is the crescent from the LV's wall to epi + h g: pi sum(2 h <epi g> + h^2 <g^2>) dz is its volume.
        s = (planes - rv_base) / (traits.length - rv_base) / (rv_end - 0.05 * moved)
        s, shown = np.clip(s, 0, 1), (s >= 0) & (s < 1)
        reach = np.sqrt(1 - s**1.7) * shown
        x = from_rv / (half_width * (0.62 + 0.38 * reach))[..., None]
        lean = 1 + (skew + leaning * (s - 0.4))[..., None] * x
        g = np.maximum(0, 1 - x**2) ** bluntness * lean * free_wall * reach[..., None]
        mean_g, mean_g2 = (f[:, 1].mean(axis=1).sum() for f in (epi * g, g**2))
        h = (np.sqrt(mean_g**2 + mean_g2 * rv_volume * 1000 / (DZ * np.pi)) - mean_g) / mean_g2
        phases[phase] = Contours(endo, epi, epi + h * g, planes - lv_base, planes - rv_base)
    return phases


def place(contours: Contours, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where the LV's axis meets each slice, (n_slices, 2), x right and y down, mm from the middle: tilted, bent.

    The box round the end-diastolic heart is centred, as preparation does it for patients. Breath-holds shift slices.
    """
    way = (z - z.mean())[:, None] / 40
    axis = way * rng.normal(0, 3.2, 2) + way**2 * rng.normal(0, 1.2, 2) + rng.normal(0, 0.8, (len(z), 2))
    outer = np.maximum(contours.rv, contours.epi)[:, 1, :, None] * np.stack([np.cos(THETA), -np.sin(THETA)], axis=-1)
    points = axis[:, None, :] + outer
    return axis - (points.max(axis=(0, 1)) + points.min(axis=(0, 1))) / 2 + rng.uniform(-0.5, 0.5, 2) * PIXEL


def _uneven(rng: np.random.Generator, spreads: dict[int, float]) -> np.ndarray:
    """(N_ANGLES,) round 1: a cosine of random phase and normal amplitude for each wave number."""
    waves = (rng.normal(0, sd) * np.cos(k * THETA + rng.uniform(0, 2 * np.pi)) for k, sd in spreads.items())
    return 1 + np.sum(list(waves), axis=0)


def _wrapped(angle: np.ndarray) -> np.ndarray:
    return (angle + np.pi) % (2 * np.pi) - np.pi
