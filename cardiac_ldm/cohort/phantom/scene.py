"""What a short-axis stack of a simulated patient shows, painted tissue over tissue as signed magnetisation.

Every boundary is a signed distance (mm, negative inside) and covers a voxel by degrees. Smooth random fields bend the
boundaries and mottle the tissues. How much of each was chosen by looking at real stacks of one centre.
"""

from collections.abc import Mapping

import numpy as np

from cardiac_ldm.cohort.phantom.contours import N_ANGLES, THETA, Contours
from cardiac_ldm.cohort.phantom.population import Traits
from cardiac_ldm.cohort.phantom.scanner import acquire, off_resonance, signals
from cardiac_ldm.cohort.volumes import GRID, Phase

PIXEL = GRID.spacing_mm[1]
_GRAINS = {"speckle": (2, 0), "fine": (4, 1.0), "coarse": (10, 1.5), "broad": (24, 3.0)}
"""Size of a random field's grains: pixels in-plane, slices across (0: slices are independent)."""


def image_patient(
    traits: Traits, contours: Mapping[Phase, Contours], centres: np.ndarray, z: np.ndarray, rng: np.random.Generator
) -> dict[Phase, np.ndarray]:
    """Image the phases of a patient: float32 (n_slices, 96, 96) each, in units of their own.

    centres: (n_slices, 2), where the LV's axis meets a slice, mm right of and below the picture's middle. z:
    (n_slices,) mm below the base. Body, coil, field and breath-holds are shared by the phases; thermal noise isn't.
    """
    scene = _Scene(traits, contours["ED"], centres, z, rng)
    images = {}
    for phase, c in contours.items():
        planes = [scene.heart(c, plane, systole=phase == "ES") for plane in range(c.endo.shape[1])]
        images[phase] = acquire(np.mean(planes, axis=0) * scene.coil, traits.scanner, rng)
    return images


