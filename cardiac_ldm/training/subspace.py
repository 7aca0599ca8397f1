"""Tune a denoiser privately along directions that public patients' own gradients span.

Noise is added to every number that is tuned, so its length grows with the root of how many there are; much of what a
new population has to teach lies where public patients differ among themselves. Kin: Yu et al., arXiv 2102.12677, and
Zhou et al., arXiv 2007.03813, whose directions are of classifiers and follow the training; AdaDPS (Li et al.,
arXiv 2202.05963) scales by public gradients. Here directions are taken once, of the public model, from public patients.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from threading import Lock

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
_NULL = 1e-6
"""Of the largest variance of a block: below it lies what rounding leaves of none."""
MOMENTUM = 0.9
"""Of gradient descent on z."""
_REHEARSED = {False: (0.137, 2.7), True: (0.262, 3.1)}
"""Of a step in the rehearsals that chose the step size: the noise, in clipping norms, and the signal over it; of
directions of the whole network, and of each weight tensor's own."""


class SubspaceSettings(Settings):
    """Directions that the gradients of public patients span.

    dimensions: k. patients: how many give a gradient each, the mean over `draws` timesteps and noises that all share,
    so that gradients differ as patients do. power: coordinates are scaled by the variance of public gradients to
    -power; 0 leaves the steepest directions, which move the loss least. apart: every weight tensor has directions of
    its own, k in all, those of the largest variance: as many patients then give far more.
    """

    dimensions: Count
    patients: Count
    draws: Count
    power: float = Field(ge=0, le=1)
    apart: bool = Field(default=False, exclude_if=lambda apart: not apart)


class Directions(nn.Module):
    """Directions in the space of a model's d weights end to end, float16 (k_b, d_b) for every block b of them.

    sizes: (k_b, d_b) of each. z (k,), block by block too, moves the weights by `moves(z)`.
    """

    def __init__(self, sizes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.sizes = [(k, d) for k, d in sizes]
        for number, size in enumerate(self.sizes):
            self.register_buffer(f"block{number}", torch.empty(size, dtype=torch.float16))

    def __len__(self) -> int:
        return sum(k for k, _ in self.sizes)

    def along(self, gradients: Tensor) -> Tensor:
        """Gradients with respect to z, float32 (n, k), from those with respect to the weights (n, d)."""
        parts = gradients.split([d for _, d in self.sizes], dim=1)
        return torch.cat([part @ block.T for part, block in zip(parts, self.buffers(), strict=True)], dim=1)

    def moves(self, z: Tensor) -> Tensor:
        """By how much z (k,) moves the weights, (d,)."""
        parts = z.split([k for k, _ in self.sizes])
        return torch.cat([part @ block for part, block in zip(parts, self.buffers(), strict=True)])


def restraint(noise: float, apart: bool = False) -> float:
    """The part of the rehearsed step size that suits steps with more noise: few patients, or a small budget.

    Of a sum whose signal stands S over its noise, shrinking does best to keep S² / (1 + S²). It's public: a plan says
    how much noise there is.

    Args:
        noise: the length of a step's noise in clipping norms, σ √k / B.
        apart: whether every weight tensor has directions of its own.
    """
    rehearsed, most = _REHEARSED[apart]
    signal = most * min(1.0, rehearsed / noise) if noise else most
    return (signal**2 / (1 + signal**2)) / (most**2 / (1 + most**2))


def public_directions(
    model: Denoiser, patients: Patients, latents: np.ndarray, settings: SubspaceSettings
) -> tuple[Directions, np.ndarray]:
    """The principal directions of public patients' gradients, scaled, and the variance (k,) along each.

    With G the centred gradients of unit length and S a diagonal of mean square 1, they are B S where B are the leading
    right singular vectors of G S, or of each weight tensor's columns of it.

    Args:
        latents: (n_volumes, c, d, h, w) of the patients' volumes.

    Raises:
        PrivacyError: the patients are private.
        ParameterError: there are too few patients for so many directions, or their gradients span fewer.
    """
    require_public(patients, "directions of private patients' gradients, which have no noise")
    n, k = min(settings.patients, len(patients)), settings.dimensions
    model.to(compute_device()).requires_grad_(True)
    weights = list(model.parameters())
    sizes = [weight.numel() for weight in weights]
    widths = sizes if settings.apart else [sum(sizes)]
    if k > sum(min(n - 1, width) for width in widths):
        raise ParameterError(f"subspace.dimensions: {k} directions need more than {n} public patients; give fewer")
    gradients = torch.empty(n, sum(sizes))
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
    parts, scales = gradients.split(widths, dim=1), scale.split(widths)
    values, vectors = zip(*(torch.linalg.eigh((part @ part.T).double()) for part in parts), strict=True)
    spanned = torch.cat([own.where(own > _NULL * own.max(), 0.0) for own in values])
    if k > (rank := int((spanned > 0).sum())):
        raise ParameterError(
            f"subspace.dimensions: gradients of {n} public patients span {rank} directions, fewer than {k}; give fewer"
        )
    most = torch.zeros(len(spanned), dtype=torch.bool)
    most[spanned.topk(k).indices] = True
    kept = [chosen.nonzero().flatten().flip(0) for chosen in most.split([len(own) for own in values])]
    found = Directions([(len(own), width) for own, width in zip(kept, widths, strict=True)])
    for block, own, value, vector, part, of_part in zip(
        found.buffers(), kept, values, vectors, parts, scales, strict=True
    ):
        block.copy_(((vector[:, own] / value[own].sqrt()).T.float() @ part).mul_(of_part))
    variance = torch.cat([value[own] for value, own in zip(values, kept, strict=True)]) / n
    return found, variance.numpy()


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
    """Patients' gradients along directions, of a model whose weights are start + directions.moves(z).

    full: gives gradients, float32 (n, d) of some patients at a time, with respect to all weights of `model`.
    """

    model: Denoiser
    directions: Directions
    full: Callable[[Sequence[int], Callable[[int], torch.Generator]], Iterator[Tensor]]

    def __post_init__(self) -> None:
        device = device_of(self.model)
        self.directions = deepcopy(self.directions).to(device, torch.float32)
        self.start = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.z = nn.Parameter(torch.zeros(len(self.directions), device=device))
        self._at, self._lock = torch.full_like(self.z, torch.nan), Lock()

    @property
    def digest(self) -> str:
        """Tells these directions from others: z means nothing along those."""
        told = hashlib.sha256()
        for block in self.directions.buffers():
            told.update(block.half().cpu().numpy().tobytes())
        return told.hexdigest()

    @torch.no_grad()
    def move(self) -> None:
        """Give the model the weights that belong to z, unless it has them: other threads may be reading them."""
        with self._lock:
            if not torch.equal(self._at, self.z):
                nn.utils.vector_to_parameters(self.start + self.directions.moves(self.z), self.model.parameters())
                self._at = self.z.detach().clone()

    def alone(self, unit: int, generator: torch.Generator) -> Tensor | None:
        """A scalar that has a unit's gradient with respect to z; None of an empty place."""
        own = next(iter(self.gradients([unit], lambda _: generator)), None)
        return None if own is None else own[0] @ self.z

    def gradients(self, units: Sequence[int], draws: Callable[[int], torch.Generator]) -> Iterator[Tensor]:
        """Unclipped gradients with respect to z, float32 (n, k) of some patients at a time."""
        self.move()
        for gradients in self.full(units, draws):
            yield self.directions.along(gradients)
