"""How a stack lies: what is stored the other way round, in which order slices run, whether the heart is mirrored."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from einops import reduce

from cardiac_ldm.cohort.attributes import LV, MYOCARDIUM, RV
from cardiac_ldm.cohort.volumes import Volume

SAID = ("slices ran from apex to base", "rows up", "columns left")
"""What is wrong with the axes (slices, rows, columns) that `turns` names."""
WEIGHTS = np.array([-0.46, 0.12, -0.69, -0.54, -1.56, -1.12, 0.76, 0.53, -1.18, 4.03, 2.21, -1.19, -1.12, 0.71, 0.62])
"""Of `features`, by logistic regression without intercept on 40 ACDC patients and 1,000 phantoms, whose mean score is
1: `python -m benchmarks.data_faults fit`."""
_RING_MM, _FAR_MM, _OCTANT = 20.0, 50.0, 45


def turns(affine: np.ndarray, labels: Sequence[np.ndarray]) -> tuple[int, ...]:
    """The axes of (slices, rows, columns) to flip, so that rows run down, columns to the right and the base is first.

    The order of slices shows in the RV, which is wide at the base and ends before the apex: in all 80 ACDC patients
    the basal third holds more of it than the apical one, by 12 to 78 % of the whole. Where labels don't tell, an
    affine does, since the apex points left, forwards and down. By the affine alone columns and rows run to the
    left, back or down, as scanners show the short axis. An affine along the scanner's axes is a placeholder, as
    ACDC's are, since no heart lies so: it tells nothing.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    told = np.abs(directions).max() < 0.999 and np.allclose(directions.T @ directions, np.eye(3), atol=0.1)
    rv, shown = (
        np.sum([match(a).sum(axis=(1, 2)) for a in labels], axis=0) for match in (lambda a: a == RV, lambda a: a > 0)
    )
    labelled = np.flatnonzero(shown)
    third = len(labelled) // 3
    lean = (rv[labelled[:third]].sum() - rv[labelled[-third:]].sum()) / rv.sum() if third and rv.any() else 0.0
    to_apex = directions[:, 2] @ (-1, 1, -1) / 3**0.5 if told else 0.0
    reverse = lean < 0 if abs(lean) >= 0.1 else to_apex < -0.5
    columns, rows = -directions.sum(axis=0)[:2] < -0.5 if told else (False, False)
    return tuple(axis for axis, turn in enumerate((reverse, rows, columns)) if turn)


def flipped(volumes: Sequence[Volume], axes: Sequence[int]) -> tuple[Volume, ...]:
    """Volumes whose images and labels are flipped along these axes."""
    if not axes:
        return tuple(volumes)

    def flip(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.flip(array, tuple(axes)))

    return tuple(replace(v, image=flip(v.image), labels=None if v.labels is None else flip(v.labels)) for v in volumes)


