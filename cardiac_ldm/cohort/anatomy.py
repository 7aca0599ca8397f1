"""What a heart must look like: the check of a patient's images, labels and table against anatomy and each other.

Errors refuse a patient; doubts are remarked and kept with them. Thresholds lie between what 40 ACDC patients and 2,000
phantoms have and what each corruption of them has; `python -m benchmarks.data_faults` measures both on others.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from scipy import ndimage

from cardiac_ldm.cohort.attributes import LV, MYOCARDIUM, RV, implausible, measure_attributes
from cardiac_ldm.cohort.orientation import correlations, handedness, slice_order, unlike
from cardiac_ldm.cohort.volumes import Patient, Volume, labels_by_phase

ENCLOSED, OPEN = 0.9, 0.75
"""Share of the LV cavity's edge that is wall: sound 0.98 or more; below OPEN it's refused, below ENCLOSED doubted."""
RIM = 0.65
"""Share of the wall's outer edge in one slice that is RV: sound 0.53 or less; a rim of 1 round 3 makes it 0.7 to 1."""
FRAGMENTS = 0.05
"""Share of a structure that lies apart from its largest piece in a slice: sound 0.02 or less."""
CONTRAST = 0.0
"""Brightness of the cavity above the wall's in standard deviations of the image: sound mostly 0.6 or more."""
ANGLES = (100.0, 255.0)
"""Directions from the LV to the RV, degrees: sound 108 to 246; mirrored left to right -66 to 72."""
REFLECTED, STEEP, REFLECTED_STEEP = -0.55, 150.0, -0.3
"""Handedness below which a picture is doubted, and that for an RV that lies higher than STEEP degrees, as few do unless
x and y are exchanged. Handedness is 1 on average, and -1 for reflected hearts."""
FLAT = 0.15
"""Contrast of a slice relative to the stack's median: sound 0.5 or more; a black one has 0."""
REPEATED = 0.995
"""Correlation of two slices of one stack: sound 0.95 or less; a repeated one has 1."""
SAME_SLICE = 0.8
"""Mean correlation of all pairs of slices: sound 0.65 or less; the frames of one slice's cine have 0.9 or more."""
OUT_OF_ORDER = {"images": 1.25, "labels": 1.38}
"""How much rougher the stored order is than the smoothest one: sound up to 1.24 and 1.35."""
FACTOR, DOUBTED_FACTOR, LEAST_ML = 2.0, 1.5, 15.0
"""A table's volume against what the labels measure; contours of two readers differ by a tenth or two."""
EF_POINTS = 10.0
"""An ejection fraction against the volumes beside it, in points of a hundred: rounding makes 2."""
_OF_LABELS = ("values", "open", "rim", "pieces", "contrast", "no RV")
"""Codes of findings that, of a segmenter's labels, tell of the segmenter alone."""
CROSS = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]])
"""A voxel and its neighbours in-plane."""
_NAMES = {RV: "RV", MYOCARDIUM: "wall", LV: "LV"}
_REFLECTIONS = {
    "mirrored left to right": 180,
    "stored with x and y exchanged": 270,
    "mirrored upside down": 360,
    "stored with x and y exchanged and turned by 180 degrees": 90,
}
_TURNS = {"turned left by 90 degrees": -90, "turned by 180 degrees": 180, "turned right by 90 degrees": 90}
"""What may have been done to a picture, with the angle of the RV before: that plus (less, if reflected) today's."""
_BY_NEAREST = "labels that were interpolated have such rims: resample them by nearest neighbour"


@dataclass(frozen=True)
class Finding:
    """What is wrong (or, a doubt, seems so): a code, the file, and what it is with what to do."""

    code: str
    file: str
    says: str
    doubt: bool = False


@dataclass(frozen=True)
class Sources:
    """What messages name: the image of each phase, its labels, the table's row; the labels' values in the files.

    reverse: whether the stack is stored apex first: slices are counted from 0 as they're stored.
    """

    images: Mapping[str, str]
    labels: Mapping[str, str]
    table: str = "the table"
    values: Mapping[int, int] | None = None
    reverse: bool = False

    def at(self, slices: Sequence[int] | np.ndarray, n: int) -> str:
        """Slices of n as they're counted in the file."""
        return ", ".join(str(n - 1 - int(i) if self.reverse else int(i)) for i in slices)


