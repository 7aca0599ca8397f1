"""What volumes are worth as training data: train on them, test on real patients (Esteban et al., arXiv 1706.02633).

Which volumes those are, an arm of the comparison, is the caller's: synthetic, real, or both together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from einops import rearrange, reduce
from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn import functional

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Patients, require_labelled, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.control import STRUCTURES, volume_dice
from cardiac_ldm.evaluation.features import SLICES, slice_features
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS, Estimate, bootstrap
from cardiac_ldm.models.anatomy import N_LABELS, PhaseClassifier, Segmenter
from cardiac_ldm.models.device import compute_device, device_of
from cardiac_ldm.training.anatomy import _seeded, _train, augment

_BATCH = 8
_ESED, _LVEDV = (ATTRIBUTE_NAMES.index(name) for name in ("ESED", "LVEDV"))
PENALTIES = np.logspace(-4, 4, 17)
"""Of the ridge regression, as multiples of the number of features."""


@dataclass(frozen=True)
class LabelledVolumes:
    """Volumes to train on or to test on; plain arrays, which guard nobody.

    images: float32 (n, 13, 96, 96) in [0, 1]. labels: uint8 (n, 13, 96, 96): 0 background, 1 RV, 2 myocardium, 3 LV; or
    None where the decoder that drew them gives none. attributes: float32 (n, 14), NaN where unknown. owners: int64
    (n,), the patient or request of each volume.

    Raises:
        ParameterError: an array has another shape, or values that aren't finite or no label.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray | None
    attributes: np.ndarray
    owners: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.images)
        for field, shape in (
            ("images", (n, *GRID.shape)),
            ("labels", (n, *GRID.shape)),
            ("attributes", (n, len(ATTRIBUTE_NAMES))),
            ("owners", (n,)),
        ):
            given = getattr(self, field)
            if given is not None and given.shape != shape:
                raise ParameterError(f"{self.name}: {field} are {given.shape}, expected {shape}")
        if not np.isfinite(self.images).all():
            raise ParameterError(f"{self.name}: images hold values that aren't finite; leave those volumes out")
        if self.labels is not None and self.labels.max(initial=0) >= N_LABELS:
            raise ParameterError(f"{self.name}: labels go up to {self.labels.max()}; give 0 to {N_LABELS - 1}")

    @classmethod
    def of(cls, patients: Patients) -> "LabelledVolumes":
        """Those of the patients whose labels were given, with all their volumes.

        Raises:
            PrivacyError: they are private and not simulated.
            CohortError: none of them has labels.
        """
        require_releasable(patients, "labels and images of private patients through what is trained and tested on them")
        patients = require_labelled(patients, "a measure of utility")
        volumes = np.arange(len(patients.owners))
        return cls(
            patients.name, patients.images(volumes), patients.labels(volumes), patients.attributes, patients.owners
        )

    def __add__(self, other: "LabelledVolumes") -> "LabelledVolumes":
        """Both together, without labels where either has none; nobody of the one is anybody of the other."""
        unlabelled = self.labels is None or other.labels is None
        return LabelledVolumes(
            f"{self.name} + {other.name}",
            np.concatenate([self.images, other.images]),
            None if unlabelled else np.concatenate([self.labels, other.labels]),
            np.concatenate([self.attributes, other.attributes]),
            np.concatenate([self.owners, other.owners + self.owners.max() + 1]),
        )

    @cached_property
    def phased(self) -> np.ndarray:
        """int64: the volumes of known phase."""
        return np.flatnonzero(np.isfinite(self.attributes[:, _ESED]))

    @cached_property
    def filled(self) -> np.ndarray:
        """int64: the end-diastolic volumes of known LVEDV."""
        return np.flatnonzero((self.attributes[:, _ESED] == 1) & np.isfinite(self.attributes[:, _LVEDV]))

    @cached_property
    def features(self) -> np.ndarray:
        """float32 (`filled`, 1280): EfficientNet's, frozen, averaged over slices 3..9; read once for all arms."""
        features, _ = slice_features(self.images[self.filled], self.filled, progress=False)
        return reduce(features, "(n s) f -> n f", "mean", s=SLICES.stop - SLICES.start)


@dataclass(frozen=True)
class Budget:
    """Length of a training, alike for all arms."""

    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Utility:
    """What was reached on the test patients.

    outcomes: a row for every test patient, NaN where something isn't known: "Dice RV", "Dice myocardium" and "Dice LV",
    means over volumes; "phase", the share of volumes whose phase is told; "LVEDV" and "predicted LVEDV" in mL. rows:
    metric, attribute, value, low, high, n_patients, unit.
    """

    name: str
    outcomes: pd.DataFrame
    rows: pd.DataFrame


