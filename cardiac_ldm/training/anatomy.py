"""Train the segmenter and the phase classifier, on public labels only."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Patients, require_labelled, require_public
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter
from cardiac_ldm.models.device import compute_device, own_share
from cardiac_ldm.training.fit import Loss, Recipe, fit

Network = TypeVar("Network", bound=nn.Module)


def augment(images: Tensor, labels: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Turn, scale, shift, shade, recontrast and roughen each volume in one draw, and brighten each of its slices.

    Args:
        images: (b, 13, 96, 96) in [0, 1].
        labels: (b, 13, 96, 96), integers, or None.
        generator: the source of all randomness.

    Returns:
        Images, still in [0, 1], and labels of the same shapes; what comes in from outside is zero.
    """

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)

    angle, scale = draw(-math.pi / 6, math.pi / 6), draw(0.85, 1.2)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    affine = torch.cat([cosine, -sine, draw(-0.15, 0.15), sine, cosine, draw(-0.15, 0.15)], dim=1)
    grid = functional.affine_grid(
        rearrange(affine, "b (i j) 1 1 -> b i j", i=2), list(images.shape), align_corners=False
    )
    images = functional.grid_sample(images, grid, align_corners=False)
    if labels is not None:
        labels = functional.grid_sample(labels.float(), grid, mode="nearest", align_corners=False).long()
    across = torch.linspace(-0.5, 0.5, images.shape[-1], device=images.device)
    shade = draw(-0.8, 0.8) * across + draw(-0.8, 0.8) * across[:, None]
    gains = 0.15 * torch.randn(*images.shape[:2], 1, 1, generator=generator).to(images.device)
    images = images.clamp(0, 1) ** torch.exp(draw(-0.4, 0.4)) * draw(0.7, 1.2) * torch.exp(shade + gains)
    blurred = functional.avg_pool2d(images, 3, stride=1, padding=1)
    images = torch.lerp(images, blurred, draw(0, 1))
    images = images + draw(0, 0.06) * torch.randn(images.shape, generator=generator).to(images.device)
    return images.clamp(0, 1), labels


def train_segmenter(
    patients: Patients, *, steps: int, batch: int, learning_rate: float, seed: int, state: Path | None = None
) -> tuple[Segmenter, list[dict[str, float]]]:
    """Train a segmenter on `batch` volumes a step with Dice + cross-entropy; give it with its losses by step.

    Patients whose labels were predicted are left out. Resumes from `state`, if it's given.

    Raises:
        PrivacyError: the patients are private.
        CohortError: none of them has labels.
    """
    require_public(patients, "the labels of private patients through the segmenter's weights")
    patients = require_labelled(patients, "training a segmenter")
    volumes = np.arange(len(patients.patient_index))
    images, labels = _read_images(patients, volumes), torch.from_numpy(patients.labels(volumes))
    return fit_segmenter(images, labels, steps=steps, batch=batch, learning_rate=learning_rate, seed=seed, state=state)


def fit_segmenter(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    **training: Any,  # noqa: ANN401
) -> tuple[Segmenter, list[dict[str, float]]]:
    """The same from images and labels (n, 13, 96, 96); guards nobody."""
    dice, device = DiceCELoss(to_onehot_y=True, softmax=True, batch=True), compute_device()

    def loss(segmenter: Segmenter, rows: Tensor, generator: torch.Generator) -> Tensor:
        drawn, truth = augment(images[rows].to(device).float(), labels[rows].to(device), generator)
        own = own_share(len(rows))
        assert truth is not None
        return dice(segmenter(drawn[own]), rearrange(truth, "b d h w -> b 1 d h w")[own])

    return _train(_seeded(Segmenter, seed), loss, len(images), seed=seed, **training)


def train_phase_classifier(
    patients: Patients, *, steps: int, batch: int, learning_rate: float, seed: int, state: Path | None = None
) -> tuple[PhaseClassifier, list[dict[str, float]]]:
    """Train a phase classifier on `batch` volumes a step with cross-entropy; give it with its losses by step.

    Volumes of unknown phase are left out. Resumes from `state`, if it's given.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "the phases of private patients through the classifier's weights")
    esed = patients.attributes[:, ATTRIBUTE_NAMES.index("ESED")]
    volumes = np.flatnonzero(np.isfinite(esed))
    images, phases = _read_images(patients, volumes), torch.from_numpy(esed[volumes])
    given: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "state": state,
    }
    return fit_phase_classifier(images, phases, **given)


def fit_phase_classifier(
    images: Tensor,
    phases: Tensor,
    *,
    seed: int,
    **training: Any,  # noqa: ANN401
) -> tuple[PhaseClassifier, list[dict[str, float]]]:
    """The same from images (n, 13, 96, 96) and phases (n,); guards nobody."""
    device = compute_device()

    def loss(classifier: PhaseClassifier, rows: Tensor, generator: torch.Generator) -> Tensor:
        drawn, _ = augment(images[rows].to(device).float(), None, generator)
        own = own_share(len(rows))
        return functional.cross_entropy(classifier(drawn[own]), phases[rows][own].long().to(device))

    return _train(_seeded(PhaseClassifier, seed), loss, len(images), seed=seed, **training)


def _read_images(patients: Patients, volumes: np.ndarray) -> Tensor:
    """All images at once, in half precision: a few at random from the store take longer to read than to learn from."""
    return torch.from_numpy(patients.images(volumes).astype(np.float16))


def _seeded(build: type[Network], seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _train(
    network: Network,
    loss_of: Callable[[Network, Tensor, torch.Generator], Tensor],
    n_volumes: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    state: Path | None = None,
) -> tuple[Network, list[dict[str, float]]]:
    """AdamW; a step's volumes are all different, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Loss:
        return Loss({"loss": loss_of(network, torch.randperm(n_volumes, generator=generator)[:batch], generator)})

    recipe = Recipe(steps, learning_rate, torch.optim.AdamW, warm_up=0.3, clip=None)
    name = type(network).__name__
    return network, fit(network, loss, recipe, name, generator=generator, state=state)
