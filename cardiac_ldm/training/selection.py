"""Teach the public model again by the public patients who are most like the private ones, before it meets those.

One Gaussian measurement, which sees every private patient once, gives the mean of features of their latents. Public
patients get the chances that come nearest to it and leave uniform ones least, and the denoiser goes on learning from
them, all weights and with no further noise: that is computed from what was measured. Kin: Yu et al., arXiv 2305.13865,
who select by a private classifier, and Li et al., arXiv 2311.12850, by a private histogram of classes.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import logsumexp

from cardiac_ldm.cohort import Patients, require_public
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import is_first_process, wait_for_all
from cardiac_ldm.privacy import Mechanism, PrivatePlan, Randomness
from cardiac_ldm.privacy.accounting import LEAST, MOST, calibrate
from cardiac_ldm.privacy.dpsgd import gaussian
from cardiac_ldm.progress import tqdm
from cardiac_ldm.settings import Count, Positive, Settings
from cardiac_ldm.training.pretrain import Latents, PretrainSettings, pretrain

_CELLS, _ROWS, _NOISE = 4, 256, 1
_FLAT = 1e-3
"""Of latents' values: a feature that public patients have to within this tells nothing; empty slices have such."""
FILE = "selection.npz"
LEFT = (FILE, "selection.tmp", "selected.pt", "selected.tmp")
"""What a finished training no longer needs."""
STAGE, TUNED = "selection", "public patients"
"""How a ledger names the measurement, and what it decides on."""


class SelectionSettings(Settings):
    """How public patients are chosen, and how long they teach.

    share: the part of a training's epsilon that the measurement gets. doubt: how far chances may leave uniform ones:
    the prior variance, inverted, of the tilt along a feature of unit variance. steps, learning_rate: of the cycle.
    """

    share: float = Field(gt=0, le=0.9)
    doubt: Positive
    steps: Count
    learning_rate: Positive

    def mechanism(self, epsilon: float, delta: float, n_patients: int) -> Mechanism:
        """The measurement in a training of `epsilon`: one step whose batch is all places.

        Raises:
            ParameterError: the share is too little for any measurement.
        """
        if (own := self.share * epsilon) < LEAST:
            raise ParameterError(
                f"selection.share: {self.share} of epsilon {epsilon} is below {LEAST}; give more of either"
            )
        sigma = 0.0 if math.isinf(own) else calibrate(min(own, MOST), delta, 1.0, 1)
        everybody = {"sampling_rate": 1.0, "expected_batch": n_patients, "steps": 1, "clip": 1.0, "draws": 1}
        described = {"stage": STAGE, "tuned": TUNED, "noise_multiplier": sigma}
        return Mechanism.model_validate(described | everybody)


def features(patients: Patients, latents: np.ndarray | Latents) -> np.ndarray:
    """What patients look like, float64 (n_patients, c (35 + d)): the mean over their volumes, NaN where they have none.

    Of every latent channel: means and logarithms of standard deviations in 4 x 4 cells of the middle slices, means of
    every slice, and mean absolute differences of neighbours along each axis.

    Args:
        latents: (n_volumes, c, d, h, w) of the patients' volumes, and perhaps of others after them.
    """
    n, counts = int(patients.offsets[-1]), np.diff(patients.offsets)
    hide = n < _ROWS or patients.secret
    parts = range(0, max(n, 1), _ROWS)  # of nobody one too: it tells how many features there are
    found = [
        _of_volumes(np.asarray(latents[np.arange(at, min(at + _ROWS, n))], np.float64))
        for at in tqdm(parts, desc=f"features of {patients.name}", disable=hide)
    ]
    total = np.zeros((len(patients), found[0].shape[1]))
    np.add.at(total, patients.patient_index, np.concatenate(found))
    return np.divide(total, counts[:, None], out=np.full_like(total, np.nan), where=counts[:, None] > 0)