def examine(volumes: Sequence[Volume], said: Mapping[str, float], sources: Sources) -> list[Finding]:
    """Everything that is wrong with a patient, base first, rows down.

    volumes: those of one or two phases, of one geometry. said: attributes by the table.
    """
    return [*_images(volumes, sources), *examine_labels(volumes, said, sources)]


def examine_labels(volumes: Sequence[Volume], said: Mapping[str, float], sources: Sources) -> list[Finding]:
    """What labels tell, and the table against them: for labels by a segmenter these are doubts, since it may err."""
    labels = labels_by_phase(volumes)
    measured = measure_attributes(labels, volumes[0].spacing_mm) if labels else {}
    found = [finding for v in volumes if v.labels is not None for finding in _labels(v, v.labels, sources)]
    if measured and all(finding.doubt for finding in found):  # those of labels that are something else mean nothing
        found += [*_sides(volumes, labels, measured["ANGLE"], sources), *_sizes(labels, measured, sources)]
    trusted = measured if all(finding.doubt for finding in found) else {}
    return [*found, *_order(volumes, sources, "labels"), *_table(said, trusted, sources)]


def segmented(patient: Patient, seen: Mapping[str, np.ndarray]) -> list[str]:
    """Doubts about a patient of whom a segmenter labelled what nobody had: its labels by phase, held to the same."""
    if all(v.labels is not None for v in patient.volumes):
        return []
    named = dict.fromkeys(seen, patient.id)
    volumes = [replace(v, labels=seen[v.phase]) for v in patient.volumes if v.phase in seen]
    found = examine_labels(volumes, patient.attributes, Sources(named, named, patient.id)) if volumes else []
    of_the_heart = [finding for finding in found if finding.code not in _OF_LABELS]
    return [f"{finding.file}: as the segmenter sees it, {finding.says}" for finding in of_the_heart]


def _images(volumes: Sequence[Volume], sources: Sources) -> Iterator[Finding]:
    whole = True
    for v in volumes:
        file, n = sources.images[v.phase], len(v.image)
        if modulus := wrapped(v.image):
            cast = f"numpy.uint{int(modulus).bit_length() - 1}" if modulus in (2**8, 2**16) else "an unsigned integer"
            says = f"its negative values run on above the largest: they're wrapped; cast it to {cast}"
            yield Finding("wrapped", file, says)
            continue
        spread = v.image.std(axis=(1, 2))
        flat = spread < FLAT * np.median(spread)
        full = np.flatnonzero(~flat)
        if len(full) < 2:
            continue
        inner = (np.arange(n) > full[0]) & (np.arange(n) < full[-1])
        if v.labels is not None:
            inner |= v.labels.any(axis=(1, 2))
        if len(where := np.flatnonzero(flat & inner)):
            says = f"slice {sources.at(where, n)} (from 0) is black inside the stack; export it again"
            yield Finding("black", file, says)
        if len(where := np.flatnonzero(flat & ~inner)):
            says = f"slice {sources.at(where, n)} (from 0) is black at the stack's end; is it padding?"
            yield Finding("black", file, says, doubt=True)
        alike = correlations(v.image)[np.ix_(full, full)]
        if len(full) > 3 and alike[np.triu_indices(len(full), 1)].mean() > SAME_SLICE:
            says = f"its {n} slices are nearly the same picture: they seem to be the frames of one slice's cine"
            yield Finding("cine", file, f"{says} (x, y, t); give the stack (x, y, z) of one phase")
            whole = False
        elif (twice := np.argwhere(np.triu(alike, 1) > REPEATED)).size:
            met = "; ".join(sources.at(sorted(full[pair]), n).replace(", ", " and ") for pair in twice[:4])
            yield Finding("repeated", file, f"slices {met} (from 0) are the same picture; export it again")
            whole = False
        whole &= not flat.any()
    if whole:
        yield from _order(volumes, sources, "images")


def wrapped(image: np.ndarray) -> float:
    """The modulus (2^16 or 2^8, times the slope) whose addition to negative values makes an image smoother; else 0."""
    if image.min() >= 0:
        return 0.0
    values = np.unique(image)
    step, span = float(np.diff(values).min()) if len(values) > 1 else 0.0, float(values[-1] - values[0])
    for modulus in (2.0**8, 2.0**16, 2**8 * step, 2**16 * step):
        if modulus / 2 < span <= modulus and values[0] >= -modulus / 2:
            undone = np.where(image < 0, image + modulus, image)
            if _roughness(undone) < _roughness(image):
                return modulus
    return 0.0


