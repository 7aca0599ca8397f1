"""What volumes are worth as training data: train on them, test on real patients (Esteban et al., arXiv 1706.02633).

Which volumes those are, a training set of the comparison, is the caller's: synthetic, real, or both together.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Patients, Volumes, require_labelled
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.control import STRUCTURES, volume_dice
from cardiac_ldm.evaluation.features import volume_features
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS, bootstrap
from cardiac_ldm.models.anatomy import PhaseClassifier
from cardiac_ldm.models.device import device_of
from cardiac_ldm.settings import TrainingSettings
from cardiac_ldm.training.anatomy import fit_phase_classifier, fit_segmenter

_BATCH = 8
_ESED, _LVEDV = (ATTRIBUTE_NAMES.index(name) for name in ("ESED", "LVEDV"))
_PURPOSE = "a measure of utility"
PENALTIES = np.logspace(-4, 4, 17)
"""Of the ridge regression, as multiples of the number of features."""


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


def labelled_volumes(patients: Patients) -> Volumes:
    """All volumes of the patients whose labels were given, to train or to test on.

    Raises:
        PrivacyError: they are private and not simulated.
        CohortError: none of them has labels.
    """
    leak = "labels and images of private patients through what is trained and tested on them"
    return Volumes.of(patients, leak, labelled_for=_PURPOSE)


def training_patients(patients: Patients, n_patients: int, seed: int) -> Patients:
    """As many of the patients whose labels were given, drawn by the seed. Raises CohortError where there are none."""
    patients = require_labelled(patients, _PURPOSE)
    return patients.subset(np.random.default_rng(seed).permutation(len(patients)))[:n_patients]


def utility(
    training_sets: Sequence[Volumes],
    test: Volumes,
    *,
    segmenter: TrainingSettings,
    phase: TrainingSettings,
    resamples: int,
    seed: int,
) -> list[Utility]:
    """Train a segmenter, a phase classifier and a regression of LVEDV on each cohort, test them on another's patients.

    Intervals (95 %, bootstrap) are over test patients: another training set or seed would move the values further. Give
    budgets at which more real patients serve better than fewer; shorter ones measure the training, not the data. Dice
    is NaN where the volumes to train on have no labels.

    Raises:
        ParameterError: fewer than 8 test patients, or fewer than 8 of a cohort at end-diastole with a known LVEDV, or
            no volume to train on at one of the phases, or no labels to test on.
    """
    if test.labels is None:
        raise ParameterError(f"{test.name}: has no labels; test on patients whose labels were given")
    for cohort in (*training_sets, test):
        _check(cohort)
    phased, filled, seen = _phased(test), _filled(test), _features(test)
    found = []
    for train in training_sets:
        _check_phases(train)
        dice = pd.DataFrame(np.nan, index=np.unique(test.patient_index), columns=list(STRUCTURES))
        if train.labels is not None:
            pairs = torch.from_numpy(train.images), torch.from_numpy(train.labels)
            predicted, _ = fit_segmenter(*pairs, **segmenter.model_dump(), seed=seed)
            dice = volume_dice(predicted, test.images, test.labels).groupby(test.patient_index).mean()
        known = _phased(train)
        pairs = torch.from_numpy(train.images[known]), torch.from_numpy(train.attributes[known, _ESED])
        classifier, _ = fit_phase_classifier(*pairs, **phase.model_dump(), seed=seed)
        right = _phases(classifier, test.images[phased]) == test.attributes[phased, _ESED]
        volumes = ridge(_features(train), train.attributes[_filled(train), _LVEDV])(seen)
        regressed = pd.DataFrame({"LVEDV": test.attributes[filled, _LVEDV], "predicted LVEDV": volumes})
        phases = pd.Series(right, name="phase").groupby(test.patient_index[phased]).mean()
        outcomes = dice.add_prefix("Dice ").join(phases)
        outcomes = outcomes.join(regressed.groupby(test.patient_index[filled]).mean())
        found.append(Utility(train.name, outcomes, _rows([outcomes], resamples, seed)))
    return found


def compare_training_sets(first: Utility, second: Utility, *, resamples: int, seed: int) -> pd.DataFrame:
    """What one training set reaches beyond another, on the same resampled test patients: rows as in `Utility.rows`.

    Raises:
        ParameterError: they weren't tested on the same patients.
    """
    if not (first.outcomes.index.equals(second.outcomes.index) and first.outcomes.LVEDV.equals(second.outcomes.LVEDV)):
        raise ParameterError(f"{second.name}: wasn't tested on the patients of {first.name}; test both on the same")
    return _rows([first.outcomes, second.outcomes], resamples, seed)


def tabulate_training_sets(
    training_sets: Sequence[Utility], baselines: Sequence[Utility], *, resamples: int, seed: int
) -> pd.DataFrame:
    """What every training set reaches (`against` is ""), and what it reaches beyond each of the other baselines.

    Returns:
        Columns training_set, against, and those of `Utility.rows`.

    Raises:
        ParameterError: as `compare_training_sets`.
    """
    parts = [training_set.rows.assign(training_set=training_set.name, against="") for training_set in training_sets]
    for training_set, other in product(training_sets, baselines):
        if training_set.name != other.name:
            beyond = compare_training_sets(training_set, other, resamples=resamples, seed=seed)
            parts.append(beyond.assign(training_set=training_set.name, against=other.name))
    return pd.concat(parts, ignore_index=True)


def ridge(features: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit standardised features (n, d) to targets (n,); give what predicts (m,) from (m, d).

    Of `PENALTIES`, the one of least squared error with one left out (Allen, Technometrics 16:125, 1974).
    """
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=features.shape[1] * PENALTIES))
    model.fit(features.astype(np.float64), targets.astype(np.float64))
    return lambda some: model.predict(some.astype(np.float64))


