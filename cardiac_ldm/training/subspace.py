"""Tune a denoiser privately along few directions, which public patients' own gradients span.

Noise is added to every number that is tuned, so its length grows with the root of how many there are; much of what a
new population has to teach lies where public patients differ among themselves. Kin: Yu et al., arXiv 2102.12677, and
Zhou et al., arXiv 2007.03813, whose directions are of classifiers and follow the training; AdaDPS (Li et al.,
arXiv 2202.05963) scales by public gradients. Here directions are taken once, of the public model, from public patients.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from cardiac_ldm.cohort import Patients, require_public
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import compute_device, device_of
from cardiac_ldm.models.diffusion import TIMESTEPS
from cardiac_ldm.progress import tqdm
from cardiac_ldm.settings import Count, Settings

_ROWS = 16
"""So many volumes at a time; their number and order are the same on every device."""
_COLUMNS = 2**16
MOMENTUM = 0.9
"""Of gradient descent on z."""
_NOISE, _SIGNAL = 0.137, 2.7
"""Of a step in the rehearsals that chose the step size: the noise, in clipping norms, and the signal over it."""


class SubspaceSettings(Settings):
    """Directions that the gradients of public patients span.

    dimensions: k. patients: how many give a gradient each, the mean over `draws` timesteps and noises that all share,
    so that gradients differ as patients do. power: coordinates are scaled by the variance of public gradients to
    -power; 0 leaves the steepest directions, which move the loss least.
    """

    dimensions: Count
    patients: Count
    draws: Count
    power: float = Field(ge=0, le=1)


class Directions(nn.Module):
    """Directions float16 (k, d) in the space of a model's d weights: z (k,) moves the weights by z @ directions."""

    directions: Tensor

    def __init__(self, dimensions: int, weights: int) -> None:
        super().__init__()
        self.register_buffer("directions", torch.empty(dimensions, weights, dtype=torch.float16))


def restraint(noise: float) -> float:
    """The part of the rehearsed step size that suits steps with more noise: few patients, or a small budget.

    Of a sum whose signal stands S over its noise, shrinking does best to keep S² / (1 + S²). It's public: a plan says
    how much noise there is.

    Args:
        noise: the length of a step's noise in clipping norms, σ √k / B.
    """
    signal = _SIGNAL * min(1.0, _NOISE / noise) if noise else _SIGNAL
    return (signal**2 / (1 + signal**2)) / (_SIGNAL**2 / (1 + _SIGNAL**2))


def public_directions(
    model: Denoiser, patients: Patients, latents: np.ndarray, settings: SubspaceSettings
) -> tuple[Directions, np.ndarray]:
    """The principal directions of public patients' gradients, scaled, and the variance (k,) along each.

    With G the centred gradients of unit length and S a diagonal of mean square 1, they are B S where B are the leading
    right singular vectors of G S.

    Args:
        latents: (n_volumes, c, d, h, w) of the patients' volumes.

    Raises:
        PrivacyError: the patients are private.
        ParameterError: there are too few patients for so many directions.
    """
    require_public(patients, "directions of private patients' gradients, which have no noise")
    n, k = min(settings.patients, len(patients)), settings.dimensions
    if n <= k:
        raise ParameterError(f"subspace.dimensions: {k} directions need more than {n} public patients; give fewer")
    model.to(compute_device()).requires_grad_(True)
    weights = list(model.parameters())
    gradients = torch.empty(n, sum(weight.numel() for weight in weights))
    attributes = torch.from_numpy(patients.attributes)
    for patient in tqdm(range(n), desc="public gradients", unit="patient"):
        own = slice(*patients.offsets[patient : patient + 2].tolist())
        loss = _common_loss(model, torch.from_numpy(latents[own]), attributes[own], settings.draws)
        gradients[patient] = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]).cpu()
    gradients -= gradients.mean(dim=0)
    gradients /= gradients.norm(dim=1, keepdim=True)
    scale = (gradients.square().mean(dim=0) + 1e-3 * gradients.square().mean()) ** -settings.power
    scale /= scale.square().mean().sqrt()
    for columns in range(0, gradients.shape[1], _COLUMNS):  # in place: they are the largest thing in memory
        gradients[:, columns : columns + _COLUMNS] *= scale[columns : columns + _COLUMNS]
    values, vectors = torch.linalg.eigh((gradients @ gradients.T).double())
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    found = Directions(k, gradients.shape[1])
    found.directions.copy_(((vectors / values.sqrt()).T.float() @ gradients).mul_(scale))
    return found, (values / n).numpy()


def _common_loss(model: Denoiser, latents: Tensor, attributes: Tensor, draws: int) -> Tensor:
    """A patient's mean loss over timesteps spread evenly, with a noise each that is the same for every patient."""
    losses, device = [], device_of(model)
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        noise = torch.randn(latents.shape[1:], generator=generator).expand_as(latents)
        steps = torch.full((len(latents),), int((draw + 0.5) * TIMESTEPS / draws))
        losses.append([latents, attributes, steps, noise])
    rows = [torch.cat(part).split(_ROWS) for part in zip(*losses, strict=True)]
    found = [model.loss(*(part.to(device) for part in given)) for given in zip(*rows, strict=True)]
    return torch.cat(found).mean()


@dataclass
class SubspaceLoss:
    """Patients' gradients along directions, of a model whose weights are start + z @ directions.

    full: gives gradients, float32 (n, d) of some patients at a time, with respect to all weights of `model`.
    """

    model: Denoiser
    directions: Tensor
    full: Callable[[Sequence[int], Callable[[int], torch.Generator]], Iterator[Tensor]]

    def __post_init__(self) -> None:
        device = device_of(self.model)
        self.directions = self.directions.to(device, torch.float32)
        self.start = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.z = nn.Parameter(torch.zeros(len(self.directions), device=device))

    @torch.no_grad()
    def move(self) -> None:
        """Give the model the weights that belong to z."""
        nn.utils.vector_to_parameters(self.start + self.z @ self.directions, self.model.parameters())

    def alone(self, unit: int, generator: torch.Generator) -> Tensor | None:
        """A scalar that has a unit's gradient with respect to z; None of an empty place."""
        own = next(iter(self.gradients([unit], lambda _: generator)), None)
        return None if own is None else own[0] @ self.z

    def gradients(self, units: Sequence[int], draws: Callable[[int], torch.Generator]) -> Iterator[Tensor]:
        """Unclipped gradients with respect to z, float32 (n, k) of some patients at a time."""
        self.move()
        for gradients in self.full(units, draws):
            yield gradients @ self.directions.T