def utility(
    train: LabelledVolumes,
    test: LabelledVolumes,
    *,
    segmenter: Budget,
    phase: Budget,
    resamples: int,
    seed: int,
    progress: bool = True,
) -> Utility:
    """Train a segmenter, a phase classifier and a regression of LVEDV on one cohort, test them on another's patients.

    Intervals (95 %, bootstrap) are over test patients: another training set or seed would move the values further. Give
    budgets at which more real patients serve better than fewer; shorter ones measure the training, not the data. Dice
    is NaN where the volumes to train on have no labels.

    Raises:
        ParameterError: fewer than 8 test patients, or fewer than 8 of either cohort at end-diastole with a known LVEDV,
            or no volume to train on at one of the phases, or no labels to test on.
    """
    truth = _check(train, test)
    dice = pd.DataFrame(np.nan, index=np.unique(test.owners), columns=list(STRUCTURES))
    if train.labels is not None:
        predicted = _fit_segmenter(train.images, train.labels, segmenter, seed, progress)
        dice = volume_dice(predicted, test.images, truth).groupby(test.owners).mean()
    classifier = _fit_phase_classifier(train, phase, seed, progress)
    right = _phases(classifier, test.images[test.phased]) == test.attributes[test.phased, _ESED]
    volumes = ridge(train.features, train.attributes[train.filled, _LVEDV])(test.features)
    regressed = pd.DataFrame({"LVEDV": test.attributes[test.filled, _LVEDV], "predicted LVEDV": volumes})
    phases = pd.Series(right, name="phase").groupby(test.owners[test.phased]).mean()
    outcomes = dice.add_prefix("Dice ").join(phases)
    outcomes = outcomes.join(regressed.groupby(test.owners[test.filled]).mean())
    return Utility(train.name, outcomes, _rows([outcomes], resamples, seed))


def compare_arms(first: Utility, second: Utility, *, resamples: int, seed: int) -> pd.DataFrame:
    """What the first arm reaches beyond the second, on the same resampled test patients: rows as in `Utility.rows`.

    Raises:
        ParameterError: they weren't tested on the same patients.
    """
    if not (first.outcomes.index.equals(second.outcomes.index) and first.outcomes.LVEDV.equals(second.outcomes.LVEDV)):
        raise ParameterError(f"{second.name}: wasn't tested on the patients of {first.name}; test both on the same")
    return _rows([first.outcomes, second.outcomes], resamples, seed)


def tabulate_arms(arms: Sequence[Utility], baselines: Sequence[Utility], *, resamples: int, seed: int) -> pd.DataFrame:
    """What every arm reaches (`against` is ""), and what it reaches beyond each of the other baselines.

    Returns:
        Columns arm, against, and those of `Utility.rows`.

    Raises:
        ParameterError: as `compare_arms`.
    """
    parts = [arm.rows.assign(arm=arm.name, against="") for arm in arms]
    for arm, other in product(arms, baselines):
        if arm.name != other.name:
            beyond = compare_arms(arm, other, resamples=resamples, seed=seed)
            parts.append(beyond.assign(arm=arm.name, against=other.name))
    return pd.concat(parts, ignore_index=True)