def _phased(volumes: Volumes) -> np.ndarray:
    """int64: the volumes of known phase."""
    return np.flatnonzero(np.isfinite(volumes.attributes[:, _ESED]))


def _filled(volumes: Volumes) -> np.ndarray:
    """int64: the end-diastolic volumes of known LVEDV."""
    return np.flatnonzero((volumes.attributes[:, _ESED] == 1) & np.isfinite(volumes.attributes[:, _LVEDV]))


def _features(volumes: Volumes) -> np.ndarray:
    """float32 (`_filled`, 1280): EfficientNet's, frozen, averaged over slices 3..9."""
    return volume_features(volumes.images[_filled(volumes)])


@torch.no_grad()
def _phases(classifier: PhaseClassifier, images: np.ndarray) -> np.ndarray:
    """int64 (n,): 0 end-systole, 1 end-diastole."""
    batches = torch.from_numpy(images).to(device_of(classifier)).split(_BATCH)
    return torch.cat([classifier(some).argmax(dim=1) for some in batches]).cpu().numpy()


def _r_squared(known: np.ndarray) -> float:
    truth, predicted = known.T
    spread = np.square(truth - truth.mean()).sum()
    return float(1 - np.square(truth - predicted).sum() / spread) if spread > 0 else float("nan")


_MEASURES: dict[tuple[str, str | None, str], tuple[list[str], Callable[[np.ndarray], float]]] = {
    **{("Dice", name, ""): ([f"Dice {name}"], lambda known: float(known.mean())) for name in STRUCTURES},
    ("phase accuracy", None, ""): (["phase"], lambda known: float(known.mean())),
    ("R2", "LVEDV", ""): (["LVEDV", "predicted LVEDV"], _r_squared),
    ("mean absolute error", "LVEDV", "mL"): (
        ["LVEDV", "predicted LVEDV"],
        lambda known: float(np.abs(known[:, 0] - known[:, 1]).mean()),
    ),
}
"""Metric, attribute or structure, and unit; the columns of `Utility.outcomes` it takes, and how."""


def _rows(training_sets: list[pd.DataFrame], resamples: int, seed: int) -> pd.DataFrame:
    """Every measure of one training set, or the first's minus the second's; of patients in whom it's known in both."""
    rows = []
    for (metric, attribute, unit), (columns, measure) in _MEASURES.items():
        paired = pd.concat([training_set[columns] for training_set in training_sets], axis=1).dropna()
        known = np.split(paired.to_numpy(np.float64), len(training_sets), axis=1)
        estimate = bootstrap(partial(_beyond, measure, known), len(known[0]), resamples=resamples, seed=seed)
        rows.append({"metric": metric, "attribute": attribute, **asdict(estimate), "unit": unit})
    return pd.DataFrame(rows)


def _beyond(measure: Callable[[np.ndarray], float], known: list[np.ndarray], patients: np.ndarray) -> float:
    first, *others = (measure(training_set[patients]) for training_set in known)
    return first - sum(others)


def _check(cohort: Volumes) -> None:
    for described, volumes in (
        ("patients", slice(None)),
        ("patients at end-diastole whose LVEDV is known", _filled(cohort)),
    ):
        if (found := len(np.unique(cohort.patient_index[volumes]))) < MIN_PATIENTS:
            raise ParameterError(f"{cohort.name}: {found} {described}; give at least {MIN_PATIENTS}")


def _check_phases(train: Volumes) -> None:
    for value, name in ((0, "end-systole"), (1, "end-diastole")):
        if not (train.attributes[:, _ESED] == value).any():
            raise ParameterError(f"{train.name}: no volume at {name} (ESED = {value}) to train on; give both phases")
