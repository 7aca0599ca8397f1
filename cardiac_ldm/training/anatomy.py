"""Train the segmenter and the phase classifier, on public labels only."""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Patients, require_public
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter

Network = TypeVar("Network", bound=nn.Module)


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn, scale, shift, recontrast and roughen each volume, in one draw per volume.

    Args:
        images: (b, 13, 96, 96) in [0, 1].
        labels: (b, 13, 96, 96), integers.
        generator: the source of all randomness.

    Returns:
        Images, still in [0, 1], and labels of the same shapes; what comes in from outside is zero.
    """

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)

    angle, scale = draw(-math.pi / 6, math.pi / 6), draw(0.85, 1.2)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    affine = torch.cat([cosine, -sine, draw(-0.15, 0.15), sine, cosine, draw(-0.15, 0.15)], dim=1)
    grid = functional.affine_grid(
        rearrange(affine, "b (i j) 1 1 -> b i j", i=2), list(images.shape), align_corners=False
    )
    images = functional.grid_sample(images, grid, align_corners=False)
    labels = functional.grid_sample(labels.float(), grid, mode="nearest", align_corners=False).long()
    images = images.clamp(0, 1) ** torch.exp(draw(-0.4, 0.4)) * draw(0.7, 1.2)
    blurred = functional.avg_pool2d(images, 3, stride=1, padding=1)
    images = torch.lerp(images, blurred, draw(0, 1))
    images = images + draw(0, 0.06) * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1), labels


def train_segmenter(
    patients: Patients, *, steps: int, batch: int, learning_rate: float, seed: int, progress: bool = True
) -> tuple[Segmenter, list[dict[str, float]]]:
    """Train a segmenter on `batch` volumes a step with Dice + cross-entropy; give it with its losses by step.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "the labels of private patients through the segmenter's weights")
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)

    def step(segmenter: nn.Module, volumes: np.ndarray, generator: torch.Generator) -> Tensor:
        images, labels = torch.from_numpy(patients.images(volumes)), torch.from_numpy(patients.labels(volumes))
        images, labels = augment(images, labels, generator)
        return loss(segmenter(images), rearrange(labels, "b d h w -> b 1 d h w"))

    every = np.arange(len(patients.owners))
    return _train(
        Segmenter, step, every, steps=steps, batch=batch, learning_rate=learning_rate, seed=seed, progress=progress
    )


def train_phase_classifier(
    patients: Patients, *, steps: int, batch: int, learning_rate: float, seed: int, progress: bool = True
) -> tuple[PhaseClassifier, list[dict[str, float]]]:
    """Train a phase classifier on `batch` volumes a step with cross-entropy; give it with its losses by step.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "the phases of private patients through the classifier's weights")
    phases = patients.attributes[:, ATTRIBUTE_NAMES.index("ESED")]

    def step(classifier: nn.Module, volumes: np.ndarray, generator: torch.Generator) -> Tensor:
        images = torch.from_numpy(patients.images(volumes))
        images, _ = augment(images, torch.zeros_like(images), generator)
        return functional.cross_entropy(classifier(images), torch.from_numpy(phases[volumes]).long())

    known = np.flatnonzero(np.isfinite(phases))
    return _train(
        PhaseClassifier,
        step,
        known,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
    )


def _train(
    build: type[Network],
    loss_of: Callable[[Network, np.ndarray, torch.Generator], Tensor],
    volumes: np.ndarray,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> tuple[Network, list[dict[str, float]]]:
    """Adam under a one-cycle learning rate, on random volumes without replacement within a step; all from the seed."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=max(steps, 2))
    losses = []
    bar = tqdm(range(steps), desc=build.__name__, unit="step", disable=not progress)
    for number in bar:
        loss = loss_of(network, np.sort(rng.choice(volumes, min(batch, len(volumes)), replace=False)), generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append({"step": number, "loss": loss.item()})
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval(), losses