def _roughness(image: np.ndarray) -> float:
    return float(sum(np.abs(np.diff(image, axis=axis)).sum(dtype=np.float64) for axis in (1, 2)))


def _order(volumes: Sequence[Volume], sources: Sources, of: str) -> Iterator[Finding]:
    """Whether neighbours in the stack are the slices that look most alike."""
    stacks = [v for v in volumes if of == "images" or v.labels is not None]
    n = len(volumes[0].image)
    if not stacks:
        return
    if of == "images":
        shown, apart = np.arange(n), 1 - np.mean([correlations(v.image) for v in stacks], axis=0)
    else:
        labels = np.stack([v.labels for v in stacks if v.labels is not None])
        shown = np.flatnonzero(labels.any(axis=(0, 2, 3)))
        apart = np.mean([unlike(one[shown]) for one in labels], axis=0)
    if len(shown) < 5:
        return
    best, rougher = slice_order(apart)
    if rougher > OUT_OF_ORDER[of]:
        file = (sources.images if of == "images" else sources.labels)[stacks[0].phase]
        way = f"from one end they'd be {sources.at(shown[best], n)} (from 0)"
        says = f"its slices aren't in the order in which they lie in the body: {way}"
        yield Finding("order", file, f"{says}; bring them into that order, images and labels alike")


def _around(inside: np.ndarray) -> np.ndarray:
    return np.asarray(ndimage.binary_dilation(inside, CROSS) & ~inside)


def enclosed(labels: np.ndarray, structure: int = LV, by: int = MYOCARDIUM) -> float:
    """Share of a structure's neighbours in-plane that are wall. ACDC: LVs 98 % or more, RVs 41 % or less."""
    around = _around(labels == structure)
    return float((labels[around] == by).mean()) if around.any() else 0.0


def fitting_map(labels: np.ndarray) -> dict[int, int] | None:
    """The exchange of values after which the wall encloses the LV alone; None where there's none."""
    for rv, wall, lv in permutations((RV, MYOCARDIUM, LV)):
        if enclosed(labels, lv, wall) > 0.95 and enclosed(labels, rv, wall) < OPEN:
            return {rv: RV, wall: MYOCARDIUM, lv: LV}
    return None


def _labels(v: Volume, labels: np.ndarray, sources: Sources) -> Iterator[Finding]:
    """One phase: enclosure, rims, connectedness, contrast."""
    box = (slice(None), *(slice(max(at.min() - 1, 0), at.max() + 2) for at in np.nonzero(labels)[1:]))
    labels, image = labels[box], v.image[box]
    file, share = sources.labels[v.phase], enclosed(labels)
    if share < ENCLOSED and (exchange := fitting_map(labels)):
        values = sources.values or {k: k for k in _NAMES}
        fits = {value: exchange[ours] for value, ours in values.items() if ours}
        surrounded = next(_NAMES[value] for value, ours in exchange.items() if ours == LV)
        says = f"the wall surrounds what is labelled {surrounded}, not LV"
        if exchange[MYOCARDIUM] != MYOCARDIUM:
            says = "what is labelled wall doesn't surround the LV"
        yield Finding("values", file, f"{says}; map the label values: {fits} would fit")
        return
    if share < ENCLOSED:
        says = f"the wall surrounds {share:.0%} of the LV cavity's edge; {_BY_NEAREST}, or complete the wall"
        yield Finding("open", file, says, share >= OPEN)
    around = _around(labels >= MYOCARDIUM)
    edges = around.sum(axis=(1, 2))
    beside = (around & (labels == RV)).sum(axis=(1, 2)) / np.maximum(edges, 1) * (edges > 20)
    if beside.max() > RIM:
        where = sources.at([int(beside.argmax())], len(labels))
        says = f"in slice {where} (from 0) RV lies round {beside.max():.0%} of the wall; {_BY_NEAREST}"
        yield Finding("rim", file, says)
    for structure, name in _NAMES.items():
        if (apart := _scattered(labels == structure)) > FRAGMENTS:
            yield Finding("pieces", file, f"{apart:.0%} of the {name} lies apart from the rest; look at it", True)
    wall, cavity = (image[labels == k] for k in (MYOCARDIUM, LV))
    if share >= ENCLOSED and len(wall) and cavity.mean() - wall.mean() < CONTRAST * v.image.std():
        says = "the LV cavity isn't brighter than the wall; are they this image's labels?"
        yield Finding("contrast", file, says, doubt=True)


