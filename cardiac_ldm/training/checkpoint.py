"""What training leaves on disk: weights as safetensors, and the state from which a killed run goes on. All atomic."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.device import compute_device


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights and buffers as safetensors, synced before they replace others."""
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Read weights into `module`, and take it to the device that computes.

    Raises:
        ParameterError: the file belongs to another architecture.
    """
    module.to(compute_device())
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ParameterError(
            f"{path}: these weights are of another network than the settings describe: {error}"
        ) from error


def save_state(path: Path, **state: object) -> None:
    """Write a training state (tensors, numbers, nested dicts and lists), synced before it replaces the last one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The last training state, or None where there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def update_average(average: Mapping[str, Tensor], now: Mapping[str, Tensor], step: int, decay: float) -> None:
    """Move an exponential moving average of weights, in place; young averages forget faster, (1 + t) / (10 + t)."""
    keep = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, tensor in average.items():
            tensor.lerp_(now[name], 1 - keep)
