"""Candidates: several pairs of volumes are drawn for a request; the one that public networks read nearest to it stays.

What is done to the samples of a private model is post-processing: it costs no privacy.
"""

from dataclasses import dataclass

import numpy as np
import torch

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Volume, Volumes
from cardiac_ldm.cohort.anatomy import Sources, examine
from cardiac_ldm.evaluation.control import STEPS, Drawer, read_anatomy
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter
from cardiac_ldm.models.device import device_of

CANDIDATES = 4
"""Pairs of volumes drawn for a request: `python -m benchmarks.candidates`."""
ROUNDS = 3
"""How often a request is drawn anew, CANDIDATES at a time, while none of them is plausible."""
LOST = 6.0
"""Distance, in steps, of an attribute that can't be measured: the whole of its range."""
_APART = 2**32
"""Candidate c of request i starts from the noise of request i + c times this."""


@dataclass(frozen=True)
class Judged:
    """What public networks say of n candidates: distance float64 (n,) in steps (STEPS) from what was requested.

    measured: one dictionary a candidate, attribute -> value. plausible: bool (n,): whether the anatomy check refuses
    neither volume.
    """

    distance: np.ndarray
    measured: tuple[dict[str, float], ...]
    plausible: np.ndarray

    def best(self) -> int:
        """The nearest candidate among those that are plausible, else among all."""
        return int(np.lexsort((self.distance, ~self.plausible))[0])


@dataclass(frozen=True)
class Chosen:
    """The volumes that stay, with labels; measured: attribute -> value; drawn, refused: of how many, how many weren't
    plausible; plausible: whether these are.
    """

    volumes: Volumes
    measured: dict[str, float]
    distance: float
    plausible: bool
    drawn: int
    refused: int


def judge(drawn: Volumes, segmenter: Segmenter, classifier: PhaseClassifier) -> Judged:
    """Read candidates, `drawn` with labels, and hold each to what was requested and to what hearts look like."""
    table = read_anatomy(drawn, segmenter, classifier)
    apart = (table.measured - table.requested).abs() / table.attribute.map(STEPS)
    apart = apart.fillna(LOST).clip(upper=LOST)[table.requested.notna()]
    owners = np.unique(drawn.patient_index)
    distance = apart.groupby(table.patient).mean().reindex(owners).to_numpy(np.float64)
    told = table[table.attribute != "ESED"].groupby("patient")
    measured = tuple(dict(zip(own.attribute, own.measured, strict=True)) for _, own in told)
    plausible = [_plausible(drawn, np.flatnonzero(drawn.patient_index == owner)) for owner in owners]
    return Judged(distance, measured, np.array(plausible))


def _plausible(drawn: Volumes, rows: np.ndarray) -> bool:
    """Whether the check that real patients go through refuses none of a patient's volumes; doubts don't count."""
    assert drawn.labels is not None
    phases = ["ED" if drawn.attributes[row, ATTRIBUTE_NAMES.index("ESED")] == 1 else "ES" for row in rows]
    eight_bits = (255 * drawn.images.clip(0, 1)).round()
    volumes = [Volume(p, eight_bits[i], drawn.labels[i], GRID.spacing_mm) for p, i in zip(phases, rows, strict=True)]  # type: ignore[arg-type]
    if not all((drawn.labels[row] == structure).any() for row in rows for structure in (1, 2, 3)):
        return False
    named = dict.fromkeys(phases, "synthetic")
    return all(finding.doubt for finding in examine(volumes, {}, Sources(named, named)))


def choose(
    draw: Drawer, conditions: np.ndarray, number: int, segmenter: Segmenter, classifier: PhaseClassifier
) -> Chosen:
    """Draw a request's volumes, conditions (v, 14), several times, and keep the nearest.

    number: of the request; it and the candidate's number tell the noise.
    """
    n_drawn, n_refused, best = 0, 0, None
    for round_ in range(ROUNDS):
        drawn = labelled(draw(*requests(conditions, number, CANDIDATES, round_ * CANDIDATES)), segmenter)
        judged = judge(drawn, segmenter, classifier)
        i = judged.best()
        n_drawn, n_refused = n_drawn + CANDIDATES, n_refused + int((~judged.plausible).sum())
        if best is None or (judged.plausible[i], -judged.distance[i]) > (best.plausible, -best.distance):
            best = Chosen(
                of_candidate(drawn, i), judged.measured[i], float(judged.distance[i]), bool(judged.plausible[i]), 0, 0
            )
        if best.plausible:
            break
    assert best is not None
    return Chosen(best.volumes, best.measured, best.distance, best.plausible, n_drawn, n_refused)


def requests(conditions: np.ndarray, number: int, candidates: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What to draw for candidates of one request, conditions (v, 14): attributes (kv, 14) and patients int64 (kv,)."""
    owners = number + _APART * np.arange(first, first + candidates, dtype=np.int64)
    return np.tile(conditions, (candidates, 1)), np.repeat(owners, len(conditions))


def of_candidate(drawn: Volumes, i: int) -> Volumes:
    """The volumes of candidate `i` alone, of patient 0."""
    rows = drawn.patient_index == np.unique(drawn.patient_index)[i]
    labels = None if drawn.labels is None else drawn.labels[rows]
    return Volumes(drawn.name, drawn.images[rows], drawn.attributes[rows], np.zeros(rows.sum(), np.int64), labels)


@torch.no_grad()
def labelled(drawn: Volumes, segmenter: Segmenter) -> Volumes:
    """The volumes with the labels that the decoder meant; where it gives none, with those that the segmenter reads."""
    if drawn.labels is not None:
        return drawn
    read = segmenter(torch.from_numpy(drawn.images).to(device_of(segmenter))).argmax(dim=1).to(torch.uint8).cpu()
    return Volumes(drawn.name, drawn.images, drawn.attributes, drawn.patient_index, read.numpy())