class _Scene:
    """The surroundings of one patient's heart, and everything about the heart that both phases share.

    Directions are degrees counter-clockwise from the picture's right; planes are (n_slices, 96, 96) in float32.
    """

    def __init__(
        self, traits: Traits, ed: Contours, centres: np.ndarray, z: np.ndarray, rng: np.random.Generator
    ) -> None:
        self.traits, self.rng, n = traits, rng, len(z)
        self.level = {name: level * rng.lognormal(0, 0.16) for name, level in signals(traits.scanner).items()}
        self.level["lung"] += rng.uniform(0.03, 0.14)
        self.level["blood"] *= rng.uniform(0.75, 1.4)  # fresh, unsaturated spins flow in
        self.noise = {name: _field(rng, n, *grain) for name, grain in _GRAINS.items()}
        self.apical = np.clip(z / traits.length, 0, 1)
        self.height = np.linspace(-0.5, 0.5, n)

        grid = (np.arange(GRID.size) - (GRID.size - 1) / 2) * PIXEL
        self.x = (grid[None, None, :] - centres[:, 0, None, None]).astype(np.float32)
        self.y = (centres[:, 1, None, None] - grid[None, :, None]).astype(np.float32)
        self.radius = np.hypot(self.x, self.y)
        angle = np.round(np.arctan2(self.y, self.x) * np.float32(N_ANGLES / (2 * np.pi))).astype(np.int32) % N_ANGLES
        self.entry = angle + N_ANGLES * np.arange(n, dtype=np.int32)[:, None, None]
        breath = np.cumsum(rng.normal(0, 0.6, (n, 2)), axis=0)
        self.body_x, self.body_y = grid - breath[:, :1], -grid - breath[:, 1:]
        self.centres, self.outline = centres, np.maximum(ed.epi, ed.rv)[:, 1]

        self.to_wall = traits.orientation + rng.normal(-28, 9)
        self.to_abdomen = traits.orientation + rng.normal(80, 9)
        self.wall, self.abdomen = self._wall_depth(), self._abdomen_depth()
        self.body = self._surroundings()
        self.coil = self._coil()

        # Fat lies where the heart, the chest wall and the diaphragm are near: their nearnesses add up.
        near = (np.exp(np.minimum(depth, 0) / np.float32(rng.uniform(6, 13))) for depth in (self.wall, self.abdomen))
        self.nearness = sum(near, start=np.zeros_like(self.body))
        self.fat_reach = np.float32(rng.uniform(4, 11) * (0.5 + 0.5 * traits.bmi / 26))
        self.fat_threshold = np.float32(rng.uniform(0.2, 0.8))
        self.fat = self._mottled_fat()
        self.pericardium = np.float32(rng.uniform(1, 4)) + self.noise["coarse"]
        self.rv_wall = rng.uniform(2.2, 4.0)
        self.myocardium = self._mottled(self.level["myocardium"], coarse=0.05, fine=0.05)
        self.swirl, self.trabeculation = rng.uniform(0.01, 0.08), rng.uniform(0.5, 2.0)
        self.trabeculae, self.filled = _trabeculae(rng, n), rng.uniform(0.25, 0.6)
        fresh = rng.uniform(0, 1.3) ** 2 * (1 - self.apical) ** rng.uniform(1, 5)
        self.inflow = _column((1 + fresh) * (1 + rng.normal(0, 0.05, n)))
        self.rv_blood = self.level["blood"] * rng.uniform(0.72, 1.0)  # venous: T2 is shorter
        self.papillary_at = np.radians(traits.orientation + 180 + np.array([-55, 60]) + rng.normal(0, 10, 2))
        self.papillary_size, self.papillary_reach = rng.uniform(3.0, 5.5, 2), rng.uniform(0.6, 0.85, 2)
        self.vessels = self._vessels(np.sqrt((ed.endo[:, 1] ** 2).mean(axis=1)).max())

    def heart(self, contours: Contours, plane: int, *, systole: bool) -> np.ndarray:
        """Magnetisation of one plane of each slice."""
        noise = self.noise
        endo, epi, rv = (
            self.radius - np.take(radii[:, plane].astype(np.float32).ravel(), self.entry)
            for radii in (contours.endo, contours.epi, contours.rv)
        )
        below_valve = {
            "mitral": _column(contours.below_mitral[:, plane]),
            "tricuspid": _column(contours.below_tricuspid[:, plane]),
        }
        outside = np.minimum(epi, rv - np.float32(self.rv_wall))
        flow = 1 + (0.11 if systole else 0.06) * noise["coarse"] + np.float32(self.swirl) * noise["fine"]

        picture = self.body.copy()
        nearness = self.nearness + np.exp(np.minimum(-outside, 0) / self.fat_reach)
        nearness *= 1 + 0.3 * noise["coarse"] + 0.12 * noise["fine"]
        fatty = np.clip((nearness / self.fat_threshold - 1) * (self.fat_reach / np.float32(PIXEL)) + 0.5, 0, 1)
        picture += fatty * ((self.wall < 0) & (self.abdomen < 0)) * (self.fat - picture)
        _paint(picture, np.abs(outside - self.pericardium) - 0.5, 0.5 * self.level["muscle"])
        for valve, above, at, size, brightness in self.vessels:
            shown = np.clip((np.float32(above) - below_valve[valve]) / 5, 0, 1)
            if shown.any():
                blob = np.hypot(self.x - at[0], self.y - at[1]) - size + 3.5 * noise["coarse"]
                _paint(picture, blob - 2, self.level["muscle"], shown)
                _paint(picture, blob, self.level["blood"] * brightness * flow * self.inflow, shown)

        _paint(
            picture, rv - np.float32(self.rv_wall) * np.clip(1 + below_valve["tricuspid"] / 10, 0.5, 1), self.myocardium
        )
        strands = np.clip(0.9 * noise["speckle"] + 0.8 * noise["fine"] - 0.4, 0, 1) * np.exp(np.minimum(rv, 0) / 7)
        strands *= _column(np.clip(0.3 + self.apical, 0, 1)) * np.float32(self.trabeculation)
        blood = self.rv_blood * flow * (0.5 + 0.5 * self.inflow)
        _paint(picture, rv, blood + np.minimum(strands, 0.8) * (self.myocardium - blood))

        _paint(picture, epi, self.myocardium)
        mean_radius, below = contours.endo[:, plane].mean(axis=1), contours.below_mitral[:, plane]
        depth = np.minimum(self.trabeculation * (1 + 2 * self.apical), (self.filled if systole else 0.25) * mean_radius)
        depth = depth * (below > 8)
        ragged = 0.5 * np.take((self.trabeculae * depth[:, None]).astype(np.float32).ravel(), self.entry)
        ragged += np.maximum(0.9 * noise["speckle"] + 0.9 * noise["fine"], -0.3) * _column(depth)
        blood = self.level["blood"] * flow * self.inflow
        fades = np.clip(4 * np.minimum(mean_radius / mean_radius.max() - 0.3, 0.85 - self.apical), 0, 1)
        fades = 0.9 * fades * np.clip(below / 10 - 0.8, 0, 1)
        for angle, size, reach in zip(self.papillary_at, self.papillary_size, self.papillary_reach, strict=True):
            away = (0.75 if systole else 1.0) * reach * mean_radius
            x, y = self.x - _column(away * np.cos(angle)), self.y - _column(away * np.sin(angle))
            papillary = np.hypot(x, y) - np.float32(size) + 1.2 * noise["fine"]
            blood = blood + _cover(papillary) * _column(fades) * (self.myocardium - blood)
        _paint(picture, endo + ragged, blood)
        return picture

    def _along(self, degrees: float) -> np.ndarray:
        """Coordinate (mm) in this direction, from the picture's middle; it moves with the breath."""
        a = np.radians(degrees)
        across, up = self.body_x * np.cos(a), self.body_y * np.sin(a)
        return (across[:, None, :] + up[:, :, None]).astype(np.float32)

    def _reach(self, degrees: float) -> np.ndarray:
        """(n_slices,) how far the heart at end-diastole reaches in this direction from the picture's middle, mm."""
        a = np.radians(degrees)
        own: np.ndarray = self.centres @ (np.cos(a), -np.sin(a))
        return own + (self.outline * np.cos(THETA - a)).max(axis=1)

    def _wall_depth(self) -> np.ndarray:
        """Depth below the inner surface of the chest wall, which bends round the heart and comes nearer at the apex."""
        rng, reach = self.rng, self._reach(self.to_wall)
        inner = 0.6 * reach.max() + 0.4 * reach + rng.uniform(2, 14) - self.height * rng.uniform(-4, 14)
        across = self._along(self.to_wall + 90) - np.float32(rng.normal(0, 12))
        bend = 1 / (2 * rng.uniform(90, 220) * (1.15 - 0.6 * self.height))
        return self._along(self.to_wall) - _column(inner) + across**2 * _column(bend) + 2 * self.noise["coarse"]

    def _abdomen_depth(self) -> np.ndarray:
        """Depth below the diaphragm, a dome on which the heart lies."""
        rng, reach = self.rng, self._reach(self.to_abdomen)
        top = 0.5 * reach.max() + 0.5 * reach + rng.uniform(-3, 7) - self.height * rng.uniform(-5, 12)
        across = self._along(self.to_abdomen + 90)
        dome = (across - np.float32(rng.normal(0, 25))) ** 2 / np.float32(2 * rng.uniform(60, 250))
        tilt = across * np.float32(rng.normal(0, 0.1))
        return self._along(self.to_abdomen) - _column(top) + dome + tilt + 3 * self.noise["coarse"]

    def _surroundings(self) -> np.ndarray:
        """Lungs with vessels; liver, stomach and gas; spine and aorta; the chest wall's muscle, ribs, fat; air."""
        rng, noise, level = self.rng, self.noise, self.level
        body = self._mottled(level["lung"], coarse=0.3, speckle=0.3)
        vessels = noise["fine"] + 0.6 * noise["speckle"] + 0.4 * noise["broad"] - np.float32(rng.uniform(1.0, 1.7))
        body += np.clip(vessels * np.float32(rng.uniform(0.4, 1.2)), 0, level["blood"])

        bright, dark, rough = rng.uniform(0.1, 0.6), rng.uniform(0.03, 0.18), rng.uniform(0.1, 0.5)
        liver = self._mottled(level["liver"], coarse=0.1, fine=rng.uniform(0.03, 0.12))
        liver += bright * np.clip(noise["fine"] + 0.5 * noise["speckle"] - 1.3, 0, 1)
        liver -= dark * np.clip(-noise["fine"] - 1.2, 0, 1)
        stomach = level["stomach"] * rng.uniform(0.3, 2.2)
        stomach = np.maximum(self._mottled(stomach, coarse=0.3, fine=rough, speckle=0.6 * rough), 0.02)
        stomach *= np.clip(1.5 - rng.uniform(0, 2) * np.maximum(noise["coarse"] - 0.3, 0), 0.05, 1)  # gas
        side = noise["broad"] + self._along(self.to_abdomen + 90) * np.float32(rng.normal(0.012, 0.012))
        side = 20 * (side - np.float32(rng.uniform(-0.8, 0.7)))
        _paint(liver, -side, stomach)
        _paint(liver, np.abs(side) - rng.uniform(0, 2.5), 0.9 * level["fat"])
        _paint(body, -self.abdomen, liver)
        _paint(body, np.abs(self.abdomen) - rng.uniform(0.2, 1.2), level["muscle"])

        towards = self.traits.orientation + rng.normal(135, 14)
        distance = self._reach(towards).max() + rng.uniform(8, 22)
        for name, brightness, away, size in (
            ("marrow", 1.0, distance + rng.uniform(30, 45), rng.uniform(17, 24)),
            ("blood", rng.uniform(0.7, 1.15), distance, rng.uniform(8.5, 13)),
        ):
            along = self._along(towards) - _column(away + self.height * rng.normal(0, 6))
            round_ = np.hypot(along, self._along(towards + 90) + _column(self.height * rng.normal(0, 6))) - size
            _paint(body, round_ - 2, level["muscle"])
            _paint(body, round_, self._mottled(level[name] * brightness, fine=0.05))

        muscle = rng.uniform(6, 13) + 2 * noise["coarse"]
        skin = muscle + float(np.clip(1.1 * (self.traits.bmi - 16) + rng.normal(5, 4), 6, 40)) + 2 * noise["broad"]
        ribs = self._mottled(level["muscle"], coarse=0.3, fine=0.15)
        _paint(ribs, 4 * (0.9 - np.abs(noise["coarse"])), level["marrow"])
        _paint(ribs, np.abs(8 * noise["coarse"] + 3 * noise["fine"]) - rng.uniform(0, 2), 0.8 * level["fat"])
        _paint(body, -self.wall, ribs)
        _paint(body, np.abs(self.wall + 1) - rng.uniform(0, 1.5), 0.8 * level["fat"])
        _paint(body, muscle - self.wall, self._mottled(level["fat"], fine=0.05))
        _paint(body, skin - self.wall, 0.0)
        return body

    def _coil(self) -> np.ndarray:
        """What coil and field make of the signal: brighter by the chest wall, banded away from the shimmed heart."""
        scanner, noise = self.traits.scanner, self.noise
        shading = np.exp(np.float32(scanner.shading) * (self._along(self.to_wall) / 60 + 0.3 * noise["broad"]))
        by_air = np.exp(-(np.maximum(-self.abdomen, 0) + np.maximum(-self.wall, 0)) / 40)
        field = np.clip(self.radius / 60, 0.3, 1.3) * (noise["broad"] + 0.6 * noise["coarse"] + by_air)
        return shading * off_resonance(field * np.float32(scanner.off_resonance), scanner)

    def _mottled_fat(self) -> np.ndarray:
        """Fat round the heart with vessels, dark and bright, in it."""
        noise, rng = self.noise, self.rng
        fat = self._mottled(self.level["fat"], coarse=0.1, fine=0.1)
        dark = np.clip(2 * (noise["fine"] + 0.6 * noise["speckle"] - rng.uniform(1.0, 2.0)), 0, 1)
        fat += dark * (self.level["muscle"] - fat)
        bright = np.clip(2 * (0.6 * noise["coarse"] - noise["fine"] - rng.uniform(1.3, 2.4)), 0, 1)
        return fat + bright * (self.level["blood"] - fat)

    def _mottled(self, level: float, **amounts: float) -> np.ndarray:
        """A tissue of this signal, varied by random fields."""
        varied = sum((np.float32(a) * self.noise[name] for name, a in amounts.items()), start=np.float32(1))
        return np.asarray(level * varied, np.float32)

    def _vessels(self, lv: float) -> list[tuple[str, float, tuple[float, float], float, float]]:
        """What lies above the valves: valve, level where it ends (mm), place from the LV's axis, size, brightness.

        Right atrium, right outflow tract, aortic root and left atrium, beside an LV of radius `lv` mm.
        """
        rng, facing = self.rng, np.radians(self.traits.orientation)

        def at(right: float, front: float) -> tuple[float, float]:
            x, y = right * np.cos(facing) + front * np.sin(facing), right * np.sin(facing) - front * np.cos(facing)
            return float(x), float(y)

        def blood() -> float:
            return rng.uniform(0.8, 1.1)

        return [
            ("tricuspid", 1, at(lv + rng.uniform(22, 30), -rng.uniform(4, 20)), rng.uniform(20, 30), blood()),
            ("tricuspid", 2, at(lv * rng.uniform(0.5, 1), lv + rng.uniform(10, 16)), rng.uniform(12, 17), blood()),
            ("mitral", -2, at(lv * rng.uniform(0.5, 0.8), rng.uniform(0, 10)), rng.uniform(12, 15), blood()),
            ("mitral", -6, at(-0.2 * lv, -rng.uniform(2, 10)), rng.uniform(18, 26), blood()),
        ]