def correlations(image: np.ndarray) -> np.ndarray:
    """Correlations (n, n) of a stack's slices at half their resolution; 0 for a slice without contrast."""
    rows, columns = (n // 2 * 2 for n in image.shape[1:])
    flat = reduce(image[:, :rows, :columns], "n (h i) (w j) -> n (h w)", "mean", i=2, j=2)
    centred = flat - flat.mean(axis=1, keepdims=True)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    return np.asarray(unit @ unit.T)


def unlike(labels: np.ndarray) -> np.ndarray:
    """1 less the Dice overlap of every two slices (n, n)."""
    parts = [(labels == k).reshape(len(labels), -1).astype(np.float32) for k in (RV, MYOCARDIUM, LV)]
    sizes = np.sum([part.sum(axis=1) for part in parts], axis=0)
    return np.asarray(1 - 2 * np.sum([p @ p.T for p in parts], axis=0) / np.maximum(sizes[:, None] + sizes, 1))


def slice_order(apart: np.ndarray) -> tuple[list[int], float]:
    """A short way through all slices, and how much rougher (1 or more) the stored order is; apart: (n, n).

    The nearest next one from every start, then reversals as long as they shorten the best of these ways.
    """

    def length(way: Sequence[int]) -> float:
        return float(apart[list(way)[:-1], list(way)[1:]].sum())

    n, ways = len(apart), []
    for start in range(n):
        way, left = [start], set(range(n)) - {start}
        while left:
            way.append(min(left, key=lambda k: float(apart[way[-1], k])))
            left.remove(way[-1])
        ways.append(way)
    best = min(ways, key=length)
    shorter = n <= 40
    while shorter:
        shorter = False
        for i in range(n - 1):
            for j in range(i + 1, n):
                before = apart[best[i - 1], [best[i], best[j]]] if i else (0.0, 0.0)
                after = apart[[best[j], best[i]], best[j + 1]] if j + 1 < n else (0.0, 0.0)
                if before[1] + after[1] < before[0] + after[0] - 1e-6:
                    best, shorter = [*best[:i], *best[i : j + 1][::-1], *best[j + 1 :]], True
    return best if best[0] < best[-1] else best[::-1], length(range(n)) / max(length(best), 1e-9)


def handedness(volumes: Iterable[Volume]) -> float:
    """About 1 for hearts as they are, -1 for reflected ones, however turned; NaN without both ventricles' labels."""
    known = [x for v in volumes if v.labels is not None if (x := features(v.image, v.labels, v.spacing_mm)) is not None]
    return float(WEIGHTS @ np.mean(known, axis=0)) if known else float("nan")


def features(image: np.ndarray, labels: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray | None:
    """Fifteen numbers of a volume, each of which a reflection of the picture negates and a rotation keeps.

    They are measured beside the line from the LV's to the RV's centre: how askew the RV is (third moments, median,
    middle of its extent), how far that line turns from base to apex and the LV shifts, and how much brighter the
    picture is on one side than on the other, 45 degrees at a time, near the heart and further away.

    image, labels: (slices, rows, columns), base first. None where a ventricle has too few voxels.
    """
    _, dy, dx = spacing_mm
    lv, rv = labels == LV, labels == RV
    both = np.flatnonzero(np.minimum(lv.sum(axis=(1, 2)), rv.sum(axis=(1, 2))) > 15)
    if not len(both):
        return None
    rows, columns = np.indices(labels.shape[1:])
    place = np.stack([columns * dx, -rows * dy])
    centre, across = _centre(lv, place), _centre(rv, place) - _centre(lv, place)
    along = across / np.linalg.norm(across)
    side = np.array([-along[1], along[0]])
    a, b = (np.tensordot(d, place - centre[:, None, None], 1) for d in (along, side))
    in_rv = np.nonzero(rv)[1:]
    x, y = a[in_rv], b[in_rv]
    u, v, spread = x - x.mean(), y - y.mean(), y.std()
    radius = np.sqrt(2 * float((lv * (a**2 + b**2)).sum() / lv.sum()))
    third = len(both) // 3 or 1
    base, apex = ([_centre(m[part], place) for m in (lv, rv)] for part in (both[:third], both[-third:]))
    turn = [np.arctan2(side @ (r - left), along @ (r - left)) for left, r in (base, apex)]
    shape = [
        (v**3).mean() / spread**3,
        (u * v).mean() / (x.std() * spread),
        (u**2 * v).mean() / (x.var() * spread),
        np.median(y) / spread,
        (y.max() + y.min()) / 2 / spread,
        turn[0] - turn[1],
        side @ (base[0] - apex[0]) / radius,
    ]
    return np.array([*shape, *_brighter(image, labels, np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360, radius)])


def _centre(mask: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.asarray((mask.sum(axis=0) * place).sum(axis=(1, 2)) / mask.sum())


def _brighter(
    image: np.ndarray, labels: np.ndarray, distance: np.ndarray, angle: np.ndarray, radius: float
) -> list[float]:
    """Mean brightness of four octants less that of their mirror images, near the heart, then further away."""
    low, high = np.percentile(image, (1, 99))
    shown = np.flatnonzero((labels == LV).any(axis=(1, 2)))
    clear = labels[shown] == 0
    bright = np.clip((image[shown] - low) / max(high - low, 1e-9), 0, 1) * clear
    near = 2.2 * radius + _RING_MM
    differences: list[float] = []
    for ring in ((distance > radius) & (distance < near), (distance >= near) & (distance < near - _RING_MM + _FAR_MM)):
        octant = (angle[ring] // _OCTANT).astype(int)
        n, sums = (np.bincount(octant, weights=m[:, ring].sum(axis=0), minlength=8)[:8] for m in (clear, bright))
        mean = np.where(n > 0, sums / np.maximum(n, 1), sums.sum() / max(n.sum(), 1))
        differences += list(mean[:4] - mean[:3:-1])
    return differences
