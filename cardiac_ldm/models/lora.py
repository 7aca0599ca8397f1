"""Low-rank adaptation (Hu et al., arXiv 2106.09685): train W + U D with U, D of rank r instead of a weight W."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """What is added to a weight of shape (out, ...): up (out, r) times down (r, rest), 0 at the start."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        inputs = weight[0].numel()
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.down = nn.Parameter((torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, of the shape of `weight`."""
        return weight + (self.up @ self.down).view_as(weight)


def add_lora(modules: Sequence[nn.Linear | nn.Conv2d | nn.Conv3d], rank: int) -> None:
    """Adapt the weight of each of these linear or convolutional layers; their own weights freeze.

    The start is always the same: processes that train together, and a run that goes on, must agree on it.
    """
    generator = torch.Generator().manual_seed(rank)
    for module in modules:
        weight = module.weight.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", LowRank(weight, rank, generator))


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold every adaptation into its weight: the model has its own architecture again."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model
