"""Teach the public model again by the public patients who are most like the private ones, before it meets those.

One Gaussian measurement, which sees every private patient once, gives the mean of features of their latents. Public
patients get the chances that come nearest to it and leave uniform ones least, and the denoiser goes on learning from
them, all weights and with no further noise: that is computed from what was measured. Kin: Yu et al., arXiv 2305.13865,
who select by a private classifier, and Li et al., arXiv 2311.12850, by a private histogram of classes.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import logsumexp

from cardiac_ldm.cohort import Patients, require_public
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import is_first_process, wait_for_all
from cardiac_ldm.privacy import Mechanism, PrivatePlan, Randomness
from cardiac_ldm.privacy.accounting import calibrate
from cardiac_ldm.privacy.dpsgd import gaussian
from cardiac_ldm.progress import tqdm
from cardiac_ldm.settings import Count, Positive, Settings
from cardiac_ldm.training.pretrain import Latents, PretrainSettings, pretrain

_CELLS, _ROWS = 4, 256
_NOISE = 1
STAGE, TUNED = "selection", "public patients"
"""How a ledger names the measurement, and what it decides on."""


class SelectionSettings(Settings):
    """How public patients are chosen, and how long they teach.

    share: the part of a training's epsilon that the measurement gets. doubt: how far chances may leave uniform ones:
    the prior variance, inverted, of the tilt along a feature of unit variance. steps, learning_rate: of the cycle.
    """

    share: float = Field(gt=0, lt=1)
    doubt: Positive
    steps: Count
    learning_rate: Positive

    def mechanism(self, epsilon: float, delta: float, n_patients: int) -> Mechanism:
        """The measurement in a training of `epsilon`: one step whose batch is all places.

        Raises:
            ParameterError: no noise suffices for so little.
        """
        sigma = 0.0 if math.isinf(epsilon) else calibrate(self.share * epsilon, delta, 1.0, 1)
        everybody = {"sampling_rate": 1.0, "expected_batch": n_patients, "steps": 1, "clip": 1.0, "draws": 1}
        described = {"stage": STAGE, "tuned": TUNED, "noise_multiplier": sigma}
        return Mechanism.model_validate(described | everybody)


def features(patients: Patients, latents: np.ndarray | Latents) -> np.ndarray:
    """What patients look like, float64 (n_patients, c (35 + d)): the mean over their volumes.

    Of every latent channel: means and logarithms of standard deviations in 4 x 4 cells of the middle slices, means of
    every slice, and mean absolute differences of neighbours along each axis.

    Args:
        latents: (n_volumes, c, d, h, w) of the patients' volumes, and perhaps of others after them.
    """
    found, offsets = [], patients.offsets
    n = int(offsets[-1])
    for at in tqdm(range(0, n, _ROWS), desc=f"features of {patients.name}", disable=n < _ROWS or patients.secret):
        found.append(_of_volumes(np.asarray(latents[np.arange(at, min(at + _ROWS, n))], np.float64)))
    each, total = np.concatenate(found), np.zeros((len(patients), found[0].shape[1]))
    np.add.at(total, patients.patient_index, each)
    return total / np.maximum(np.diff(offsets), 1)[:, None]


def _of_volumes(latents: np.ndarray) -> np.ndarray:
    n, c, depth, height, width = latents.shape
    rows, columns = (np.array_split(np.arange(size), min(_CELLS, size)) for size in (height, width))
    middle = latents[:, :, depth // 6 : depth - depth // 6]
    spread = np.log(middle.std(axis=2) + 1e-3)
    cells = [
        part[:, :, r][..., k].mean(axis=(2, 3)) for part in (middle.mean(axis=2), spread) for r in rows for k in columns
    ]
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

        Leaves `selection.npy` and `selected.pt` in `folder`: a killed training goes on, nobody is measured twice.

        Raises:
            PrivacyError: those to choose from aren't public, the plan doesn't account for the measurement, or there are
                more private patients than places.
        """
        require_public(self.patients, "what chooses among them")
        if not (accounted := [mechanism for mechanism in plan.before if mechanism.stage == STAGE]):
            raise PrivacyError("selection: the plan doesn't account for it; make the plan by the recipe that has it")
        mechanism, own = accounted[-1], f"{randomness.run}/{STAGE}/{plan.epsilon}/{self.settings.model_dump_json()}"
        randomness = Randomness(randomness.seed, simulated=randomness.simulated, run=own)
        path, public = folder / "selection.npy", features(self.patients, self.latents)
        centre, spread = public.mean(axis=0), public.std(axis=0) + 1e-6
        if is_first_process() and not path.exists():
            private = (features(patients, latents) - centre) / spread
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, measured(private, mechanism, randomness))
                os.fsync(file.fileno())
            temporary.replace(path)
        wait_for_all()
        noise = mechanism.noise_multiplier * math.sqrt(public.shape[1]) / mechanism.expected_batch
        chances = tilted((public - centre) / spread, np.load(path), self.settings.doubt + noise**2)
        cycle = {"steps": self.settings.steps, "learning_rate": self.settings.learning_rate, "further": ()}
        volumes = (chances / np.diff(self.patients.offsets))[self.patients.patient_index]
        given = self.patients, self.latents, model, self.pretraining.model_copy(update=cycle), self.seed
        pretrain(*given, folder / "selected.pt", volumes)


def measured(features: np.ndarray, mechanism: Mechanism, randomness: Randomness) -> np.ndarray:
    """The mean (f,) over all places of features (n, f), one row a patient, with the mechanism's noise.

    A row is scaled down to a norm of sqrt(f), where it's above. An empty place has the public mean, 0.

    Raises:
        PrivacyError: there are more rows than places.
    """
    n, most = mechanism.expected_batch, math.sqrt(features.shape[1])
    if len(features) > n:
        raise PrivacyError(f"selection: {len(features)} patients, but the ledger accounts for {n} places")
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