def ridge(features: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit standardised features (n, d) to targets (n,); give what predicts (m,) from (m, d).

    min |y - X b|^2 + a |b|^2 (Hoerl and Kennard, Technometrics 12:55, 1970), the intercept free; of `PENALTIES`, a is
    the one of least squared error with one left out, (y - y') / (1 - h) with the leverage h (Allen, Technometrics
    16:125, 1974).
    """
    x, y = features.astype(np.float64), targets.astype(np.float64)
    mean, spread, level = x.mean(axis=0), x.std(axis=0), y.mean()
    spread, y = np.where(spread > 0, spread, 1), y - level
    u, s, vt = np.linalg.svd((x - mean) / spread, full_matrices=False)

    def left_out(penalty: float) -> float:
        kept = s**2 / (s**2 + penalty)
        residuals = (y - u @ (kept * (u.T @ y))) / (1 - 1 / len(y) - u**2 @ kept)
        return float(np.square(residuals).mean())

    penalty = min(features.shape[1] * PENALTIES, key=left_out)
    slopes = vt.T @ (s / (s**2 + penalty) * (u.T @ y))
    return lambda some: (some - mean) / spread @ slopes + level


def _fit_segmenter(volumes: np.ndarray, truths: np.ndarray, budget: Budget, seed: int, progress: bool) -> Segmenter:
    images, labels = (torch.from_numpy(array).to(compute_device()) for array in (volumes, truths))
    dice = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)

    def loss(network: Segmenter, rows: Tensor, generator: torch.Generator) -> Tensor:
        drawn, truth = augment(images[rows], labels[rows], generator)
        return dice(network(drawn), rearrange(truth, "b d h w -> b 1 d h w"))

    network = _seeded(Segmenter, seed)
    return _train(network, loss, len(images), budget.steps, budget.batch, budget.learning_rate, seed, progress)[0]


def _fit_phase_classifier(train: LabelledVolumes, budget: Budget, seed: int, progress: bool) -> PhaseClassifier:
    images, phases = (torch.from_numpy(x).to(compute_device()) for x in (train.images, train.attributes[:, _ESED]))
    known = torch.from_numpy(train.phased)

    def loss(network: PhaseClassifier, rows: Tensor, generator: torch.Generator) -> Tensor:
        drawn, _ = augment(images[known[rows]], None, generator)
        return functional.cross_entropy(network(drawn), phases[known[rows]].long())

    network = _seeded(PhaseClassifier, seed)
    return _train(network, loss, len(known), budget.steps, budget.batch, budget.learning_rate, seed, progress)[0]


@torch.no_grad()
def _phases(classifier: PhaseClassifier, images: np.ndarray) -> np.ndarray:
    """int64 (n,): 0 end-systole, 1 end-diastole."""
    batches = torch.from_numpy(images).to(device_of(classifier)).split(_BATCH)
    return torch.cat([classifier(some).argmax(dim=1) for some in batches]).cpu().numpy()


def _r_squared(known: np.ndarray) -> float:
    truth, predicted = known.T
    spread = np.square(truth - truth.mean()).sum()
    return float(1 - np.square(truth - predicted).sum() / spread) if spread > 0 else float("nan")


def _mean_error(known: np.ndarray) -> float:
    return float(np.abs(known[:, 0] - known[:, 1]).mean())


def _mean(known: np.ndarray) -> float:
    return float(known.mean())


_MEASURES: dict[tuple[str, str | None, str], tuple[list[str], Callable[[np.ndarray], float]]] = {
    **{("Dice", structure, ""): ([f"Dice {structure}"], _mean) for structure in STRUCTURES},
    ("phase accuracy", None, ""): (["phase"], _mean),
    ("R2", "LVEDV", ""): (["LVEDV", "predicted LVEDV"], _r_squared),
    ("mean absolute error", "LVEDV", "mL"): (["LVEDV", "predicted LVEDV"], _mean_error),
}
"""Metric, attribute or structure, and unit; the columns of `Utility.outcomes` it takes, and how."""


def _rows(arms: list[pd.DataFrame], resamples: int, seed: int) -> pd.DataFrame:
    """Every measure of one arm, or the first's minus the second's; of patients in whom it's known in both."""
    rows = []
    for (metric, attribute, unit), (columns, measure) in _MEASURES.items():
        paired = pd.concat([arm[columns] for arm in arms], axis=1).dropna()
        known = np.split(paired.to_numpy(np.float64), len(arms), axis=1)
        estimate = Estimate(math.nan, math.nan, math.nan, len(known[0]))
        if len(known[0]) >= MIN_PATIENTS:
            estimate = bootstrap(partial(_beyond, measure, known), len(known[0]), resamples=resamples, seed=seed)
        rows.append({"metric": metric, "attribute": attribute, **asdict(estimate), "unit": unit})
    return pd.DataFrame(rows)


def _beyond(measure: Callable[[np.ndarray], float], known: list[np.ndarray], patients: np.ndarray) -> float:
    first, *others = (measure(arm[patients]) for arm in known)
    return first - sum(others)


def _check(train: LabelledVolumes, test: LabelledVolumes) -> np.ndarray:
    """Refuse what is too little; give the labels to test on."""
    if test.labels is None:
        raise ParameterError(f"{test.name}: has no labels; test on patients whose labels were given")
    for cohort in (train, test):
        for described, volumes in (
            ("patients", slice(None)),
            ("patients at end-diastole whose LVEDV is known", cohort.filled),
        ):
            if (found := len(np.unique(cohort.owners[volumes]))) < MIN_PATIENTS:
                raise ParameterError(f"{cohort.name}: {found} {described}; give at least {MIN_PATIENTS}")
    for value, name in ((0, "end-systole"), (1, "end-diastole")):
        if not (train.attributes[:, _ESED] == value).any():
            raise ParameterError(f"{train.name}: no volume at {name} (ESED = {value}) to train on; give both phases")
    return test.labels