def _cover(distance: np.ndarray) -> np.ndarray:
    """Fraction of a voxel inside a boundary at this signed distance (mm, negative inside): a ramp one pixel wide."""
    return np.clip(0.5 - distance / np.float32(PIXEL), 0, 1)


def _paint(picture: np.ndarray, distance: np.ndarray, new: np.ndarray | float, shown: np.ndarray | float = 1) -> None:
    """Paint `new` over the picture, inside a boundary and as far as it's shown, in place."""
    picture += _cover(distance) * shown * (new - picture)


def _column(values: np.ndarray) -> np.ndarray:
    """One value a slice, (n_slices,), as float32 (n_slices, 1, 1)."""
    return np.asarray(values, np.float32)[:, None, None]


def _trabeculae(rng: np.random.Generator, n: int) -> np.ndarray:
    """How far trabeculae reach into the cavity, tables (n, N_ANGLES) of about -0.2 to 2: slices resemble neighbours."""
    waves = np.arange(5, 17)
    weights = 0.5 * np.cumsum(rng.standard_normal((n, 2, len(waves))), axis=0) + rng.standard_normal((2, len(waves)))
    weights /= np.sqrt((weights**2).sum(axis=(1, 2), keepdims=True) / 2)
    angles = np.outer(waves, THETA)
    return np.maximum(weights[:, 0] @ np.cos(angles) + weights[:, 1] @ np.sin(angles), -0.2)


def _field(rng: np.random.Generator, n: int, grain: float, slices: float) -> np.ndarray:
    """A smooth random field (n, 96, 96) of unit variance: cubic B-splines between random knots."""
    plane = _spline(GRID.size, grain)
    through = _spline(n, slices) if slices else np.eye(n, dtype=np.float32)
    knots = rng.standard_normal((through.shape[1], plane.shape[1], plane.shape[1]), np.float32)
    variance = 0.4794 ** (3 if slices else 2)  # the integral of the squared B-spline, by dimension
    return plane @ np.tensordot(through, knots, 1) @ plane.T / np.float32(np.sqrt(variance))


def _spline(n: int, grain: float) -> np.ndarray:
    """Weights (n, knots) of cubic B-splines whose knots lie `grain` apart."""
    away = np.abs(np.arange(n)[:, None] / grain + 1.5 - np.arange(int(np.ceil(n / grain)) + 4))
    weights = np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, np.maximum(2 - away, 0) ** 3 / 6)
    return weights.astype(np.float32)