def _scattered(mask: np.ndarray) -> float:
    """Share of a structure that isn't in the largest piece of its slice."""
    apart = 0
    for one in mask[mask.any(axis=(1, 2))]:
        sizes = np.bincount(ndimage.label(one, np.ones((3, 3)))[0].ravel())[1:]
        apart += sizes.sum() - sizes.max()
    return float(apart / max(mask.sum(), 1))


def _sides(
    volumes: Sequence[Volume], labels: Mapping[str, np.ndarray], angle: float, sources: Sources
) -> Iterator[Finding]:
    """Where the RV lies beside the LV, and whether the heart is its own mirror image."""
    with_rv = [phase for phase, one in labels.items() if (one == RV).any()]
    if not with_rv:
        return
    phase = with_rv[0]
    if len(with_rv) < len(labels):
        lacking = next(p for p in labels if p not in with_rv)
        yield Finding(
            "no RV", sources.labels[lacking], f"has no RV, which is labelled at {phase}; label it, or not", True
        )
    hand = handedness(volumes)
    if not ANGLES[0] <= angle <= ANGLES[1]:
        ways = _REFLECTIONS if hand < 0 else _TURNS
        fits = {way: (by + (-angle if hand < 0 else angle)) % 360 for way, by in ways.items()}
        likely = sorted((way for way in fits if ANGLES[0] <= fits[way] <= ANGLES[1]), key=lambda w: abs(fits[w] - 180))
        says = f"the RV lies at {angle:.0f} degrees from the LV, expected {ANGLES[0]:.0f} to {ANGLES[1]:.0f}"
        what = f"the picture seems {' or '.join(likely)}; undo that in images and labels alike"
        yield Finding("side", sources.images[phase], f"{says}: {what}")
    elif hand < (REFLECTED_STEEP if angle < STEEP else REFLECTED):
        says = "it looks like the mirror image of a heart, upside down or with x and y exchanged; look at it"
        yield Finding("reflected", sources.images[phase], says, True)


def _sizes(labels: Iterable[str], measured: Mapping[str, float], sources: Sources) -> Iterator[Finding]:
    last = sources.labels[list(labels)[-1]]
    if measured["LVESV"] > measured["LVEDV"]:
        met = f"{measured['LVESV']:.0f} mL against {measured['LVEDV']:.0f} mL"
        yield Finding("phases", last, f"the LV is larger at ES than at ED, {met}; exchange the phases")
    elif measured["RVESV"] > measured["RVEDV"]:
        met = f"{measured['RVESV']:.0f} mL against {measured['RVEDV']:.0f} mL"
        yield Finding("phases", last, f"the RV is larger at ES than at ED, {met}; look at it", True)
    for name in ("LVEDV", "LVESV", "RVEDV", "RVESV", "MYOEDTHICK", "MYOESTHICK"):
        value = measured[name]
        if value > 0 and (problem := implausible(name, value)):
            says = f"as its labels and spacing have it, {problem}"
            yield Finding("size", sources.labels["ES" if "ES" in name else "ED"], says, name != "LVEDV")


def _table(said: Mapping[str, float], measured: Mapping[str, float], sources: Sources) -> Iterator[Finding]:
    """The table against itself, and against what labels measure, where they may be trusted."""
    for side in ("LV", "RV"):
        full, empty, ef = (said.get(f"{side}{end}") for end in ("EDV", "ESV", "EF"))
        if not (full and empty):
            continue
        makes = 100 * (1 - empty / full)
        if empty > full:
            says = f"{side}ESV, {empty:g} mL, is more than {side}EDV, {full:g} mL"
            yield Finding("table", sources.table, f"{says}; correct them")
        elif ef and abs(ef - makes) > EF_POINTS:
            says = f"{side}EF is {ef:g} %, but volumes of {full:g} and {empty:g} mL make {makes:.0f} %"
            yield Finding("table", sources.table, f"{says}; correct them")
    for name in ("LVEDV", "LVESV", "RVEDV", "RVESV"):
        given, seen = said.get(name, np.nan), measured.get(name, np.nan)
        if seen > 0 and abs(given - seen) > LEAST_ML and max(given / seen, seen / given) > DOUBTED_FACTOR:
            says = f"{name} is {given:g} mL, but the labels measure {seen:.0f} mL; correct the table, or the labels"
            yield Finding("table", sources.table, says, max(given / seen, seen / given) <= FACTOR)