def _of_volumes(latents: np.ndarray) -> np.ndarray:
    n, c, depth, height, width = latents.shape
    rows, columns = (np.array_split(np.arange(size), min(_CELLS, size)) for size in (height, width))
    middle = latents[:, :, depth // 6 : depth - depth // 6]
    maps = middle.mean(axis=2), np.log(middle.std(axis=2) + 1e-3)
    cells = [part[:, :, r][..., k].mean(axis=(2, 3)) for part in maps for r in rows for k in columns]
    rough = [np.abs(np.diff(latents, axis=axis)).mean(axis=(2, 3, 4)) for axis in (2, 3, 4)]
    return np.concatenate([*cells, *rough, latents.mean(axis=(3, 4)).reshape(n, c * depth)], axis=1)


@dataclass(frozen=True)
class Selection:
    """Public patients to choose from, and how the denoiser learns from them.

    latents: (n_volumes, c, d, h, w) of their volumes, and perhaps of others after them. seed: of public training.
    """

    settings: SelectionSettings
    patients: Patients
    latents: np.ndarray | Latents
    pretraining: PretrainSettings
    seed: int

    def teach(
        self,
        model: Denoiser,
        patients: Patients,
        latents: np.ndarray | Latents,
        plan: PrivatePlan,
        randomness: Randomness,
        folder: Path,
    ) -> None:
        """Measure private patients, unless `folder` holds what was measured, and teach `model` by whom that chooses.

        Leaves `selection.npz` and `selected.pt` in `folder`, so that a killed training goes on. What was measured by
        one that was killed before it was written down is measured again: nobody has seen it.

        Raises:
            PrivacyError: those to choose from aren't public, the plan doesn't account for the measurement, or there are
                more private patients than places.
            ParameterError: `folder` holds what others chose, or by other settings.
        """
        require_public(self.patients, "what chooses among them")
        mechanism, path = _accounted(plan), folder / FILE
        if is_first_process() and not path.exists():
            own = f"{randomness.run}/{STAGE}/{plan.epsilon}/{self.settings.model_dump_json()}"
            randomness = Randomness(randomness.seed, simulated=randomness.simulated, run=own)
            chances = self._chances(patients, latents, mechanism, randomness)
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.savez(file, chances=chances, described=self._described(patients))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        wait_for_all()
        left = np.load(path)
        if str(left["described"]) != self._described(patients):
            raise ParameterError(f"{path}: was left by other patients or settings; give this run its own folder")
        chances = (left["chances"] / np.diff(self.patients.offsets))[self.patients.patient_index]
        given = self.patients, self.latents, model, self._cycle, self.seed
        pretrain(*given, folder / "selected.pt", chances)

    @property
    def _cycle(self) -> PretrainSettings:
        own = {"steps": self.settings.steps, "learning_rate": self.settings.learning_rate, "further": ()}
        return self.pretraining.model_copy(update=own)

    def _described(self, patients: Patients) -> str:
        """Tells this choice from others."""
        told = [patients.people, self.patients.people, self.settings, self._cycle, self.seed]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def _chances(
        self, patients: Patients, latents: np.ndarray | Latents, mechanism: Mechanism, randomness: Randomness
    ) -> np.ndarray:
        """Each public patient's, by one measurement of private ones."""
        public = features(self.patients, self.latents)
        centre, spread = public.mean(axis=0), public.std(axis=0)
        unit = np.where(spread > _FLAT, spread, np.inf)  # what public patients share can't tell them apart
        mean = measured((features(patients, latents) - centre) / unit, mechanism, randomness)
        noise = mechanism.noise_multiplier * math.sqrt(len(mean)) / mechanism.expected_batch
        return tilted((public - centre) / unit, mean, self.settings.doubt + noise**2)


def _accounted(plan: PrivatePlan) -> Mechanism:
    """The measurement that a plan accounts for: one, of everybody."""
    found = [mechanism for mechanism in plan.before if mechanism.stage == STAGE]
    terms = [(m.sampling_rate, m.steps, m.expected_batch) for m in found]
    if terms != [(1.0, 1, plan.n_patients)]:
        raise PrivacyError(f"{STAGE}: the plan doesn't account for it; make the plan by the recipe that has it")
    return found[0]


def measured(features: np.ndarray, mechanism: Mechanism, randomness: Randomness) -> np.ndarray:
    """The mean (f,) over all places of features (n, f), one row a patient, with the mechanism's noise.

    A row is scaled down to a norm of sqrt(f), where it's above; one that isn't finite counts as 0, which is the public
    mean, and so does an empty place.

    Raises:
        PrivacyError: there are more rows than places.
    """
    n, most = mechanism.expected_batch, math.sqrt(features.shape[1])
    if len(features) > n:
        raise PrivacyError(f"{STAGE}: more patients than the {n} places that the ledger accounts for; plan for them")
    with np.errstate(over="ignore"):
        rows = np.where(np.isfinite(np.linalg.norm(features, axis=1, keepdims=True)), features, 0.0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    total = (rows * np.minimum(1.0, most * (1 - 2**-20) / np.maximum(norms, 1e-12))).sum(axis=0)
    if mechanism.noise_multiplier:
        total += gaussian(len(total), most * mechanism.noise_multiplier, randomness.generator(0, _NOISE))
    return total / n


def tilted(features: np.ndarray, mean: np.ndarray, doubt: float) -> np.ndarray:
    """Chances (n,) of rows (n, f), proportional to exp(features @ t), whose mean comes near to `mean` (f,).

    t minimises log sum exp(features @ t) - mean @ t + doubt |t|^2 / 2: without doubt, the chances of the most entropy
    that have this mean (Csiszar's I-projection); with it, they stay nearer to uniform ones.
    """

    def loss(t: np.ndarray) -> tuple[float, np.ndarray]:
        scores = features @ t
        level = logsumexp(scores)
        gradient = np.exp(scores - level) @ features - mean + doubt * t
        return float(level - mean @ t + doubt * t @ t / 2), gradient

    found = minimize(loss, np.zeros(len(mean)), jac=True, method="L-BFGS-B")
    scores = features @ found.x
    return np.exp(scores - logsumexp(scores))
